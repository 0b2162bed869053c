"""What a volume holds, by its signature: kind, UUID and label as blkid tells them. Pure.

Offsets from the kernel's own on-disk structures (fs/ext4/ext4.h, fs/xfs/libxfs/xfs_format.h, fs/btrfs),
LUKS and LVM2 on-disk format documents, and the FAT and NTFS boot sectors.
"""

import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from drsync.preflight.facts import JOURNAL_WAITS, plain
from drsync.preflight.inside.source import Source

_HEAD_BYTES: Final = 0x11000
"""btrfs has its superblock at 64 KiB."""
_EXT_JOURNAL, _EXT_RECOVER, _EXT_EXTENTS, _EXT_64BIT = 0x4, 0x4, 0x40, 0x80


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a volume says it is."""

    kind: str = ""
    uuid: str = ""
    label: str = ""
    note: str = ""


def identify(volume: Source) -> Signature:
    """What is on a volume; an empty kind if nothing known is."""
    head = volume.read(0, _HEAD_BYTES).ljust(_HEAD_BYTES, b"\0")
    for look in _LOOKS:
        found = look(head)
        if found is not None:
            return found
    return Signature()


def _luks(head: bytes) -> Signature | None:
    if head[:6] != b"LUKS\xba\xbe":
        return None
    return Signature(kind="crypto_LUKS", uuid=_text(head[168:208]), label=_text(head[24:72]) if head[7] == 2 else "")


def _lvm(head: bytes) -> Signature | None:
    for sector in range(4):
        label = head[sector * 512 : sector * 512 + 64]
        if label[:8] == b"LABELONE" and label[24:32] == b"LVM2 001":
            return Signature(kind="LVM2_member", uuid=_text(label[32:64]))
    return None


def _xfs(head: bytes) -> Signature | None:
    if head[:4] != b"XFSB":
        return None
    return Signature(kind="xfs", uuid=str(uuid.UUID(bytes=head[32:48])), label=_text(head[108:120]))


def _ext(head: bytes) -> Signature | None:
    block = head[1024:2048]
    if block[56:58] != b"\x53\xef":
        return None
    compatible, incompatible = struct.unpack_from("<II", block, 92)
    kind = "ext2"
    if compatible & _EXT_JOURNAL:
        kind = "ext4" if incompatible & (_EXT_EXTENTS | _EXT_64BIT) else "ext3"
    note = JOURNAL_WAITS if incompatible & _EXT_RECOVER else ""
    return Signature(kind=kind, uuid=str(uuid.UUID(bytes=block[104:120])), label=_text(block[120:136]), note=note)


def _btrfs(head: bytes) -> Signature | None:
    block = head[0x10000:0x11000]
    if block[64:72] != b"_BHRfS_M":
        return None
    return Signature(kind="btrfs", uuid=str(uuid.UUID(bytes=block[32:48])), label=_text(block[299:555]))


def _swap(head: bytes) -> Signature | None:
    if head[4086:4096] not in {b"SWAPSPACE2", b"SWAP-SPACE"}:
        return None
    return Signature(kind="swap", uuid=str(uuid.UUID(bytes=head[1036:1052])), label=_text(head[1052:1068]))


def _ntfs(head: bytes) -> Signature | None:
    if head[3:11] != b"NTFS    ":
        return None
    return Signature(kind="ntfs", uuid=f"{struct.unpack_from('<Q', head, 72)[0]:016X}")


def _bitlocker(head: bytes) -> Signature | None:
    return Signature(kind="BitLocker") if head[3:11] == b"-FVE-FS-" else None


def _exfat(head: bytes) -> Signature | None:
    return Signature(kind="exfat") if head[3:11] == b"EXFAT   " else None


def _fat(head: bytes) -> Signature | None:
    if head[510:512] != b"\x55\xaa" or head[0] not in {0xEB, 0xE9}:
        return None
    for kind, at in ((b"FAT32", 82), (b"FAT", 54)):
        if head[at : at + len(kind)] == kind:
            serial = struct.unpack_from("<I", head, at - 15)[0]
            label = _text(head[at - 11 : at])
            return Signature(
                kind="vfat",
                uuid=f"{serial >> 16:04X}-{serial & 0xFFFF:04X}",
                label="" if label == "NO NAME" else label,
            )
    return None


def _raid(head: bytes) -> Signature | None:
    for at in (0, 4096):  # versions 1.1 and 1.2; 0.90 and 1.0 lie at the end
        if head[at : at + 4] == b"\xfc\x4e\x2b\xa9":
            return Signature(kind="linux_raid_member", uuid=str(uuid.UUID(bytes=head[at + 16 : at + 32])))
    return None


def _text(raw: bytes) -> str:
    return plain(raw.split(b"\0")[0].decode("utf-8", "replace").strip())


_LOOKS: Final[tuple[Callable[[bytes], Signature | None], ...]] = (
    _luks,
    _lvm,
    _raid,
    _xfs,
    _btrfs,
    _swap,
    _ntfs,
    _bitlocker,
    _exfat,
    _ext,
    _fat,
)
