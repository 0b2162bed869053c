"""A file system's files, and a guest's tree over several file systems.

`FileSystem` is the contract; dissect_files.py and guestfs_files.py keep it. Paths are tuples of names from the
file system's own root, without links: those are followed by `Tree` alone, which knows what is mounted where, and
never leaves the guest. Nothing here touches a path of the host's.

Errors: whatever is wrong with a file system is `Unreadable`, and nothing else comes out.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO, Final, Protocol

Path = tuple[str, ...]

MAX_LINKS: Final = 40
"""Of one path, as in the kernel (MAXSYMLINKS)."""
MAX_NAMES: Final = 65536
"""Of one directory."""
TEXT_BYTES: Final = 256 * 1024
"""A configuration file is not larger; grub.cfg of a machine with many kernels has 30 KiB."""


class Unreadable(Exception):
    """A file or file system is not what it should be."""


class Kind(Enum):
    """What a name stands for."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A file, directory or link."""

    kind: Kind
    size_bytes: int = 0


class FileSystem(Protocol):
    """One file system, read only."""

    def look(self, path: Path) -> Node | None:
        """What is at `path`; None if nothing. Links are not followed: a path through one leads to nothing."""
        ...

    def names(self, path: Path) -> Sequence[str]:
        """The names in a directory, at most MAX_NAMES; none if it is no directory."""
        ...

    def link(self, path: Path) -> str:
        """Where the link at `path` leads."""
        ...

    def open(self, path: Path) -> BinaryIO:
        """The file at `path`, to be read; its own errors may be of any class (see `Tree.read`)."""
        ...


class Tree:
    """A guest's files as it sees them itself."""

    def __init__(self, root: FileSystem) -> None:
        self._mounts: dict[Path, FileSystem] = {(): root}

    def mount(self, at: str, files: FileSystem) -> None:
        """Let a file system appear at a path."""
        self._mounts[tuple(part for part in at.split("/") if part)] = files

    def exists(self, path: str) -> bool:
        return self._find(path) is not None

    def is_file(self, path: str) -> bool:
        found = self._find(path)
        return found is not None and found[2].kind is Kind.FILE

    def size(self, path: str) -> int:
        """Bytes of a file; 0 if there is none."""
        found = self._find(path)
        return found[2].size_bytes if found is not None else 0

    def names(self, path: str) -> list[str]:
        """The names in a directory, sorted; none if there is no such directory."""
        found = self._find(path)
        return sorted(found[0].names(found[1])) if found is not None and found[2].kind is Kind.DIRECTORY else []

    def walk(self, path: str, suffix: str, *, depth: int, limit: int) -> list[str]:
        """Paths of the files below `path` that end in `suffix`: bounded, and links are not followed."""
        waiting, found = deque([(path.rstrip("/"), depth)]), list[str]()
        while waiting and len(found) < limit:
            directory, left = waiting.popleft()
            for name in self.names(directory):
                child = f"{directory}/{name}"
                node = self._find(child, follow=False)
                if node is not None and node[2].kind is Kind.DIRECTORY and left > 1 and len(waiting) < limit:
                    waiting.append((child, left - 1))
                elif node is not None and node[2].kind is not Kind.DIRECTORY and name.endswith(suffix):
                    found.append(child)
        return found[:limit]

    def link(self, path: str) -> str | None:
        """Where a link leads; None if there is none at `path`."""
        found = self._find(path, follow=False)
        return found[0].link(found[1]) if found is not None and found[2].kind is Kind.LINK else None

    def open(self, path: str) -> BinaryIO | None:
        """The file at a path, or None."""
        found = self._find(path)
        return found[0].open(found[1]) if found is not None and found[2].kind is Kind.FILE else None

    def read(self, path: str, limit: int = TEXT_BYTES) -> bytes | None:
        """The first `limit` bytes of a file; None if there is none.

        Raises:
            Unreadable: it is there, but can't be read.
        """
        file = self.open(path)
        if file is None:
            return None
        try:
            return file.read(limit)
        except Exception as err:
            raise Unreadable(f"{path}: {err or type(err).__name__}") from err

    def text(self, path: str) -> str | None:
        """As `read`, decoded; what is not UTF-8 is replaced."""
        raw = self.read(path)
        return None if raw is None else raw.decode("utf-8", "replace")

    def _find(self, path: str, *, follow: bool = True) -> tuple[FileSystem, Path, Node] | None:
        """What a path leads to: its file system, the path there, and what it is."""
        done: Path = ()
        left = deque(path.split("/"))
        links = 0
        while left:
            part = left.popleft()
            if part in {"", "."}:
                continue
            if part == "..":
                done = done[:-1]
                continue
            here = (*done, part)
            files, inner = self._place(here)
            node = Node(kind=Kind.DIRECTORY) if not inner else files.look(inner)
            if node is None:
                return None
            if node.kind is Kind.LINK and (follow or any(left)):
                links += 1
                if links > MAX_LINKS:
                    return None
                target = files.link(inner)
                done = () if target.startswith("/") else done
                left.extendleft(reversed(target.split("/")))
                continue
            done = here
        files, inner = self._place(done)
        node = Node(kind=Kind.DIRECTORY) if not inner else files.look(inner)
        return None if node is None else (files, inner, node)

    def _place(self, path: Path) -> tuple[FileSystem, Path]:
        """The file system that a path lies on, and the path there."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._mounts:
                return self._mounts[path[:length]], path[length:]
        return self._mounts[()], path
