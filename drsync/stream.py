"""Streams one round of a seed: what is read live goes straight into packs, and is noted in the journal.

    planner     presence, what is known ─▶ spans of a disk ─┐ one a worker
    worker      read ─▶ zeros? hash ─▶ as known? ─▶ frames ─▶ pack ─▶ store ─▶ journal

A worker has its own connection and buffers; while some wait for the line, others
read and encode. So memory is bounded by the number of workers, whatever the size of
the disk. Packs do not overlap: each holds blocks of one stretch of one disk.

Where something is known of a disk that is read as a whole (the point before, earlier
rounds), a block whose keyed hash is as known is not sent, and one that holds nothing any
more becomes a zero run.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from drsync.changes import nonzero_rows, zero_runs
from drsync.direct import aligned_buffer
from drsync.encode import Frames, RowsBuilder, store_pack
from drsync.format.columns import Bytes2D
from drsync.image import PointImage
from drsync.journal import Journal, PackRecord, RoundDisk, RoundState, Stretch
from drsync.model import BLOCK_SIZE, Progress, block_length
from drsync.repository import VmObjects
from drsync.ship import USUAL, ShipLimits
from drsync.source import Flags, LiveReader, LiveView, Numbers
from drsync.window import NOWHERE, WINDOW_BLOCKS, Window

COMPARED_WINDOWS: Final = 8
"""Windows of a span whose blocks are compared: few differ, and each span ends with a pack of its own."""


class Stopped(Exception):
    """The seed was asked to stop; what was noted stays, the rest is read again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Blocks `first` to `end - 1` of a disk, within one window; arrays have one element a block."""

    first: int
    end: int
    blocks: Numbers
    """Those to be read."""
    zeros: Flags
    """Those that read as zeros, and have to be told: something else is known of them, or may be."""
    tell: Flags
    """Those that have to be told if they are read and hold nothing."""
    known: Flags
    hashes: Bytes2D | None
    """What the known ones hold; None: nothing is compared."""


@dataclass(slots=True)
class _Span:
    """What a worker is given: neighbouring parts of a disk."""

    disk: RoundDisk
    parts: list[_Part] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        return sum(len(part.blocks) for part in self.parts)


class _Bench:
    """What one worker works with; it goes from thread to thread, but is used by one at a time."""

    def __init__(self, view: LiveView, limits: ShipLimits) -> None:
        self.out = aligned_buffer(limits.object_bytes)
        self._view = view
        self._disk = ""
        self._reader: LiveReader | None = None

    def reader(self, disk: str) -> LiveReader:
        if self._reader is None or disk != self._disk:
            self.close()
            self._reader, self._disk = self._view.reader(disk), disk
        return self._reader

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class Streaming:
    """One run of a round, from what the journal says is missing to its end."""

    def __init__(
        self,
        objects: VmObjects,
        journal: Journal,
        view: LiveView,
        known: PointImage | None,
        *,
        progress: Progress,
        stop: Callable[[], bool],
        limits: ShipLimits = USUAL,
        step: str = "seed",
    ) -> None:
        """`known` is what the point before and the packs of the journal come to; None if nothing is compared.

        `step` is what progress is told under.
        """
        self._objects = objects
        self._journal = journal
        self._view = view
        self._known = known
        self._progress = progress
        self._stop = stop
        self._limits = limits
        self._step = step
        self._failed = threading.Event()
        self._cause: BaseException | None = None
        """What the first worker failed with; the others are stopped by it."""

    def run(self, state: RoundState) -> None:
        """Read what the round has not read yet.

        Raises:
            Stopped: it was asked to; what is in the journal needs not be done again.
            SourceError, StoreError, SpoolError: likewise.
        """
        self._progress.start(self._step, max(0, state.total_bytes - state.read_bytes))
        benches: queue.SimpleQueue[_Bench] = queue.SimpleQueue()
        made = [_Bench(self._view, self._limits) for _ in range(self._limits.workers)]
        for bench in made:
            benches.put(bench)
        try:
            with ThreadPoolExecutor(self._limits.workers, thread_name_prefix="seed") as workers:
                self._feed(state, workers, benches)
        except Stopped:
            if self._cause is not None:
                raise self._cause from None
            raise
        finally:
            for bench in made:
                bench.close()

    def _feed(self, state: RoundState, workers: ThreadPoolExecutor, benches: "queue.SimpleQueue[_Bench]") -> None:
        pending: deque[Future[None]] = deque()
        try:
            for span in self._spans(state):
                pending.append(workers.submit(self._work, span, benches, benches.get()))
                while pending and pending[0].done():
                    pending.popleft().result()  # raises what it failed with
            for future in pending:
                future.result()
        except BaseException:
            self._failed.set()
            for future in pending:
                future.cancel()
            raise

    def _check_stop(self) -> None:
        if self._failed.is_set() or self._stop():
            raise Stopped

    # What is to be read

    def _spans(self, state: RoundState) -> Iterator[_Span]:
        for disk in state.begun.disks:
            missing = state.missing(disk)
            if not missing:
                continue
            reader = self._view.reader(disk.name)
            try:
                for first, end in missing:
                    yield from self._spans_of(disk, reader, first, end)
            finally:
                reader.close()

    def _spans_of(self, disk: RoundDisk, reader: LiveReader, first: int, end: int) -> Iterator[_Span]:
        compares = self._is_compared(disk)
        span, windows = _Span(disk), 0
        for part in self._parts(disk, reader, first, end):
            self._check_stop()
            if compares:
                span.parts.append(part)
                windows += 1
                if windows == COMPARED_WINDOWS:
                    yield span
                    span, windows = _Span(disk), 0
                continue
            rest: _Part | None = part
            while rest is not None:
                head, rest = _cut(rest, self._limits.object_blocks - span.blocks)
                span.parts.append(head)
                if rest is not None or span.blocks == self._limits.object_blocks:
                    yield span
                    span = _Span(disk)
        if span.parts:
            yield span

    def _is_compared(self, disk: RoundDisk) -> bool:
        return disk.whole and self._known is not None and disk.name in {d.name for d in self._known.point.disks}

    def _parts(self, disk: RoundDisk, reader: LiveReader, first: int, end: int) -> Iterator[_Part]:
        """One part a window, up to `end`."""
        indexes = range(first // WINDOW_BLOCKS, -(-end // WINDOW_BLOCKS))
        windows = self._known_windows(disk, indexes)
        for index in indexes:
            low = max(first, index * WINDOW_BLOCKS)
            high = min(end, (index + 1) * WINDOW_BLOCKS)
            yield _part(reader, low, high, next(windows), dirty=not disk.whole)

    def _known_windows(self, disk: RoundDisk, indexes: range) -> Iterator[Window | None]:
        """What is known of each window; None where nothing is."""
        if self._is_compared(disk) and self._known is not None:
            there = range(indexes.start, min(indexes.stop, self._known.window_count(disk.name)))
            yield from self._known.windows(disk.name, there)
        while True:
            yield None

    # Reading it

    def _work(self, span: _Span, benches: "queue.SimpleQueue[_Bench]", bench: _Bench) -> None:
        try:
            _Packing(self, span, bench).run()
        except BaseException as err:
            if self._cause is None and not isinstance(err, Stopped):
                self._cause = err
            self._failed.set()
            bench.close()  # what it had on its way must not wait until the others have ended, which may be at the line
            raise
        finally:
            benches.put(bench)

    @property
    def objects(self) -> VmObjects:
        return self._objects

    @property
    def limits(self) -> ShipLimits:
        return self._limits

    def read_some(self, read_bytes: int) -> None:
        """A worker has read so much more.

        Raises:
            Stopped: the seed was asked to stop, or another worker failed.
        """
        self._progress.advance(read_bytes)
        self._check_stop()

    def note(self, stretch: Stretch) -> None:
        self._journal.append(stretch)


class _Packing:
    """A span on its way into packs: usually one."""

    def __init__(self, streaming: Streaming, span: _Span, bench: _Bench) -> None:
        self._streaming = streaming
        self._disk = span.disk
        self._parts = span.parts
        self._bench = bench
        self._reader = bench.reader(span.disk.name)
        self._begun = span.parts[0].first
        self._read_bytes = 0
        self._begin_pack()

    def _begin_pack(self) -> None:
        self._frames = Frames(self._streaming.objects, self._streaming.objects.new_header("pack"), self._bench.out)
        self._rows = RowsBuilder(self._disk.name, self._disk.size_bytes)

    def run(self) -> None:
        for part in self._parts:
            self._add(part)
            if self._rows.zero_runs >= self._streaming.limits.object_zero_runs:
                self._finish_pack(part.end)
        if self._begun < self._parts[-1].end:
            self._finish_pack(self._parts[-1].end)

    def _add(self, part: _Part) -> None:
        zeros = part.zeros.copy()
        told = part.first  # zeros of blocks before this one are told
        for blocks, raw in self._reader.read(part.blocks):
            data = nonzero_rows(raw, len(blocks))
            at = blocks - part.first
            zeros[at[~data]] = part.tell[at[~data]]
            for row in np.flatnonzero(data).tolist():
                block, plain = int(blocks[row]), raw[row * BLOCK_SIZE : (row + 1) * BLOCK_SIZE]
                digest = self._digest(block, plain)
                if self._is_known(part, block - part.first, digest):
                    continue
                if len(self._rows) == self._streaming.limits.object_blocks:
                    self._note_zeros(zeros, part.first, told, block)
                    told = block
                    self._finish_pack(block)
                self._rows.seal(block, plain, self._frames, digest)
            self._read_bytes += len(blocks) * BLOCK_SIZE
            self._streaming.read_some(len(blocks) * BLOCK_SIZE)
        self._note_zeros(zeros, part.first, told, part.end)

    def _digest(self, block: int, plain: memoryview) -> bytes:
        return self._frames.hash_block(plain[: block_length(block, self._disk.size_bytes)])

    @staticmethod
    def _is_known(part: _Part, index: int, digest: bytes) -> bool:
        return part.hashes is not None and bool(part.known[index]) and part.hashes[index].tobytes() == digest

    def _note_zeros(self, zeros: Flags, first: int, start: int, end: int) -> None:
        runs, counts = zero_runs(zeros[start - first : end - first], start)
        self._rows.note_zeros(runs.tolist(), counts.tolist())

    def _finish_pack(self, end: int) -> None:
        """Store what was gathered of the blocks before `end`, and note it."""
        rows = self._rows.rows()
        record: PackRecord | None = None
        if len(rows.blocks) or len(rows.zero_first):
            self._reader.settle()  # the line may take its time
            entry = store_pack(
                self._streaming.objects,
                self._frames.header,
                self._bench.out,
                self._frames.end,
                [rows],
                first=self._begun,
                last=end - 1,
            )
            record = PackRecord(
                object_id=entry.object_id.hex(), length=entry.length, index_sha256=entry.index_sha256.hex()
            )
        self._streaming.note(
            Stretch(
                disk=self._disk.name,
                first=self._begun,
                end=end,
                read_bytes=self._read_bytes,
                changed_bytes=self._rows.changed_bytes,
                pack=record,
            )
        )
        self._begun, self._read_bytes = end, 0
        self._begin_pack()


def _part(reader: LiveReader, first: int, end: int, known: Window | None, *, dirty: bool) -> _Part:
    """What is to be read of the blocks `first` to `end - 1`, which lie in one window."""
    count = end - first
    presence = reader.presence(first, count)
    had = np.zeros(count, np.bool_)
    hashes: Bytes2D | None = None
    if known is not None:
        at = first - known.first_block
        there = known.containers[at : at + count] != NOWHERE
        had[: len(there)] = there
        hashes = np.zeros((count, known.hashes.shape[1]), np.uint8)
        hashes[: len(there)] = known.hashes[at : at + count]
    tell = np.ones(count, np.bool_) if dirty else had
    if not np.any(presence.holds) and not np.any(presence.zeros & tell):  # takes no room: a span may have thousands
        nothing = np.zeros(0, np.bool_)
        empty = np.zeros(0, np.int64)
        return _Part(first=first, end=end, blocks=empty, zeros=nothing, tell=nothing, known=nothing, hashes=None)
    return _Part(
        first=first,
        end=end,
        blocks=np.flatnonzero(presence.holds) + first,
        zeros=presence.zeros & tell,
        tell=tell,
        known=had,
        hashes=hashes,
    )


def _cut(part: _Part, room: int) -> tuple[_Part, _Part | None]:
    """The part up to its first `room` blocks that are read, and the rest."""
    if len(part.blocks) <= room:
        return part, None
    at = int(part.blocks[room])
    return _slice(part, part.first, at), _slice(part, at, part.end)


def _slice(part: _Part, first: int, end: int) -> _Part:
    within = slice(first - part.first, end - part.first)
    low, high = np.searchsorted(part.blocks, [first, end])
    return _Part(
        first=first,
        end=end,
        blocks=part.blocks[low:high],
        zeros=part.zeros[within],
        tell=part.tell[within],
        known=part.known[within],
        hashes=part.hashes[within] if part.hashes is not None else None,
    )
