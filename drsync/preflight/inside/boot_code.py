"""What a BIOS would run from a disk, and whether that finds what it loads next. Pure.

GRUB's first sector holds, at byte 92, the sector of its core image; that begins with a sector of its own
(diskboot.img), whose last 12 bytes say where the rest lies (GRUB's grub-core/boot/i386/pc/boot.S, diskboot.S,
include/grub/i386/pc/boot.h). Other loaders run the boot sector of the active partition.
"""

import struct
from typing import Final, NamedTuple

from drsync.preflight.facts import BootCode, Partition, Table
from drsync.preflight.inside.partitions import BIOS_BOOT_TYPE, SECTOR, Layout
from drsync.preflight.inside.source import Source

_GRUB_KERNEL_SECTOR: Final = 92
_GRUB_BLOCKLIST: Final = SECTOR - 12
_MAX_CORE_SECTORS: Final = 32768


class Found(NamedTuple):
    """A boot code, and what it needs."""

    code: BootCode
    core: bool | None = None
    place: str = ""


def read_boot_code(disk: Source, layout: Layout) -> Found:
    """What is in the first sector of a disk."""
    code = disk.read(0, 440)
    if not any(code):
        return Found(BootCode.NONE)
    if b"GRUB" in code:
        return _grub(disk, layout, code)
    active = next((p for p in layout.partitions if p.active), None)
    if active is None:
        known = any(words in code for words in (b"operating system", b"Invalid partition table"))
        return Found(BootCode.OTHER, False, "no partition is marked as the one to boot") if known else _unknown(layout)
    return _chained(disk, active)


def _unknown(layout: Layout) -> Found:
    return Found(BootCode.NONE if layout.table is Table.NONE else BootCode.OTHER)


def _grub(disk: Source, layout: Layout, code: bytes) -> Found:
    (sector,) = struct.unpack_from("<Q", code, _GRUB_KERNEL_SECTOR)
    place = _place_of(sector * SECTOR, layout)
    first = disk.read(sector * SECTOR, SECTOR)
    if len(first) < SECTOR or not any(first):
        return Found(BootCode.GRUB, False, f"sector {sector} is empty")
    start, count, _ = struct.unpack_from("<QHH", first, _GRUB_BLOCKLIST)
    if b"loading" not in first or start != sector + 1 or not 0 < count <= _MAX_CORE_SECTORS:
        return Found(BootCode.GRUB, False, f"sector {sector} does not begin GRUB's core image")
    rest = disk.read(start * SECTOR, count * SECTOR)
    whole = len(rest) == count * SECTOR and any(rest[:SECTOR]) and any(rest[-SECTOR:])
    return Found(BootCode.GRUB, whole, place)


def _place_of(at: int, layout: Layout) -> str:
    for partition in layout.partitions:
        if partition.start_bytes <= at < partition.start_bytes + partition.size_bytes:
            what = "the BIOS boot partition" if partition.type == BIOS_BOOT_TYPE else "partition"
            return f"{what} ({partition.number})"
    return "the gap before the first partition"


def _chained(disk: Source, active: Partition) -> Found:
    sector = disk.read(active.start_bytes, SECTOR)
    place = f"the boot sector of partition {active.number}"
    if len(sector) < SECTOR or sector[510:512] != b"\x55\xaa":
        return Found(BootCode.OTHER, False, f"{place} is none")
    if sector[3:11] == b"SYSLINUX" or b"SYSLINUX" in sector:
        return Found(BootCode.SYSLINUX, True, place)
    if b"BOOTMGR" in sector or b"NTLDR" in sector:
        return Found(BootCode.WINDOWS, True, place)
    if b"GRUB" in sector:
        return Found(BootCode.GRUB, None, place)
    extlinux = b"EXTLINUX" in disk.read(active.start_bytes, 64 * 1024)
    return Found(BootCode.SYSLINUX if extlinux else BootCode.OTHER, True if extlinux else None, place)
