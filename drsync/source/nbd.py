"""Reads a disk over NBD as it is at each moment: the only module that knows libnbd.

    presence   base:allocation ∧ qemu:dirty-bitmap ─▶ which blocks to read, which are zeros
    read       blocks ─▶ pieces of 1 MiB, four of them on their way at a time, each in a buffer that is used again

No request is left on its way while this side does something that takes long (waits for
the pace, or for the line): QEMU drains its block layer for snapshots, resets and jobs, and
that waits until its NBD clients have taken their replies, the guest with it.

Only what the server says is ZERO is not read; a HOLE alone guarantees nothing (NBD
protocol, "base:allocation"). A server may split extents anywhere, answer for less
than was asked, and for each context a different length.

libnbd comes with the distribution (python3-libnbd) and is loaded when a disk is
first read live: nothing else needs it.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from drsync.direct import aligned_buffer
from drsync.errors import CaptureFailed, DrsyncError, LibraryMissing, SourceLost
from drsync.model import BLOCK_SIZE, Pace, block_length
from drsync.source import Flags, Numbers, Presence

PIECE_BLOCKS: Final = 16
"""Blocks of a piece: 1 MiB, which stays in the processor's cache until it is compressed."""
DEPTH: Final = 4
"""Pieces on their way at a time. QEMU takes 16 requests at once of a connection (nbd/server.c, MAX_NBD_REQUESTS)."""
TIMEOUT_S: Final = 60.0
"""QEMU answers in milliseconds, unless a disk hangs."""
_DIRTY: Final = 1
"""Bit of qemu:dirty-bitmap (QEMU's docs/interop/nbd.txt)."""
_ALLOCATION: Final = "base:allocation"
_POLL_MS: Final = 1000
_CONNECTING: Final = "connecting"


def load(vm: str) -> ModuleType:
    """libnbd's binding.

    Raises:
        LibraryMissing: it is not installed, or this Python does not see it.
    """
    try:
        import nbd  # noqa: PLC0415 - only live reading needs it
    except ImportError as err:
        raise LibraryMissing(
            vm=vm, what="reading disks live", library="libnbd", package="python3-libnbd", problem=err
        ) from err
    module: ModuleType = nbd
    return module


class NbdReader:
    """A LiveReader over one NBD connection."""

    def __init__(
        self,
        vm: str,
        socket: Path,
        export: str,
        *,
        size_bytes: int,
        bitmap: str,
        pace: Pace,
        depth: int = DEPTH,
        piece_blocks: int = PIECE_BLOCKS,
    ) -> None:
        """Connect. `bitmap`: only what it holds belongs to the view; empty = the whole disk.

        `depth` pieces of `piece_blocks` blocks are on their way at a time.

        Raises:
            SourceLost: nobody answers.
            CaptureFailed: it is another disk than expected, or can't tell what is to be read.
        """
        self._vm = vm
        self._size_bytes = size_bytes
        self._pace = pace
        self._dirty = f"qemu:dirty-bitmap:{bitmap}" if bitmap else ""
        self._nbd = load(vm)
        self._handle: Any = self._nbd.NBD()
        self._piece_blocks = piece_blocks
        self._buffers = [aligned_buffer(piece_blocks * BLOCK_SIZE) for _ in range(depth)]
        self._pending: deque[_Piece] = deque()
        try:
            self._connect(socket, export)
        except self._nbd.Error as err:
            raise self._error(_CONNECTING, err) from err

    def _connect(self, socket: Path, export: str) -> None:
        contexts = [_ALLOCATION, *([self._dirty] if self._dirty else [])]
        self._handle.set_export_name(export)
        self._handle.set_pread_initialize(False)  # what a failed read leaves is never looked at
        for context in contexts:
            self._handle.add_meta_context(context)
        self._handle.aio_connect_unix(str(socket))
        deadline_s = time.monotonic() + TIMEOUT_S
        while not self._handle.aio_is_ready():
            self._turn(deadline_s)
        size = self._handle.get_size()
        if size != self._size_bytes:
            raise self._failed(f"the export of {export} has {size} bytes, not {self._size_bytes}")
        for context in contexts:
            if not self._handle.can_meta_context(context):
                raise self._failed(f"the export of {export} does not know {context}")

    def presence(self, first_block: int, count: int) -> Presence:
        offset = first_block * BLOCK_SIZE
        end = min(offset + count * BLOCK_SIZE, self._size_bytes)
        tally = _Tally(offset, count)
        covered = dict.fromkeys([_ALLOCATION, *([self._dirty] if self._dirty else [])], offset)

        def note(context: str, at: int, entries: Sequence[int], _error: object) -> int:
            for length, flags in zip(entries[::2], entries[1::2], strict=True):
                if context == _ALLOCATION and not flags & self._nbd.STATE_ZERO:
                    tally.mark(tally.data, at, min(at + length, end))
                elif context == self._dirty and flags & _DIRTY:
                    tally.mark(tally.dirty, at, min(at + length, end))
                at += length
            covered[context] = max(covered[context], at)
            return 0

        while (at := min(covered.values())) < end:
            self._status(end - at, at, note)
            if min(covered.values()) <= at:
                raise self._failed(f"QEMU does not tell what is allocated at {at}")
        belongs = tally.dirty if self._dirty else np.ones(count, np.bool_)
        return Presence(holds=belongs & tally.data, zeros=belongs & ~tally.data)

    def _status(self, length: int, offset: int, note: Any) -> None:
        try:
            self._wait(self._handle.aio_block_status(length, offset, note))
        except self._nbd.Error as err:
            raise self._error("asking what is allocated", err) from err

    def read(self, blocks: Numbers) -> Iterator[tuple[Numbers, memoryview]]:
        size, depth = self._piece_blocks, len(self._buffers)
        pieces = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        try:
            for number, piece in enumerate(pieces):
                if number >= depth:
                    yield self._finish(self._pending.popleft())
                self._pending.append(self._begin(piece, self._buffers[number % depth]))
            while self._pending:
                yield self._finish(self._pending.popleft())
        except self._nbd.Error as err:
            raise self._error("reading", err) from err

    def _begin(self, blocks: Numbers, buffer: memoryview) -> "_Piece":
        """Send the requests of a piece, one for each run of neighbours."""
        cookies: list[int] = []
        starts = np.flatnonzero(np.diff(blocks, prepend=-2) != 1)
        ends = np.append(starts[1:], len(blocks))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            first, last = int(blocks[start]), int(blocks[end - 1])
            length = (last - first) * BLOCK_SIZE + block_length(last, self._size_bytes)
            if not self._pace.take_now(length):
                self._collect(cookies)
                self.settle()
                self._pace.take(length)
            part = buffer[start * BLOCK_SIZE : start * BLOCK_SIZE + length]
            cookies.append(self._handle.aio_pread(self._nbd.Buffer.from_buffer(part), first * BLOCK_SIZE))
            if length % BLOCK_SIZE:
                buffer[start * BLOCK_SIZE + length : end * BLOCK_SIZE] = bytes(-length % BLOCK_SIZE)
        return _Piece(blocks, buffer, cookies)

    def settle(self) -> None:
        try:
            for piece in self._pending:
                self._collect(piece.cookies)
        except self._nbd.Error as err:
            raise self._error("reading", err) from err

    def _finish(self, piece: "_Piece") -> tuple[Numbers, memoryview]:
        self._collect(piece.cookies)
        return piece.blocks, piece.buffer

    def _collect(self, cookies: list[int]) -> None:
        """Wait until all of these requests are done, and forget them."""
        while cookies:
            self._wait(cookies[-1])
            cookies.pop()

    def _wait(self, cookie: int) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not self._handle.aio_command_completed(cookie):
            self._turn(deadline_s)

    def _turn(self, deadline_s: float) -> None:
        """Let the connection go on by a step."""
        if self._handle.aio_is_dead() or self._handle.aio_is_closed():
            raise self._lost("reading", "it closed the connection")
        if self._handle.poll(_POLL_MS) == 0 and time.monotonic() > deadline_s:
            raise self._lost("reading", f"no answer in {TIMEOUT_S:g} s")

    def close(self) -> None:
        # Buffers that the kernel may still fill belong to the handle until it is gone.
        self._pending.clear()
        self._handle = None

    def _error(self, operation: str, err: Exception) -> DrsyncError:
        """QEMU's own error, or that it is gone."""
        text = getattr(err, "string", str(err))
        if self._handle is None or self._handle.aio_is_dead() or self._handle.aio_is_closed():
            return self._lost(operation, text)
        code = getattr(err, "errno", None)
        if code in {"ESHUTDOWN", "ENOTCONN", "ECONNREFUSED", "ENOENT", "EPIPE"}:
            return self._lost(operation, text)
        if code == "EINVAL" and operation == _CONNECTING:
            # libnbd waits to write its first byte, and is told that the other side has hung up, which it takes for
            # something to read (nbd_poll prefers that): "external event 0 is invalid in state CONNECT.START".
            return self._lost(operation, "it closed the connection")
        return CaptureFailed(vm=self._vm, operation=operation, problem=text)

    def _failed(self, problem: str) -> CaptureFailed:
        return CaptureFailed(vm=self._vm, operation="reading live", problem=problem)

    def _lost(self, operation: str, problem: str) -> SourceLost:
        return SourceLost(vm=self._vm, operation=operation, problem=problem)


class _Piece:
    """Requests on their way, and where their bytes go."""

    __slots__ = ("blocks", "buffer", "cookies")

    def __init__(self, blocks: Numbers, buffer: memoryview, cookies: list[int]) -> None:
        self.blocks = blocks
        self.buffer = buffer
        self.cookies = cookies


class _Tally:
    """What extents come to, block by block: a block is data if any byte of it is."""

    def __init__(self, offset: int, count: int) -> None:
        self._offset = offset
        self.data: Flags = np.zeros(count, np.bool_)
        self.dirty: Flags = np.zeros(count, np.bool_)

    def mark(self, flags: Flags, start: int, end: int) -> None:
        first = max(0, (start - self._offset) // BLOCK_SIZE)
        flags[first : max(first, -(-(end - self._offset) // BLOCK_SIZE))] = True
