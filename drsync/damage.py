"""What is lost in an object, as seen by who read all of it; and the records of that in the repository.

    read the object ─▶ its SHA-256? its index? ─▶ each frame ─▶ Checked: nothing, or Damaged: these blocks
                        └ no: read it again: a bad transfer is no damage      └▶ vm/<vm>/damage/… (create-only)

A record is news, never the truth: who acts on it looks at the object itself. So a false one costs a
read, and one that is lost is written again by the next who looks.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from drsync.changes import zero_runs
from drsync.errors import IntegrityError, KeyMissing, ObjectDamaged, ObjectMissing
from drsync.format import Malformed, names, seal
from drsync.format.damage import DamageMeta, decode_damage, encode_damage
from drsync.format.frame import FrameOpener, disk_binding
from drsync.format.keys import ObjectKeys
from drsync.format.segment import DiskMeta, DiskRows
from drsync.horizon import Merged
from drsync.log import Log, Segment, beside
from drsync.model import block_count, block_length
from drsync.packs import pack_rows
from drsync.repository import VmObjects
from drsync.window import place

_LOGGER = logging.getLogger(__name__)
_ATTEMPTS: Final = 2
"""So often an object is read before it counts as damaged."""
MAX_RECORDS: Final = 10_000
"""Damage records that are looked at: who writes junk into the bucket can't make anybody read more."""

Runs: TypeAlias = Sequence[tuple[int, int]]
"""Runs of neighbouring blocks: first block and number of blocks, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """An object of a log that is not as it was written."""

    name: str
    object_id: bytes
    """Empty if it is a segment whose index is lost, and with it the id."""
    seq: int
    """The segment that it is, or that lists it."""
    pack: bool
    error: IntegrityError | ObjectMissing
    whole: bool
    """Its index is lost, or it is missing: nothing of it can be had without a block map."""
    blocks: Mapping[str, Runs]
    """The blocks by disk that are lost; if `whole`, those that it may have held (none known: a segment)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """An object that was read as a whole."""

    frames: int
    read_bytes: int
    damaged: Damaged | None
    segment: Segment | None = None
    """The segment that it is, if it is one and its index could be read."""


def check_segment(log: Log, link: int | Merged) -> Checked:
    """Read a segment, or a merged one, as a whole and open each of its frames.

    Raises:
        StoreError: it could not be read, which says nothing of what it is like.
    """
    found = Checked(frames=0, read_bytes=0, damaged=None)
    for _ in range(_ATTEMPTS):
        found = _check_merged(log, link) if isinstance(link, Merged) else _check_segment(log, link)
        if found.damaged is None:
            break
    return found


def check_pack(objects: VmObjects, segment: Segment, number: int) -> Checked:
    """Read pack `number` of a segment as a whole and open each of its frames.

    Raises:
        StoreError: it could not be read, which says nothing of what it is like.
    """
    found = Checked(frames=0, read_bytes=0, damaged=None)
    for _ in range(_ATTEMPTS):
        found = _check_pack(objects, segment, number)
        if found.damaged is None:
            break
    return found


def _check_merged(log: Log, link: Merged) -> Checked:
    name = names.merged(log.vm, link.last, link.object_id)
    data, segment = b"", None
    try:
        data = log.objects.store.get(name, limit_bytes=seal.MAX_OBJECT_BYTES)
        segment = log.read_merged(link)
        if (problem := _unkeyed_problem(data)) is None:
            return Checked(frames=0, read_bytes=len(data), damaged=None, segment=segment)
        error: ObjectMissing | ObjectDamaged = ObjectDamaged(key=name, problem=problem)
    except (ObjectMissing, ObjectDamaged) as err:
        error = err
    except Malformed as err:
        error = ObjectDamaged(key=name, problem=err)
    lost = lost_segment(log.vm, link.last, error)
    if segment is not None:  # nothing is lost by it
        lost = replace(lost, whole=False)
    return Checked(frames=0, read_bytes=len(data), damaged=lost, segment=segment)


def _check_segment(log: Log, seq: int) -> Checked:
    name = names.segment(log.vm, seq)
    data = b""
    try:
        data = log.objects.store.get(name, limit_bytes=seal.MAX_OBJECT_BYTES)
        segment = log.decode(name, seq, log.objects.open_end(name, "segment", data, seq=seq))
    except (ObjectMissing, ObjectDamaged) as err:
        return Checked(frames=0, read_bytes=len(data), damaged=lost_segment(log.vm, seq, err))
    point = segment.meta.point
    error, blocks = _lost_frames(
        log.objects,
        name,
        data,
        log.objects.keys_of(segment.object_id, segment.generation),
        segment.rows,
        point.disks if point is not None else [],
    )
    damaged = None
    if error is not None:
        damaged = Damaged(
            name=name, object_id=segment.object_id, seq=seq, pack=False, error=error, whole=False, blocks=blocks
        )
    frames = sum(len(r.blocks) for r in segment.rows)
    return Checked(frames=frames, read_bytes=len(data), damaged=damaged, segment=segment)


def _check_pack(objects: VmObjects, segment: Segment, number: int) -> Checked:
    entry = segment.packs.entry(number)
    name = names.pack(objects.vm, entry.object_id)
    disks: Sequence[DiskMeta] = segment.meta.point.disks if segment.meta.point is not None else []
    data = b""
    try:
        data = objects.store.get(name, limit_bytes=seal.MAX_OBJECT_BYTES)
        opened = objects.open_end(name, "pack", data)
        rows = pack_rows(name, opened, entry, disks)
    except (ObjectMissing, ObjectDamaged) as err:
        return Checked(frames=0, read_bytes=len(data), damaged=lost_pack(objects.vm, segment, number, err))
    error, blocks = _lost_frames(objects, name, data, objects.object_keys(opened.header), rows, disks)
    damaged = None
    if error is not None:
        damaged = Damaged(
            name=name, object_id=entry.object_id, seq=segment.seq, pack=True, error=error, whole=False, blocks=blocks
        )
    return Checked(frames=sum(len(r.blocks) for r in rows), read_bytes=len(data), damaged=damaged)


def lost_segment(vm: str, seq: int, error: IntegrityError | ObjectMissing) -> Damaged:
    """A segment of which nothing can be read by its index: not even what its object id was.

    Also what stands for several up to `seq`, if that is lost.
    """
    name = names.segment(vm, seq)
    return Damaged(name=name, object_id=b"", seq=seq, pack=False, error=error, whole=True, blocks={})


def lost_pack(vm: str, segment: Segment, number: int, error: IntegrityError | ObjectMissing) -> Damaged:
    """A pack of which nothing can be read by its index."""
    entry = segment.packs.entry(number)
    blocks: dict[str, Runs] = {}
    for disk_number, disk in enumerate(segment.meta.point.disks if segment.meta.point is not None else []):
        low = disk_number << 32
        first, last = max(entry.first - low, 0), min(entry.last - low, block_count(disk.size_bytes) - 1)
        if last >= first:
            blocks[disk.name] = [(first, last + 1 - first)]
    name = names.pack(vm, entry.object_id)
    return Damaged(
        name=name, object_id=entry.object_id, seq=segment.seq, pack=True, error=error, whole=True, blocks=blocks
    )


def _lost_frames(
    objects: VmObjects,
    name: str,
    data: bytes,
    keys: ObjectKeys,
    rows: Sequence[DiskRows],
    disks: Sequence[DiskMeta],
) -> tuple[ObjectDamaged | None, Mapping[str, Runs]]:
    """What is wrong with an object whose index is whole, and which blocks are lost by it; perhaps none."""
    opener, view = FrameOpener(keys), memoryview(data)
    sizes = {d.name: d.size_bytes for d in disks}
    problem: Malformed | str | None = None
    blocks: dict[str, Runs] = {}
    for disk, placed in place(rows).items():
        binding = disk_binding(objects.repository_id, disk)
        lost: list[int] = []
        columns = zip(placed.rows.blocks.tolist(), placed.offsets.tolist(), placed.rows.lengths.tolist(), strict=True)
        for row, (block, offset, length) in enumerate(columns):
            try:
                frame = view[offset : offset + length]
                plain = opener.open(frame, offset, binding, block, block_length(block, sizes[disk]))
                if opener.hash_block(plain) != placed.rows.hashes[row].tobytes():
                    problem = problem or f"block {block} does not match its hash"
            except Malformed as err:
                problem = problem or err
                lost.append(block)
        if lost:
            blocks[disk] = runs_of(np.array(lost, np.int64))
    if problem is None:
        problem = _unkeyed_problem(data)
    return (ObjectDamaged(key=name, problem=problem) if problem is not None else None), blocks


def _unkeyed_problem(data: bytes) -> Malformed | None:
    """What is wrong with the parts that nothing is read from; no block is lost by it."""
    footer = seal.parse_footer(data, len(data))
    try:
        seal.check_unkeyed(data, footer)
    except Malformed as err:
        return err
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A damage record, as it was read from the repository."""

    name: str
    found_at: datetime
    damaged: Damaged


def runs_of(blocks: npt.NDArray[np.int64]) -> Runs:
    """The runs of `blocks`, which are ascending."""
    if not len(blocks):
        return []
    first = int(blocks[0])
    flags = np.zeros(int(blocks[-1]) - first + 1, np.bool_)
    flags[blocks - first] = True
    starts, counts = zero_runs(flags, first)
    return list(zip(starts.tolist(), counts.tolist(), strict=True))


def write_record(objects: VmObjects, damaged: Damaged, found_at: datetime) -> str:
    """Record damage for whoever can do something about it; the record's name.

    Raises:
        StoreError: it could not be stored.
    """
    header = objects.new_header("damage", damaged.seq)
    meta = DamageMeta(
        seq=damaged.seq,
        object=damaged.object_id.hex(),
        pack=damaged.pack,
        problem=str(damaged.error)[:1000],
        time=found_at.isoformat(),
        whole=damaged.whole,
        disks={disk: list(runs) for disk, runs in damaged.blocks.items()},
    )
    index = encode_damage(meta)
    buffer, sealed = objects.seal_alone(header, index)
    name = names.damage(objects.vm, damaged.seq, bytes.fromhex(header.object))
    objects.store.create(name, buffer[: sealed.length], sha256=sealed.sha256)
    return name


def read_records(objects: VmObjects, *, known: Mapping[str, Record] | None = None) -> Iterator[Record]:
    """The damage records of a VM, in order; what is none is passed over. Those `known` are not read again."""
    for number, info in enumerate(objects.store.list(names.damage_prefix(objects.vm))):
        if number >= MAX_RECORDS:
            _LOGGER.warning("vm=%s has more than %d damage records: the others are passed over", objects.vm, number)
            return
        if known and info.key in known:
            yield known[info.key]
            continue
        try:
            yield _read_record(objects, info.key)
        except (ObjectMissing, ObjectDamaged, KeyMissing) as err:
            _LOGGER.warning("vm=%s passed over a damage record: %s", objects.vm, err)


def _read_record(objects: VmObjects, name: str) -> Record:
    try:
        seq = names.seq_of_damage(name)
        opened = objects.read_index(name, "damage", seq=seq)
        meta = decode_damage(opened.index, opened.frames_end)
        if meta.seq != seq:
            raise Malformed(f"its index is of segment {meta.seq}")
        found_at = datetime.fromisoformat(meta.time)
    except ValueError as err:  # Malformed is one, and what fromisoformat raises
        raise ObjectDamaged(key=name, problem=err) from err
    object_id = bytes.fromhex(meta.object)
    key = names.pack(objects.vm, object_id) if meta.pack else names.segment(objects.vm, meta.seq)
    damaged = Damaged(
        name=key,
        object_id=object_id,
        seq=meta.seq,
        pack=meta.pack,
        error=ObjectDamaged(key=key, problem=meta.problem),
        whole=meta.whole,
        blocks=meta.disks,
    )
    return Record(name=name, found_at=found_at, damaged=damaged)


def says_the_same(one: Damaged, other: Damaged) -> bool:
    """Whether two findings tell of the same damage."""
    same = (one.name, one.whole, one.blocks.keys()) == (other.name, other.whole, other.blocks.keys())
    return same and all([*runs] == [*other.blocks[disk]] for disk, runs in one.blocks.items())


def beside_damaged(log: Log) -> Log:
    """As log.beside, for a log whose newest segment may be what is damaged: then hosts may lack the key."""
    try:
        return beside(log)
    except (ObjectMissing, ObjectDamaged, KeyMissing):
        return log


def record(log: Log, found: Sequence[Damaged], found_at: datetime) -> None:
    """Record damage, as far as the repository does not know of it already; its records are read once.

    Raises:
        StoreError: it could not be stored.
    """
    if not found:
        return
    known = [record.damaged for record in read_records(log.objects)]
    objects = beside_damaged(log).objects
    for damaged in found:
        if any(says_the_same(one, damaged) for one in known):
            continue
        name = write_record(objects, damaged, found_at)
        known.append(damaged)
        _LOGGER.warning("vm=%s recorded damage: %s", log.vm, name)
