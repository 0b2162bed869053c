"""Disks as files: raw or qcow2, sparse, under a `.partial` name until they are complete."""

import os
import threading
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from drsync.direct import ALIGNMENT, aligned_buffer, open_direct
from drsync.errors import TargetFull
from drsync.model import BLOCK_SIZE
from drsync.qcow2 import TABLE_BLOCKS, ImageWriter
from drsync.target import Positions
from drsync.target.partial import PartialFile, free_bytes, translated
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
        self._file = PartialFile(path, vm=vm, overwrite=overwrite)
        try:
            with translated(self._file.partial):
                if image_format is ImageFormat.RAW:
                    os.ftruncate(self._file.fd, size_bytes)
                self._data_fd = open_direct(self._file.fd)
        except BaseException:
            self._file.abandon()
            raise
        self._buffers = threading.local()  # a worker's bytes are brought together at an aligned address
        self._qcow2 = ImageWriter(self._file.fd, size_bytes) if image_format is ImageFormat.QCOW2 else None

    def place(self, window: int, blocks: npt.NDArray[np.int64]) -> Positions:
        if self._qcow2 is None:
            return blocks * BLOCK_SIZE
        if not len(blocks):
            return blocks
        first = self._qcow2.allocate(len(blocks))
        positions: Positions = first + np.arange(len(blocks), dtype=np.int64) * BLOCK_SIZE
        entries = np.zeros(TABLE_BLOCKS, np.uint64)
        entries[blocks - window * TABLE_BLOCKS] = positions
        with translated(self._file.partial):
            self._qcow2.set_table(window, entries)
        return positions

    def write(self, at: int, buffers: Sequence[bytes]) -> None:
        with translated(self._file.partial):
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
        _write_all(self._file.fd, gathered[aligned:length], at + aligned)  # the short end of an odd disk
        return length

    def finish(self) -> None:
        with translated(self._file.partial):
            if self._qcow2 is not None:
                self._qcow2.finish()
        self._file.finish()
        os.close(self._data_fd)

    def abandon(self) -> None:
        if self._file.is_open:
            self._file.abandon()
            os.close(self._data_fd)


def write_text_file(path: Path, text: str, *, vm: str, overwrite: bool) -> None:
    """Write a text, as `write_file`."""
    write_file(path, text.encode(), vm=vm, overwrite=overwrite)


def write_file(path: Path, content: bytes, *, vm: str, overwrite: bool) -> None:
    """Write a small file beside the restored disks, whole or not at all.

    Raises:
        TargetExists: `path` exists and `overwrite` is not set.
        TargetFull, TargetUnusable: it can't be written.
    """
    file = PartialFile(path, vm=vm, overwrite=overwrite)
    try:
        with translated(file.partial), os.fdopen(file.fd, "wb", closefd=False) as stream:
            stream.write(content)
        file.finish()
    except BaseException:
        file.abandon()
        raise


def check_room(directory: Path, needed_bytes: int) -> None:
    """Check that the file system of `directory`, which need not exist yet, has room.

    Raises:
        TargetFull: it has not.
    """
    with translated(directory):
        free = free_bytes(directory)
    if free < needed_bytes:
        raise TargetFull(path=directory, needed=format_size(needed_bytes), free=format_size(free))


def _write_all(fd: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written
