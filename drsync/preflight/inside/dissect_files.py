"""File systems read by dissect's libraries: ext2/3/4, XFS, btrfs, FAT, NTFS; and LVM volumes.

They are pure Python, so a damaged disk can't make them write over memory, and read only what they are asked for.
They are under the AGPL and therefore no part of drsync: the extra `preflight` installs them, and this module, which
only runs inside the fence, is the only one that knows them (docs/decisions/0005-reading-guests.md).

They do not play a journal back: what a guest had only just written when the point was taken may be seen as it was
before.
"""

import importlib
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Final, Protocol

from drsync.preflight.inside.files import MAX_NAMES, Kind, Node, Path, Unreadable
from drsync.preflight.inside.source import Source, SourceFile

_CACHED_DIRECTORIES: Final = 128
_MAX_LINK: Final = 4096


class _Reader(Protocol):
    """What differs between the libraries. `node` is whatever a library calls an inode."""

    root: Any
    ignores_case: bool

    def children(self, node: Any) -> Iterator[tuple[str, Any]]: ...

    def kind(self, node: Any) -> Kind: ...

    def size(self, node: Any) -> int: ...

    def link(self, node: Any) -> str: ...

    def open(self, node: Any) -> BinaryIO: ...


class _UnixReader:
    """ext2/3/4 and XFS, which dissect offers in the same way."""

    ignores_case = False

    def __init__(self, files: Any) -> None:
        self.root = files.root if hasattr(files, "root") else files.get_inode(files.sb.sb_rootino)

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        for child in node.iterdir():
            yield child.filename, child

    def kind(self, node: Any) -> Kind:
        return _kind_of_mode(node.filetype)

    def size(self, node: Any) -> int:
        return int(node.size)

    def link(self, node: Any) -> str:
        return str(node.link)

    def open(self, node: Any) -> BinaryIO:
        opened: BinaryIO = node.open()
        return opened


class _BtrfsReader(_UnixReader):
    def __init__(self, files: Any) -> None:
        self.root = files.root

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        yield from node.iterdir()

    def kind(self, node: Any) -> Kind:
        if node.is_dir():
            return Kind.DIRECTORY
        if node.is_symlink():
            return Kind.LINK
        return Kind.FILE if node.is_file() else Kind.OTHER


class _FatReader:
    ignores_case = True

    def __init__(self, files: Any) -> None:
        self.root = files.root

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        for child in node.iterdir():
            if not child.is_volume_id():  # a short name alone is shown as Linux shows it
                yield child.name.lower() if child.name == child.short_name else child.name, child

    def kind(self, node: Any) -> Kind:
        return Kind.DIRECTORY if node.is_directory() else Kind.FILE

    def size(self, node: Any) -> int:
        return int(node.size)

    def link(self, _node: Any) -> str:
        raise Unreadable("FAT has no links")

    def open(self, node: Any) -> BinaryIO:
        opened: BinaryIO = node.open()
        return opened


class _NtfsReader:
    """A node is an entry of a directory's index until more than its name is asked for."""

    ignores_case = True

    def __init__(self, files: Any) -> None:
        self.root = files.mft.root

    def _record(self, node: Any) -> Any:
        return node.dereference() if hasattr(node, "dereference") else node

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        yield from self._record(node).listdir().items()

    def kind(self, node: Any) -> Kind:
        record = self._record(node)
        if record.is_dir():
            return Kind.DIRECTORY
        return Kind.FILE if record.is_file() else Kind.OTHER

    def size(self, node: Any) -> int:
        return int(self._record(node).size())

    def link(self, _node: Any) -> str:
        raise Unreadable("links of NTFS are not followed")

    def open(self, node: Any) -> BinaryIO:
        opened: BinaryIO = self._record(node).open()
        return opened


class DissectFiles:
    """A file system (see files.FileSystem)."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._directories: OrderedDict[Path, Mapping[str, Any]] = OrderedDict()

    def look(self, path: Path) -> Node | None:
        found = self._node(path)
        return None if found is None else _guarded(path, lambda: self._told(found))

    def _told(self, node: Any) -> Node:
        kind = self._reader.kind(node)
        return Node(kind=kind, size_bytes=self._reader.size(node) if kind is Kind.FILE else 0)

    def names(self, path: Path) -> Sequence[str]:
        return [str(name) for name, _ in self._entries(path).values()]

    def link(self, path: Path) -> str:
        found = self._node(path)
        if found is None:
            raise Unreadable(f"{'/'.join(path)}: it is not there")
        return str(_guarded(path, lambda: self._reader.link(found)))[:_MAX_LINK]

    def open(self, path: Path) -> BinaryIO:
        found = self._node(path)
        if found is None:
            raise Unreadable(f"{'/'.join(path)}: it is not there")
        opened: BinaryIO = _guarded(path, lambda: self._reader.open(found))
        return opened

    def _node(self, path: Path) -> Any:
        if not path:
            return self._reader.root
        entry = self._entries(path[:-1]).get(self._key(path[-1]))
        return None if entry is None else entry[1]

    def _key(self, name: str) -> str:
        return name.upper() if self._reader.ignores_case else name

    def _entries(self, path: Path) -> Mapping[str, Any]:
        """Key → name and node, of a directory; empty if it is none."""
        if path in self._directories:
            self._directories.move_to_end(path)
            return self._directories[path]
        node = self._node(path)
        entries = {} if node is None else _guarded(path, lambda: self._list(node))
        self._directories[path] = entries
        while len(self._directories) > _CACHED_DIRECTORIES:
            self._directories.popitem(last=False)
        return entries

    def _list(self, node: Any) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        if self._reader.kind(node) is not Kind.DIRECTORY:
            return entries
        for name, child in self._reader.children(node):
            if name not in {".", ".."}:
                entries[self._key(name)] = (name, child)
            if len(entries) >= MAX_NAMES:
                break
        return entries


def _kind_of_mode(mode: int) -> Kind:
    kinds = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.LINK}
    return kinds.get(stat.S_IFMT(mode), Kind.OTHER)


def _guarded(path: Path, call: Callable[[], Any]) -> Any:
    """What `call` returns; a library that stumbles over damage raises whatever it stumbles with."""
    try:
        return call()
    except Unreadable:
        raise
    except Exception as err:
        raise Unreadable(f"/{'/'.join(path)}: {err or type(err).__name__}") from err


def _ext(file: SourceFile) -> _Reader:
    from dissect.extfs import ExtFS  # noqa: PLC0415 - an extra: only what is needed is loaded

    return _UnixReader(ExtFS(file))


def _xfs(file: SourceFile) -> _Reader:
    from dissect.xfs import XFS  # noqa: PLC0415 - as above

    return _UnixReader(XFS(file))


def _btrfs(file: SourceFile) -> _Reader:
    from dissect.btrfs import Btrfs  # noqa: PLC0415 - as above

    return _BtrfsReader(Btrfs(file))


def _fat(file: SourceFile) -> _Reader:
    from dissect.fat import FATFS  # noqa: PLC0415 - as above

    return _FatReader(FATFS(file))


def _ntfs(file: SourceFile) -> _Reader:
    from dissect.ntfs import NTFS  # noqa: PLC0415 - as above

    return _NtfsReader(NTFS(file))


_OPENERS: Final[Mapping[str, Callable[[SourceFile], _Reader]]] = {
    "ext2": _ext,
    "ext3": _ext,
    "ext4": _ext,
    "xfs": _xfs,
    "btrfs": _btrfs,
    "vfat": _fat,
    "ntfs": _ntfs,
}
READABLE: Final = frozenset(_OPENERS)


_MODULES: Final = ("extfs", "xfs", "btrfs", "fat", "ntfs", "volume.lvm", "util.compression")


def load() -> bool:
    """Load the libraries while this process may still read them; whether they are there (one extra brings all)."""
    try:
        for name in _MODULES:
            importlib.import_module(f"dissect.{name}")
    except ImportError:
        return False
    return True


def open_files(kind: str, source: Source) -> DissectFiles:
    """The files of a file system of one of the kinds READABLE.

    Raises:
        Unreadable: it is damaged, or has a feature that the library does not know.
    """
    files: DissectFiles = _guarded((), lambda: DissectFiles(_OPENERS[kind](SourceFile(source))))
    return files


class _Stream:
    """A library's stream as a source."""

    def __init__(self, stream: Any, size_bytes: int) -> None:
        self._stream = stream
        self.size_bytes = size_bytes

    def read(self, offset: int, length: int) -> bytes:
        self._stream.seek(offset)
        return bytes(self._stream.read(min(length, max(0, self.size_bytes - offset))))


def logical_volumes(members: Sequence[Source]) -> Sequence[tuple[str, Source | None, str]]:
    """The logical volumes that lie on LVM's physical volumes: name (`vg0/root`), source or None, why none.

    Raises:
        Unreadable: the metadata of a physical volume can't be read.
    """
    from dissect.volume.lvm import LVM2, LVM2Device  # noqa: PLC0415 - as above

    groups: dict[str, list[Any]] = {}
    for member in members:
        device = _guarded((), lambda member=member: LVM2Device(SourceFile(member)))  # type: ignore[misc]  # the default binds it
        names = _guarded((), lambda device=device: [k for k, v in device.metadata.items() if isinstance(v, dict)])  # type: ignore[misc]  # as above
        groups.setdefault(names[0] if names else "", []).append(device)
    found: list[tuple[str, Source | None, str]] = []
    for name, devices in groups.items():
        group = _guarded((), lambda devices=devices: LVM2(devices).vg)  # type: ignore[misc]  # as above
        found += [_logical_volume(name, volume) for volume in list(group.lv)[:64] if _is_visible(volume)]
    return found


def _is_visible(volume: Any) -> bool:
    return not volume.status or "VISIBLE" in volume.status


def _logical_volume(group: str, volume: Any) -> tuple[str, Source | None, str]:
    name = f"{group}/{volume.name}"
    try:
        stream = volume.open()
        return name, _Stream(stream, int(stream.size)), ""
    except Exception as err:  # noqa: BLE001 - see _guarded; the other volumes may be whole
        return name, None, f"{err or type(err).__name__}"
