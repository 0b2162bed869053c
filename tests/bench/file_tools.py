"""restic and borg: they back up the raw disk as a file, which is changed in place between the two backups."""

from collections.abc import Sequence
from pathlib import Path

from bench.disk_data import Piece
from bench.measuring import Usage, measure
from bench.tools import Place, need

_BORG_OPTIONS = ["--chunker-params", "fixed,65536", "--sparse", "-C", "zstd,1"]
"""Blocks as large as drsync's, and holes are not read."""


class _FileTool:
    """What both have in common."""

    name: str
    restored_format = "raw"

    def __init__(self, place: Place) -> None:
        self._place = place
        self.reads = place.raw
        self.stored = place.directory / "repository"
        self._output = place.directory / "restored"
        self.restored = self._output / place.raw.relative_to("/")  # both keep the whole path
        self._env: dict[str, str] = {}

    def change(self, pieces: Sequence[Piece]) -> None:
        """The raw disk is changed already."""

    def close(self) -> None:
        """Nothing runs."""

    def _measure(self, *command: str | Path, cwd: Path | None = None) -> Usage:
        return measure(command, self._place.log, self._env, cwd)


class ResticTool(_FileTool):
    """restic with its usual options."""

    name = "restic"

    def prepare(self) -> None:
        need(["restic"])
        self._env = {
            "RESTIC_PASSWORD": "bench",
            "RESTIC_REPOSITORY": str(self.stored),
            "RESTIC_CACHE_DIR": str(self._place.directory / "cache"),
        }
        self._measure("restic", "init", "-q")

    def full(self) -> Usage:
        return self._measure("restic", "backup", "-q", self.reads)

    def increment(self) -> Usage:
        return self.full()

    def restore(self) -> Usage:
        return self._measure("restic", "restore", "-q", "latest", "--target", self._output)


class BorgTool(_FileTool):
    """borg with blocks of a fixed size, encryption, and the fastest zstd."""

    name = "borg"

    def prepare(self) -> None:
        need(["borg"])
        self._env = {
            "BORG_PASSPHRASE": "bench",
            "BORG_REPO": str(self.stored),
            "BORG_BASE_DIR": str(self._place.directory / "base"),
        }
        self._measure("borg", "init", "-e", "repokey-blake2")

    def full(self) -> Usage:
        return self._measure("borg", "create", *_BORG_OPTIONS, "::full", self.reads)

    def increment(self) -> Usage:
        return self._measure("borg", "create", *_BORG_OPTIONS, "::increment", self.reads)

    def restore(self) -> Usage:
        self._output.mkdir()
        return self._measure("borg", "extract", "--sparse", "::increment", cwd=self._output)
