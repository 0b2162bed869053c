"""Disks that only a stream can reach: front to back, holes and all, over whatever connection there is.

Blocks are restored in parallel and arrive out of order, so they wait in a sparse scratch file
until all of a window (512 MiB of disk) is there. Then it is sent, and its scratch space freed:

    write ─▶ scratch │ window 0 │ window 1 │ window 2 …
               sent and freed ──▶│ waits    │ being filled

A qcow2's header and L1 table are its front, but known last: they are sent last, by
a stream of their own. What was cut off before is no image.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from drsync.model import BLOCK_SIZE
from drsync.qcow2 import TABLE_BLOCKS, ImageWriter
from drsync.target import Positions
from drsync.target.image import ImageFormat
from drsync.target.partial import translated
from drsync.units import MiB

_AHEAD: Final = 3
"""Windows that may wait for the line; the restore waits then. Bounds the scratch file to 2 GiB."""
_PIECE_BYTES: Final = 1 * MiB
_PUNCH_HOLE: Final = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


class ByteStream(Protocol):
    """Takes bytes in order. Every method raises TargetError when the other side fails."""

    def send(self, data: bytes) -> None: ...

    def skip(self, length: int) -> None:
        """So many zeros."""
        ...

    def finish(self) -> None:
        """All is sent; returns when the other side has it."""
        ...

    def abort(self) -> None: ...


@dataclass(slots=True)
class _Region:
    """A range of the file that is sent as soon as nothing of it is left to come."""

    start: int
    end: int
    left_bytes: int


class UploadDisk:
    """A disk that is restored through a stream (a DiskWriter)."""

    def __init__(
        self,
        open_stream: Callable[[int], ByteStream],
        size_bytes: int,
        image_format: ImageFormat,
        *,
        scratch: Path,
        remove: Callable[[], None],
    ) -> None:
        """Begin to send; `open_stream` opens one at an offset of the file, `remove` makes the file go.

        Raises:
            TargetError: there can be no scratch file, or no stream.
        """
        self._size_bytes = size_bytes
        self._open_stream = open_stream
        self._remove = remove
        self._path = scratch
        with translated(scratch):
            self._fd = os.open(scratch, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        self._qcow2 = ImageWriter(self._fd, size_bytes) if image_format is ImageFormat.QCOW2 else None
        self._front = self._qcow2.allocate(0) if self._qcow2 is not None else 0
        self._sent = self._front
        self._regions: list[_Region] = []
        self._changed = threading.Condition()
        self._no_more = False
        self._error: BaseException | None = None
        self._is_open = True
        self._stream = open_stream(self._front)
        self._sender = threading.Thread(target=self._send_all, name="upload", daemon=True)
        self._sender.start()

    def place(self, window: int, blocks: npt.NDArray[np.int64]) -> Positions:
        positions, start, end = (
            self._raw_place(window, blocks) if self._qcow2 is None else self._allocate(window, blocks)
        )
        left = len(blocks) * BLOCK_SIZE
        if len(blocks) and int(blocks[-1]) == self._size_bytes // BLOCK_SIZE:
            left -= BLOCK_SIZE - self._size_bytes % BLOCK_SIZE
        with self._changed:
            self._changed.wait_for(lambda: len(self._regions) < _AHEAD or self._error is not None)
            self._raise_error()
            self._regions.append(_Region(start, end, left))
            self._changed.notify_all()
        return positions

    def _raw_place(self, window: int, blocks: npt.NDArray[np.int64]) -> tuple[Positions, int, int]:
        start = window * TABLE_BLOCKS * BLOCK_SIZE
        return blocks * BLOCK_SIZE, start, min(start + TABLE_BLOCKS * BLOCK_SIZE, self._size_bytes)

    def _allocate(self, window: int, blocks: npt.NDArray[np.int64]) -> tuple[Positions, int, int]:
        qcow2 = self._qcow2
        if qcow2 is None or not len(blocks):
            return blocks, self._sent, self._sent
        first = qcow2.allocate(len(blocks))
        positions: Positions = first + np.arange(len(blocks), dtype=np.int64) * BLOCK_SIZE
        entries = np.zeros(TABLE_BLOCKS, np.uint64)
        entries[blocks - window * TABLE_BLOCKS] = positions
        with translated(self._path):
            qcow2.set_table(window, entries)
        return positions, first, qcow2.allocate(0)

    def write(self, at: int, buffers: Sequence[bytes]) -> None:
        start = at
        with translated(self._path):
            for buffer in buffers:
                at += _write_all(self._fd, buffer, at)
        with self._changed:
            self._raise_error()
            region = next(r for r in self._regions if r.start <= start < r.end)
            region.left_bytes -= at - start
            self._changed.notify_all()

    def finish(self) -> None:
        with self._changed:
            self._no_more = True
            self._changed.notify_all()
        self._sender.join()
        self._raise_error()
        with translated(self._path):
            if self._qcow2 is not None:
                self._qcow2.finish()
                end = os.fstat(self._fd).st_size
            else:
                end = self._size_bytes
        self._send(self._sent, end)
        self._stream.finish()
        if self._front:
            self._stream = self._open_stream(0)
            with translated(self._path):  # without holes: behind a hole, the other side cuts the file off
                self._send_data(0, self._front)
            self._stream.finish()
        self._close()

    def abandon(self) -> None:
        if not self._is_open:
            return
        with self._changed:
            self._no_more = True
            self._error = self._error or InterruptedError("abandoned")
            self._changed.notify_all()
        self._sender.join()
        self._stream.abort()
        self._close()
        self._remove()

    def _close(self) -> None:
        self._is_open = False
        os.close(self._fd)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _send_all(self) -> None:
        try:
            while (region := self._next()) is not None:
                self._send(self._sent, region.end)
                _free(self._fd, region.start, region.end - region.start)
                with self._changed:
                    self._sent = max(self._sent, region.end)
                    self._regions.pop(0)
                    self._changed.notify_all()
        except BaseException as err:  # noqa: BLE001  raised again in the thread that waits for it
            with self._changed:
                self._error = err
                self._changed.notify_all()

    def _next(self) -> _Region | None:
        """The next region that is complete; None when there will be none."""
        with self._changed:
            while True:
                if self._error is not None:
                    return None
                if self._regions and not self._regions[0].left_bytes:
                    return self._regions[0]
                if self._no_more and not self._regions:
                    return None
                self._changed.wait()

    def _send(self, start: int, end: int) -> None:
        """Send a range of the scratch file, its holes as holes."""
        with translated(self._path):
            for at, length, is_data in _extents(self._fd, start, end):
                if is_data:
                    self._send_data(at, length)
                else:
                    self._stream.skip(length)

    def _send_data(self, at: int, length: int) -> None:
        for piece in range(at, at + length, _PIECE_BYTES):
            self._stream.send(os.pread(self._fd, min(_PIECE_BYTES, at + length - piece), piece))


def _extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Offset, length and "holds data" of each part of a range of a sparse file."""
    while start < end:
        try:
            data = min(os.lseek(fd, start, os.SEEK_DATA), end)
        except OSError:  # ENXIO: nothing but a hole follows
            data = end
        if data > start:
            yield start, data - start, False
        if data < end:
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            yield data, hole - data, True
            start = hole
        else:
            start = end


def _free(fd: int, start: int, length: int) -> None:
    """Give the space of a range of the scratch file back; where that can't be, it is kept until the end."""
    call = getattr(ctypes.CDLL(None), "fallocate64", None) or getattr(ctypes.CDLL(None), "fallocate", None)
    if call is not None and length > 0:
        call(fd, _PUNCH_HOLE, ctypes.c_longlong(start), ctypes.c_longlong(length))


def _write_all(fd: int, data: bytes, at: int) -> int:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written
    return len(data)
