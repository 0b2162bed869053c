"""Restores the disks of a point: windows → ranged reads → frames → target.

    window ─▶ fetches (runs of frames in one object) ─▶ get_range ─▶ open each frame ─▶ write

Several fetches run at once. Every frame is authenticated; what is missing,
damaged or swapped stops the restore with the object's name, and no file that
looks finished is left.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

from drsync.errors import ObjectDamaged, ObjectMissing
from drsync.format import Malformed
from drsync.format.frame import FrameOpener, disk_binding
from drsync.format.segment import DiskMeta
from drsync.image import NOWHERE, Container, PointImage, Window
from drsync.model import BLOCK_SIZE, Progress, block_length
from drsync.repository import VmObjects
from drsync.target import DiskWriter, Positions

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
    return np.flatnonzero(window.containers != NOWHERE) + window.first_block


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


def restore_disk(objects: VmObjects, image: PointImage, disk: str, target: DiskWriter, progress: Progress) -> None:
    """Write one disk of a point into `target`, and finish it; abandon it if anything fails.

    Progress is told in bytes of the disk: what is empty counts as soon as it is passed.

    Raises:
        ObjectMissing, ObjectDamaged: a frame can't be had as it was written.
        PrunedMeanwhile: the log was pruned since it was read, and this restore took longer than the grace time.
        StoreError, TargetError: reading or writing failed.
    """
    try:
        _Restore(objects, image, image.disk(disk), target, progress).run()
        target.finish()
    except BaseException as err:
        target.abandon()
        if isinstance(err, ObjectMissing):
            image.check_in_force(err)
        raise


class _Restore:
    """One run of `restore_disk`."""

    def __init__(
        self, objects: VmObjects, image: PointImage, disk: DiskMeta, target: DiskWriter, progress: Progress
    ) -> None:
        self._reader = BlockReader(objects, disk)
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
        for index, window in enumerate(self._image.windows(self._disk.name)):
            blocks = live_blocks(window)
            end = min((window.first_block + len(window.containers)) * BLOCK_SIZE, self._disk.size_bytes)
            self._progress.advance(end - window.first_block * BLOCK_SIZE - self._plain_bytes(blocks))
            positions = self._target.place(index, blocks)
            yield from plan_fetches(window, blocks, positions, self._image.containers)

    def _plain_bytes(self, blocks: npt.NDArray[np.int64]) -> int:
        """The bytes of `blocks` (ascending); only the disk's last block can be short."""
        if not len(blocks):
            return 0
        return (len(blocks) - 1) * BLOCK_SIZE + block_length(int(blocks[-1]), self._disk.size_bytes)

    def _fetch(self, fetch: Fetch) -> None:
        opened = self._reader.read(fetch)
        for start, end in _neighbours(fetch.positions):
            plain = [block for _, block in islice(opened, end - start)]
            self._target.write(int(fetch.positions[start]), plain)
            self._progress.advance(sum(map(len, plain)))


class BlockReader:
    """Reads the blocks of one disk of a point, each authenticated. May be used from several threads."""

    def __init__(self, objects: VmObjects, disk: DiskMeta) -> None:
        self._objects = objects
        self._disk = disk
        self._binding = disk_binding(objects.repository_id, disk.name)

    def read(self, fetch: Fetch) -> Iterator[tuple[int, bytes]]:
        """Number and content of the blocks of one request, in its order; each is opened when it is asked for.

        Raises:
            ObjectMissing, ObjectDamaged: a frame can't be had as it was written.
            StoreError: reading failed.
        """
        data = memoryview(self._objects.store.get_range(fetch.container.name, fetch.start, fetch.length))
        opener = FrameOpener(self._objects.keys_of(fetch.container.object_id, fetch.container.generation))
        for block, offset, length in zip(
            fetch.blocks.tolist(), fetch.offsets.tolist(), fetch.lengths.tolist(), strict=True
        ):
            yield block, self._open(opener, fetch, data, block, offset, length)

    def _open(self, opener: FrameOpener, fetch: Fetch, data: memoryview, block: int, offset: int, length: int) -> bytes:
        start = offset - fetch.start
        wanted = block_length(block, self._disk.size_bytes)
        try:
            return opener.open(data[start : start + length], offset, self._binding, block, wanted)
        except Malformed as err:
            raise ObjectDamaged(key=fetch.container.name, problem=err) from err


def _neighbours(positions: Positions) -> Iterator[tuple[int, int]]:
    """The runs of positions that follow each other block by block, none longer than _PIECE_BLOCKS."""
    starts = np.flatnonzero(np.diff(positions, prepend=-2 * BLOCK_SIZE) != BLOCK_SIZE)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(positions)], strict=True):
        for first in range(start, end, _PIECE_BLOCKS):
            yield first, min(first + _PIECE_BLOCKS, end)
