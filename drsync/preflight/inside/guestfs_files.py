"""File systems read by libguestfs: everything that a Linux kernel reads, journals played back.

    fence.py ─▶ nbd_export.py ─▶ libguestfs' VM (a kernel of its own, no network) ─▶ files

The binding holds Python's lock while it waits for its disks: they must come from another process. It takes seconds with
KVM and a minute or more without, so it comes second (docs/decisions/0005-reading-guests.md). The VM is the fence here:
this process has to start programs and write temporary files, and still has no key.
"""

import io
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as HostPath
from typing import Any, BinaryIO, Final, TypeVar

from drsync.preflight.inside.files import MAX_NAMES, Kind, Node, Path, Unreadable
from drsync.preflight.inside.nbd_export import socket_name
from drsync.preflight.inside.source import Source

_PIECE: Final = 1024 * 1024
_KINDS: Final = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.LINK}
Result = TypeVar("Result")


def is_installed() -> bool:
    """Whether Python's binding of libguestfs is there."""
    try:
        import guestfs  # noqa: F401, PLC0415 - a package of the distribution's, which few need
    except ImportError:
        return False
    return True


class GuestfsOpener:
    """libguestfs as a survey.Opener; its VM starts when the first file system is opened."""

    name = "libguestfs"
    readable = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "ntfs"})

    def __init__(self, disks: Mapping[str, Source], directory: HostPath) -> None:
        self._disks = disks
        self._directory = directory
        self._handle: Any = None
        self._mounted = 0

    def open_files(self, kind: str, _source: Source, name: str) -> "GuestfsFiles":
        device = self._device(name)
        point = f"/v{self._mounted}"
        self._mounted += 1
        self._call(lambda g: g.mkmountpoint(point))
        self._call(lambda g: g.mount_ro(device, point))
        return GuestfsFiles(self._call, point, ignores_case=kind in {"vfat", "ntfs"})

    def logical_volumes(self, _members: Sequence[Source]) -> Sequence[tuple[str, Source | None, str]]:
        found: list[tuple[str, Source | None, str]] = []
        for device in self._call(lambda g: g.lvs())[:64]:
            size = self._call(lambda g, device=device: g.blockdev_getsize64(device))  # type: ignore[misc]  # the default binds it
            found.append((str(device).removeprefix("/dev/"), _Device(self._call, device, int(size)), ""))
        return found

    def _device(self, name: str) -> str:
        """What a volume is called in the VM: its disks are sda, sdb … in their order here."""
        for place, disk in enumerate(self._disks):
            part = re.fullmatch(rf"{re.escape(disk)}p?(\d*)", name)
            if part is not None:
                return f"/dev/sd{chr(ord('a') + place)}{part[1]}"
        return f"/dev/{name}"

    def _call(self, operation: Callable[[Any], Result]) -> Result:
        try:
            if self._handle is None:
                self._launch()
            return operation(self._handle)
        except RuntimeError as err:
            raise Unreadable(" ".join(str(err).split())[:300]) from err

    def _launch(self) -> None:
        import guestfs  # noqa: PLC0415 - as above

        handle = guestfs.GuestFS(python_return_dict=True)
        for place in range(len(self._disks)):
            socket = self._directory / socket_name(place)
            handle.add_drive_opts("", format="raw", readonly=1, protocol="nbd", server=[f"unix:{socket}"])
        handle.launch()
        self._handle = handle


class GuestfsFiles:
    """A file system that is mounted in libguestfs' VM (see files.FileSystem)."""

    def __init__(self, call: Callable[[Callable[[Any], Any]], Any], point: str, *, ignores_case: bool) -> None:
        self._call = call
        self._point = point
        self._ignores_case = ignores_case
        self._known: dict[Path, Node | None] = {}

    def look(self, path: Path) -> Node | None:
        if path not in self._known:
            if len(self._known) > MAX_NAMES:
                self._known.clear()
            self._known[path] = self._look(path)
        return self._known[path]

    def _look(self, path: Path) -> Node | None:
        if path:
            parent = self.look(path[:-1])
            if parent is None or parent.kind is not Kind.DIRECTORY:
                return None
        try:
            told = self._call(lambda g: g.lstatns(self._real(path)))
        except Unreadable:
            return None
        kind = _KINDS.get(stat.S_IFMT(int(told["st_mode"])), Kind.OTHER)
        return Node(kind=kind, size_bytes=int(told["st_size"]) if kind is Kind.FILE else 0)

    def _real(self, path: Path) -> str:
        """A path in the VM."""
        whole = "/".join((self._point, *path))
        if self._ignores_case and path:
            return str(self._call(lambda g: g.case_sensitive_path(whole)))
        return whole

    def names(self, path: Path) -> Sequence[str]:
        node = self.look(path)
        if node is None or node.kind is not Kind.DIRECTORY:
            return []
        found: list[str] = self._call(lambda g: g.ls(self._real(path)))
        return found[:MAX_NAMES]

    def link(self, path: Path) -> str:
        return str(self._call(lambda g: g.readlink(self._real(path))))

    def open(self, path: Path) -> BinaryIO:
        node = self.look(path)
        if node is None or node.kind is not Kind.FILE:
            raise Unreadable(f"/{'/'.join(path)}: it is not there")
        real = self._real(path)
        pieces = _Pieces(lambda offset, length: self._call(lambda g: g.pread(real, length, offset)), node.size_bytes)
        return io.BufferedReader(pieces, _PIECE)


class _Device:
    """A device of the VM's as a source."""

    def __init__(self, call: Callable[[Callable[[Any], Any]], Any], device: str, size_bytes: int) -> None:
        self._call = call
        self._device = device
        self.size_bytes = size_bytes

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size_bytes - offset, _PIECE))
        return bytes(self._call(lambda g: g.pread_device(self._device, length, offset))) if length else b""


class _Pieces(io.RawIOBase):
    """A file that is read piece by piece through calls."""

    def __init__(self, read_at: Callable[[int, int], Any], size_bytes: int) -> None:
        self._read_at = read_at
        self._size = size_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # any writable buffer
        length = max(0, min(len(buffer), self._size - self._at, _PIECE))
        data = bytes(self._read_at(self._at, length)) if length else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
