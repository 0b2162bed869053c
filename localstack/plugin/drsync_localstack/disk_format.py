"""RAW, stream-optimised VMDK and VHD, read piece by piece: what VM Import takes from S3.

Known: the formats, from their specifications (VMware "Virtual Disk Format 5.0", Microsoft "Virtual Hard Disk Image
Format Specification" 1.0); that VM Import takes RAW, VHD fixed and dynamic, VMDK stream-optimised alone, and no qcow2
(VM Import guide, "Image formats"). VHDX and OVA, which AWS takes too, are refused here.

Guess: the words of the refusals behind "Unsupported specified file format", which were seen with osbuild-composer#706.

Memory is bounded: a piece has at most 2 MiB. What comes from the object is checked before it is used.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from drsync_localstack.blocks import BLOCK_BYTES, ZERO_BLOCK

SECTOR = 512
PIECE_BYTES = 512 * 1024
TABLE_PART = 4096  # entries of a table that are read at once
MAX_DISK_BYTES = 16 * 2**40
"""Known: images up to 16 TiB."""


class BadImage(Exception):
    """The object is not a disk image of the format that was named."""


class ImageObject(Protocol):
    """An object that holds an image."""

    @property
    def size_bytes(self) -> int:
        """Its length."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes of it, fewer at its end."""
        ...


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk's size, and its data as (offset, bytes), each offset once; what lies between is zero."""

    size_bytes: int
    pieces: Iterator[tuple[int, bytes]]


def open_disk(image: ImageObject, image_format: str) -> Disk:
    """Read an image of a format that VM Import knows by this name.

    Raises:
        BadImage: it isn't one; also while its pieces are read.
    """
    match image_format.upper():
        case "RAW":
            disk = _open_raw(image)
        case "VMDK":
            disk = _open_vmdk(image)
        case "VHD":
            disk = _open_vhd(image)
        case _:
            raise BadImage(f"Unsupported specified file format: {image_format}")
    if not 0 < disk.size_bytes <= MAX_DISK_BYTES:
        raise BadImage(f"Disk size of {disk.size_bytes} bytes is not supported")
    return disk


def blocks_of(pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, int, bytes]]:
    """Cut pieces at the bounds of 512 KiB blocks: block's number, offset within it, data."""
    for start, data in pieces:
        done = 0
        while done < len(data):
            index, within = divmod(start + done, BLOCK_BYTES)
            length = min(len(data) - done, BLOCK_BYTES - within)
            yield index, within, data[done : done + length]
            done += length


def _exactly(image: ImageObject, offset: int, length: int) -> bytes:
    data = image.read(offset, length)
    if len(data) != length:
        raise BadImage("The image ends too early")
    return data


def _open_raw(image: ImageObject) -> Disk:
    # A raw image can hold anything; what starts as another format was uploaded under the wrong name.
    start = image.read(0, 8)
    if start.startswith((b"KDMV", b"QFI\xfb", b"conectix", b"vhdxfile")):
        raise BadImage("Unsupported specified file format: the object is not a RAW image")
    return Disk(image.size_bytes, _data(image, 0, image.size_bytes))


def _data(image: ImageObject, offset: int, length: int) -> Iterator[tuple[int, bytes]]:
    for at in range(0, length, PIECE_BYTES):
        piece = _exactly(image, offset + at, min(PIECE_BYTES, length - at))
        if piece != ZERO_BLOCK[: len(piece)]:
            yield at, piece


# --- VMDK, stream-optimised: a header, then grains, each a sector-aligned marker with deflated data. Grain tables and
# their directory say where the grains are; the header, or the footer at the end, says where the directory is. ---------

VMDK_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
VMDK_MARKER = struct.Struct("<QI")
COMPRESSED_WITH_MARKERS = 0x30000
MAX_GRAIN_SECTORS = 4096  # 2 MiB; usual are 128
TABLE_ENTRIES = 512
DIRECTORY_AT_END = 2**64 - 1
END, FOOTER = 0, 3


@dataclass(slots=True)
class _Grains:
    """How many grains, and where: two ways to read an image have to find the same. In any order, in constant memory."""

    count: int = 0
    places: int = 0

    def add(self, number: int, sector: int) -> None:
        self.count += 1
        self.places += hash((number, sector))


def _open_vmdk(image: ImageObject) -> Disk:
    header = _exactly(image, 0, SECTOR)
    magic, _, flags, capacity, grain, _, _, _, _, _, _, _, _, method = VMDK_HEADER.unpack_from(header)
    if magic != b"KDMV":
        raise BadImage("Unsupported specified file format: the object is not a VMDK image")
    if flags & COMPRESSED_WITH_MARKERS != COMPRESSED_WITH_MARKERS or method != 1:
        raise BadImage("Unsupported VMDK: only stream-optimized VMDK images are supported")
    if not 1 <= grain <= MAX_GRAIN_SECTORS:
        raise BadImage(f"Bad VMDK: grains of {grain} sectors")
    return Disk(capacity * SECTOR, _grains(image, header))


def _grains(image: ImageObject, header: bytes) -> Iterator[tuple[int, bytes]]:
    """All grains in the order of the stream; then the tables are checked, by which others would find them."""
    _, _, _, capacity, grain, _, _, _, _, directory_at, overhead, *_ = VMDK_HEADER.unpack_from(header)
    at, seen = overhead * SECTOR, _Grains()
    while True:
        marker = _exactly(image, at, SECTOR)
        value, size = VMDK_MARKER.unpack_from(marker)
        if size == 0:  # a table, the footer or the end; value: sectors that follow
            (kind,) = struct.unpack_from("<I", marker, VMDK_MARKER.size)
            if kind == END:
                break
            if kind == FOOTER and directory_at == DIRECTORY_AT_END:
                directory_at = VMDK_HEADER.unpack_from(_exactly(image, at + SECTOR, SECTOR))[9]
            at += SECTOR + value * SECTOR
            continue
        if size > 2 * grain * SECTOR or value >= capacity or value % grain:
            raise BadImage(f"Bad VMDK: grain at sector {value}")
        seen.add(value // grain, at // SECTOR)
        length = min(grain, capacity - value) * SECTOR
        yield value * SECTOR, _inflate(_exactly(image, at + VMDK_MARKER.size, size), grain * SECTOR, length)[:length]
        at += -(-(VMDK_MARKER.size + size) // SECTOR) * SECTOR
    if directory_at == DIRECTORY_AT_END:
        raise BadImage("Bad VMDK: there is no footer")
    if seen != _in_tables(image, directory_at, -(-capacity // grain)):
        raise BadImage("Bad VMDK: its grain tables are not those of its grains")


def _in_tables(image: ImageObject, directory_at: int, grains: int) -> _Grains:
    """The grains that the directory and its tables tell of."""
    found, tables = _Grains(), -(-grains // TABLE_ENTRIES)
    for first in range(0, tables, TABLE_PART):
        part = _exactly(image, directory_at * SECTOR + first * 4, min(TABLE_PART, tables - first) * 4)
        for table, (table_at,) in enumerate(struct.iter_unpack("<I", part), start=first):
            entries = _exactly(image, table_at * SECTOR, TABLE_ENTRIES * 4) if table_at else b""
            for entry, (sector,) in enumerate(struct.iter_unpack("<I", entries)):
                if sector:
                    found.add(table * TABLE_ENTRIES + entry, sector)
    return found


def _inflate(data: bytes, limit: int, wanted: int) -> bytes:
    engine = zlib.decompressobj()
    try:
        grain = engine.decompress(data, limit)
        too_large = not engine.eof and engine.decompress(engine.unconsumed_tail, 1)
    except zlib.error as err:
        raise BadImage(f"Bad VMDK: {err}") from err
    if too_large:
        raise BadImage("Bad VMDK: a grain is too large")
    if not engine.eof:
        raise BadImage("Bad VMDK: a grain is cut off")
    if len(grain) < wanted:
        raise BadImage("Bad VMDK: a grain is too short")
    return grain


# --- VHD: a footer at the end; fixed: data before it; dynamic: a table of blocks, each with a bitmap before it -------

VHD_FOOTER = struct.Struct(">8sIIQI4sI4sQQII")
VHD_SPARSE = struct.Struct(">8sQQIII")
FIXED, DYNAMIC = 2, 3
NO_BLOCK = 0xFFFFFFFF
MAX_VHD_BLOCK = 2 * 2**20


def _open_vhd(image: ImageObject) -> Disk:
    if image.size_bytes < SECTOR:
        raise BadImage("Unsupported specified file format: the object is not a VHD image")
    footer = _exactly(image, image.size_bytes - SECTOR, SECTOR)
    cookie, _, _, at, _, _, _, _, _, size, _, kind = VHD_FOOTER.unpack_from(footer)
    if cookie != b"conectix":
        raise BadImage("Unsupported specified file format: the object is not a VHD image")
    (checksum,) = struct.unpack_from(">I", footer, 64)
    if checksum != _vhd_checksum(footer, 64):
        raise BadImage("Bad VHD: the footer's checksum is wrong")
    if kind == FIXED:
        if size > image.size_bytes - SECTOR:
            raise BadImage("The image ends too early")
        return Disk(size, _data(image, 0, size))
    if kind == DYNAMIC:
        return Disk(size, _vhd_blocks(image, at, size))
    raise BadImage("Unsupported VHD: only fixed and dynamic VHD images are supported")


def _vhd_blocks(image: ImageObject, header_at: int, size: int) -> Iterator[tuple[int, bytes]]:
    header = _exactly(image, header_at, 1024)
    cookie, _, table_at, _, entries, block_bytes = VHD_SPARSE.unpack_from(header)
    if cookie != b"cxsparse" or struct.unpack_from(">I", header, 36)[0] != _vhd_checksum(header, 36):
        raise BadImage("Bad VHD: no header of a dynamic disk")
    if block_bytes % SECTOR or not SECTOR <= block_bytes <= MAX_VHD_BLOCK or entries * block_bytes < size:
        raise BadImage(f"Bad VHD: {entries} blocks of {block_bytes} bytes")
    bitmap_bytes = -(-block_bytes // SECTOR // 8 // SECTOR) * SECTOR or SECTOR
    count = -(-size // block_bytes)
    for first in range(0, count, TABLE_PART):
        part = _exactly(image, table_at + first * 4, min(TABLE_PART, count - first) * 4)
        for number, (sector,) in enumerate(struct.iter_unpack(">I", part), start=first):
            if sector != NO_BLOCK:
                length = min(block_bytes, size - number * block_bytes)
                yield number * block_bytes, _exactly(image, sector * SECTOR + bitmap_bytes, length)


def _vhd_checksum(header: bytes, at: int) -> int:
    """The one's complement of the sum of all bytes, the checksum itself left out."""
    return ~(sum(header) - sum(header[at : at + 4])) & 0xFFFFFFFF
