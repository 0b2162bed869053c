"""The bytes of a disk, or of a part of it."""

import io
from typing import Final, Protocol

PIECE_BYTES: Final = 65536


class Source(Protocol):
    """Bytes that can be read at any place."""

    size_bytes: int

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; fewer at the end."""
        ...


class Part:
    """A part of a source, which is a source itself."""

    def __init__(self, source: Source, start_bytes: int, size_bytes: int) -> None:
        self._source = source
        self._start = start_bytes
        self.size_bytes = max(0, min(size_bytes, source.size_bytes - start_bytes))

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset >= self.size_bytes:
            return b""
        return self._source.read(self._start + offset, min(length, self.size_bytes - offset))


class SourceFile(io.RawIOBase):
    """A source as a file, which is how libraries want it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size_bytes}[whence]
        if base + offset < 0:
            raise ValueError("a place before the beginning")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._source.size_bytes - self._at)
        data = self._source.read(self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # any writable buffer
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
