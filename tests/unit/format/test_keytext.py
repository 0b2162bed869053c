"""The text of a key file: root keys of several generations, or the keys of some VMs."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsync.format import Malformed
from drsync.format.keys import HostKeys, Keys, RootKey, RootKeys
from drsync.format.keytext import decode_keys, encode_keys

REPOSITORY = bytes(range(16))
ROOTS = RootKeys(tuple(RootKey(bytes([n]) * 32) for n in range(3)))
HOST = ROOTS.of_vms(REPOSITORY, ["web", "db.example-1", "web"])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_root_keys_come_back(count: int) -> None:
    roots = RootKeys(ROOTS.generations[:count])
    assert decode_keys(encode_keys(roots)) == roots


def test_before_a_rotation_a_key_file_is_the_line_that_it_always_was() -> None:
    one = RootKeys(ROOTS.generations[:1])
    assert encode_keys(one) == f"drsync-root-key:{'00' * 32}\n"
    assert decode_keys(encode_keys(one).strip()) == one


def test_the_keys_of_vms_come_back_and_are_those_that_the_root_keys_give() -> None:
    found = decode_keys(encode_keys(HOST))
    assert found == HOST
    assert isinstance(found, HostKeys)
    assert sorted(found.vms) == ["db.example-1", "web"]
    assert found.of_vm(REPOSITORY, "web") == ROOTS.of_vm(REPOSITORY, "web")
    with pytest.raises(LookupError):
        found.of_vm(REPOSITORY, "mail")
    with pytest.raises(LookupError):
        found.of_vm(bytes(16), "web")


def test_a_host_that_has_some_vms_can_hand_on_less_and_not_more() -> None:
    assert HOST.of_vms(REPOSITORY, ["web"]) == ROOTS.of_vms(REPOSITORY, ["web"])
    with pytest.raises(LookupError):
        HOST.of_vms(REPOSITORY, ["mail"])


@pytest.mark.parametrize("keys", [ROOTS, HOST], ids=["root", "host"])
def test_a_digit_that_was_copied_wrongly_never_gives_another_key(keys: Keys) -> None:
    text = encode_keys(keys)
    lines = text.splitlines(keepends=True)
    for start in range(len(lines[0]) if isinstance(keys, RootKeys) else 0, len(text)):
        if text[start] not in "0123456789abcdef":
            continue
        changed = text[:start] + ("0" if text[start] != "0" else "1") + text[start + 1 :]
        try:
            found = decode_keys(changed)
        except Malformed as err:
            assert not any(len(part) > 30 for part in str(err).split()), "it may be a key"
        else:
            pytest.fail(f"byte {start} was taken: {found != keys}")


@pytest.mark.parametrize("keys", [ROOTS, HOST], ids=["root", "host"])
def test_a_file_that_was_cut_is_refused_or_holds_whole_lines(keys: Keys) -> None:
    text = encode_keys(keys)
    for length in range(len(text)):
        try:
            found = decode_keys(text[:length])
        except Malformed:
            continue
        assert text[:length].strip() == encode_keys(found).strip()


def test_a_line_that_is_missing_in_the_middle_is_noticed() -> None:
    lines = encode_keys(ROOTS).splitlines(keepends=True)
    with pytest.raises(Malformed, match="a generation is missing"):
        decode_keys(lines[0] + lines[2])
    first, one, two, *_ = encode_keys(HOST).splitlines(keepends=True)
    with pytest.raises(Malformed, match="a generation is missing"):
        decode_keys(first + two)
    assert one


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "drsync-host-key:\n",
        "drsync-host-key:00\n",
        f"drsync-host-key:{'0' * 32}\ndrsync-vm-key:../etc:1:{'0' * 64}:00000000\n",
        f"drsync-host-key:{'0' * 32}\nsomething else\n",
        f"drsync-root-key:{'0' * 64}\ndrsync-root-key:{'0' * 64}\n",
        "ABCD-" * 14,
    ],
)
def test_what_is_no_key_file_is_refused(text: str) -> None:
    with pytest.raises(Malformed):
        decode_keys(text)


@given(st.text(), st.sampled_from(["", "drsync-host-key:" + "0" * 32 + "\n", "drsync-root-key:" + "0" * 64 + "\n"]))
def test_any_text_is_a_key_file_or_malformed(text: str, before: str) -> None:
    with suppress(Malformed):
        decode_keys(before + text)


def test_no_repr_shows_a_key() -> None:
    shown = repr(ROOTS) + repr(HOST) + repr(HOST.vms["web"]) + HOST.described + ROOTS.described
    for of_vm in HOST.vms.values():
        for key in of_vm.generations:
            assert key.secret.hex() not in shown
            assert repr(key.secret) not in shown
    assert all(root.secret.hex() not in shown and repr(root.secret) not in shown for root in ROOTS.generations)


def test_a_message_names_some_vms_and_counts_the_rest() -> None:
    many = ROOTS.of_vms(REPOSITORY, [f"vm{n:02}" for n in range(20)])
    assert many.described == "keys of vm00, vm01, vm02, vm03, vm04, vm05, vm06, vm07 and 12 more alone"
    assert RootKeys(ROOTS.generations[:1]).described == "the root key"
