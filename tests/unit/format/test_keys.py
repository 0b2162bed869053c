"""Keys: derived as docs/format.md says, read from text that people type, and never shown."""

import base64
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsync.format import Malformed
from drsync.format.keys import ObjectKeys, RecoveryKey, RootKey, VmKey, new_object_id

ROOT = RootKey(bytes(range(32)))
REPOSITORY = bytes(range(100, 116))
OTHER = bytes(range(50, 66))
secrets_ = st.binary(min_size=32, max_size=32)


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256 and 32 bytes of output, which is one round."""
    extracted = hmac.digest(salt or bytes(32), key, "sha256")
    return hmac.digest(extracted, info + b"\1", "sha256")


def test_every_key_is_derived_as_the_format_says() -> None:
    vm = ROOT.of_vm(REPOSITORY, "web")
    assert vm.secret == hkdf(ROOT.secret, REPOSITORY, b"drsync vm\0web")
    keys = vm.of_object(b"o" * 16)
    assert keys.frame == hkdf(vm.secret, b"o" * 16, b"drsync frame")
    assert keys.index == hkdf(vm.secret, b"o" * 16, b"drsync index")
    assert keys.content == hkdf(vm.secret, b"", b"drsync content hash")
    assert vm.of_heartbeat() == hkdf(vm.secret, b"", b"drsync heartbeat")
    assert ROOT.check(REPOSITORY) == hkdf(ROOT.secret, REPOSITORY, b"drsync key check")[:16]


def test_no_two_keys_are_alike() -> None:
    vms = [ROOT.of_vm(r, vm) for r in (REPOSITORY, OTHER) for vm in ("web", "web2", "we")]
    keys = [vm.secret for vm in vms] + [vm.of_heartbeat() for vm in vms]
    for vm in vms:
        for object_id in (b"a" * 16, b"b" * 16):
            found = vm.of_object(object_id)
            keys += [found.frame, found.index]
        keys.append(vm.of_object(b"a" * 16).content)
    assert len(set(keys)) == len(keys)


def test_hashes_of_one_vm_can_be_compared_between_its_objects() -> None:
    vm = ROOT.of_vm(REPOSITORY, "web")
    assert vm.of_object(b"a" * 16).content == vm.of_object(b"b" * 16).content


def test_f6_object_ids_are_random() -> None:
    ids = {new_object_id() for _ in range(100)}
    assert len(ids) == 100
    assert {len(i) for i in ids} == {16}


def test_nothing_that_is_a_key_shows_itself() -> None:
    vm = ROOT.of_vm(REPOSITORY, "web")
    recovery = RecoveryKey.generate()
    for key in (ROOT, vm, vm.of_object(b"o" * 16), recovery):
        shown = repr(key) + str(key) + f"{key}"
        assert shown == f"{type(key).__name__}()" * 3
    assert {ObjectKeys, VmKey, RootKey, RecoveryKey} == {type(k) for k in (ROOT, vm, vm.of_object(b"o"), recovery)}


@given(secrets_)
def test_a_key_files_text_gives_its_key(secret: bytes) -> None:
    assert RootKey.from_text(RootKey(secret).to_text()) == RootKey(secret)
    assert RootKey(secret).to_text() == f"drsync-root-key:{secret.hex()}\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "drsync-root-key:",
        "drsync-root-key:" + "00" * 31,
        "drsync-root-key:" + "00" * 33,
        "drsync-root-key:" + "0g" * 32,
        "drsync-root-key:" + "\u0660" * 64,
        "other-key:" + "00" * 32,
        "00" * 32,
        "-----BEGIN PRIVATE KEY-----",
    ],
)
def test_what_is_no_key_file_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(Malformed) as caught:
        RootKey.from_text(text)
    assert str(caught.value) == "is not a drsync key file"


@given(st.text())
def test_any_text_is_a_key_file_or_malformed(text: str) -> None:
    for tried in (text, f"drsync-root-key:{text}"):
        with pytest.raises(Malformed):
            RootKey.from_text(tried)


@given(secrets_)
def test_a_recovery_key_survives_being_written_down(secret: bytes) -> None:
    text = RecoveryKey(secret).to_text()
    assert [len(group) for group in text.split("-")] == [4] * 14
    raw = base64.b32decode(text.replace("-", ""))
    assert raw == secret + hashlib.sha256(b"drsync recovery key" + secret).digest()[:3]
    typed = text.lower().replace("-", " ").replace("o", "0").replace("i", "1")
    assert RecoveryKey.from_text(f"  {typed}\n") == RecoveryKey(secret)


@given(secrets_, st.integers(0, 55), st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"))
def test_one_wrong_letter_in_a_recovery_key_is_noticed(secret: bytes, at: int, letter: str) -> None:
    letters = RecoveryKey(secret).to_text().replace("-", "")
    wrong = letters[:at] + letter + letters[at + 1 :]
    if wrong != letters:
        with pytest.raises(Malformed, match="typing error"):
            RecoveryKey.from_text(wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "of its 0 letters and digits 0 can be used, a recovery key has 56"),
        ("A" * 55, "of its 55 letters and digits 55 can be used, a recovery key has 56"),
        ("A" * 55 + "8", "of its 56 letters and digits 55 can be used, a recovery key has 56"),
        ("A" * 57, "of its 57 letters and digits 57 can be used, a recovery key has 56"),
        ("A" * 56, "its check digits do not match: there is a typing error"),
    ],
)
def test_what_is_wrong_with_a_recovery_key_is_told_without_showing_it(text: str, message: str) -> None:
    with pytest.raises(Malformed) as caught:
        RecoveryKey.from_text(text)
    assert str(caught.value) == message


@given(st.text() | st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567=01 -", min_size=50, max_size=80))
def test_any_text_is_a_recovery_key_or_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        RecoveryKey.from_text(text)


def test_the_recovery_key_unwraps_the_root_key_of_its_repository_only() -> None:
    recovery = RecoveryKey.generate()
    wrapped = recovery.wrap(ROOT, REPOSITORY)
    assert recovery.unwrap(wrapped, REPOSITORY) == ROOT
    assert len(wrapped) == 12 + 32 + 16
    assert wrapped != recovery.wrap(ROOT, REPOSITORY)
    for other, data, repository in [
        (RecoveryKey.generate(), wrapped, REPOSITORY),
        (recovery, wrapped, OTHER),
        (recovery, wrapped[:-1], REPOSITORY),
        (recovery, wrapped + b"\0", REPOSITORY),
    ]:
        with pytest.raises(Malformed):
            other.unwrap(data, repository)


@given(st.binary(max_size=80))
def test_any_slot_is_refused(wrapped: bytes) -> None:
    with pytest.raises(Malformed):
        RecoveryKey(bytes(32)).unwrap(wrapped, REPOSITORY)


def test_a_slot_that_wraps_something_else_than_a_root_key_is_refused() -> None:
    recovery = RecoveryKey.generate()
    with pytest.raises(Malformed, match="something else"):
        recovery.unwrap(recovery.wrap(RootKey(b"short"), REPOSITORY), REPOSITORY)
