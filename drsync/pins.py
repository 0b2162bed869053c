"""Pins: points that a person wants kept, whatever the rules say (docs/format.md, "Pins").

Records are numbered from 1, created and never changed: the newest one of a
point counts, so unpinning is a record more. Numbers, not clocks, say which is the
newest; a missing number is noticed. Records are sealed with the VM's key. A
host's rights do not let it write any (docs/security.md): who has taken a host over
can't unpin a point, nor pin everything.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final

import msgspec

from drsync.errors import NotPinned, ObjectDamaged, ObjectExists, PinForged, PinsBroken
from drsync.format import Malformed, names, seal
from drsync.format.record import decode_record
from drsync.repository import VmObjects
from drsync.retention import Pin

MAX_RECORDS: Final = 100_000
"""Of one VM: more were not written by people."""
MAX_NOTE_CHARACTERS: Final = 200
_READERS: Final = 8
_TRIES: Final = 20


class PinRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one record says of one point."""

    point: int
    pinned: bool
    """False: it is pinned no more."""
    until: datetime | None
    """When the pin ends by itself; None: never."""
    time: datetime
    """When the record was made, by its maker's clock: for people, decides nothing."""
    note: str = ""
    """Why, for people."""

    def __post_init__(self) -> None:
        naive = self.time.tzinfo is None or (self.until is not None and self.until.tzinfo is None)
        if self.point < 1 or naive or len(self.note) > MAX_NOTE_CHARACTERS:
            raise ValueError("it breaks a rule of docs/format.md")


@dataclass(frozen=True, slots=True)
class Pins:
    """The pins of a VM, as its records say."""

    records: Sequence[PinRecord]
    """All of them, in order: the newest of a point counts."""

    def standing(self) -> list[PinRecord]:
        """The record of each point that is pinned, by number; also if its time is over."""
        newest = {record.point: record for record in self.records}
        return [newest[point] for point in sorted(newest) if newest[point].pinned]

    def of(self, point: int) -> PinRecord | None:
        """The record that pins a point, or None."""
        return next((record for record in self.standing() if record.point == point), None)

    def for_rules(self) -> list[Pin]:
        """As `retention.decide` takes them."""
        return [Pin(record.point, record.until) for record in self.standing()]


def read_pins(objects: VmObjects) -> Pins:
    """All pins of a VM. Who can't read them must drop none of its points (F42).

    Raises:
        PinsBroken: a record is missing, or there are more than people write.
        PinForged: a record is under an older key than the one before it.
        ObjectDamaged: a record is not as it was written.
    """
    count = 0
    for info in objects.store.list(names.pin_prefix(objects.vm)):
        count += 1
        try:
            number = names.number_of_pin(info.key)
        except Malformed as err:
            raise ObjectDamaged(key=info.key, problem=err) from err
        if number != count or count > MAX_RECORDS:
            raise PinsBroken(vm=objects.vm, problem=f"record {count} is missing, {number} is there")
    with ThreadPoolExecutor(_READERS, thread_name_prefix="pins") as readers:
        return Pins(tuple(_in_order(objects.vm, readers.map(partial(_read, objects), range(1, count + 1)))))


def write_pin(objects: VmObjects, known: Pins, record: PinRecord) -> None:
    """Add a record behind those that are `known`; others that come in between are stepped over.

    Raises:
        StoreDenied: these credentials may not pin (a host's must not).
        StoreError: the store does not take it.
    """
    first = len(known.records) + 1
    for number in range(first, first + _TRIES):
        try:
            _create(objects, number, record)
        except ObjectExists:  # somebody else pins at this moment
            continue
        return
    raise PinsBroken(vm=objects.vm, problem=f"{_TRIES} others were written at the same moment")


def pin_point(objects: VmObjects, point: int, *, until: datetime | None, note: str, now: datetime) -> PinRecord:
    """Pin a point, or change until when; that it is there is the caller's to know.

    Raises:
        PinsBroken, ObjectDamaged, StoreError: see read_pins and write_pin.
    """
    record = PinRecord(point=point, pinned=True, until=until, time=now, note=note)
    write_pin(objects, read_pins(objects), record)
    return record


def unpin_point(objects: VmObjects, point: int, *, now: datetime) -> PinRecord:
    """Take a point's pin away; what it said.

    Raises:
        NotPinned: it has none.
        PinsBroken, ObjectDamaged, StoreError: see read_pins and write_pin.
    """
    known = read_pins(objects)
    before = known.of(point)
    if before is None:
        raise NotPinned(vm=objects.vm, point=point)
    write_pin(objects, known, PinRecord(point=point, pinned=False, until=None, time=now))
    return before


def _in_order(vm: str, read: Iterable[tuple[int, PinRecord]]) -> Iterator[PinRecord]:
    """The records; under keys that never get older (F48)."""
    newest = 0
    for number, (generation, record) in enumerate(read, start=1):
        if generation < newest:
            raise PinForged(key=names.pin(vm, number))
        newest = generation
        yield record


def _read(objects: VmObjects, number: int) -> tuple[int, PinRecord]:
    """A record, and the generation of its key."""
    name = names.pin(objects.vm, number)
    opened = objects.read_index(name, "pin", seq=number)
    try:
        if opened.frames_end != seal.FRAMES_START:
            raise Malformed("a pin record has no frames")
        return opened.header.generation, decode_record(opened.index, PinRecord)
    except Malformed as err:
        raise ObjectDamaged(key=name, problem=err) from err


def _create(objects: VmObjects, number: int, record: PinRecord) -> None:
    """Each try is a new object with an id of its own (F6)."""
    header = objects.new_header("pin", number)
    index = msgspec.json.encode(record)
    buffer, sealed = objects.seal_alone(header, index)
    objects.store.create(names.pin(objects.vm, number), buffer[: sealed.length], sha256=sealed.sha256)
