"""Columns: numbers of one kind, back to back, little-endian; each is checked against the bytes that are there."""

import struct
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from drsync.format import Malformed

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Bytes2D = npt.NDArray[np.uint8]

_LENGTH: Final = struct.Struct("<I")


def little_endian(column: npt.NDArray[np.generic]) -> bytes:
    """The bytes of a column."""
    return column.astype(column.dtype.newbyteorder("<"), copy=False).tobytes()


def with_metadata(meta: msgspec.Struct) -> bytes:
    """The beginning of an index: the length of its metadata, then the metadata."""
    text = msgspec.json.encode(meta)
    return _LENGTH.pack(len(text)) + text


class Columns:
    """Takes columns off bytes, each checked against the bytes that are left."""

    def __init__(self, data: bytes, what: str = "index") -> None:
        self._data = data
        self._what = what
        self._at = 0

    def metadata(self) -> bytes:
        if len(self._data) < _LENGTH.size:
            raise Malformed(f"its {self._what} is cut")
        (length,) = _LENGTH.unpack_from(self._data)
        self._at = _LENGTH.size + length
        if self._at > len(self._data):
            raise Malformed(f"its {self._what} is cut")
        return self._data[_LENGTH.size : self._at]

    def numbers(self, count: int, kind: str) -> npt.NDArray[np.generic]:
        dtype = np.dtype(kind)
        if not 0 <= count <= (len(self._data) - self._at) // dtype.itemsize:
            raise Malformed(f"its {self._what} claims {count} entries and has fewer")
        column = np.frombuffer(self._data, dtype, count, self._at)
        self._at += count * dtype.itemsize
        return column

    def u32(self, count: int) -> U32:
        return self.numbers(count, "<u4").astype(np.uint32)

    def u64(self, count: int) -> U64:
        return self.numbers(count, "<u8").astype(np.uint64)

    def rows_of(self, count: int, width: int) -> Bytes2D:
        return self.numbers(count * width, "u1").astype(np.uint8).reshape(count, width)

    def shuffled(self, count: int, width: int) -> npt.NDArray[np.int64]:
        """A byte-shuffled column (see `shuffled`) of numbers of `width` bytes."""
        planes = self.rows_of(count * width, 1).reshape(width, count)
        column = np.ascontiguousarray(planes.T).view(f"<u{width}").reshape(count)
        return column.astype(np.int64)

    def end(self) -> None:
        if self._at != len(self._data):
            raise Malformed(f"its {self._what} has bytes that nothing describes")


def shuffled(column: npt.NDArray[np.generic]) -> bytes:
    """The bytes of a column, byte-shuffled: first the lowest byte of each number, then the next one of each …

    What numbers have in common is in their upper bytes; so it lies together, and compresses to nothing.
    """
    width = column.dtype.itemsize
    flat = np.frombuffer(little_endian(column), np.uint8).reshape(-1, width)
    return np.ascontiguousarray(flat.T).tobytes()
