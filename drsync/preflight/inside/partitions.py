"""MBR and GPT, as far as a check needs them. Pure: bytes in, values out.

Sources: UEFI specification 2.10, section 5 (GPT, protective MBR, CRCs); for logical partitions the chain of extended
boot records as Linux reads it (block/partitions/msdos.c). Chains and counts are bounded: a table may be made to loop.
"""

import struct
import uuid
import zlib
from dataclasses import dataclass
from typing import Final

from drsync.preflight.facts import Partition, Table, plain
from drsync.preflight.inside.source import Source

SECTOR: Final = 512
GPT_SIGNATURE: Final = b"EFI PART"
ESP_TYPE: Final = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
BIOS_BOOT_TYPE: Final = "21686148-6449-6e6f-744e-656564454649"
MBR_ESP_TYPE: Final = "0xef"
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_MAX_PARTITIONS: Final = 128
_MAX_TABLE_BYTES: Final = 128 * 1024
_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a disk is divided."""

    table: Table
    partitions: tuple[Partition, ...] = ()
    problem: str = ""


def read_layout(disk: Source) -> Layout:
    """The partition table of a disk; Table.NONE if there is none (a file system has a signature there, too)."""
    mbr = disk.read(0, SECTOR)
    if len(mbr) < SECTOR or mbr[510:512] != b"\x55\xaa":
        return _read_gpt(disk, "there is no protective MBR") if _has_gpt(disk) else Layout(table=Table.NONE)
    entries = [_entry(mbr, number) for number in range(4)]
    if any(kind == 0xEE for _, kind, _, _ in entries):
        return _read_gpt(disk, "")
    if not _is_table(entries, disk.size_bytes):
        return Layout(table=Table.NONE)
    return _read_mbr(disk, entries)


def _has_gpt(disk: Source) -> bool:
    return disk.read(SECTOR, 8) == GPT_SIGNATURE


def _entry(sector: bytes, number: int) -> tuple[int, int, int, int]:
    """Status, type, first sector and number of sectors of an entry."""
    status, kind, first, count = struct.unpack_from("<B3xB3xII", sector, 446 + 16 * number)
    return status, kind, first, count


def _is_table(entries: list[tuple[int, int, int, int]], size_bytes: int) -> bool:
    """Whether the first sector ends in a table: a file system's boot sector has code there."""
    if any(status not in {0, 0x80} for status, _, _, _ in entries):
        return False
    used = [(first, count) for _, kind, first, count in entries if kind]
    return bool(used) and all(first and count and first * SECTOR < size_bytes for first, count in used)


def _read_mbr(disk: Source, entries: list[tuple[int, int, int, int]]) -> Layout:
    found: list[Partition] = []
    signature = struct.unpack("<I", disk.read(440, 4))[0]
    for number, (status, kind, first, count) in enumerate(entries, 1):
        if kind and kind not in _EXTENDED:
            found.append(_mbr_partition(number, status, kind, first, count, signature))
    for _, kind, first, _ in entries:
        if kind in _EXTENDED:
            found += _logical(disk, first, signature)
    return Layout(table=Table.MBR, partitions=tuple(found), problem=_beyond(found, disk.size_bytes))


def _mbr_partition(number: int, status: int, kind: int, first: int, count: int, signature: int) -> Partition:
    return Partition(
        number=number,
        start_bytes=first * SECTOR,
        size_bytes=count * SECTOR,
        type=f"0x{kind:02x}",
        active=status == 0x80,
        uuid=f"{signature:08x}-{number:02x}",
    )


def _logical(disk: Source, extended: int, signature: int) -> list[Partition]:
    found: list[Partition] = []
    at, seen = extended, set[int]()
    while at not in seen and len(found) < _MAX_PARTITIONS:
        seen.add(at)
        record = disk.read(at * SECTOR, SECTOR)
        if len(record) < SECTOR or record[510:512] != b"\x55\xaa":
            break
        status, kind, first, count = _entry(record, 0)
        if kind and count:
            found.append(_mbr_partition(5 + len(found), status, kind, at + first, count, signature))
        _, kind, following, _ = _entry(record, 1)
        if kind not in _EXTENDED or not following:
            break
        at = extended + following
    return found


def _beyond(partitions: list[Partition], size_bytes: int) -> str:
    over = [str(p.number) for p in partitions if p.start_bytes + p.size_bytes > size_bytes]
    return f"partition {', '.join(over)} goes beyond the end of the disk" if over else ""


def _read_gpt(disk: Source, problem: str) -> Layout:
    """The GPT at the beginning, or its copy at the end, which firmware falls back to."""
    last = disk.size_bytes // SECTOR - 1
    for at, trouble in ((1, ""), (last, "the GPT at the beginning is damaged; its copy at the end is used")):
        found = _gpt_at(disk, at)
        if found is not None:
            return Layout(
                table=Table.GPT,
                partitions=tuple(found),
                problem="; ".join(filter(None, (problem, trouble, _beyond(found, disk.size_bytes)))),
            )
    return Layout(table=Table.GPT, problem="neither the GPT at the beginning nor its copy at the end is whole")


def _gpt_at(disk: Source, sector: int) -> list[Partition] | None:
    """The entries of a header whose checksums are right."""
    raw = disk.read(sector * SECTOR, SECTOR)
    if len(raw) < SECTOR or raw[:8] != GPT_SIGNATURE:
        return None
    (_, _, length, crc, _, _, _, _, _, _, table, count, size, table_crc) = _HEADER.unpack_from(raw)
    if not _HEADER.size <= length <= SECTOR or size < 128 or size * count > _MAX_TABLE_BYTES:
        return None
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:length]) != crc:
        return None
    entries = disk.read(table * SECTOR, size * count)
    if len(entries) != size * count or zlib.crc32(entries) != table_crc:
        return None
    rows = [entries[size * n : size * (n + 1)] for n in range(min(count, _MAX_PARTITIONS))]
    return [_gpt_partition(number, row) for number, row in enumerate(rows, 1) if any(row[:16])]


def _gpt_partition(number: int, row: bytes) -> Partition:
    first, last, attributes = struct.unpack_from("<QQQ", row, 32)
    return Partition(
        number=number,
        start_bytes=first * SECTOR,
        size_bytes=max(0, last - first + 1) * SECTOR,
        type=str(uuid.UUID(bytes_le=row[:16])),
        active=bool(attributes & 4),  # "legacy BIOS bootable"
        uuid=str(uuid.UUID(bytes_le=row[16:32])),
        label=plain(row[56:128].decode("utf-16-le", "replace").split("\0")[0]),
    )
