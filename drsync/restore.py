"""Restores the disks of a point: windows → ranged reads → frames → target.

    window ─▶ fetches (runs of frames in one object) ─▶ get_range ─▶ open each frame ─▶ write

Several fetches run at once. Every frame is authenticated; what is missing,
damaged or swapped stops the restore with the object's name, and no file that
looks finished is left: unless the repository has the same block elsewhere (copies.py),
or what is lost was said to be done without (`Salvage`).
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

from drsync.copies import Copies
from drsync.errors import ObjectDamaged, ObjectMissing
from drsync.format import Malformed
from drsync.format.frame import FrameOpener, disk_binding
from drsync.format.segment import DiskMeta
from drsync.image import PointImage
from drsync.model import BLOCK_SIZE, Progress, block_length
from drsync.packs import Failure
from drsync.repository import VmObjects
from drsync.target import DiskWriter, Positions
from drsync.window import NOWHERE, UNKNOWN, Container, Window

WORKERS: Final = 4
FETCH_BYTES: Final = 4 * 1024 * 1024
"""A ranged read asks for no more: bounds memory, and is enough to hide a request's latency."""
GAP_BYTES: Final = 64 * 1024
"""Dead bytes between two frames that are read over rather than asked around."""
_PENDING: Final = 2 * WORKERS
_PIECE_BLOCKS: Final = 64
"""Blocks that a worker opens before it writes them: 4 MiB, however well the frames of a request are compressed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Frames that are read by one request, in the order of their offsets."""

    container: Container
    blocks: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    positions: Positions
    """Where the target wants each block."""

    @property
    def start(self) -> int:
        return int(self.offsets[0])

    @property
    def length(self) -> int:
        return int(self.offsets[-1] + self.lengths[-1]) - self.start


def live_blocks(window: Window) -> npt.NDArray[np.int64]:
    """The blocks of a window that hold data, ascending."""
    return np.flatnonzero(window.containers > NOWHERE) + window.first_block


def plan_fetches(
    window: Window, blocks: npt.NDArray[np.int64], positions: Positions, containers: Sequence[Container]
) -> Iterator[Fetch]:
    """The requests that bring `blocks` of a window: as few as FETCH_BYTES and GAP_BYTES allow. Pure."""
    at = blocks - window.first_block
    held_by, offsets = window.containers[at], window.offsets[at].astype(np.int64)
    lengths = window.lengths[at].astype(np.int64)
    order = np.lexsort((offsets, held_by))
    for start, end in _joined(held_by[order], offsets[order], offsets[order] + lengths[order]):
        chosen = order[start:end]
        yield Fetch(
            container=containers[int(held_by[chosen[0]])],
            blocks=blocks[chosen],
            offsets=offsets[chosen],
            lengths=lengths[chosen],
            positions=positions[chosen],
        )


def _joined(
    held_by: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> Iterator[tuple[int, int]]:
    """The runs of frames, sorted by object and offset, that one request each can bring."""
    apart = (held_by[1:] != held_by[:-1]) | (starts[1:] - ends[:-1] > GAP_BYTES)
    first = 0
    for after in [*(np.flatnonzero(apart) + 1).tolist(), len(starts)]:
        while first < after:  # a run that is larger than a request takes several
            end = int(np.searchsorted(ends[first:after], starts[first] + FETCH_BYTES, side="right")) + first
            yield first, end
            first = end


@dataclass(slots=True)
class Salvage:
    """What a restore does without: filled in while it runs. Thread-safe."""

    lost: dict[str, dict[int, Failure]] = field(default_factory=dict)
    """Blocks by disk, each with the reason. In the restored disk they hold `lost_mark`."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, disk: str, block: int, failure: Failure) -> None:
        """A block can't be had."""
        with self._lock:
            self.lost.setdefault(disk, {})[block] = failure


def lost_mark(disk: str, block: int, length: int) -> bytes:
    """What a lost block is filled with: text that says so in every 128 bytes, so that nobody takes it for data."""
    line = f"DRSYNC: THIS BLOCK IS LOST: disk {disk} block {block}".encode()[:127].ljust(127) + b"\n"
    return (line * -(-length // len(line)))[:length]


def restore_disk(
    objects: VmObjects,
    image: PointImage,
    disk: str,
    target: DiskWriter,
    progress: Progress,
    salvage: Salvage | None = None,
) -> None:
    """Write one disk of a point into `target`, and finish it; abandon it if anything fails.

    Progress is told in bytes of the disk: what is empty counts as soon as it is passed. With `salvage`, what can't
    be had as it was is noted there and marked in the target, instead of failing.

    Raises:
        ObjectMissing, ObjectDamaged: a frame can't be had as it was written.
        PrunedMeanwhile: the log was pruned since it was read, and this restore took longer than the grace time.
        StoreError, TargetError: reading or writing failed.
    """
    try:
        _Restore(objects, image, image.disk(disk), target, progress, salvage).run()
        _check_really_lost(image, salvage.lost.get(disk, {}) if salvage is not None else {})
        target.finish()
    except BaseException as err:
        target.abandon()
        if isinstance(err, ObjectMissing):
            image.check_in_force(err)
        raise


def _check_really_lost(image: PointImage, lost: Mapping[int, Failure]) -> None:
    """See that what is missing is not missing because it was pruned meanwhile.

    Raises:
        PrunedMeanwhile: it is.
    """
    missing = next((failure for failure in lost.values() if isinstance(failure, ObjectMissing)), None)
    if missing is not None:
        image.check_in_force(missing)


class _Restore:
    """One run of `restore_disk`."""

    def __init__(
        self,
        objects: VmObjects,
        image: PointImage,
        disk: DiskMeta,
        target: DiskWriter,
        progress: Progress,
        salvage: Salvage | None,
    ) -> None:
        self._reader = BlockReader(objects, disk)
        self._salvage = salvage
        self._image = image
        self._disk = disk
        self._target = target
        self._progress = progress

    def run(self) -> None:
        pending: deque[Future[None]] = deque()
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="restore") as workers:
            try:
                for fetch in self._fetches():
                    if len(pending) >= _PENDING:
                        pending.popleft().result()
                    pending.append(workers.submit(self._fetch, fetch))
                while pending:
                    pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _fetches(self) -> Iterator[Fetch]:
        tolerant = self._salvage is not None
        for index, window in enumerate(self._image.windows(self._disk.name, tolerant=tolerant)):
            held = np.flatnonzero(window.containers != NOWHERE) + window.first_block
            end = min((window.first_block + len(window.containers)) * BLOCK_SIZE, self._disk.size_bytes)
            self._progress.advance(end - window.first_block * BLOCK_SIZE - self._plain_bytes(held))
            positions = self._target.place(index, held)
            known = window.containers[held - window.first_block] > NOWHERE
            self._mark_unknown(window, held[~known], positions[~known])
            yield from plan_fetches(window, held[known], positions[known], self._image.containers)

    def _mark_unknown(self, window: Window, blocks: npt.NDArray[np.int64], positions: Positions) -> None:
        for block, at in zip(blocks.tolist(), positions.tolist(), strict=True):
            failure = self._image.failures[UNKNOWN - int(window.containers[block - window.first_block])]
            self._target.write(at, [self._lost(block, failure)])
            self._progress.advance(block_length(block, self._disk.size_bytes))

    def _lost(self, block: int, failure: Failure) -> bytes:
        """What is written for a block that can't be had, if it may be done without."""
        if self._salvage is None:
            raise failure
        self._salvage.note(self._disk.name, block, failure)
        return lost_mark(self._disk.name, block, block_length(block, self._disk.size_bytes))

    def _plain_bytes(self, blocks: npt.NDArray[np.int64]) -> int:
        """The bytes of `blocks` (ascending); only the disk's last block can be short."""
        if not len(blocks):
            return 0
        return (len(blocks) - 1) * BLOCK_SIZE + block_length(int(blocks[-1]), self._disk.size_bytes)

    def _fetch(self, fetch: Fetch) -> None:
        opened = self._reader.try_read(fetch)
        for start, end in _neighbours(fetch.positions):
            plain = [
                self._lost(block, found) if isinstance(found, Exception) else found
                for block, found in islice(opened, end - start)
            ]
            self._target.write(int(fetch.positions[start]), plain)
            self._progress.advance(sum(map(len, plain)))


class BlockReader:
    """Reads the blocks of one disk of a point, each authenticated. May be used from several threads."""

    def __init__(self, objects: VmObjects, disk: DiskMeta, *, copies: bool = True) -> None:
        """`copies`: what is damaged is looked for in other frames of the same block."""
        self._objects = objects
        self._disk = disk
        self._binding = disk_binding(objects.repository_id, disk.name)
        self._copies = Copies(objects) if copies else None

    def read(self, fetch: Fetch) -> Iterator[tuple[int, bytes]]:
        """Number and content of the blocks of one request, in its order; each is opened when it is asked for.

        Raises:
            ObjectMissing, ObjectDamaged: a frame can't be had as it was written.
            StoreError: reading failed.
        """
        for block, found in self.try_read(fetch):
            if isinstance(found, Exception):
                raise found
            yield block, found

    def try_read(self, fetch: Fetch) -> Iterator[tuple[int, bytes | Failure]]:
        """As `read`, but a block that can't be had comes as the error that says why."""
        data: memoryview | Failure
        try:
            data = memoryview(self._objects.store.get_range(fetch.container.name, fetch.start, fetch.length))
        except (ObjectMissing, ObjectDamaged) as err:
            data = err
        opener = FrameOpener(self._objects.keys_of(fetch.container.object_id, fetch.container.generation))
        for block, offset, length in zip(
            fetch.blocks.tolist(), fetch.offsets.tolist(), fetch.lengths.tolist(), strict=True
        ):
            try:
                frame = self._frame(fetch, data, offset, length)
                found: bytes | Failure = self._open(opener, fetch.container, frame, block, offset)
            except (ObjectMissing, ObjectDamaged) as err:
                found = self._copy_of(fetch.container, block) or err
            yield block, found

    def _copy_of(self, container: Container, block: int) -> bytes | None:
        if self._copies is None:
            return None
        return self._copies.find(container, self._disk.name, block, self._disk.size_bytes)

    def _frame(self, fetch: Fetch, data: memoryview | Failure, offset: int, length: int) -> memoryview:
        """The bytes of one frame; if the object is too short for the whole request, what it is not too short for."""
        if isinstance(data, ObjectDamaged):
            return memoryview(self._objects.store.get_range(fetch.container.name, offset, length))
        if isinstance(data, Exception):
            raise data
        return data[offset - fetch.start : offset - fetch.start + length]

    def _open(self, opener: FrameOpener, container: Container, frame: memoryview, block: int, offset: int) -> bytes:
        try:
            return opener.open(frame, offset, self._binding, block, block_length(block, self._disk.size_bytes))
        except Malformed as err:
            raise ObjectDamaged(key=container.name, problem=err) from err


def _neighbours(positions: Positions) -> Iterator[tuple[int, int]]:
    """The runs of positions that follow each other block by block, none longer than _PIECE_BLOCKS."""
    starts = np.flatnonzero(np.diff(positions, prepend=-2 * BLOCK_SIZE) != BLOCK_SIZE)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(positions)], strict=True):
        for first in range(start, end, _PIECE_BLOCKS):
            yield first, min(first + _PIECE_BLOCKS, end)
