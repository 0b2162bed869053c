"""The index of a segment or a pack: metadata, then columns (docs/format.md, "Index").

    index = u32 length of metadata | metadata (JSON)
            | packs, only in a segment:  id 16[n] | length u64[n] | index SHA-256 32[n] | first u64[n] | last u64[n]
            | then for each disk in `contents`:
                rows:      block u32[n] | stored length u32[n] | keyed hash 16[n]
                zero runs: first block u32[m] | number of blocks u32[m]

A row is a block with a frame; frames lie in the order of the rows, so their
offsets are the running sum of the lengths. A zero run is blocks that now read
as zeros; it needs no bytes. `first` and `last` of a pack are the positions
(disk number << 32 | block) that its rows and runs lie between, so that a reader
who wants one part of one disk loads only the packs that can hold it.

A point that was seeded has packs of several rounds: within a round they follow
each other in the order of the point, and a later round lies over an earlier one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import msgspec
import numpy as np

from drsync.format import Malformed
from drsync.format.columns import U32, U64, Bytes2D, Columns, little_endian, with_metadata
from drsync.format.frame import HASH_BYTES, MAX_FRAME_BYTES
from drsync.format.keys import OBJECT_ID_BYTES
from drsync.format.record import decode_record
from drsync.format.seal import FRAMES_START, MAX_OBJECT_BYTES
from drsync.model import MAX_DISK_BYTES, CaptureId, Consistency, Kind, block_count, is_name

_SHA256_BYTES: Final = 32
MAX_DISKS: Final = 64
MAX_ROUNDS: Final = 4096
"""Of a segment; a seed that does not come to an end is cut off long before."""


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Metadata with no more and no other fields than the format names."""


class Extent(_Strict, frozen=True):
    """How many rows and zero runs of a disk an object holds."""

    disk: str
    rows: int
    zero_runs: int


class DiskMeta(_Strict, frozen=True):
    """A disk in a point."""

    name: str
    size_bytes: int
    kind: Kind
    reason: str
    """Why this disk is not an increment; empty if it is."""
    changed_bytes: int
    """Plain bytes of the blocks that this point brought, zeros included."""
    persistent_bitmap: bool


class PointMeta(_Strict, frozen=True):
    """A point, as its segment describes it."""

    capture: CaptureId
    """The id that the dirty bitmaps carry which record what changed since this point."""
    base: CaptureId | None
    """The capture that an increment is relative to: always the point before it in the log."""
    time: str
    """The instant of the capture by the host's clock, RFC 3339, UTC."""
    consistency: Consistency
    disks: list[DiskMeta]
    definition: dict[str, object]
    """What the source knows of the VM beside its disks."""


class PackMeta(_Strict, frozen=True):
    """Metadata of a pack."""

    contents: list[Extent]


class SegmentMeta(_Strict, frozen=True, omit_defaults=True):
    """Metadata of a segment."""

    seq: int
    epoch: int
    """Rises by one each time another writer takes the VM over."""
    writer: str
    """Who wrote it: the random id of a spool."""
    previous: str
    """SHA-256 (hex) of the sealed index of segment seq - 1; empty for the first."""
    point: PointMeta | None
    """None: the segment only fences (a new writer took over) and holds no blocks."""
    packs: int
    contents: list[Extent]
    rounds: list[int] = []
    """How many packs each round has; empty, and not stored, if all of them are of one round."""

    @property
    def round_bounds(self) -> Sequence[tuple[int, int]]:
        """Where each round's packs begin and end in the table, the oldest round first."""
        ends = list(accumulate(self.rounds)) or [self.packs]
        return list(zip([0, *ends], ends, strict=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRows:
    """The blocks of one disk that one object holds."""

    disk: str
    blocks: U32
    lengths: U32
    hashes: Bytes2D
    zero_first: U32
    zero_count: U32

    @property
    def extent(self) -> Extent:
        return Extent(disk=self.disk, rows=len(self.blocks), zero_runs=len(self.zero_first))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackEntry:
    """A pack that a segment lists."""

    object_id: bytes
    length: int
    index_sha256: bytes
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackTable:
    """The packs of a segment, as columns."""

    ids: Bytes2D
    lengths: U64
    index_sha256: Bytes2D
    first: U64
    last: U64

    def __len__(self) -> int:
        return len(self.lengths)

    def entry(self, number: int) -> PackEntry:
        return PackEntry(
            object_id=self.ids[number].tobytes(),
            length=int(self.lengths[number]),
            index_sha256=self.index_sha256[number].tobytes(),
            first=int(self.first[number]),
            last=int(self.last[number]),
        )


def position(disk_number: int, block: int) -> int:
    """Where a block lies in the order of a point: by disk, then by block."""
    return disk_number << 32 | block


def pack_table(entries: Sequence[PackEntry]) -> PackTable:
    """The columns of `entries`."""
    return PackTable(
        ids=np.frombuffer(b"".join(e.object_id for e in entries), np.uint8).reshape(-1, OBJECT_ID_BYTES),
        lengths=np.array([e.length for e in entries], np.uint64),
        index_sha256=np.frombuffer(b"".join(e.index_sha256 for e in entries), np.uint8).reshape(-1, _SHA256_BYTES),
        first=np.array([e.first for e in entries], np.uint64),
        last=np.array([e.last for e in entries], np.uint64),
    )


def encode_pack(rows: Sequence[DiskRows]) -> bytes:
    """The index of a pack."""
    return _encode(PackMeta(contents=[r.extent for r in rows]), None, rows)


def encode_segment(meta: SegmentMeta, packs: PackTable, rows: Sequence[DiskRows]) -> bytes:
    """The index of a segment."""
    return _encode(meta, packs, rows)


def index_bound(meta_bytes: int, packs: int, rows: int, zero_runs: int) -> int:
    """The length that an index with so many packs, rows and zero runs has at most."""
    return 4 + meta_bytes + packs * 72 + rows * (8 + HASH_BYTES) + zero_runs * 8


def _encode(meta: _Strict, packs: PackTable | None, rows: Sequence[DiskRows]) -> bytes:
    parts = [with_metadata(meta)]
    if packs is not None:
        columns = (packs.ids, packs.lengths, packs.index_sha256, packs.first, packs.last)
        parts += [little_endian(column) for column in columns]
    for row in rows:
        parts += [
            little_endian(column) for column in (row.blocks, row.lengths, row.hashes, row.zero_first, row.zero_count)
        ]
    return b"".join(parts)


def decode_pack(index: bytes, frames_end: int) -> list[DiskRows]:
    """The rows of a pack's index; `frames_end` is where its frames end.

    Raises:
        Malformed: it breaks a rule of docs/format.md.
    """
    columns = Columns(index)
    meta = decode_record(columns.metadata(), PackMeta)
    return _decode_rows(columns, meta.contents, frames_end)


def decode_segment(index: bytes, frames_end: int) -> tuple[SegmentMeta, PackTable, list[DiskRows]]:
    """Metadata, packs and rows of a segment's index; `frames_end` is where its frames end.

    Raises:
        Malformed: it breaks a rule of docs/format.md.
    """
    columns = Columns(index)
    meta = decode_record(columns.metadata(), SegmentMeta)
    packs = PackTable(
        ids=columns.rows_of(meta.packs, OBJECT_ID_BYTES),
        lengths=columns.u64(meta.packs),
        index_sha256=columns.rows_of(meta.packs, _SHA256_BYTES),
        first=columns.u64(meta.packs),
        last=columns.u64(meta.packs),
    )
    rows = _decode_rows(columns, meta.contents, frames_end)
    _check_rounds(meta)
    _check_packs(packs, meta.round_bounds)
    if meta.point is not None:
        _check_disks(meta.point)
        check_rows(rows, meta.point.disks)
    elif len(packs) or rows:
        raise Malformed("it has blocks, but is no point")
    return meta, packs, rows


def _decode_rows(columns: Columns, contents: Sequence[Extent], frames_end: int) -> list[DiskRows]:
    if len(contents) > MAX_DISKS:
        raise Malformed(f"it has {len(contents)} disks")
    rows = [
        DiskRows(
            disk=extent.disk,
            blocks=columns.u32(extent.rows),
            lengths=columns.u32(extent.rows),
            hashes=columns.rows_of(extent.rows, HASH_BYTES),
            zero_first=columns.u32(extent.zero_runs),
            zero_count=columns.u32(extent.zero_runs),
        )
        for extent in contents
    ]
    columns.end()
    if any(np.any((r.lengths == 0) | (r.lengths > MAX_FRAME_BYTES)) for r in rows):
        raise Malformed("a frame has a length that no frame has")
    stored = sum(int(r.lengths.sum(dtype=np.uint64)) for r in rows)
    if FRAMES_START + stored != frames_end:
        raise Malformed(f"its frames take {frames_end - FRAMES_START} bytes and its index tells of {stored}")
    return rows


def _check_rounds(meta: SegmentMeta) -> None:
    """Rounds share all packs among them; a single one is not written down."""
    if len(meta.rounds) == 1 or len(meta.rounds) > MAX_ROUNDS or any(count < 1 for count in meta.rounds):
        raise Malformed("its rounds are none, empty or too many")
    if meta.rounds and sum(meta.rounds) != meta.packs:
        raise Malformed(f"its rounds have {sum(meta.rounds)} packs and it lists {meta.packs}")


def _check_packs(packs: PackTable, rounds: Sequence[tuple[int, int]]) -> None:
    """Packs of a round follow each other in the order of the point: a reader finds those it needs by that."""
    if np.any(packs.lengths > MAX_OBJECT_BYTES):
        raise Malformed("it lists a pack that is longer than any object")
    in_order = packs.first[1:] > packs.last[:-1]
    in_order[[end - 1 for _, end in rounds[:-1]]] = True  # a round begins anew
    if np.any(packs.last < packs.first) or not np.all(in_order):
        raise Malformed("its packs are not in order")


def _check_disks(point: PointMeta) -> None:
    names = [d.name for d in point.disks]
    if len(set(names)) != len(names) or len(names) > MAX_DISKS:
        raise Malformed("its disks are not distinct, or too many")
    for disk in point.disks:
        if not is_name(disk.name) or not 0 <= disk.size_bytes <= MAX_DISK_BYTES:
            raise Malformed("a disk has a name or size that no disk has")


def check_rows(rows: Sequence[DiskRows], disks: Sequence[DiskMeta]) -> None:
    """Check that rows lie in order, inside of their disks, and do not overlap.

    Raises:
        Malformed: they do not.
    """
    sizes = {d.name: block_count(d.size_bytes) for d in disks}
    if len({r.disk for r in rows}) != len(rows):
        raise Malformed("it has a disk twice")
    for row in rows:
        if row.disk not in sizes:
            raise Malformed("it has blocks of a disk that the point does not have")
        if not _fits(row, sizes[row.disk]):
            raise Malformed(f"its blocks of disk {row.disk} are not in order, overlap, or lie outside of the disk")


def _fits(row: DiskRows, blocks: int) -> bool:
    first = np.concatenate([row.blocks, row.zero_first]).astype(np.int64)
    last = np.concatenate([row.blocks, row.zero_first.astype(np.int64) + row.zero_count.astype(np.int64) - 1])
    if np.any(last < first) or np.any(last >= blocks):
        return False
    order = np.argsort(first, kind="stable")
    in_order = all(np.all(column[1:] > column[:-1]) for column in (row.blocks, row.zero_first))
    return in_order and bool(np.all(first[order][1:] > last[order][:-1]))


def check_bounds(rows: Sequence[DiskRows], disks: Sequence[DiskMeta], entry: PackEntry) -> None:
    """Check that the rows of a pack, which fit `disks`, lie where the segment that lists it says.

    Raises:
        Malformed: they do not: a reader who looks for them would pass the pack over.
    """
    numbers = {d.name: n for n, d in enumerate(disks)}
    for row in rows:
        ends = row.zero_first.astype(np.int64) + row.zero_count - 1
        held = np.concatenate([row.blocks[:1], row.blocks[-1:], row.zero_first[:1], ends[-1:]]).tolist()
        positions = [position(numbers[row.disk], int(block)) for block in held]
        if any(not entry.first <= at <= entry.last for at in positions):
            raise Malformed(f"it has blocks of disk {row.disk} outside of where its segment says")
