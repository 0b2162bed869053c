"""Any range of a disk of a point, straight from the repository.

A restore walks a disk from its beginning; who looks for a partition table, an
inode and a file jumps. So blocks are fetched when they are asked for, a few
more when they are asked for in order, and the last ones are kept. Every block is
authenticated, as in a restore. What is stored nowhere reads as zeros and costs nothing.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

import numpy as np

from drsync.errors import ObjectDamaged
from drsync.format import Malformed
from drsync.format.frame import FrameOpener, disk_binding
from drsync.image import PointImage
from drsync.model import BLOCK_SIZE, block_count, block_length
from drsync.repository import VmObjects
from drsync.restore import Fetch, plan_fetches
from drsync.window import NOWHERE, WINDOW_BLOCKS, Window

CACHE_BLOCKS: Final = 512
"""32 MiB: more than the metadata of a file system that a check walks through."""
CACHE_WINDOWS: Final = 16
"""8192 blocks each, at some 230 KiB: the file systems of a VM are looked at in turns."""
READ_AHEAD_BLOCKS: Final = 16
"""Fetched at once where blocks are asked for in order: a request to a store far away costs more than 1 MiB of data."""


class PointDisk:
    """One disk of a point, read at any place. One thread uses it."""

    def __init__(self, objects: VmObjects, image: PointImage, disk: str) -> None:
        self._objects = objects
        self._image = image
        self.name = disk
        self.size_bytes = image.disk(disk).size_bytes
        self._binding = disk_binding(objects.repository_id, disk)
        self._windows: OrderedDict[int, Window] = OrderedDict()
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self.fetched_bytes = 0
        """What was read from the store for blocks, in all."""
        self.requests = 0

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; fewer at the disk's end.

        Raises:
            ObjectMissing, ObjectDamaged: a block can't be had as it was captured.
            StoreError: the store does not answer.
        """
        end = min(offset + length, self.size_bytes)
        if offset < 0 or end <= offset:
            return b""
        first, last = offset // BLOCK_SIZE, (end - 1) // BLOCK_SIZE
        pieces = [self._block(number, last) for number in range(first, last + 1)]
        start = offset - first * BLOCK_SIZE
        return b"".join(pieces)[start : start + end - offset]

    def _block(self, number: int, last: int) -> bytes:
        """A block; those up to `last` are wanted next."""
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        window = self._window(number // WINDOW_BLOCKS)
        if window.containers[number - window.first_block] == NOWHERE:
            return bytes(block_length(number, self.size_bytes))
        in_order = number - 1 in self._blocks
        ahead = max(last - number + 1, READ_AHEAD_BLOCKS if in_order else 1)
        wanted = self._missing(window, number, min(ahead, CACHE_BLOCKS // 2))
        for fetch in plan_fetches(window, wanted, wanted * BLOCK_SIZE, self._image.containers):
            for fetched, data in self._fetch(fetch):
                self._blocks[fetched] = data
        found = self._blocks[number]
        while len(self._blocks) > CACHE_BLOCKS:
            self._blocks.popitem(last=False)
        return found

    def _window(self, index: int) -> Window:
        if index in self._windows:
            self._windows.move_to_end(index)
            return self._windows[index]
        window = self._windows[index] = self._image.window(self.name, index)
        while len(self._windows) > CACHE_WINDOWS:
            self._windows.popitem(last=False)
        return window

    def _missing(self, window: Window, first: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Of `count` blocks from `first` on, those of this window that hold data and are not here yet."""
        end = min(first + count, window.first_block + len(window.containers), block_count(self.size_bytes))
        numbers = np.arange(first, end, dtype=np.int64)
        held = numbers[window.containers[numbers - window.first_block] != NOWHERE]
        return np.array([n for n in held.tolist() if n not in self._blocks], np.int64)

    def _fetch(self, fetch: Fetch) -> Iterator[tuple[int, bytes]]:
        data = memoryview(self._objects.store.get_range(fetch.container.name, fetch.start, fetch.length))
        self.fetched_bytes += fetch.length
        self.requests += 1
        opener = FrameOpener(self._objects.keys_of(fetch.container.object_id, fetch.container.generation))
        rows = zip(fetch.blocks.tolist(), fetch.offsets.tolist(), fetch.lengths.tolist(), strict=True)
        for block, offset, length in rows:
            frame = data[offset - fetch.start : offset - fetch.start + length]
            try:
                plain = opener.open(frame, offset, self._binding, block, block_length(block, self.size_bytes))
            except Malformed as err:
                raise ObjectDamaged(key=fetch.container.name, problem=err) from err
            yield block, plain
