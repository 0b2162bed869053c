"""A file system in memory: the twin of those that are read from disks (preflight.inside.files.FileSystem)."""

import io
from collections.abc import Sequence
from typing import BinaryIO

from guest_disks import Files

from drsync.preflight.inside.files import Kind, Node, Path, Unreadable


class MemoryFiles:
    """Files as guest_disks.lay_out takes them: a text that begins with `-> ` is a link."""

    def __init__(self, files: Files) -> None:
        self._files = {tuple(name.strip("/").split("/")): content for name, content in files.items()}
        self._directories = {path[:length] for path in self._files for length in range(len(path))} | {()}

    def look(self, path: Path) -> Node | None:
        if path in self._directories:
            return Node(kind=Kind.DIRECTORY)
        if path not in self._files:
            return None
        if self._target(path) is not None:
            return Node(kind=Kind.LINK)
        return Node(kind=Kind.FILE, size_bytes=len(self._bytes(path)))

    def names(self, path: Path) -> Sequence[str]:
        known = {*self._files, *self._directories}
        return sorted({p[len(path)] for p in known if len(p) > len(path) and p[: len(path)] == path})

    def link(self, path: Path) -> str:
        target = self._target(path)
        if target is None:
            raise Unreadable("it is not there")
        return target

    def open(self, path: Path) -> BinaryIO:
        if path not in self._files:
            raise Unreadable("it is not there")
        return io.BytesIO(self._bytes(path))

    def _bytes(self, path: Path) -> bytes:
        content = self._files[path]
        return content.encode() if isinstance(content, str) else content

    def _target(self, path: Path) -> str | None:
        content = self._files.get(path)
        return content.removeprefix("-> ") if isinstance(content, str) and content.startswith("-> ") else None
