"""Disks as files: raw or qcow2, sparse, under a `.partial` name until they are complete."""

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from drsync.direct import ALIGNMENT, aligned_buffer, open_direct
from drsync.errors import TargetExists, TargetFull, TargetUnusable
from drsync.model import BLOCK_SIZE
from drsync.qcow2 import TABLE_BLOCKS, ImageWriter
from drsync.target import Positions
from drsync.units import format_size

_BLOCKS_AT_ONCE = 64  # 4 MiB


class ImageFormat(StrEnum):
    """The format of a restored disk; also the ending of its file."""

    QCOW2 = "qcow2"
    RAW = "raw"


class ImageDisk:
    """A disk that is restored into a file (a DiskWriter)."""

    def __init__(self, path: Path, size_bytes: int, image_format: ImageFormat, *, vm: str, overwrite: bool) -> None:
        """Make the partial file beside `path`; a partial file of an earlier, broken restore is replaced.

        Raises:
            TargetExists: `path` exists and `overwrite` is not set.
            TargetUnusable: the file can't be made, or another restore is writing it.
        """
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._vm = vm
        self._overwrite = overwrite
        self._check_free()
        with _translated(self._partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = _open_partial(self._partial)
            if image_format is ImageFormat.RAW:
                os.ftruncate(self._fd, size_bytes)
        self._data_fd = open_direct(self._fd)
        self._buffers = threading.local()  # a worker's bytes are brought together at an aligned address
        self._open = True
        self._size_bytes = size_bytes
        self._qcow2 = ImageWriter(self._fd, size_bytes) if image_format is ImageFormat.QCOW2 else None

    def place(self, window: int, blocks: npt.NDArray[np.int64]) -> Positions:
        if self._qcow2 is None:
            return blocks * BLOCK_SIZE
        if not len(blocks):
            return blocks
        first = self._qcow2.allocate(len(blocks))
        positions: Positions = first + np.arange(len(blocks), dtype=np.int64) * BLOCK_SIZE
        entries = np.zeros(TABLE_BLOCKS, np.uint64)
        entries[blocks - window * TABLE_BLOCKS] = positions
        with _translated(self._partial):
            self._qcow2.set_table(window, entries)
        return positions

    def write(self, at: int, buffers: Sequence[bytes]) -> None:
        with _translated(self._partial):
            for start in range(0, len(buffers), _BLOCKS_AT_ONCE):
                at += self._write_together(buffers[start : start + _BLOCKS_AT_ONCE], at)

    def _write_together(self, buffers: Sequence[bytes], at: int) -> int:
        """Write up to _BLOCKS_AT_ONCE blocks past the page cache; how many bytes that was."""
        gathered: memoryview | None = getattr(self._buffers, "gathered", None)
        if gathered is None:
            gathered = self._buffers.gathered = aligned_buffer(_BLOCKS_AT_ONCE * BLOCK_SIZE)
        length = 0
        for buffer in buffers:
            gathered[length : length + len(buffer)] = buffer
            length += len(buffer)
        aligned = length // ALIGNMENT * ALIGNMENT
        _write_all(self._data_fd, gathered[:aligned], at)
        _write_all(self._fd, gathered[aligned:length], at + aligned)  # the short end of an odd disk
        return length

    def finish(self) -> None:
        with _translated(self._partial):
            if self._qcow2 is not None:
                self._qcow2.finish()
            os.fsync(self._fd)
            self._check_free()
            self._partial.replace(self.path)
            self._close()
            _sync_directory(self.path.parent)

    def abandon(self) -> None:
        if self._open:
            with suppress(FileNotFoundError):
                self._partial.unlink()
            self._close()

    def _check_free(self) -> None:
        if not self._overwrite and os.path.lexists(self.path):
            raise TargetExists(path=self.path, vm=self._vm)

    def _close(self) -> None:
        """Give up the file, and only now its lock: its name is no longer the partial one."""
        self._open = False
        os.close(self._data_fd)
        os.close(self._fd)


def write_text_file(path: Path, text: str, *, vm: str, overwrite: bool) -> None:
    """Write a small file beside the restored disks, whole or not at all.

    Raises:
        TargetExists: `path` exists and `overwrite` is not set.
        TargetUnusable: it can't be written.
    """
    if not overwrite and path.exists():
        raise TargetExists(path=path, vm=vm)
    partial = path.with_name(path.name + ".partial")
    with _translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)


def check_room(directory: Path, needed_bytes: int) -> None:
    """Check that the file system of `directory`, which need not exist yet, has room.

    Raises:
        TargetFull: it has not.
    """
    place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    with _translated(place):
        free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise TargetFull(path=directory, needed=format_size(needed_bytes), free=format_size(free))


def _open_partial(path: Path) -> int:
    """The partial file, empty and locked: two restores that wrote one file would mix their points."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), path.stat()):  # it was finished in between
            raise BlockingIOError
        os.ftruncate(fd, 0)
    except (BlockingIOError, FileNotFoundError) as err:
        os.close(fd)
        raise TargetUnusable(path=path, problem="another restore is writing it") from err
    return fd


def _write_all(fd: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if err.errno in {errno.ENOSPC, errno.EDQUOT}:
            free = shutil.disk_usage(path.parent).free
            raise TargetFull(path=path, needed="more room", free=format_size(free)) from err
        raise TargetUnusable(path=path, problem=err.strerror) from err
