"""Disks as guests have them, made with the real tools: sfdisk, mkfs.*, mtools, LVM. Nothing is mounted.

files ─▶ a directory ─▶ mkfs.ext4 -d | mkfs.xfs -p | mkfs.btrfs --rootdir | mcopy ─▶ partition of a sparse raw file
"""

import os
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from drsync.units import MiB

Files = Mapping[str, str | bytes]
ENVIRONMENT: Final = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "MTOOLS_SKIP_CHECK": "1"}
ROOT_UUID: Final = "11111111-2222-3333-4444-555555555555"
KERNEL: Final = "6.1.0-99-amd64"


class FileSource:
    """A file as a disk: what the fence serves, and what is read inside."""

    def __init__(self, path: Path, name: str = "vda") -> None:
        self._path = path
        self.name = name
        self.size_bytes = path.stat().st_size
        self.read_bytes = 0

    def read(self, offset: int, length: int) -> bytes:
        self.read_bytes += length
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


def run(*command: str | Path, stdin: str = "") -> str:
    """Run a tool; its output. What fails fails the test."""
    words = [str(word) for word in command]
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout


def lay_out(directory: Path, files: Files) -> Path:
    """Files below a directory; a value that begins with `-> ` is a link, an executable one an ELF header."""
    directory.mkdir(parents=True)
    for name, content in files.items():
        path = directory / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str) and content.startswith("-> "):
            path.symlink_to(content.removeprefix("-> "))
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


def make_ext4(path: Path, size_bytes: int, files: Files, *, uuid: str = ROOT_UUID, label: str = "") -> Path:
    tree = lay_out(path.with_suffix(".tree"), files)
    _truncate(path, size_bytes)
    run("mkfs.ext4", "-q", "-F", "-U", uuid, "-L", label, "-d", tree, path)
    return path


def make_btrfs(path: Path, size_bytes: int, files: Files, *, uuid: str = ROOT_UUID) -> Path:
    tree = lay_out(path.with_suffix(".tree"), files)
    _truncate(path, size_bytes)
    run("mkfs.btrfs", "-q", "-f", "-U", uuid, "--rootdir", tree, path)
    return path


def make_xfs(path: Path, size_bytes: int, files: Files, *, uuid: str = ROOT_UUID) -> Path:
    """XFS takes its files from a prototype (mkfs.xfs(8), -p)."""
    tree = lay_out(path.with_suffix(".tree"), files)
    prototype = path.with_suffix(".proto")
    prototype.write_text("/\n0 0\n" + "\n".join(_prototype(tree, "d--755 0 0")) + "\n")
    _truncate(path, size_bytes)
    run("mkfs.xfs", "-q", "-f", "-m", f"uuid={uuid}", "-p", prototype, path)
    return path


def _prototype(directory: Path, head: str) -> list[str]:
    lines = [head]
    for child in sorted(directory.iterdir()):
        if child.is_symlink():
            lines.append(f"{child.name} l--777 0 0 {child.readlink()}")
        elif child.is_dir():
            lines += _prototype(child, f"{child.name} d--755 0 0")
        else:
            lines.append(f"{child.name} ---644 0 0 {child}")
    return [*lines, "$"]


def make_fat(path: Path, size_bytes: int, files: Files, *, label: str = "ESP") -> Path:
    tree = lay_out(path.with_suffix(".tree"), files)
    _truncate(path, size_bytes)
    run("mkfs.vfat", "-n", label, "-i", "12345678", path)
    for child in sorted(tree.iterdir()):
        run("mcopy", "-s", "-i", path, child, "::/")
    return path


def make_ntfs(path: Path, size_bytes: int, files: Files) -> Path:
    """NTFS has no tool that lays files out without a mount: FUSE, so root and /dev/fuse."""
    tree, mounted = lay_out(path.with_suffix(".tree"), files), path.with_suffix(".mnt")
    _truncate(path, size_bytes)
    run("mkntfs", "-q", "-F", "-Q", path)
    mounted.mkdir()
    run("ntfs-3g", path, mounted)
    try:
        run("cp", "-r", *sorted(tree.iterdir()), mounted)
    finally:
        run("umount", mounted)
    return path


def _truncate(path: Path, size_bytes: int) -> None:
    with path.open("xb") as file:
        file.truncate(size_bytes)


def make_disk(path: Path, size_bytes: int, script: str, parts: Mapping[int, Path], *, boot_code: bytes = b"") -> Path:
    """A raw disk with a partition table by sfdisk's script; `parts` are laid at their offsets in bytes."""
    _truncate(path, size_bytes)
    run("sfdisk", "--quiet", path, stdin=script)
    with path.open("r+b") as disk:
        disk.write(boot_code)
        for offset, part in parts.items():
            assert part.stat().st_size <= size_bytes - offset
            with part.open("rb") as content:
                while piece := content.read(MiB):
                    if any(piece):
                        disk.seek(offset + content.tell() - len(piece))
                        disk.write(piece)
    return path


def elf(machine: int = 0x3E) -> bytes:
    """The head of an executable: 0x3E is x86-64."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, machine) + bytes(44)


def pe(machine: int = 0x8664, more: bytes = b"") -> bytes:
    """The head of an EFI executable."""
    return b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + struct.pack("<H", machine) + bytes(200) + more


def initramfs(directory: Path, modules: Sequence[str], *, packed: str = "gzip", early: bool = True) -> bytes:
    """An initramfs with empty modules, by the real cpio and packer; with an early archive for microcode before it."""
    names = {f"usr/lib/modules/{KERNEL}/kernel/drivers/{name}.ko": "x" for name in modules}
    main = _archive(lay_out(directory / "main", {**names, "init": "#!/bin/sh\n"}))
    first = _archive(lay_out(directory / "early", {"kernel/x86/microcode/GenuineIntel.bin": "u" * 5000}))
    commands = {
        "gzip": ["gzip", "-1"],
        "xz": ["xz", "-1", "--check=crc32"],
        "zstd": ["zstd", "-1", "-q"],
        "bzip2": ["bzip2", "-1"],
        "lz4": ["lz4", "-l", "-q"],
        "plain": ["cat"],
    }
    done = subprocess.run(commands[packed], input=main, capture_output=True, check=True)
    return (first + bytes(-len(first) % 512) if early else b"") + done.stdout


def _archive(tree: Path) -> bytes:
    names = "\n".join(str(p.relative_to(tree)) for p in sorted(tree.rglob("*")))
    done = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc"], input=names.encode(), cwd=tree, capture_output=True, check=True
    )
    return done.stdout


@dataclass(slots=True)
class DebianGuest:
    """A Debian, file by file; every field is something that a check looks at. As it is, it boots in EC2."""

    initramfs: bytes
    fstab: str = f"UUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\n"
    command_line: str = f"root=UUID={ROOT_UUID} ro console=tty0 console=ttyS0,115200"
    interfaces: str = "auto lo\niface lo inet loopback\nauto ens5\niface ens5 inet dhcp\n"
    built_in: str = "kernel/fs/ext4/ext4.ko\n"
    modules: str = "kernel/drivers/nvme/host/nvme.ko: x\nkernel/drivers/net/ethernet/amazon/ena/ena.ko:\n"
    more: dict[str, str | bytes] = field(default_factory=dict)

    def files(self) -> dict[str, str | bytes]:
        return {
            "/etc/os-release": "-> ../usr/lib/os-release",
            "/usr/lib/os-release": 'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
            "/etc/debian_version": "12.7\n",
            "/etc/fstab": self.fstab,
            "/etc/network/interfaces": self.interfaces,
            "/usr/sbin/ifup": "x",
            "/usr/bin/dash": elf(),
            "/usr/bin/sh": "-> dash",
            "/bin": "-> usr/bin",
            "/lib": "-> usr/lib",
            "/sbin": "-> usr/sbin",
            "/usr/sbin/sshd": "x",
            "/usr/lib/systemd/systemd": "x",
            "/etc/systemd/system/multi-user.target.wants/ssh.service": "-> /lib/systemd/system/ssh.service",
            f"/boot/vmlinuz-{KERNEL}": "kernel",
            f"/boot/initrd.img-{KERNEL}": self.initramfs,
            "/boot/grub/grub.cfg": f"menuentry 'Debian' {{\n\tlinux\t/boot/vmlinuz-{KERNEL} {self.command_line}\n}}\n",
            f"/usr/lib/modules/{KERNEL}/modules.builtin": self.built_in,
            f"/usr/lib/modules/{KERNEL}/modules.dep": self.modules,
            **self.more,
        }


def grub_core(disk_code: bytearray, sector: int, sectors: int = 8) -> tuple[bytes, bytes]:
    """The first sector and the core image of GRUB, as far as their structure is concerned, at a sector."""
    disk_code[0x180:0x184] = b"GRUB"
    disk_code[92:100] = struct.pack("<Q", sector)
    first = bytearray(512)
    first[:20] = b"\x52loading\0.\0\r\n\0Geom\0"[:20]
    first[500:512] = struct.pack("<QHH", sector + 1, sectors, 0x820)
    return bytes(disk_code[:440]), bytes(first) + os.urandom(512 * sectors)


def lvm_physical_volume(path: Path, size_bytes: int, group: str, volumes: Mapping[str, Path]) -> Path:
    """A physical volume with logical volumes, by LVM's own tools on a loop device; needs root, no device-mapper."""
    _truncate(path, size_bytes)
    device = run("losetup", "--find", "--show", path).strip()
    backup = path.with_suffix(".vg")
    try:
        run("pvcreate", "-q", "-y", "--dataalignment", "1m", device)
        run("vgcreate", "-q", "-y", "-s", "4m", group, device)
        run("vgcfgbackup", "-q", "-f", backup, group)
        backup.write_text(_with_volumes(backup.read_text(), volumes))
        run("vgcfgrestore", "-q", "-y", "--force", "-f", backup, group)
    finally:
        run("losetup", "-d", device)
    with path.open("r+b") as disk:
        at = MiB
        for content in volumes.values():
            disk.seek(at)
            disk.write(content.read_bytes())
            at += -(-content.stat().st_size // (4 * MiB)) * 4 * MiB
    return path


def _with_volumes(text: str, volumes: Mapping[str, Path]) -> str:
    """LVM's metadata with linear logical volumes, one behind the other."""
    rows, extent = [], 0
    for number, (name, content) in enumerate(volumes.items()):
        count = -(-content.stat().st_size // (4 * MiB))
        identity = f"{number:06d}-aaaa-bbbb-cccc-dddd-eeee-ffffff"
        rows.append(
            f'{name} {{ id = "{identity}" status = ["READ", "WRITE", "VISIBLE"] flags = [] creation_time = 1 '
            f'creation_host = "x" segment_count = 1 segment1 {{ start_extent = 0 extent_count = {count} '
            f'type = "striped" stripe_count = 1 stripes = ["pv0", {extent}] }} }}'
        )
        extent += count
    head, _, tail = text.rpartition("\n}\n")  # the group's own brace is the last one
    return "\n".join([head, "logical_volumes {", *rows, "}", "}", tail])
