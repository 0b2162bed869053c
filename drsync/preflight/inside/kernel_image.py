"""What a kernel's image tells of itself (Documentation/arch/x86/boot.rst of the kernel)."""

import struct
from collections.abc import Sequence
from typing import BinaryIO, Final

from drsync.preflight.facts import plain
from drsync.preflight.inside.initramfs import unpacked

_HEAD_BYTES: Final = 65536
_MAX_IMAGE: Final = 64 * 1024 * 1024
_MAX_PLAIN: Final = 256 * 1024 * 1024


def version_of(head: bytes) -> str:
    """The kernel's version, from its first 64 KiB; empty if it has no x86 header."""
    if head[0x202:0x206] != b"HdrS":
        return ""
    at = int(struct.unpack_from("<H", head, 0x20E)[0]) + 0x200
    text = head[at : at + 128].split(b"\0")[0].decode("ascii", "replace")
    return plain(text.split(" ")[0])


def built_in(file: BinaryIO, parameters: Sequence[bytes]) -> bool:
    """Whether the kernel itself has one of these module parameters, as `nvme.io_queue_depth`.

    A driver that is built in leaves the names of its parameters there; without modules.builtin that is what tells.
    Errors may be of any class: the image is a guest's.
    """
    head = file.read(_HEAD_BYTES)
    if head[0x202:0x206] != b"HdrS":
        return False
    offset, length = struct.unpack_from("<II", head, 0x248)
    start = (head[0x1F1] or 4) * 512 + 512 + offset
    if not 0 < length <= _MAX_IMAGE:
        return False
    file.seek(start)
    before, seen = b"", 0
    for piece in unpacked(file, length):
        if any(name in before + piece for name in parameters):
            return True
        before, seen = piece[-64:], seen + len(piece)
        if seen > _MAX_PLAIN:
            break
    return False
