"""A block map: where each block of a point is, in pages of 8192 blocks (docs/format.md, "Block maps").

    index = u32 length of metadata | metadata (JSON)
            | older maps:  number u64[m] | object id 16[m]
            | then for each disk of the point, its pages:  source u32[p] | offset u32[p] | stored length u32[p]
    page  = AES-256-GCM( frame key of its map, nonce = offset, zstd-3 of:
            u32 containers | number u64[c] | object id 16[c]
            | container u16[blocks] | gap u32[held] | stored length u32[held], each byte-shuffled )

A number also carries the generation of the key that its object is under (`with_generation`).
A page that did not change since an older map is not written again: the index
says in which map it lies. The gaps are from frame to frame within a container,
so where blocks lie as they were written, all of them are 0.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from drsync.format import Malformed
from drsync.format.columns import U32, U64, Bytes2D, Columns, little_endian, shuffled, with_metadata
from drsync.format.frame import MAX_FRAME_BYTES, TAG_BYTES
from drsync.format.keys import FIRST_GENERATION, MAX_GENERATIONS, OBJECT_ID_BYTES, ObjectKeys
from drsync.format.names import MAX_SEQ
from drsync.format.record import decode_record
from drsync.format.seal import FRAMES_START, MAGIC, MAX_INDEX_BYTES, MAX_OBJECT_BYTES
from drsync.format.segment import MAX_DISKS
from drsync.model import MAX_DISK_BYTES, block_count, is_name

PAGE_BLOCKS: Final = 8192
"""Blocks of a page: 512 MiB of disk."""
MAX_PAGE_BYTES: Final = 320 * 1024
"""Of a page, plain and stored: one that has a container for each of its blocks takes 272 KiB."""
MAX_OLDER_MAPS: Final = 64
"""Older maps that hold pages of one map: bounds what can go wrong with it, and what has to be kept for it."""
NO_CONTAINER: Final = -1
NO_PAGE: Final = 0
"""The source of a page all of whose blocks read as zeros."""
THIS_MAP: Final = 1
"""The source of a page that lies in the map itself; source 2 + n is older map n."""
_LEVEL: Final = 3
_PURPOSE: Final = b"drsync map page\0"
_NONCE: Final = struct.Struct("<IQ")
_NUMBER: Final = struct.Struct("<Q")
_PAGE_ENTRY_BYTES: Final = 12
_GENERATION_SHIFT: Final = 48


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Metadata with no more and no other fields than the format names."""


class MapDisk(_Strict, frozen=True):
    """A disk of the point that a map shows."""

    name: str
    size_bytes: int


class MapMeta(_Strict, frozen=True, omit_defaults=True):
    """Metadata of a map."""

    seq: int
    """The point that it shows."""
    segment: str
    """SHA-256 (hex) of the sealed index of segment `seq`: the map is of this log and no other."""
    parent: int | None
    """The point before `seq`; None if it is the first."""
    older: int
    disks: list[MapDisk]
    horizon: int = 0
    """The number of the horizon that the log was read under; the objects that the map names are those of that one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OlderMaps:
    """The maps that hold pages of a newer one."""

    numbers: U64
    ids: Bytes2D
    generations: U64
    """Of the root key that each is under."""

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """Where the pages of one disk are; one array element a page."""

    sources: U32
    offsets: U32
    lengths: U32

    @classmethod
    def empty(cls, pages: int) -> "PageTable":
        return cls(
            sources=np.zeros(pages, np.uint32), offsets=np.zeros(pages, np.uint32), lengths=np.zeros(pages, np.uint32)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PageContainer:
    """An object that holds frames of a page's blocks."""

    number: int
    """Of the segment; 0: it is a pack."""
    object_id: bytes
    generation: int = FIRST_GENERATION
    """Of the root key that it is under."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Where the blocks of a part of a disk are; one array element a block."""

    containers: Sequence[PageContainer]
    held_by: npt.NDArray[np.int32]
    """Index into `containers`, or NO_CONTAINER."""
    offsets: U32
    lengths: U32


def with_generation(number: int, generation: int) -> int:
    """A number as a map has it: the generation of its object's key stands in the upper 16 bits, less one.

    Raises:
        Malformed: the number is so high that it can't; nothing must be stored.
    """
    if number >= 1 << _GENERATION_SHIFT:
        raise Malformed(f"segment {number} has a number that no map can name")
    return (generation - FIRST_GENERATION) << _GENERATION_SHIFT | number


def _without_generations(column: U64) -> tuple[U64, U64]:
    """The numbers of a column, and the generations that stand in it."""
    generations = (column >> np.uint64(_GENERATION_SHIFT)) + np.uint64(FIRST_GENERATION)
    if np.any(generations > MAX_GENERATIONS):
        raise Malformed("it names an object under a key of a generation that none has")
    return column & np.uint64((1 << _GENERATION_SHIFT) - 1), generations


def page_count(size_bytes: int) -> int:
    """How many pages a disk of `size_bytes` has."""
    return -(-block_count(size_bytes) // PAGE_BLOCKS)


def page_blocks(page: int, size_bytes: int) -> int:
    """How many blocks page number `page` of a disk has; the last one may be short."""
    return min(PAGE_BLOCKS, block_count(size_bytes) - page * PAGE_BLOCKS)


def page_binding(repository_id: bytes, disk: str) -> bytes:
    """The part of the associated data that all pages of a disk share."""
    return _PURPOSE + repository_id + disk.encode() + b"\0"


def encode_page(page: Page) -> bytes:
    """The plain bytes of a page.

    Raises:
        Malformed: frames of one container don't lie in the order of their blocks; nothing must be stored.
    """
    at = np.flatnonzero(page.held_by != NO_CONTAINER)
    at = at[np.argsort(page.held_by[at], kind="stable")]
    held_by, offsets, lengths = page.held_by[at], page.offsets[at].astype(np.int64), page.lengths[at]
    expected = np.zeros(len(at), np.int64)
    follows = held_by[1:] == held_by[:-1]
    expected[1:][follows] = (offsets + lengths)[:-1][follows]
    gaps = offsets - expected
    if np.any(gaps < 0):
        raise Malformed("frames overlap, or are not in the order of their blocks")
    return b"".join(
        [
            little_endian(np.array([len(page.containers)], np.uint32)),
            little_endian(np.array([with_generation(c.number, c.generation) for c in page.containers], np.uint64)),
            *(c.object_id for c in page.containers),
            shuffled((page.held_by + 1).astype(np.uint16)),
            shuffled(gaps.astype(np.uint32)),
            shuffled(lengths.astype(np.uint32)),
        ]
    )


def decode_page(plain: bytes, blocks: int, newest: int) -> Page:
    """A page of `blocks` blocks, of a map of point `newest`.

    Raises:
        Malformed: it breaks a rule of docs/format.md.
    """
    columns = Columns(plain, "page")
    count = int(columns.u32(1)[0])
    numbers, generations = _without_generations(columns.u64(count))
    ids = columns.rows_of(count, OBJECT_ID_BYTES)
    held_by = columns.shuffled(blocks, 2) - 1
    at = np.flatnonzero(held_by != NO_CONTAINER)
    gaps, lengths = columns.shuffled(len(at), 4), columns.shuffled(len(at), 4)
    columns.end()
    if np.any(held_by >= count) or np.any(numbers > newest):
        raise Malformed("its page names a container that it does not have, or a segment behind its point")
    if np.any((lengths == 0) | (lengths > MAX_FRAME_BYTES)):
        raise Malformed("its page has a frame of a length that no frame has")
    at = at[np.argsort(held_by[at], kind="stable")]
    offsets = _offsets(held_by[at], gaps, lengths)
    if np.any((offsets < FRAMES_START) | (offsets + lengths > MAX_OBJECT_BYTES)):
        raise Malformed("its page has a frame outside of any object")
    page = Page(
        containers=[
            PageContainer(number=int(n), object_id=i.tobytes(), generation=int(g))
            for n, i, g in zip(numbers, ids, generations, strict=True)
        ],
        held_by=held_by.astype(np.int32),
        offsets=np.zeros(blocks, np.uint32),
        lengths=np.zeros(blocks, np.uint32),
    )
    page.offsets[at], page.lengths[at] = offsets, lengths
    return page


def _offsets(
    held_by: npt.NDArray[np.int64], gaps: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The offsets of frames that are sorted by container; 8192 numbers of 32 bits don't overflow 64."""
    if not len(held_by):
        return gaps
    ends = np.cumsum(gaps + lengths)
    first = np.flatnonzero(np.diff(held_by, prepend=-1))
    before = np.concatenate([np.zeros(1, np.int64), ends])[first]
    offsets: npt.NDArray[np.int64] = ends - lengths - np.repeat(before, np.diff(first, append=len(held_by)))
    return offsets


class PageSealer:
    """Makes the pages of one map; `buffer` is the object as far as it has come. One thread uses it."""

    def __init__(self, keys: ObjectKeys) -> None:
        self.buffer = bytearray(MAGIC)
        self._cipher = AESGCM(keys.frame)
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)

    def add(self, page: Page, binding: bytes, number: int) -> tuple[int, int]:
        """Write a page behind the ones before; its offset and stored length.

        Raises:
            Malformed: see `encode_page`.
        """
        offset = len(self.buffer)
        packed = self._compressor.compress(encode_page(page))
        self.buffer += self._cipher.encrypt(_NONCE.pack(0, offset), packed, binding + _NUMBER.pack(number))
        return offset, len(self.buffer) - offset


def open_page(keys: ObjectKeys, stored: bytes, offset: int, binding: bytes, number: int) -> bytes:
    """The plain bytes of a page that lies at `offset` of the map with these keys.

    Raises:
        Malformed: not this page, or not unchanged, or larger than a page is.
    """
    try:
        packed = AESGCM(keys.frame).decrypt(_NONCE.pack(0, offset), stored, binding + _NUMBER.pack(number))
    except (InvalidTag, ValueError) as err:
        raise Malformed(f"its page {number} at offset {offset} does not authenticate") from err
    try:
        size = zstandard.frame_content_size(packed)
        if not 0 < size <= MAX_PAGE_BYTES:  # see seal._decompress
            raise Malformed(f"its page {number} claims {size} bytes")
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
    except zstandard.ZstdError as err:
        raise Malformed(f"its page {number} at offset {offset} does not decompress") from err


def map_index_bound(meta_bytes: int, pages: int) -> int:
    """The length that the index of a map with so many pages has at most."""
    return 4 + meta_bytes + MAX_OLDER_MAPS * (8 + OBJECT_ID_BYTES) + pages * _PAGE_ENTRY_BYTES


def encode_map(meta: MapMeta, older: OlderMaps, tables: Sequence[PageTable]) -> bytes:
    """The index of a map; a table for each disk of `meta`."""
    numbers = [with_generation(int(n), int(g)) for n, g in zip(older.numbers, older.generations, strict=True)]
    parts = [with_metadata(meta), little_endian(np.array(numbers, np.uint64)), older.ids.tobytes()]
    for table in tables:
        parts += [little_endian(column) for column in (table.sources, table.offsets, table.lengths)]
    return b"".join(parts)


def decode_map(index: bytes, frames_end: int) -> tuple[MapMeta, OlderMaps, list[PageTable]]:
    """Metadata, older maps and page tables of a map's index; `frames_end` is where its own pages end.

    Raises:
        Malformed: it breaks a rule of docs/format.md.
    """
    columns = Columns(index)
    meta = decode_record(columns.metadata(), MapMeta)
    _check_meta(meta)
    numbers, generations = _without_generations(columns.u64(meta.older))
    older = OlderMaps(numbers=numbers, ids=columns.rows_of(meta.older, OBJECT_ID_BYTES), generations=generations)
    if np.any((older.numbers == 0) | (older.numbers > meta.seq)):
        raise Malformed("it uses a map of a point that is not older")
    tables: list[PageTable] = []
    for disk in meta.disks:
        pages = page_count(disk.size_bytes)
        table = PageTable(sources=columns.u32(pages), offsets=columns.u32(pages), lengths=columns.u32(pages))
        _check_table(table, len(older))
        tables.append(table)
    columns.end()
    _check_own_pages(tables, frames_end)
    return meta, older, tables


def _check_meta(meta: MapMeta) -> None:
    if not 1 <= meta.seq <= MAX_SEQ or not 0 <= meta.older <= MAX_OLDER_MAPS:
        raise Malformed("it has a number, or a count of older maps, that no map has")
    if meta.parent is not None and not 1 <= meta.parent < meta.seq:
        raise Malformed("its parent is not an earlier point")
    if len({d.name for d in meta.disks}) != len(meta.disks) or len(meta.disks) > MAX_DISKS:
        raise Malformed("its disks are not distinct, or too many")
    if not 0 <= meta.horizon <= MAX_SEQ:
        raise Malformed("it is of a horizon that there can't be")
    for disk in meta.disks:
        if not is_name(disk.name) or not 0 <= disk.size_bytes <= MAX_DISK_BYTES:
            raise Malformed("a disk has a name or size that no disk has")
    if sum(page_count(d.size_bytes) for d in meta.disks) > MAX_INDEX_BYTES // _PAGE_ENTRY_BYTES:
        raise Malformed("it has more pages than an index holds")


def _check_table(table: PageTable, older: int) -> None:
    if np.any(table.sources >= THIS_MAP + 1 + older):
        raise Malformed("a page lies in a map that it does not name")
    offsets, lengths = table.offsets.astype(np.int64), table.lengths.astype(np.int64)
    absent = table.sources == NO_PAGE
    if np.any(offsets[absent]) or np.any(lengths[absent]):
        raise Malformed("a page that is not there has a place")
    offsets, lengths = offsets[~absent], lengths[~absent]
    if np.any((lengths <= TAG_BYTES) | (lengths > MAX_PAGE_BYTES)):
        raise Malformed("a page has a length that no page has")
    if np.any((offsets < FRAMES_START) | (offsets + lengths > MAX_OBJECT_BYTES)):
        raise Malformed("a page lies outside of any object")


def _check_own_pages(tables: Sequence[PageTable], frames_end: int) -> None:
    """The pages of the map itself take exactly the bytes between magic and header, in their order."""
    own = [table.sources == THIS_MAP for table in tables]
    offsets = np.concatenate([np.zeros(0, np.int64), *(t.offsets[o] for t, o in zip(tables, own, strict=True))])
    lengths = np.concatenate([np.zeros(0, np.int64), *(t.lengths[o] for t, o in zip(tables, own, strict=True))])
    ends = FRAMES_START + np.cumsum(lengths)
    if np.any(offsets != ends - lengths) or (int(ends[-1]) if len(ends) else FRAMES_START) != frames_end:
        raise Malformed("its pages don't take exactly the bytes between magic and header")
