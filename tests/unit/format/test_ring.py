"""The key ring: opened by each of its slots, and by nothing else (F45 to F47)."""

import json
from base64 import b64encode
from typing import Any

import msgspec
import pytest

from drsync.format import Malformed
from drsync.format.keys import RecoveryKey, RootKey, RootKeys
from drsync.format.ring import (
    MAX_SLOTS,
    Ring,
    RingSecret,
    ScryptCost,
    Slot,
    decode_ring,
    encode_ring,
    open_ring,
    open_with_secret,
    personal_slot,
)

REPOSITORY = bytes(range(16))
CHEAP = ScryptCost(salt="ab" * 16, log2_n=10)
RECOVERY = RecoveryKey(b"s" * 32)
PHRASE = "six words that nobody can guess"
SECRET = RingSecret.first(RootKeys((RootKey.generate(), RootKey.generate())))


def never(_slot: Slot, _key: bytes) -> bytes:
    raise AssertionError("no slot is of KMS")


def slots_of(secret: RingSecret) -> list[Slot]:
    phrase = CHEAP.secret_of(PHRASE)
    return [
        personal_slot("recovery", "recovery", RECOVERY.secret, REPOSITORY, secret.authority, added="2026"),
        personal_slot("ops", "passphrase", phrase, REPOSITORY, secret.authority, added="2026", scrypt=CHEAP),
    ]


RAW = encode_ring(REPOSITORY, 3, SECRET, slots_of(SECRET), never)
RING = decode_ring(RAW, REPOSITORY, 3)


def opened(raw: bytes, slot: int, secret: bytes) -> RingSecret | None:
    ring = decode_ring(raw, REPOSITORY, 3)
    return open_with_secret(raw, ring, ring.slots[slot], secret)


def test_each_slot_opens_the_ring_by_its_own_secret() -> None:
    assert opened(RAW, 0, RECOVERY.secret) == SECRET
    assert opened(RAW, 1, CHEAP.secret_of(PHRASE)) == SECRET
    assert opened(RAW, 0, CHEAP.secret_of(PHRASE)) is None
    assert opened(RAW, 1, CHEAP.secret_of(PHRASE + "!")) is None
    assert opened(RAW, 1, RECOVERY.secret) is None


def test_a_ring_is_the_bytes_that_the_format_says() -> None:
    clear, sealed, rest = RAW.split(b"\n")
    assert rest == b""
    assert sealed
    said = json.loads(clear)
    assert list(said) == ["format", "repository", "number", "checks", "slots"]
    assert (said["format"], said["repository"], said["number"]) == (1, REPOSITORY.hex(), 3)
    assert said["checks"] == [root.check(REPOSITORY).hex() for root in SECRET.roots.generations]
    assert set(said["slots"][0]) == {"name", "kind", "added", "wrapped", "public", "proof"}
    assert said["slots"][1]["scrypt"] == {"salt": "ab" * 16, "log2_n": 10, "r": 8, "p": 1}


def test_how_an_accent_was_typed_does_not_matter() -> None:
    assert CHEAP.secret_of("Caf\u00e9 au lait bitte") == CHEAP.secret_of("Cafe\u0301 au lait bitte")


def test_every_changed_byte_is_noticed() -> None:
    noticed = 0
    for at in range(len(RAW) - 1):
        raw = RAW[:at] + bytes([RAW[at] ^ 1]) + RAW[at + 1 :]
        try:
            found = opened(raw, 0, RECOVERY.secret)
        except (Malformed, IndexError):
            noticed += 1
        else:
            noticed += found is None
            assert found is None or found == SECRET
    assert noticed > len(RAW) - 10


def test_who_has_no_slot_cannot_make_a_ring_that_a_slot_vouches_for() -> None:
    """F46: the public keys are there for all to see, and with a stolen root key even the roots are known."""
    forged = RingSecret.first(SECRET.roots).rotated()
    raw = encode_ring(REPOSITORY, 3, forged, RING.slots, never)
    for slot, secret in enumerate([RECOVERY.secret, CHEAP.secret_of(PHRASE)]):
        with pytest.raises(Malformed, match="does not vouch for it"):
            opened(raw, slot, secret)


def test_a_slot_that_somebody_added_to_a_ring_makes_it_damaged() -> None:
    thief = personal_slot("thief", "recovery", b"t" * 32, REPOSITORY, b"a" * 32, added="2026")
    clear, sealed, _ = RAW.split(b"\n")
    said = json.loads(clear)
    said["slots"].append(json.loads(msgspec.json.encode(msgspec.structs.replace(thief, wrapped="AAAA"))))
    raw = json.dumps(said).encode() + b"\n" + sealed + b"\n"
    with pytest.raises(Malformed, match="it was changed"):
        opened(raw, 0, RECOVERY.secret)


def test_a_ring_of_another_number_or_repository_is_refused() -> None:
    for identifier, number in ((REPOSITORY, 4), (bytes(16), 3)):
        with pytest.raises(Malformed, match="another ring than its name says"):
            decode_ring(RAW, identifier, number)


def test_each_ring_has_a_key_of_its_own() -> None:
    """F47: so what a removed slot opened once is of no use for the rings behind it."""
    again = encode_ring(REPOSITORY, 3, SECRET, slots_of(SECRET), never)
    assert again.split(b"\n")[1] != RAW.split(b"\n")[1]
    ring = decode_ring(again, REPOSITORY, 3)
    swapped = msgspec.structs.replace(ring, slots=RING.slots)
    with pytest.raises(Malformed):
        open_with_secret(again, swapped, RING.slots[0], RECOVERY.secret)


def test_a_rotation_adds_a_root_key_and_keeps_the_others() -> None:
    rotated = SECRET.rotated()
    assert SECRET.roots.begins(rotated.roots)
    assert not rotated.roots.begins(SECRET.roots)
    assert rotated.roots.newest == SECRET.roots.newest + 1
    assert rotated.authority == SECRET.authority


@pytest.mark.parametrize(
    "cost",
    [
        {"log2_n": 9},
        {"log2_n": 21},
        {"log2_n": 60},
        {"log2_n": -1},
        {"log2_n": 20, "r": 9},
        {"r": 0},
        {"r": 17, "log2_n": 10},
        {"p": 0},
        {"p": 5},
        {"p": 10**9},
        {"salt": ""},
        {"salt": "zz" * 16},
        {"salt": "ab" * 1000},
    ],
    ids=str,
)
def test_f47_a_scrypt_out_of_bounds_is_refused_before_it_is_tried(cost: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        msgspec.structs.replace(CHEAP, **cost).secret_of(PHRASE)


def changed_ring(**fields: object) -> bytes:
    clear, sealed, _ = RAW.split(b"\n")
    return json.dumps(json.loads(clear) | fields).encode() + b"\n" + sealed + b"\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\n",
        b"{}\nAAAA\n",
        b"[" * 100_000,
        changed_ring(format=2),
        changed_ring(format=0),
        changed_ring(checks=[]),
        changed_ring(checks=["00"]),
        changed_ring(checks=["00" * 16] * 257),
        changed_ring(slots=[]),
        changed_ring(slots=[{"name": "a", "kind": "b", "added": ""}] * 2),
        changed_ring(slots=[{"name": "../x", "kind": "b", "added": ""}]),
        changed_ring(slots=[{"name": f"s{n}", "kind": "b", "added": ""} for n in range(MAX_SLOTS + 1)]),
        changed_ring(number="3"),
    ],
    ids=lambda raw: raw[:30],
)
def test_what_is_no_ring_is_refused(raw: bytes) -> None:
    with pytest.raises(Malformed):
        decode_ring(raw, REPOSITORY, 3)


@pytest.mark.parametrize("field", ["wrapped", "public", "proof"])
@pytest.mark.parametrize("value", ["", "AAAA", "zz", "é", b64encode(bytes(200)).decode(), "00" * 32])
def test_any_value_in_a_slot_opens_nothing(field: str, value: str) -> None:
    slot = msgspec.structs.replace(RING.slots[0], **{field: value})
    try:
        found = open_with_secret(RAW, RING, slot, RECOVERY.secret)
    except Malformed:
        return
    assert found is None


@pytest.mark.parametrize("public", ["", "00", "00" * 32, "zz" * 32])
def test_a_public_key_that_is_none_stops_a_new_ring(public: str) -> None:
    slot = msgspec.structs.replace(RING.slots[0], public=public)
    with pytest.raises(Malformed):
        encode_ring(REPOSITORY, 4, SECRET, [slot], never)


def test_a_ring_with_too_much_in_it_is_not_made() -> None:
    slots = [msgspec.structs.replace(RING.slots[0], name=f"s{n}") for n in range(MAX_SLOTS + 1)]
    with pytest.raises(Malformed, match="more than a key ring takes"):
        encode_ring(REPOSITORY, 4, SECRET, slots, never)
    roots = RootKeys(tuple(RootKey(bytes([n]) * 32) for n in range(256)))
    full = RingSecret.first(roots)
    raw = encode_ring(REPOSITORY, 4, full, slots_of(full), never)
    assert open_with_secret(raw, decode_ring(raw, REPOSITORY, 4), slots_of(full)[0], b"x" * 32) is None
    with pytest.raises(Malformed, match="more than a key ring takes"):
        encode_ring(REPOSITORY, 4, full.rotated(), slots_of(full), never)


def test_root_keys_that_are_not_those_in_the_clear_are_refused() -> None:
    ring = msgspec.structs.replace(RING, checks=list(reversed(RING.checks)))
    with pytest.raises(Malformed, match="not those that it tells of"):
        open_with_secret(RAW, ring, ring.slots[0], RECOVERY.secret)
    with pytest.raises(Malformed, match="it was changed"):
        open_ring(RAW, RING, b"k" * 32)


def test_what_a_newer_drsync_adds_is_passed_over() -> None:
    clear, _, _ = RAW.split(b"\n")
    said = json.loads(clear)
    said["slots"][0]["tomorrow"] = 1
    said["later"] = {}
    assert isinstance(decode_ring(json.dumps(said).encode() + b"\n", REPOSITORY, 3), Ring)


def test_no_repr_shows_a_secret() -> None:
    shown = repr(SECRET) + repr(RING) + repr(RING.slots)
    for secret in (SECRET.authority, RECOVERY.secret, *(root.secret for root in SECRET.roots.generations)):
        assert secret.hex() not in shown
        assert repr(secret) not in shown
