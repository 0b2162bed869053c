"""Which kernel modules an initramfs brings.

An initramfs is one cpio archive after another ("newc": the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst); the first ones, for microcode, are plain, the last one is
compressed. Only names are read; what is unpacked goes by in pieces, and no more of it than MAX_PLAIN_BYTES.
"""

import bz2
import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, Protocol

import zstandard

MAX_PLAIN_BYTES: Final = 1024 * 1024 * 1024
"""Unpacked; a generic one has 100 to 300 MiB with firmware."""
_MAX_NAME: Final = 4096
_MAX_MODULES: Final = 20_000
_PIECE: Final = 1024 * 1024
_MEMORY: Final = 256 * 1024 * 1024
_LZ4_BLOCK: Final = 8 * 1024 * 1024
_MODULE: Final = re.compile(r"([^/]+)\.ko(?:\.(?:xz|zst|gz))?$")
_CPIO: Final = (b"070701", b"070702")
_HEADER: Final = 110


class Damaged(Exception):
    """The archive ends too early, or is packed in a way that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Initramfs:
    """What is in one."""

    modules: frozenset[str]
    """Names as the kernel has them: with `_`."""
    problem: str = ""
    """Why there may be more than was seen."""


def module_name(text: str) -> str:
    """The module that a path of modules.dep, modules.builtin or an archive stands for; empty if none."""
    found = _MODULE.search(text)
    return found.group(1).replace("-", "_") if found else ""


def read_initramfs(file: BinaryIO) -> Initramfs:
    """The modules in an initramfs. What is wrong with it is told in the result."""
    modules: set[str] = set()
    try:
        squashed = _scan(_Bytes(_pieces(file)), modules, depth=0)
    except Exception as err:  # noqa: BLE001 - decompressors raise errors of many classes; all mean the same
        return Initramfs(modules=frozenset(modules), problem=f"it can't be unpacked: {err or type(err).__name__}")
    return Initramfs(modules=frozenset(modules), problem="its files are in a squashfs image" if squashed else "")


def unpacked(file: BinaryIO, length: int) -> Iterator[bytes]:
    """What `length` bytes of a file unpack to, whatever they are packed with: pieces. Errors may be of any class."""
    data = _Bytes(iter([file.read(length)]))
    return _unpack(data.peek(6), data)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


class _Bytes:
    """A stream of pieces, read in the lengths that are wanted."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._held = bytearray()
        self._left = MAX_PLAIN_BYTES

    def peek(self, length: int) -> bytes:
        """The next bytes, fewer at the end."""
        while len(self._held) < length:
            piece = next(self._pieces, b"")
            if not piece:
                break
            self._left -= len(piece)
            if self._left < 0:
                raise Damaged(f"more than {MAX_PLAIN_BYTES} bytes")
            self._held += piece
        return bytes(self._held[:length])

    def read(self, length: int) -> bytes:
        data = self.peek(length)
        del self._held[: len(data)]
        return data

    def skip(self, length: int) -> None:
        while length > 0:
            taken = self.read(min(length, _PIECE))
            if not taken:
                raise Damaged("it ends too early")
            length -= len(taken)

    def skip_zeros(self) -> None:
        while data := self.peek(512):
            rest = data.lstrip(b"\0")
            self.read(len(data) - len(rest))
            if rest:
                return

    def rest(self) -> Iterator[bytes]:
        while data := self.read(_PIECE):
            yield data


def _scan(data: _Bytes, modules: set[str], depth: int) -> bool:
    """Note the modules of all archives in a row; whether one hides its files in a squashfs."""
    squashed = False
    while True:
        data.skip_zeros()
        magic = data.peek(6)
        if not magic:
            return squashed
        if magic in _CPIO:
            squashed |= _scan_archive(data, modules)
        elif depth == 0:
            return _scan(_Bytes(_unpack(magic, data)), modules, depth=1) or squashed
        else:
            raise Damaged("it is packed twice")


def _scan_archive(data: _Bytes, modules: set[str]) -> bool:
    squashed = False
    while True:
        header = data.read(_HEADER)
        if len(header) < _HEADER or header[:6] not in _CPIO:
            raise Damaged("it is cut or no archive")
        size, name_size = int(header[54:62], 16), int(header[94:102], 16)
        if not 0 < name_size <= _MAX_NAME:
            raise Damaged("a name is too long")
        name = data.read(_up(_HEADER + name_size) - _HEADER)[: name_size - 1].decode("utf-8", "replace")
        if name == "TRAILER!!!":
            return squashed
        data.skip(_up(size))
        squashed |= name.endswith(("squashfs-root.img", "squash-root.img"))
        module = module_name(name)
        if module and len(modules) < _MAX_MODULES:
            modules.add(module)


def _up(length: int) -> int:
    return -(-length // 4) * 4


def _unpack(magic: bytes, data: _Bytes) -> Iterator[bytes]:
    for start, unpack in _PACKINGS:
        if magic.startswith(start):
            return unpack(data)
    raise Damaged(f"it is packed in an unknown way ({magic[:4].hex()})")


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _bounded(decompressor: _Decompressor, data: _Bytes) -> Iterator[bytes]:
    """What a decompressor of the standard library makes of the rest, a piece at a time."""
    for packed in data.rest():
        plain = decompressor.decompress(packed, _PIECE)
        while True:
            if plain:
                yield plain
            if decompressor.eof:
                return
            if getattr(decompressor, "needs_input", True) and not plain:
                break
            plain = decompressor.decompress(b"", _PIECE)
    raise Damaged("it ends too early")


def _gzip(data: _Bytes) -> Iterator[bytes]:
    inflater = zlib.decompressobj(31)
    for packed in data.rest():
        waiting = packed
        while waiting and not inflater.eof:
            yield inflater.decompress(waiting, _PIECE)
            waiting = inflater.unconsumed_tail
        if inflater.eof:
            return
    raise Damaged("it ends too early")


def _xz(data: _Bytes) -> Iterator[bytes]:
    return _bounded(lzma.LZMADecompressor(memlimit=_MEMORY), data)


def _bzip2(data: _Bytes) -> Iterator[bytes]:
    return _bounded(bz2.BZ2Decompressor(), data)


def _zstd(data: _Bytes) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MEMORY // 2)
    readable: Any = data  # zstandard asks for nothing but `read`
    with decompressor.stream_reader(readable, read_across_frames=True) as reader:
        while plain := reader.read(_PIECE):
            yield plain


def _lz4(data: _Bytes) -> Iterator[bytes]:
    """The kernel's own (legacy) lz4 frames: each block has its length before it (lz4_Frame_format.md)."""
    try:
        from lz4 import block  # noqa: PLC0415 - of the extra `preflight`
    except ImportError as err:
        raise Damaged("it is packed with lz4, and Python's lz4 is not installed") from err
    data.read(4)
    while head := data.read(4):
        if head == b"\x02\x21\x4c\x18":  # another frame
            continue
        length = int(struct.unpack("<I", head.ljust(4, b"\0"))[0])
        if not 0 < length <= 2 * _LZ4_BLOCK:
            return
        yield block.decompress(data.read(length), uncompressed_size=_LZ4_BLOCK)


_PACKINGS: Final[tuple[tuple[bytes, Callable[[_Bytes], Iterator[bytes]]], ...]] = (
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ", _xz),
    (b"\x5d\x00\x00", _xz),  # LZMA alone: LZMADecompressor finds out
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"BZh", _bzip2),
    (b"\x02\x21\x4c\x18", _lz4),
)
