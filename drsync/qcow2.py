"""The part of qcow2 (version 3) that drsync reads and writes.

Layers are read with it (source/layer.py) and restored images written
(target/image.py). Clusters are 64 KiB, so a cluster is a block and one L2
table maps 8192 blocks, 512 MiB of disk. Nothing is compressed, encrypted or
backed by another file. Specification: docs/interop/qcow2.rst of QEMU.

    L1 table ──▶ L2 table ──▶ cluster          an L2 entry, big-endian:
    one entry     one entry    one block        bit  63     refcount is 1 (COPIED)
    a L2 table    a cluster                     bit  62     compressed
                                                bits 9-55   offset in the file, 0 = none
                                                bit  0      reads as zeros
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from drsync.model import BLOCK_SIZE, block_count

CLUSTER_BITS: Final = 16
TABLE_BLOCKS: Final = BLOCK_SIZE // 8
"""Blocks that one L2 table maps."""
ENTRY_ABSENT: Final = 0
ENTRY_ZERO: Final = 1
_COPIED: Final = 1 << 63
_COMPRESSED: Final = 1 << 62
_OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
_MAGIC: Final = 0x514649FB
_HEADER: Final = struct.Struct(">IIQIIQIIQQIIQQQQII")
_HEADER_LENGTH: Final = 104
_INCOMPATIBLE_DIRTY: Final = 1
_REFCOUNTS: Final = BLOCK_SIZE // 2  # refcounts of 16 bits in a cluster
_MAX_L1_BYTES: Final = 32 * 1024 * 1024

Entries = npt.NDArray[np.uint64]


class NotReadable(ValueError):
    """The file is not an image of the kind that this module reads; the message says what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What one L2 table says of its blocks, one array element a block."""

    first_block: int
    offsets: npt.NDArray[np.int64]
    """Where the block's bytes lie in the file; 0 = the block is absent or zeros."""
    zeros: npt.NDArray[np.bool_]
    """Whether the image says explicitly that the block reads as zeros."""


class ImageReader:
    """Reads the mapping of an image; the bytes themselves are read by whoever needs them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._file_size = os.fstat(fd).st_size
        self.size_bytes, self._l1_offset, self._l1_count = self._read_header()

    def _read_header(self) -> tuple[int, int, int]:
        raw = os.pread(self._fd, _HEADER_LENGTH, 0)
        if len(raw) < _HEADER_LENGTH:
            raise NotReadable(f"is {len(raw)} bytes long, shorter than a qcow2 header")
        (magic, version, backing, _, cluster_bits, size, crypt, l1_count, l1_offset, *_rest, incompatible) = (
            _HEADER.unpack(raw)[:14]
        )
        if magic != _MAGIC or version != 3:
            raise NotReadable("is not qcow2 version 3")
        if cluster_bits != CLUSTER_BITS or backing or crypt or incompatible & ~_INCOMPATIBLE_DIRTY:
            raise NotReadable(
                f"is not a plain image: cluster_bits {cluster_bits}, backing file {backing}, "
                f"encryption {crypt}, incompatible features {incompatible:#x}"
            )
        if incompatible:
            raise NotReadable("was not closed by QEMU")
        needed = -(-block_count(size) // TABLE_BLOCKS)
        if l1_count < needed or needed * 8 > _MAX_L1_BYTES:
            raise NotReadable(f"has {l1_count} L1 entries where {needed} are needed")
        return size, l1_offset, needed

    def tables(self) -> Iterator[Table]:
        """The L2 tables that exist, in the order of the disk.

        Raises:
            NotReadable: a table or cluster lies outside the file, or is compressed.
        """
        l1 = self._read_entries(self._l1_offset, self._l1_count)
        for index in np.flatnonzero(l1 & np.uint64(_OFFSET_MASK)):
            offset = int(l1[index]) & _OFFSET_MASK
            first = int(index) * TABLE_BLOCKS
            count = min(TABLE_BLOCKS, block_count(self.size_bytes) - first)
            yield self._table(first, self._read_entries(offset, count))

    def _table(self, first_block: int, entries: Entries) -> Table:
        if np.any(entries & np.uint64(_COMPRESSED)):
            raise NotReadable(f"holds a compressed cluster behind block {first_block}")
        zeros = (entries & np.uint64(ENTRY_ZERO)) != 0
        offsets = (entries & np.uint64(_OFFSET_MASK)).astype(np.int64)
        offsets[zeros] = 0
        if np.any(offsets >= self._file_size) or np.any(offsets & (BLOCK_SIZE - 1)):
            raise NotReadable(f"maps a block behind block {first_block} outside of its file")
        return Table(first_block=first_block, offsets=offsets, zeros=zeros)

    def _read_entries(self, offset: int, count: int) -> Entries:
        if offset + count * 8 > self._file_size:
            raise NotReadable(f"has a table at {offset} that lies outside of its file")
        raw = os.pread(self._fd, count * 8, offset)
        if len(raw) != count * 8:
            raise NotReadable(f"was cut while it was read, inside of its table at {offset}")
        return np.frombuffer(raw, ">u8").astype(np.uint64)


class ImageWriter:
    """Writes an image front to back; it is not a qcow2 file before `finish`.

    Clusters are handed out one after the other and all have refcount 1:

        header | L1 | data clusters and L2 tables as they come | refcounts
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._size_bytes = size_bytes
        self._l1: Entries = np.zeros(-(-block_count(size_bytes) // TABLE_BLOCKS), np.uint64)
        self._clusters = 1 + _clusters_of(self._l1.nbytes)

    def allocate(self, count: int) -> int:
        """The file offset of `count` new neighbouring clusters; the caller writes them."""
        offset = self._clusters * BLOCK_SIZE
        self._clusters += count
        return offset

    def set_table(self, index: int, entries: Entries) -> None:
        """Write the L2 table of blocks `index * 8192` on.

        `entries` holds, for each block, the file offset of its cluster,
        ENTRY_ZERO or ENTRY_ABSENT; it may be shorter than a table.
        """
        table: Entries = np.zeros(TABLE_BLOCKS, np.uint64)
        table[: len(entries)] = np.where(entries > ENTRY_ZERO, entries | np.uint64(_COPIED), entries)
        offset = self.allocate(1)
        _write(self._fd, table.astype(">u8").tobytes(), offset)
        self._l1[index] = offset | _COPIED

    def finish(self) -> None:
        """Write L1, refcounts and, last, the header: from now on the file is an image."""
        refcount_blocks, table_clusters = self._refcount_size()
        blocks_at = self.allocate(refcount_blocks)
        table_at = self.allocate(table_clusters)
        for index in range(refcount_blocks):  # one at a time: those of a large disk are many MiB
            counted = min(self._clusters - index * _REFCOUNTS, _REFCOUNTS)
            _write(self._fd, b"\0\1" * counted + bytes(2 * (_REFCOUNTS - counted)), blocks_at + index * BLOCK_SIZE)
        table: Entries = np.zeros(table_clusters * TABLE_BLOCKS, np.uint64)
        table[:refcount_blocks] = blocks_at + np.arange(refcount_blocks, dtype=np.uint64) * BLOCK_SIZE
        _write(self._fd, table.astype(">u8").tobytes(), table_at)
        _write(self._fd, self._l1.astype(">u8").tobytes(), BLOCK_SIZE)
        os.ftruncate(self._fd, self._clusters * BLOCK_SIZE)
        _write(self._fd, self._header(table_at, table_clusters), 0)

    def _refcount_size(self) -> tuple[int, int]:
        """Clusters for the refcount blocks and their table, which count themselves too."""
        blocks = table = 0
        while True:
            total = self._clusters + blocks + table
            needed_blocks = _clusters_of(total * 2)
            needed_table = _clusters_of(needed_blocks * 8)
            if (needed_blocks, needed_table) == (blocks, table):
                return blocks, table
            blocks, table = needed_blocks, needed_table

    def _header(self, refcount_table_offset: int, refcount_table_clusters: int) -> bytes:
        header = _HEADER.pack(
            _MAGIC,
            3,
            *(0, 0),  # no backing file
            CLUSTER_BITS,
            self._size_bytes,
            0,  # not encrypted
            len(self._l1),
            BLOCK_SIZE,
            refcount_table_offset,
            refcount_table_clusters,
            *(0, 0),  # no internal snapshots
            *(0, 0, 0),  # no feature bits
            4,  # refcounts of 2^4 bits
            _HEADER_LENGTH,
        )
        return header + bytes(8)  # no header extensions


def create_image(path: Path, size_bytes: int) -> None:
    """Make an empty image of `size_bytes` at `path`, readable by its owner alone.

    Raises:
        FileExistsError: there is a file already.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        ImageWriter(fd, size_bytes).finish()
    finally:
        os.close(fd)


def _clusters_of(length: int) -> int:
    return -(-length // BLOCK_SIZE)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
