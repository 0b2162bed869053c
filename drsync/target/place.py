"""Where the disks of a restored domain lie: a directory here, or a storage pool of libvirt's.

Directory     files, written by drsync itself
BlockPool     volumes that are devices, written by drsync itself       (libvirt_storage.py)
UploadPool    a pool of files that only libvirt can reach              (libvirt_storage.py)
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from drsync.errors import VolumeExists
from drsync.target import DiskWriter
from drsync.target.image import ImageDisk, ImageFormat, check_room, write_file
from drsync.target.partial import translated


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a disk takes."""

    size_bytes: int
    live_bytes: int
    """Bytes of it that hold data."""


class Place(Protocol):
    """Takes disks and small files, each under a name that is free."""

    block_devices: bool
    """Whether a disk is a device here; then its format is raw."""
    description: str
    """For people: "pool default", "/srv/vms"."""

    def path_of(self, name: str) -> str:
        """The path that the domain's XML has for a disk or file of that name."""
        ...

    def is_taken(self, name: str) -> bool:
        """Whether there is something of that name already."""
        ...

    def check_room(self, disks: Iterable[Room]) -> None:
        """Check that they fit.

        Raises:
            TargetFull, PoolUnusable: they don't.
        """
        ...

    def writer(self, name: str, size_bytes: int, image_format: ImageFormat) -> DiskWriter:
        """Begin a disk.

        Raises:
            VolumeExists: the name is taken.
            TargetError: it can't be made.
        """
        ...

    def put_file(self, name: str, content: bytes) -> None:
        """Write a small file (NVRAM).

        Raises:
            VolumeExists, TargetError: as `writer`.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove what was finished here under `name`; nothing happens if it is gone."""
        ...

    def finish(self) -> None:
        """All of a domain is written: let the pool know."""
        ...


class Directory:
    """A directory of this machine; as a pool, `refresh` tells libvirt what has come."""

    block_devices = False

    def __init__(
        self, path: Path, *, vm: str, description: str = "", refresh: Callable[[], None] = lambda: None
    ) -> None:
        self._path = path.absolute()
        self._vm = vm
        self._refresh = refresh
        self.description = description or str(self._path)

    def path_of(self, name: str) -> str:
        return str(self._path / name)

    def is_taken(self, name: str) -> bool:
        return os.path.lexists(self._path / name)

    def check_room(self, disks: Iterable[Room]) -> None:
        check_room(self._path, sum(disk.live_bytes for disk in disks))

    def writer(self, name: str, size_bytes: int, image_format: ImageFormat) -> DiskWriter:
        self._check_free(name)
        return ImageDisk(self._path / name, size_bytes, image_format, vm=self._vm, overwrite=False)

    def put_file(self, name: str, content: bytes) -> None:
        self._check_free(name)
        write_file(self._path / name, content, vm=self._vm, overwrite=False)

    def remove(self, name: str) -> None:
        with translated(self._path / name):
            (self._path / name).unlink(missing_ok=True)

    def finish(self) -> None:
        self._refresh()

    def _check_free(self, name: str) -> None:
        if self.is_taken(name):
            raise VolumeExists(path=self.path_of(name), vm=self._vm)
