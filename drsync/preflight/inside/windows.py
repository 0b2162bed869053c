"""A Windows guest's facts, as far as files tell them; the registry is not read."""

import struct
from typing import Final

from drsync.preflight.facts import Windows, plain
from drsync.preflight.inside.files import Tree, Unreadable

DRIVERS: Final = (
    "stornvme.sys",
    "nvme.sys",
    "awsnvme.sys",
    "ena.sys",
    "vioscsi.sys",
    "viostor.sys",
    "netkvm.sys",
    "xenbus.sys",
)
"""stornvme: Microsoft's, since 8.1 and Server 2012 R2; awsnvme and ena: of AWS's driver packages."""
_KERNEL: Final = "/Windows/System32/ntoskrnl.exe"
_KERNEL_BYTES: Final = 24 * 1024 * 1024
_FIXED_FILE_INFO: Final = struct.pack("<II", 0xFEEF04BD, 0x00010000)
_MACHINES: Final = {0x8664: "x86_64", 0xAA64: "aarch64", 0x14C: "i386"}


def is_windows(tree: Tree) -> bool:
    """Whether a tree is a Windows system's drive."""
    return tree.is_file(_KERNEL)


def read_windows(tree: Tree, root: str, bcd: tuple[str, ...], problems: list[str]) -> Windows:
    """All that is asked of a Windows system."""
    present = {name.lower() for name in tree.names("/Windows/System32/drivers")}
    machine, build = _kernel(tree, problems)
    return Windows(
        root=root,
        build=build,
        machine=machine,
        drivers=tuple(d for d in DRIVERS if d in present),
        bcd=bcd,
        hibernated=_is_hibernated(tree),
    )


def pe_machine(head: bytes) -> str:
    """What a PE executable was made for, from its first bytes; empty if it is none."""
    if len(head) < 64 or head[:2] != b"MZ":
        return ""
    (at,) = struct.unpack_from("<I", head, 0x3C)
    if at + 6 > len(head) or head[at : at + 4] != b"PE\0\0":
        return ""
    (machine,) = struct.unpack_from("<H", head, at + 4)
    return _MACHINES.get(machine, f"PE machine {machine:#x}")


def _kernel(tree: Tree, problems: list[str]) -> tuple[str, int | None]:
    """What the kernel was made for, and its build: the third number of its version resource (VS_FIXEDFILEINFO)."""
    try:
        data = tree.read(_KERNEL, _KERNEL_BYTES) or b""
    except Unreadable as err:
        problems.append(plain(err))
        return "", None
    at = data.find(_FIXED_FILE_INFO)
    if at < 0 or at + 16 > len(data):
        return pe_machine(data[:4096]), None
    (low,) = struct.unpack_from("<I", data, at + 12)
    return pe_machine(data[:4096]), low >> 16


def _is_hibernated(tree: Tree) -> bool:
    """Whether a hibernation image (or fast startup's) is valid: it begins with hibr or HIBR, else with zeros."""
    try:
        return (tree.read("/hiberfil.sys", 4) or b"").lower() == b"hibr"
    except Unreadable:
        return False
