"""Copies what is alive of a run into new packs, and writes the merged segment that takes the run's place.

    live rows, by disk and block ─▶ read, open, compare with their hash ─▶ packs of 512 blocks ─▶ merged segment
                                                                              └── each is read back ──┘

Nothing that is stored is changed, and nothing reads the new objects before a horizon names them.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from drsync.direct import aligned_buffer
from drsync.encode import Frames, RowsBuilder, store_pack
from drsync.errors import ObjectDamaged
from drsync.format import Malformed, names, seal
from drsync.format.frame import FrameOpener, disk_binding
from drsync.format.segment import (
    DiskRows,
    PackEntry,
    PointMeta,
    SegmentMeta,
    decode_segment,
    encode_segment,
    pack_table,
    position,
)
from drsync.horizon import Merged
from drsync.log import Log
from drsync.model import Progress, block_length
from drsync.packs import pack_rows
from drsync.prune.liveness import Life, LinkLife
from drsync.prune.planning import PACK_BLOCKS, Run, kept_packs
from drsync.repository import VmObjects
from drsync.ship import ShipLimits
from drsync.units import MiB
from drsync.window import place

_GAP_BYTES: Final = 64 * 1024
_CACHE_BYTES: Final = 128 * MiB
"""Of what was read: the live blocks of neighbours in the log lie in a few objects, each is read once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """A block that is copied."""

    disk: int
    block: int
    offset: int
    length: int
    digest: bytes
    source: "_Source"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Source:
    """An object that blocks are copied out of."""

    name: str
    object_id: bytes
    generation: int
    parts: Sequence[tuple[int, int]]
    """Where the live frames are, from and to, neighbours joined."""

    @property
    def size_bytes(self) -> int:
        return sum(end - start for start, end in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A run, and what takes its place."""

    run: Run
    merged: Merged
    packs: Sequence[bytes]
    """The ids of the new packs."""


def replace_run(log: Log, run: Run, progress: Progress) -> Replacement:
    """Store what takes the place of a run; it was read back and says what the run said.

    Raises:
        ObjectDamaged, ObjectMissing: what is to be copied is not as it was written; nothing was changed.
        StoreError: it could not be stored, or read.
    """
    disks = _point_of(run)
    copied = list(_Copying(log.objects, run, progress).packs()) if disks is not None else []
    entries, rounds = _kept(run)
    if copied:
        entries, rounds = entries + copied, [*rounds, len(copied)]
    merged = _store_merged(log, run, entries, rounds)
    return Replacement(run=run, merged=merged, packs=[entry.object_id for entry in copied])


def _point_of(run: Run) -> PointMeta | None:
    """What the run is in the chain: it continues what its first point does, and is continued as its last one."""
    points = [life.link.meta.point for life in run.links if life.link.meta.point is not None]
    if not points:
        return None
    first, last = points[0], points[-1]
    disks = [msgspec.structs.replace(d, changed_bytes=0, reason="") for d in first.disks]
    return msgspec.structs.replace(last, base=first.base, disks=disks, definition={})


def _kept(run: Run) -> tuple[list[PackEntry], list[int]]:
    """The packs that stay, in their order, and how many each round has."""
    entries: list[PackEntry] = []
    rounds: list[int] = []
    for life in run.links:
        kept = kept_packs(life)
        for start, end in life.link.meta.round_bounds:
            of_round = [n for n in kept if start <= n < end]
            entries += [life.link.packs.entry(n) for n in of_round]
            rounds += [len(of_round)] if of_round else []
    return entries, rounds


def _zeros(run: Run) -> list[DiskRows]:
    """The zero runs that are alive, which the merged segment holds itself."""
    point = _point_of(run)
    builders = {d.name: RowsBuilder(d.name, d.size_bytes) for d in (point.disks if point is not None else [])}
    for _, life in run.copied:
        for disk, rows in life.rows.items():
            builders[disk].note_zeros(rows.zero_first, rows.zero_count)
    return [builder.rows() for builder in builders.values() if builder.zero_runs]


def _store_merged(log: Log, run: Run, entries: Sequence[PackEntry], rounds: Sequence[int]) -> Merged:
    objects, first, last = log.objects, run.links[0].link, run.links[-1].link
    rows = _zeros(run)
    meta = SegmentMeta(
        seq=last.seq,
        epoch=last.meta.epoch,
        writer=last.meta.writer,
        previous=first.meta.previous,
        point=_point_of(run),
        packs=len(entries),
        contents=[r.extent for r in rows],
        rounds=list(rounds) if len(rounds) > 1 else [],
    )
    index = encode_segment(meta, pack_table(entries), rows)
    header = objects.new_header("merged", last.seq, generation=last.generation)  # F48
    object_id = bytes.fromhex(header.object)
    name = names.merged(objects.vm, last.seq, object_id)
    try:
        decode_segment(index, seal.FRAMES_START)  # what no reader would take must not be stored
        buffer, sealed = objects.seal_alone(header, index)
    except Malformed as err:
        raise ObjectDamaged(key=name, problem=err) from err
    objects.store.create(name, buffer[: sealed.length], sha256=sealed.sha256)
    merged = Merged(
        first=run.first,
        last=run.last,
        object_id=object_id,
        index_sha256=sealed.index_sha256,
        segment_sha256=last.index_sha256,
    )
    if log.read_merged(merged).meta != meta:
        raise ObjectDamaged(key=name, problem="it is not what was just written")
    return merged


class _Copying:
    """The blocks of one run on their way into new packs."""

    def __init__(self, objects: VmObjects, run: Run, progress: Progress) -> None:
        self._objects = objects
        self._progress = progress
        point = _point_of(run)
        self._disks = point.disks if point is not None else []
        self._bindings = [disk_binding(objects.repository_id, d.name) for d in self._disks]
        self._blocks = sorted(self._of(run), key=lambda b: (b.disk, b.block))
        self._out = aligned_buffer(ShipLimits(object_blocks=PACK_BLOCKS).object_bytes)
        self._read: OrderedDict[_Source, Mapping[int, bytes]] = OrderedDict()

    def packs(self) -> Iterator[PackEntry]:
        """Store the packs, in the order of the point; the entries under which a segment lists them."""
        for at in range(0, len(self._blocks), PACK_BLOCKS):
            blocks = self._blocks[at : at + PACK_BLOCKS]
            entry = self._store(blocks)
            self._check(entry, blocks)
            yield entry

    def _of(self, run: Run) -> Iterator[_Block]:
        numbers = {d.name: n for n, d in enumerate(self._disks)}
        for link, life in run.copied:
            source = self._source(link, life)
            for disk, rows in life.rows.items():
                columns = (rows.blocks.tolist(), rows.offsets.tolist(), rows.lengths.tolist(), rows.hashes)
                for block, offset, length, digest in zip(*columns, strict=True):
                    yield _Block(
                        disk=numbers[disk],
                        block=block,
                        offset=offset,
                        length=length,
                        digest=digest.tobytes(),
                        source=source,
                    )

    def _source(self, link: LinkLife, life: Life) -> _Source:
        if life.entry is None:
            name, object_id, generation = link.link.name, link.link.object_id, link.link.generation
        else:
            name, object_id = names.pack(self._objects.vm, life.entry.object_id), life.entry.object_id
            generation = self._objects.generation_of(name, "pack")
        starts = np.concatenate([r.offsets for r in life.rows.values()]).astype(np.int64)
        ends = starts + np.concatenate([r.lengths for r in life.rows.values()])
        return _Source(
            name=name,
            object_id=object_id,
            generation=generation,
            parts=_joined(sorted(zip(starts.tolist(), ends.tolist(), strict=True))),
        )

    def _store(self, blocks: Sequence[_Block]) -> PackEntry:
        header = self._objects.new_header("pack")
        frames = Frames(self._objects, header, self._out)
        builders: dict[int, RowsBuilder] = {}
        for block in blocks:
            disk = self._disks[block.disk]
            builder = builders.setdefault(block.disk, RowsBuilder(disk.name, disk.size_bytes))
            builder.seal(block.block, memoryview(self._plain(block)), frames, block.digest)
        first, last = blocks[0], blocks[-1]
        return store_pack(
            self._objects,
            header,
            self._out,
            frames.end,
            [builders[number].rows() for number in sorted(builders)],
            first=position(first.disk, first.block),
            last=position(last.disk, last.block),
        )

    def _plain(self, block: _Block) -> bytes:
        """A block's bytes, which match its hash.

        Raises:
            ObjectDamaged: it is not as it was written.
        """
        frame = self._frame(block)
        opener = FrameOpener(self._objects.keys_of(block.source.object_id, block.source.generation))
        length = block_length(block.block, self._disks[block.disk].size_bytes)
        try:
            plain = opener.open(frame, block.offset, self._bindings[block.disk], block.block, length)
            if opener.hash_block(plain) != block.digest:
                raise Malformed(f"block {block.block} does not match its hash")
        except Malformed as err:
            raise ObjectDamaged(key=block.source.name, problem=err) from err
        self._progress.advance(block.length)
        return plain

    def _frame(self, block: _Block) -> memoryview:
        source = block.source
        parts = self._read.get(source)
        if parts is None:
            get = self._objects.store.get_range
            parts = {start: get(source.name, start, end - start) for start, end in source.parts}
            self._read[source] = parts
            while len(self._read) > 1 and sum(s.size_bytes for s in self._read) > _CACHE_BYTES:
                self._read.popitem(last=False)
        self._read.move_to_end(source)
        start = max(at for at in parts if at <= block.offset)
        return memoryview(parts[start])[block.offset - start : block.offset - start + block.length]

    def _check(self, entry: PackEntry, blocks: Sequence[_Block]) -> None:
        """Read a pack back: it must be what its entry says, and hold these blocks.

        Raises:
            ObjectDamaged: it does not; the sources are there still.
        """
        name = names.pack(self._objects.vm, entry.object_id)
        data = self._objects.store.get(name, limit_bytes=seal.MAX_OBJECT_BYTES)
        opened = self._objects.open_whole(name, "pack", data)
        placed = place(pack_rows(name, opened, entry, self._disks))
        opener = FrameOpener(self._objects.object_keys(opened.header))
        numbers = {d.name: n for n, d in enumerate(self._disks)}
        found: dict[tuple[int, int], bytes] = {}
        for disk, held in placed.items():
            number = numbers[disk]
            columns = (held.rows.blocks.tolist(), held.offsets.tolist(), held.rows.lengths.tolist())
            for block, offset, length in zip(*columns, strict=True):
                size = block_length(block, self._disks[number].size_bytes)
                frame = memoryview(data)[offset : offset + length]
                try:
                    plain = opener.open(frame, offset, self._bindings[number], block, size)
                except Malformed as err:
                    raise ObjectDamaged(key=name, problem=err) from err
                found[number, block] = opener.hash_block(plain)
        if found != {(b.disk, b.block): b.digest for b in blocks}:
            raise ObjectDamaged(key=name, problem="it does not hold what was just copied into it")


def _joined(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Parts of an object that one request each brings: what lies close together is one."""
    joined: list[tuple[int, int]] = []
    for start, end in parts:
        if joined and start - joined[-1][1] <= _GAP_BYTES:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
