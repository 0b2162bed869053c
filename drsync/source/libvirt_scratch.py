"""The scratch space of a pull-mode backup: where QEMU puts the old content of what the guest overwrites meanwhile.

A guest's write fails if its old block can't be put there. So it is never let come to
that: the space is looked at all the time, and there is a budget that is far from its end.
"""

import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drsync.errors import LiveUnavailable
from drsync.source import DiskSurvey
from drsync.source.backup import make_layer
from drsync.units import KiB, MiB, format_size

MAX_SOCKET_PATH_BYTES: Final = 107
"""Linux' sun_path is 108 bytes with its closing zero."""
_END_S: Final = 1.0
"""How long a job's end may take on a busy host; usually it is 0.2 s."""
_EMPTY_BYTES: Final = 256 * KiB
"""What an empty scratch file takes for its tables, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchLimits:
    """How much of the spool's file system scratch files may take."""

    keep_free_bytes: int
    """Never let less than this be free."""
    most_bytes: int = 1024 * MiB
    """A guest that overwrites more than this gets a new job, which begins with empty files, even if there is room."""
    least_bytes: int = 16 * MiB
    """With less room than this for what the guest overwrites, no job is begun."""


class Scratch:
    """A directory with a socket and one scratch file a disk. Used by one thread at a time."""

    def __init__(self, vm: str, directory: Path, limits: ScratchLimits) -> None:
        self._vm = vm
        self.directory = directory
        self._limits = limits
        self._budget_bytes = 0
        self._seen: tuple[float, int] | None = None
        """When it was last looked, and what the files took then."""
        self._files: list[Path] = []

    @property
    def socket(self) -> Path:
        """Where QEMU's NBD server listens."""
        return self.directory / "nbd"

    def check(self) -> None:
        """Check that a job could begin.

        Raises:
            LiveUnavailable: there is not enough room, or no socket can be there.
        """
        if len(bytes(self.socket)) > MAX_SOCKET_PATH_BYTES:
            raise self._unavailable(f"{self.socket} is longer than a socket's path can be")
        room_bytes = self._room_bytes()
        if room_bytes < self._limits.least_bytes:
            kept, room = format_size(self._limits.keep_free_bytes), format_size(max(0, room_bytes))
            problem = f"what the guest overwrites meanwhile would have {room} beside the {kept} that stay free"
            raise self._unavailable(f"{problem} in {_existing(self.directory)}")

    def make(self, disks: Sequence[DiskSurvey], owner: tuple[int, int]) -> Sequence[Path]:
        """Empty files, one for each disk in this order, that `owner` (QEMU's user and group) can write.

        Raises:
            LiveUnavailable: there is no room for a job, or no file can be made.
            SpoolUnusable: likewise.
        """
        self.remove()
        self.check()
        self._budget_bytes = min(self._limits.most_bytes, self._room_bytes() // 2)  # the rest: for what comes late
        try:
            self.directory.parent.mkdir(mode=0o711, exist_ok=True)
            self.directory.mkdir(mode=0o700, exist_ok=True)
            if os.geteuid() == 0:
                os.chown(self.directory, *owner, follow_symlinks=False)
        except OSError as err:
            raise self._unavailable(f"{err.filename or self.directory}: {err.strerror}") from err
        self._seen = None
        self._files = [self.directory / f"scratch-{number}.qcow2" for number in range(len(disks))]
        for path, disk in zip(self._files, disks, strict=True):
            make_layer(path, disk.size_bytes, owner)
        return self._files

    def used_bytes(self) -> int:
        """What the files take now."""
        used = 0
        for path in self._files:
            with suppress(FileNotFoundError):
                used += path.stat().st_blocks * 512
        return used

    def is_spent(self, now_s: float) -> bool:
        """Whether the job has to end now, at `now_s` of a clock that never goes back.

        Not only when the budget is spent, but also if it would be too late when the job has ended,
        should the guest go on as it did since it was last looked.
        """
        used_bytes, left_bytes = self.used_bytes(), free_bytes(self.directory) - self._limits.keep_free_bytes
        rate = 0.0
        if self._seen is not None and now_s > self._seen[0]:
            rate = max(0, used_bytes - self._seen[1]) / (now_s - self._seen[0])
        self._seen = (now_s, used_bytes)
        over = used_bytes - len(self._files) * _EMPTY_BYTES > self._budget_bytes
        return over or left_bytes < 0 or left_bytes < rate * _END_S

    def remove(self) -> None:
        """Remove everything; no job may use it. What can't be removed harms nobody and is tried again."""
        self._files = []
        remove_scratch(self.directory)
        with suppress(OSError):  # there may be that of another view
            self.directory.parent.rmdir()

    def _room_bytes(self) -> int:
        return free_bytes(_existing(self.directory)) - self._limits.keep_free_bytes

    def _unavailable(self, problem: str) -> LiveUnavailable:
        return LiveUnavailable(vm=self._vm, problem=problem)


def _existing(directory: Path) -> Path:
    return next(path for path in (directory, *directory.parents) if path.is_dir())


def free_bytes(directory: Path) -> int:
    """Room on the file system of a directory, for everybody; none if the directory can't be looked at."""
    try:
        space = os.statvfs(directory)
    except OSError:
        return 0
    return space.f_bavail * space.f_frsize


def remove_scratch(directory: Path) -> None:
    """Remove what a job has left, if nothing uses it. A link is not followed: the directory is QEMU's user's."""
    with suppress(OSError):
        if stat.S_ISDIR(directory.lstat().st_mode):
            shutil.rmtree(directory, ignore_errors=True)
