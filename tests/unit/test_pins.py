"""Pins: docs/format.md, "Pins"."""

import hashlib
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest
from fake_clock import FakeClock
from hypothesis import given
from hypothesis import strategies as st
from shipped_vm import objects_of, store_of

from drsync.errors import NotPinned, ObjectDamaged, PinsBroken
from drsync.format import names, seal
from drsync.format.keys import RootKey
from drsync.log import Log
from drsync.model import NoProgress
from drsync.pins import MAX_NOTE_CHARACTERS, PinRecord, pin_point, read_pins, unpin_point, write_pin
from drsync.repository import VmObjects
from drsync.retention import Pin
from drsync.store.memory import MemoryStore
from drsync.verify import verify

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
ROOT = RootKey.generate()
REPOSITORY = bytes(16)


def part_of(store: object, vm: str = "web") -> VmObjects:
    return VmObjects(store, REPOSITORY, vm, ROOT.of_vm(REPOSITORY, vm))  # type: ignore[arg-type]  # twins, too


@pytest.fixture
def objects() -> VmObjects:
    return part_of(MemoryStore(FakeClock()))


def pin(objects: VmObjects, point: int, until: datetime | None = None, note: str = "") -> PinRecord:
    return pin_point(objects, point, until=until, note=note, now=NOON)


def put(objects: VmObjects, number: int, index: bytes, frames: bytes = b"") -> None:
    """A record with whatever a holder of the key puts there."""
    header = objects.new_header("pin", number)
    end = seal.FRAMES_START + len(frames)
    buffer = memoryview(bytearray(end + seal.sealed_bound(len(index))))
    sealed = seal.seal(buffer, end, header, index, objects.object_keys(header))
    objects.store.replace(names.pin(objects.vm, number), bytes(buffer[: sealed.length]))


def test_a_vm_without_records_has_no_pins(objects: VmObjects) -> None:
    assert read_pins(objects).standing() == []


def test_what_was_pinned_is_read(objects: VmObjects) -> None:
    pin(objects, 7, NOON + timedelta(days=1), "before the migration")
    pin(objects, 3)
    pins = read_pins(objects)
    assert pins.for_rules() == [Pin(3, None), Pin(7, NOON + timedelta(days=1))]
    found = pins.of(7)
    assert found is not None
    assert (found.note, found.time) == ("before the migration", NOON)


def test_f41_the_newest_record_of_a_point_counts(objects: VmObjects) -> None:
    pin(objects, 7)
    pin(objects, 7, NOON)
    assert read_pins(objects).for_rules() == [Pin(7, NOON)]
    before = unpin_point(objects, 7, now=NOON)
    assert before.until == NOON
    assert read_pins(objects).for_rules() == []
    pin(objects, 7)
    assert read_pins(objects).for_rules() == [Pin(7, None)]
    assert [r.pinned for r in read_pins(objects).records] == [True, True, False, True]


def test_what_is_not_pinned_cant_be_unpinned(objects: VmObjects) -> None:
    pin(objects, 7)
    with pytest.raises(NotPinned) as caught:
        unpin_point(objects, 8, now=NOON)
    assert "drsync points web" in caught.value.remedy
    assert len(read_pins(objects).records) == 1


def test_who_pins_while_others_do_steps_over_their_records(objects: VmObjects) -> None:
    behind = read_pins(objects)
    for point in (1, 2, 3):
        pin(objects, point)
    write_pin(objects, behind, PinRecord(point=4, pinned=True, until=None, time=NOON))
    assert [r.point for r in read_pins(objects).records] == [1, 2, 3, 4]


@pytest.mark.parametrize("lost", [1, 2])
def test_f40_a_missing_record_is_noticed(objects: VmObjects, lost: int) -> None:
    for point in (1, 2, 3):
        pin(objects, point)
    left = {k: v for k, v in objects_of(objects.store).items() if k != names.pin("web", lost)}
    with pytest.raises(PinsBroken, match="is missing"):
        read_pins(part_of(store_of(left)))
    report = verify(Log(part_of(store_of(left))), committed_seq=0, read_data=False, progress=NoProgress())
    assert [(type(found.error), found.point) for found in report.problems] == [(PinsBroken, 0)]


def test_f40_a_record_under_another_number_or_of_another_vm_is_refused(objects: VmObjects) -> None:
    pin(objects, 1)
    record = objects_of(objects.store)[names.pin("web", 1)]
    digest = hashlib.sha256(record).digest()
    objects.store.create(names.pin("web", 2), record, sha256=digest)
    with pytest.raises(ObjectDamaged, match="not what its name says"):
        read_pins(objects)
    objects.store.create(names.pin("db", 1), record, sha256=digest)
    with pytest.raises(ObjectDamaged):
        read_pins(part_of(objects.store, "db"))


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b'{"point":0,"pinned":true,"until":null,"time":"2026-01-02T12:00:00Z"}',
        b'{"point":1,"pinned":true,"until":null,"time":"2026-01-02T12:00:00"}',
        b'{"point":1,"pinned":true,"until":"2026-01-02T12:00:00","time":"2026-01-02T12:00:00Z"}',
        b'{"point":1,"pinned":true,"until":null,"time":"2026-01-02T12:00:00Z","more":1}',
        b'{"point":1,"pinned":true,"time":"2026-01-02T12:00:00Z"}',
        msgspec.json.encode(
            {"point": 1, "pinned": True, "until": None, "time": NOON, "note": "x" * (MAX_NOTE_CHARACTERS + 1)}
        ),
    ],
)
def test_f40_a_record_that_breaks_a_rule_is_refused(objects: VmObjects, index: bytes) -> None:
    put(objects, 1, index)
    with pytest.raises(ObjectDamaged):
        read_pins(objects)


def test_f40_a_record_with_frames_is_refused(objects: VmObjects) -> None:
    put(objects, 1, b'{"point":1,"pinned":true,"until":null,"time":"2026-01-02T12:00:00Z"}', b"frames")
    with pytest.raises(ObjectDamaged, match="no frames"):
        read_pins(objects)


def test_f40_what_is_no_record_is_not_passed_over(objects: VmObjects) -> None:
    pin(objects, 1)
    objects.store.create("vm/web/pin/x", b"", sha256=hashlib.sha256(b"").digest())
    with pytest.raises(ObjectDamaged):
        read_pins(objects)


@given(st.data())
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    objects = part_of(MemoryStore(FakeClock()))
    pin(objects, 1)
    (raw,) = objects_of(objects.store).values()
    at = data.draw(st.integers(8, len(raw) - 57))  # magic and footer's SHA-256 are for accidents
    objects.store.replace(names.pin("web", 1), raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(ObjectDamaged):
        read_pins(objects)


def test_until_of_another_zone_is_the_same_instant(objects: VmObjects) -> None:
    east = NOON.astimezone(timezone(timedelta(hours=5)))
    pin(objects, 1, east)
    assert read_pins(objects).for_rules() == [Pin(1, NOON)]


def test_names_hold_nothing_of_a_pin_but_its_number(objects: VmObjects, tmp_path: Path) -> None:
    pin(objects, 4711, note="secret")
    ((name, raw),) = objects_of(objects.store).items()
    assert name == "vm/web/pin/0000000000000001"
    assert b"4711" not in raw
    assert b"secret" not in raw
