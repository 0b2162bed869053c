"""A point's disk as EBS sees it: blocks of 512 KiB, those that hold data, or differ from an earlier point.

    blocks of 64 KiB     ░░█░░░░░ ░░░░░░░░ ████████ ░░░░░░░░
    blocks of 512 KiB    └──0───┘ └──1───┘ └──2───┘ └──3───┘     written: 0 and 2

With an earlier point the two are compared by where their blocks lie: the same frame of the same object is
the same content. What lies elsewhere is compared by hash where both know it, else counted as different.
A 512 KiB block that holds a difference is sent whole; one that holds only zeros by now is sent as zeros.

Everything goes window by window (512 MiB of disk): memory grows with what is written (4 bytes a block),
never with the disk.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from drsync.image import PointImage
from drsync.log import Log
from drsync.model import BLOCK_SIZE, block_length
from drsync.repository import VmObjects
from drsync.restore import BlockReader, live_blocks, plan_fetches
from drsync.target.ec2.snapshot import BLOCK_BYTES, Indexes
from drsync.window import NOWHERE, WINDOW_BLOCKS, Container, Window

PER_BLOCK: Final = BLOCK_BYTES // BLOCK_SIZE
"""drsync's blocks in one of EBS."""
_WINDOW: Final = WINDOW_BLOCKS // PER_BLOCK
"""EBS blocks of a window."""
_ZEROS: Final = bytes(BLOCK_SIZE)
_READERS: Final = 4
_PIECE: Final = 16
"""EBS blocks that a reader brings at a time: 8 MiB."""


class _Below:
    """An earlier point as the ground of a later one (image.Ground)."""

    def __init__(self, image: PointImage) -> None:
        self._image = image

    def window(self, disk: str, index: int) -> tuple[Window, Sequence[Container]]:
        return self._image.window(disk, index), self._image.containers


def beside(log: Log, before: PointImage, seq: int) -> PointImage:
    """Point `seq` as it stands on the earlier point `before`: what the segments in between don't touch is the same.

    Raises:
        ChainBroken, ObjectMissing, ObjectDamaged: the log is not whole between the two.
    """
    shown = log.read(before.seq)
    behind = log.chain(before.seq + 1, seq, previous=shown.index_sha256.hex(), generation=shown.generation)
    return PointImage(log.objects, [shown, *behind], _Below(before))


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudDisk:
    """One disk of a point, beside the same disk of an earlier point or of none."""

    objects: VmObjects
    image: PointImage
    name: str
    before: PointImage | None = None
    """The earlier point, if only the difference is wanted; see `beside`."""

    @property
    def size_bytes(self) -> int:
        return self.image.disk(self.name).size_bytes

    def plan(self) -> Indexes:
        """The EBS blocks that have to be written, ascending.

        Raises:
            ObjectMissing, ObjectDamaged: the log is not whole up to there.
        """
        found = [self._wanted(index, now, then) for index, now, then in self._windows()]
        return np.concatenate([np.zeros(0, np.uint32), *found]).astype(np.uint32)

    def read(self, chosen: Indexes) -> Iterator[tuple[int, bytes]]:
        """`chosen` EBS blocks (ascending) with their content, in that order; read ahead, side by side.

        Raises:
            ObjectMissing, ObjectDamaged: a frame can't be had as it was written.
            StoreError: reading failed.
        """
        reader = BlockReader(self.objects, self.image.disk(self.name))
        pending: deque[Future[list[tuple[int, bytes]]]] = deque()
        with ThreadPoolExecutor(_READERS, thread_name_prefix="blocks") as readers:
            try:
                for window, piece in self._pieces(chosen):
                    pending.append(readers.submit(self._bring, reader, window, piece))
                    if len(pending) > _READERS:
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def read_small(self, first: int = 0) -> Iterator[tuple[int, bytes]]:
        """Blocks of 64 KiB that hold data, ascending, from block `first` on: what VM Import's images are made of.

        Raises:
            ObjectMissing, ObjectDamaged, StoreError: as `read`.
        """
        plan = self.plan()
        for index, data in self.read(plan[plan >= first // PER_BLOCK]):
            for block in range(max(first, index * PER_BLOCK), (index + 1) * PER_BLOCK):
                at = block % PER_BLOCK * BLOCK_SIZE
                held = data[at : at + BLOCK_SIZE]
                if held != _ZEROS:
                    yield block, held[: block_length(block, self.size_bytes)]

    def _windows(self) -> Iterator[tuple[int, Window, Window | None]]:
        """Every window that has to be looked at, beside the one of the earlier point."""
        if self.before is None:
            for index, window in enumerate(self.image.windows(self.name)):
                yield index, window, None
            return
        for index in self._touched(self.before):
            yield index, _window_of(self.image, self.name, index), _window_of(self.before, self.name, index)

    def _touched(self, before: PointImage) -> list[int]:
        """The windows that may differ: those that the segments in between tell of, and what one disk has more."""
        now, then = self.image.window_count(self.name), before.window_count(self.name)
        touched = np.ones(max(now, then), np.bool_)
        touched[:now] = self.image.touched(self.name)
        return [int(index) for index in np.flatnonzero(touched)]

    def _wanted(self, index: int, now: Window, then: Window | None) -> Indexes:
        mask = now.containers != NOWHERE if then is None else self._differs(now, then)
        padded = np.zeros(WINDOW_BLOCKS, np.bool_)
        padded[: len(mask)] = mask
        chosen = np.flatnonzero(padded.reshape(_WINDOW, PER_BLOCK).any(axis=1))
        return (chosen + index * _WINDOW).astype(np.uint32)

    def _differs(self, now: Window, then: Window) -> npt.NDArray[np.bool_]:
        """Which blocks of a window are not surely what they were."""
        before = self.before
        if before is None:
            raise ValueError("there is nothing to compare with")
        length = max(len(now.containers), len(then.containers))
        new, old = _padded(now, length), _padded(then, length)
        same = _identities(new, self.image) == _identities(old, before)
        same &= (new.offsets == old.offsets) | (new.containers == NOWHERE)
        hashed = (new.hashes == old.hashes).all(axis=1) & new.hashes.any(axis=1)
        hashed &= (new.containers != NOWHERE) & (old.containers != NOWHERE)
        differs: npt.NDArray[np.bool_] = ~(same | hashed)
        return differs

    def _pieces(self, chosen: Indexes) -> Iterator[tuple[Window, Indexes]]:
        numbers = chosen // _WINDOW
        for index in np.unique(numbers).tolist():
            window = _window_of(self.image, self.name, index)
            within = chosen[np.searchsorted(numbers, index) : np.searchsorted(numbers, index, side="right")]
            for first in range(0, len(within), _PIECE):
                yield window, within[first : first + _PIECE]

    def _bring(self, reader: BlockReader, window: Window, piece: Indexes) -> list[tuple[int, bytes]]:
        """A piece of a window as EBS blocks."""
        buffers = {index: bytearray(BLOCK_BYTES) for index in piece.tolist()}
        live = live_blocks(window)
        blocks = live[np.isin(live // PER_BLOCK, piece)]
        for fetch in plan_fetches(window, blocks, blocks, self.image.containers):
            for block, data in reader.read(fetch):
                at = block % PER_BLOCK * BLOCK_SIZE
                buffers[block // PER_BLOCK][at : at + len(data)] = data
        return [(index, bytes(buffer)) for index, buffer in buffers.items()]


def _window_of(image: PointImage, disk: str, index: int) -> Window:
    """A window of a disk; one behind its end holds nothing."""
    if index < image.window_count(disk):
        return image.window(disk, index)
    return Window.empty(index * WINDOW_BLOCKS, 0)


def _padded(window: Window, length: int) -> Window:
    """A window whose blocks behind the disk's end are there, and empty."""
    if len(window.containers) == length:
        return window
    longer = Window.empty(window.first_block, length)
    count = len(window.containers)
    longer.containers[:count] = window.containers
    longer.offsets[:count] = window.offsets
    longer.lengths[:count] = window.lengths
    longer.hashes[:count] = window.hashes
    return longer


def _identities(window: Window, image: PointImage) -> npt.NDArray[np.void]:
    """The object that holds each block, as 16 bytes that mean the same in every image; zeros: none."""
    used, at = np.unique(window.containers, return_inverse=True)
    ids = [bytes(16) if n == NOWHERE else image.containers[n].object_id.ljust(16, b"\0")[:16] for n in used.tolist()]
    table = np.frombuffer(b"".join(ids), np.dtype("V16"))
    return table[at.reshape(-1)]
