"""Looks on while a capture copies: reports how far it is, and gives up before the spool is full."""

import os
from collections.abc import Mapping
from pathlib import Path

from drsync.errors import CaptureFailed
from drsync.model import NoProgress, Progress
from drsync.units import format_size


class Watch:
    """One capture's onlooker."""

    def __init__(
        self, vm: str, layers: Mapping[str, Path], *, keep_free_bytes: int = 0, progress: Progress | None = None
    ) -> None:
        self._vm = vm
        self._directories = {path.parent for path in layers.values()}
        self._keep_free_bytes = keep_free_bytes
        self._progress = progress or NoProgress()
        self._started = False
        self._done_bytes = 0

    def tick(self, done_bytes: int, total_bytes: int) -> None:
        """Look now: `done_bytes` of `total_bytes` are copied.

        Raises:
            CaptureFailed: less than the room to keep is free where a layer grows.
        """
        if not self._started:
            self._progress.start("capture", total_bytes)
            self._started = True
        self._progress.advance(done_bytes - self._done_bytes)
        self._done_bytes = done_bytes
        for directory in self._directories if self._keep_free_bytes else ():
            self._check_room(directory)

    def _check_room(self, directory: Path) -> None:
        space = os.statvfs(directory)
        free_bytes = space.f_bavail * space.f_frsize
        if free_bytes < self._keep_free_bytes:
            problem = f"only {format_size(free_bytes)} are free in {directory}"
            raise CaptureFailed(vm=self._vm, operation="copying", problem=problem)
