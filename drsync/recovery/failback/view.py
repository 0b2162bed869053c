"""Snapshots as disks that are read live (source.LiveView): what a seed reads of QEMU, read of EBS.

    blocks of 512 KiB    └──0───┘ └──1───┘ └──2───┘     chosen: 0 and 2
    blocks of 64 KiB     hhhhhhhh ........ hhhhhhhh     h = has to be read; . = as the newest point has it

Of a disk that is read as a whole, what is not chosen is in no block of the snapshot: it reads as zeros.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from drsync.model import BLOCK_SIZE
from drsync.source import Numbers, Presence
from drsync.target.ec2.snapshot import BLOCK_BYTES, Indexes

PER_BLOCK: Final = BLOCK_BYTES // BLOCK_SIZE
WORKERS: Final = 16
"""Blocks of EBS that are on their way at once, of all disks; each has 512 KiB."""
_AHEAD: Final = 6
"""Blocks that one reader has on their way, or waiting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotDisk:
    """What is to be read of one disk."""

    chosen: Indexes
    """Blocks of 512 KiB, ascending."""
    is_whole: bool
    """What is not chosen reads as zeros; else it is not looked at."""
    read: Callable[[int], bytes]
    """A block of 512 KiB; called from several threads."""


class SnapshotView:
    """The disks of one pass, open for reading."""

    def __init__(self, disks: Mapping[str, SnapshotDisk], *, workers: int = WORKERS) -> None:
        self._disks = disks
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="ebs-read")

    def reader(self, disk: str) -> "SnapshotReader":
        return SnapshotReader(self._disks[disk], self._workers)

    def close(self) -> None:
        self._workers.shutdown(wait=True, cancel_futures=True)


class SnapshotReader:
    """Reads one disk. For one thread; the blocks arrive side by side."""

    def __init__(self, disk: SnapshotDisk, workers: ThreadPoolExecutor) -> None:
        self._disk = disk
        self._workers = workers
        self._pending: deque[tuple[int, Future[bytes]]] = deque()

    def presence(self, first_block: int, count: int) -> Presence:
        first, end = first_block // PER_BLOCK, -(-(first_block + count) // PER_BLOCK)
        low, high = np.searchsorted(self._disk.chosen, [first, end])
        chosen = np.zeros(end - first, np.bool_)
        chosen[self._disk.chosen[low:high].astype(np.int64) - first] = True
        at = first_block - first * PER_BLOCK
        holds = np.repeat(chosen, PER_BLOCK)[at : at + count]
        zeros = ~holds if self._disk.is_whole else np.zeros(count, np.bool_)
        return Presence(holds=holds, zeros=zeros)

    def read(self, blocks: Numbers) -> Iterator[tuple[Numbers, memoryview]]:
        numbers = blocks // PER_BLOCK
        wanted = np.unique(numbers).tolist()
        upcoming = iter(wanted)
        try:
            for index in wanted:
                while len(self._pending) < _AHEAD and (following := next(upcoming, None)) is not None:
                    self._pending.append((following, self._workers.submit(self._disk.read, following)))
                _, future = self._pending.popleft()
                low, high = np.searchsorted(numbers, [index, index + 1])
                yield blocks[low:high], _part(future.result(), blocks[low:high])
        finally:
            self.close()

    def settle(self) -> None:
        """Nothing waits for EBS."""

    def close(self) -> None:
        while self._pending:
            self._pending.popleft()[1].cancel()


def _part(data: bytes, blocks: Numbers) -> memoryview:
    """These blocks of 64 KiB of one of 512 KiB, back to back."""
    if len(blocks) == PER_BLOCK:
        return memoryview(data)
    whole = np.frombuffer(data, np.uint8).reshape(PER_BLOCK, BLOCK_SIZE)
    return memoryview(whole[blocks % PER_BLOCK].tobytes())
