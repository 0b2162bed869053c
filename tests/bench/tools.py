"""What the bench asks of a tool: a full, an increment and a restore of the same disk."""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.disk_data import Piece
from bench.measuring import Usage


class NotMeasured(Exception):
    """A tool can't be measured here; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tool works in one run."""

    directory: Path
    """The tool's own."""
    raw: Path
    """The disk's bytes. After the change these are changed, too."""

    @property
    def log(self) -> Path:
        """What the commands say."""
        return self.directory / "commands.log"


class Tool(Protocol):
    """A tool in one run."""

    name: str
    reads: Path
    """What a backup reads."""
    stored: Path
    """Where it stores."""
    restored: Path
    """What a restore writes; and its format for qemu-img:"""
    restored_format: str

    def prepare(self) -> None:
        """Get a disk with the data, and an empty repository.

        Raises:
            NotMeasured: it does not work here.
        """
        ...

    def full(self) -> Usage:
        """The first backup."""
        ...

    def change(self, pieces: Sequence[Piece]) -> None:
        """Write the changes to the disk, if this tool does not back up the raw disk itself."""
        ...

    def increment(self) -> Usage:
        """The next backup."""
        ...

    def restore(self) -> Usage:
        """Restore the newest backup to a new file."""
        ...

    def close(self) -> None:
        """End what runs."""
        ...


def need(programs: Iterable[str], *, root: bool = False) -> None:
    """Check that the programs are installed.

    Raises:
        NotMeasured: one is missing, or this is not root and should be.
    """
    missing = [p for p in programs if shutil.which(p) is None]
    if missing:
        raise NotMeasured(f"{', '.join(missing)} not installed")
    if root and os.geteuid() != 0:
        raise NotMeasured("it needs root")
