"""Ships a capture: its layers become packs and one segment, which commits the point.

    layers ─▶ changes ─▶ plans (512 blocks each) ─▶ encode ─▶ pack ─▶ store     several at once
                              the last plan      ─▶ encode ─▶ segment ─▶ store  when all packs are there

A worker has one workspace: it reads pieces of 1 MiB, leaves out zeros, hashes,
compresses and encrypts into one buffer, and stores that buffer. So memory is
bounded by the number of workspaces, whatever the size of disk and change, and
while some workers wait for the line, others encode.
"""

import os
import queue
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import numpy as np

from drsync.changes import PIECE_BLOCKS, Change, changes_of, differences, nonzero_rows
from drsync.direct import aligned_buffer
from drsync.encode import Frames, RowsBuilder, store_pack
from drsync.errors import PointUnwritable
from drsync.format import Malformed, seal
from drsync.format.frame import MAX_FRAME_BYTES, FrameSealer
from drsync.format.segment import (
    DiskMeta,
    DiskRows,
    PackEntry,
    PointMeta,
    decode_segment,
    encode_segment,
    index_bound,
    pack_table,
    position,
)
from drsync.image import PointImage
from drsync.log import Segment
from drsync.model import BLOCK_SIZE, Kind, Progress
from drsync.qcow2 import TABLE_BLOCKS
from drsync.repository import VmObjects
from drsync.source.layer import Layer
from drsync.spooled import SpooledCapture, SpooledDisk
from drsync.writer import LogWriter

_CHANGE_ZERO_RUNS: Final = TABLE_BLOCKS // 2  # of a table whose every other block is zero


@dataclass(frozen=True, slots=True, kw_only=True)
class ShipLimits:
    """How much goes into one object, and how much at once."""

    object_blocks: int = 512
    """Blocks in one object, at most: 32 MiB of disk (docs/decisions/0001-object-size.md)."""
    object_zero_runs: int = 65536
    """An object with so many zero runs takes no more."""
    workers: int = 4

    @property
    def object_bytes(self) -> int:
        """What an object can take, at most."""
        runs = self.object_zero_runs + _CHANGE_ZERO_RUNS + self.object_blocks
        index = index_bound(65536, 0, self.object_blocks, runs)
        return seal.FRAMES_START + self.object_blocks * MAX_FRAME_BYTES + seal.sealed_bound(index)


USUAL: Final = ShipLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShipDisk:
    """A disk of the capture that is shipped."""

    number: int
    spooled: SpooledDisk
    kind: Kind
    layer: Layer
    from_nothing: bool
    """There is nothing below what the layer holds, so zeros need not be told."""


@dataclass(slots=True)
class _Plan:
    """What one object will hold: parts of disks, in the order of the point."""

    limits: ShipLimits
    parts: list[tuple[ShipDisk, Change]] = field(default_factory=list)
    blocks: int = 0
    runs: int = 0

    @property
    def room(self) -> int:
        """How many more blocks fit."""
        return self.limits.object_blocks - self.blocks if self.runs < self.limits.object_zero_runs else 0

    def add(self, disk: ShipDisk, change: Change) -> None:
        self.parts.append((disk, change))
        self.blocks += len(change.blocks)
        self.runs += len(change.zero_first)

    def bounds(self) -> tuple[int, int]:
        """The positions that everything in this plan lies between."""
        (first_disk, first), (last_disk, last) = self.parts[0], self.parts[-1]
        low = min(int(first.blocks[0]) if len(first.blocks) else 2**32, *first.zero_first[:1].tolist(), 2**32)
        ends = (last.zero_first + last.zero_count - 1)[-1:].tolist()
        high = max(int(last.blocks[-1]) if len(last.blocks) else 0, *ends, 0)
        return position(first_disk.number, low), position(last_disk.number, high)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShippedPack:
    """A pack that is in the store; `entry` None: everything in it was zero, so it was not needed."""

    entry: PackEntry | None
    changed_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """The frames of an object, in a workspace, and the rows that describe them."""

    rows: Sequence[DiskRows]
    frames_end: int
    changed_bytes: Mapping[str, int]


class _Workspace:
    """The buffers of one worker."""

    def __init__(self, limits: ShipLimits) -> None:
        self.out = aligned_buffer(limits.object_bytes)
        self.raw = aligned_buffer(PIECE_BLOCKS * BLOCK_SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeded:
    """What was sent before the capture, read live (docs/decisions/0004-seed.md): the capture lies over it."""

    rounds: Sequence[Sequence[PackEntry]]
    """Each in the order of the point, a later one over an earlier one."""
    kinds: Mapping[str, Kind]
    changed_bytes: Mapping[str, int]


def ship(
    capture: SpooledCapture,
    layers: Mapping[str, Layer],
    writer: LogWriter,
    before: PointImage | None,
    progress: Progress,
    limits: ShipLimits = USUAL,
    seeded: Seeded | None = None,
) -> Segment:
    """Commit a capture as the next point of its VM's log; the committed segment.

    `before` is the point before, needed where a disk is read again as a whole;
    None if there is none, or if everything shall be sent. With `seeded`, the
    capture holds just what changed since that was read. When this raises,
    nothing was committed (StoreUnavailable: see LogWriter.append) and the same
    capture can be shipped again.

    Raises:
        LayerDamaged: a layer is not what QEMU wrote.
        Fenced: another drsync took the VM over.
        PointUnwritable: it is beyond a limit of the format.
        StoreError: an object could not be stored.
    """
    disks: list[ShipDisk] = []
    for number, disk in enumerate(capture.disks):
        kind = seeded.kinds[disk.name] if seeded is not None else _kind(disk, before)
        from_nothing = kind is Kind.FULL and seeded is None
        disks.append(
            ShipDisk(number=number, spooled=disk, kind=kind, layer=layers[disk.name], from_nothing=from_nothing)
        )
    return _Shipment(capture, disks, writer, before, progress, limits, seeded).run()


def commit_rounds(writer: LogWriter, point: PointMeta, rounds: Sequence[Sequence[PackEntry]]) -> Segment:
    """Commit a point whose blocks are all in packs that were sent before; the committed segment.

    Whoever calls has just seen that every pack is there (docs/format.md, F18).

    Raises:
        Fenced, PointUnwritable, StoreError: as `ship`.
    """
    objects = writer.log.objects
    header = objects.new_header("segment", writer.next_seq)
    entries = list(chain.from_iterable(rounds))
    meta = writer.meta(point, len(entries), [], rounds=[len(round_) for round_ in rounds])
    index = encode_segment(meta, pack_table(entries), [])
    try:
        decode_segment(index, seal.FRAMES_START)  # what no reader would take must not be committed
        buffer, sealed = objects.seal_alone(header, index)
    except Malformed as err:
        raise PointUnwritable(vm=objects.vm, problem=err) from err
    return writer.append(buffer, sealed)


def _kind(disk: SpooledDisk, before: PointImage | None) -> Kind:
    if not disk.full:
        return Kind.INCREMENTAL
    known = before is not None and disk.name in {d.name for d in before.point.disks}
    return Kind.RESYNC if known else Kind.FULL


class _Shipment:
    """One run of `ship`."""

    def __init__(
        self,
        capture: SpooledCapture,
        disks: Sequence[ShipDisk],
        writer: LogWriter,
        before: PointImage | None,
        progress: Progress,
        limits: ShipLimits,
        seeded: Seeded | None,
    ) -> None:
        self._limits = limits
        self._seeded = seeded
        self._capture = capture
        self._disks = disks
        self._writer = writer
        self._objects: VmObjects = writer.log.objects
        self._before = before
        self._progress = progress
        # Without it all workers encode at once, slowly, and then wait for the store at once. Taking turns keeps
        # both busy: 12 % less time for 256 MiB into a directory, on 2 processors.
        self._processors = threading.BoundedSemaphore(len(os.sched_getaffinity(0)))

    def run(self) -> Segment:
        workspaces: queue.SimpleQueue[_Workspace] = queue.SimpleQueue()
        for _ in range(self._limits.workers + 1):  # one more: the segment is encoded while packs are on their way
            workspaces.put(_Workspace(self._limits))
        with ThreadPoolExecutor(self._limits.workers, thread_name_prefix="ship") as workers:
            pending: deque[Future[_ShippedPack]] = deque()
            shipped: list[_ShippedPack] = []
            try:
                plans = self._plans()
                plan = next(plans)
                for following in plans:
                    pending.append(workers.submit(self._ship_pack, plan, workspaces, workspaces.get()))
                    while pending and pending[0].done():  # raises what it failed with
                        shipped.append(pending.popleft().result())
                    plan = following
                return self._ship_segment(plan, workspaces.get(), chain(shipped, map(Future.result, pending)))
            finally:
                for future in pending:
                    future.cancel()

    def _plans(self) -> Iterator[_Plan]:
        """The objects to make; always at least one, and the last one becomes the segment."""
        plan = _Plan(self._limits)
        for disk in self._disks:
            for change in self._changes(disk):
                rest: Change | None = change
                while rest is not None:
                    if plan.room == 0:
                        yield plan
                        plan = _Plan(self._limits)
                    part, rest = _take(rest, plan.room)
                    plan.add(disk, part)
        yield plan

    def _changes(self, disk: ShipDisk) -> Iterator[Change]:
        if self._seeded is None and disk.kind is Kind.RESYNC and self._before is not None:
            sealer = FrameSealer(self._objects.object_keys(self._objects.new_header("pack")))
            return differences(disk.layer, disk.spooled.name, disk.spooled.size_bytes, self._before, sealer)
        return changes_of(disk.layer, full=disk.from_nothing)

    def _ship_pack(
        self, plan: _Plan, workspaces: "queue.SimpleQueue[_Workspace]", workspace: _Workspace
    ) -> _ShippedPack:
        try:
            header = self._objects.new_header("pack")
            with self._processors:
                encoded = self._encode(plan, header, workspace)
            if not any(len(r.blocks) or len(r.zero_first) for r in encoded.rows):
                return _ShippedPack(entry=None, changed_bytes={})
            first, last = plan.bounds()
            entry = store_pack(
                self._objects, header, workspace.out, encoded.frames_end, encoded.rows, first=first, last=last
            )
        finally:
            workspaces.put(workspace)
        return _ShippedPack(entry=entry, changed_bytes=encoded.changed_bytes)

    def _ship_segment(self, plan: _Plan, workspace: _Workspace, shipped: Iterable[_ShippedPack]) -> Segment:
        header = self._objects.new_header("segment", self._writer.next_seq)
        with self._processors:
            encoded = self._encode(plan, header, workspace)
        packs = list(shipped)  # waits: every pack is stored before the segment that lists it
        entries = [pack.entry for pack in packs if pack.entry is not None]
        changed = Counter(encoded.changed_bytes)
        for pack in packs:
            changed.update(pack.changed_bytes)
        rounds = [entries]
        if self._seeded is not None:
            changed.update(self._seeded.changed_bytes)
            rounds = [list(round_) for round_ in (*self._seeded.rounds, entries) if round_]
            entries = list(chain.from_iterable(rounds))
        meta = self._writer.meta(
            self._point(changed), len(entries), encoded.rows, rounds=[len(round_) for round_ in rounds]
        )
        index = encode_segment(meta, pack_table(entries), encoded.rows)
        out = _with_room(workspace.out, encoded.frames_end, seal.sealed_bound(len(index)))
        try:
            decode_segment(index, encoded.frames_end)  # what no reader would take must not be committed
            sealed = seal.seal(out, encoded.frames_end, header, index, self._objects.object_keys(header))
        except Malformed as err:
            raise PointUnwritable(vm=self._objects.vm, problem=err) from err
        return self._writer.append(out, sealed)

    def _point(self, changed_bytes: Mapping[str, int]) -> PointMeta:
        return PointMeta(
            capture=self._capture.capture,
            base=self._capture.base if any(d.kind is Kind.INCREMENTAL for d in self._disks) else None,
            time=self._capture.time,
            consistency=self._capture.consistency,
            definition=self._capture.definition,
            disks=[
                DiskMeta(
                    name=d.spooled.name,
                    size_bytes=d.spooled.size_bytes,
                    kind=d.kind,
                    reason=d.spooled.reason,
                    changed_bytes=changed_bytes.get(d.spooled.name, 0),
                    persistent_bitmap=d.spooled.persistent_bitmap,
                )
                for d in self._disks
            ],
        )

    def _encode(self, plan: _Plan, header: seal.Header, workspace: _Workspace) -> _Encoded:
        frames = Frames(self._objects, header, workspace.out)
        builders: dict[int, RowsBuilder] = {}
        for disk, change in plan.parts:
            builder = builders.setdefault(disk.number, RowsBuilder(disk.spooled.name, disk.spooled.size_bytes))
            self._encode_change(disk, change, builder, frames, workspace.raw)
        found = [builders[number] for number in sorted(builders)]
        return _Encoded(
            rows=[builder.rows() for builder in found],
            frames_end=frames.end,
            changed_bytes={builder.disk: builder.changed_bytes for builder in found},
        )

    def _encode_change(
        self, disk: ShipDisk, change: Change, builder: RowsBuilder, frames: Frames, buffer: memoryview
    ) -> None:
        """Read a change's blocks from the layer, and seal those that hold anything."""
        builder.note_zeros(change.zero_first.tolist(), change.zero_count.tolist())
        for start in range(0, len(change.blocks), PIECE_BLOCKS):
            blocks = change.blocks[start : start + PIECE_BLOCKS]
            raw = buffer[: len(blocks) * BLOCK_SIZE]
            disk.layer.read_blocks(change.offsets[start : start + PIECE_BLOCKS], raw)
            data = nonzero_rows(raw, len(blocks))
            for row in np.flatnonzero(data).tolist():
                builder.seal(int(blocks[row]), raw[row * BLOCK_SIZE : (row + 1) * BLOCK_SIZE], frames)
            if not disk.from_nothing:
                builder.note_zeros(blocks[~data].tolist(), [1] * int((~data).sum()))
            self._progress.advance(len(raw))


def _take(change: Change, room: int) -> tuple[Change, Change | None]:
    """The first `room` blocks of a change, and what is left of it.

    A zero run goes with the blocks before it, so that the parts, and then the
    packs, follow each other without overlapping.
    """
    if len(change.blocks) <= room:
        return change, None
    runs = int(np.searchsorted(change.zero_first, change.blocks[room]))
    return _part(change, slice(None, room), slice(None, runs)), _part(change, slice(room, None), slice(runs, None))


def _part(change: Change, blocks: slice, runs: slice) -> Change:
    return Change(
        blocks=change.blocks[blocks],
        offsets=change.offsets[blocks],
        zero_first=change.zero_first[runs],
        zero_count=change.zero_count[runs],
    )


def _with_room(buffer: memoryview, used: int, room: int) -> memoryview:
    """`buffer`, or a larger copy of its first `used` bytes if `room` more don't fit (a segment of very many packs)."""
    if used + room <= len(buffer):
        return buffer
    larger = memoryview(bytearray(used + room))
    larger[:used] = buffer[:used]
    return larger
