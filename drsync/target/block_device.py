"""Disks as block devices: logical volumes, partitions. What was there before is overwritten, zeros included."""

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from drsync.errors import TargetFull
from drsync.model import BLOCK_SIZE
from drsync.target import Positions
from drsync.target.partial import translated
from drsync.units import MiB, format_size

_BLKZEROOUT: Final = 0x127F
"""ioctl: let the device zero a range, discard-like where it can (linux/fs.h)."""
_WINDOW_BYTES: Final = 8192 * BLOCK_SIZE
_ZEROS: Final = bytes(4 * MiB)
_CANT: Final = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL})


class BlockDevice:
    """A disk that is restored into a device (a DiskWriter); `remove` makes the device go if it is abandoned."""

    def __init__(self, path: Path, size_bytes: int, *, remove: Callable[[], None]) -> None:
        """Open the device, for this process alone.

        Raises:
            TargetFull: it is smaller than the disk.
            TargetUnusable: it can't be opened, or somebody uses it.
        """
        self._path = path
        self._size_bytes = size_bytes
        self._remove = remove
        self._is_open = False
        with translated(path):
            self._fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
            self._is_open = True
            there = os.lseek(self._fd, 0, os.SEEK_END)
        if there < size_bytes:
            self.abandon()
            raise TargetFull(path=path, needed=format_size(size_bytes), free=format_size(there))

    def place(self, window: int, blocks: npt.NDArray[np.int64]) -> Positions:
        """As the contract says; what the window does not hold is zeroed now."""
        start = window * _WINDOW_BYTES
        end = min(start + _WINDOW_BYTES, self._size_bytes)
        positions: Positions = blocks * BLOCK_SIZE
        starts = np.append(positions, end)
        ends = np.insert(positions + BLOCK_SIZE, 0, start)
        gaps = np.flatnonzero(starts > ends)
        with translated(self._path):
            for at, until in zip(ends[gaps].tolist(), starts[gaps].tolist(), strict=True):
                self._zero(at, until - at)
        return positions

    def _zero(self, at: int, length: int) -> None:
        try:
            fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("=QQ", at, length))
        except OSError as err:
            if err.errno not in _CANT:
                raise
            for start in range(at, at + length, len(_ZEROS)):
                self._write(memoryview(_ZEROS)[: at + length - start], start)

    def write(self, at: int, buffers: Sequence[bytes]) -> None:
        with translated(self._path):
            for buffer in buffers:
                self._write(memoryview(buffer), at)
                at += len(buffer)

    def _write(self, data: memoryview, at: int) -> None:
        while data:
            written = os.pwrite(self._fd, data, at)
            data, at = data[written:], at + written

    def finish(self) -> None:
        with translated(self._path):
            os.fsync(self._fd)
        self._close()

    def abandon(self) -> None:
        if self._is_open:
            self._close()
            self._remove()

    def _close(self) -> None:
        self._is_open = False
        os.close(self._fd)
