"""Prepares a restored copy of a guest for EC2, offline: what `drsync preflight` would complain of.

    image files ─▶ libguestfs.py   a small VM with these disks, in which the guest's own tools can be called
                     │
                     ▼
                   steps.py        in order: fstab, network, boot loader, initramfs
                     │ rewrite.py  texts in, texts out: pure
                     ▼
                   what was changed, as lines for people

Only ever a copy: the repository is not touched. Every file that is changed or put aside stays beside the new one, as
NAME.drsync. A step that finds nothing to do does nothing, so a second run changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A restored disk."""

    path: Path
    format: str
    """raw or qcow2."""


class StepFailed(Exception):
    """A step could not be done; the text says why."""


class Guest(Protocol):
    """A guest's files and tools, with all its file systems mounted. Paths are the guest's own.

    Every method raises StepFailed when the guest or the tool refuses.
    """

    def exists(self, path: str) -> bool:
        """Whether there is a file or directory; links are followed, within the guest."""
        ...

    def read(self, path: str) -> str:
        """A text file."""
        ...

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file; what was there before stays as NAME.drsync (the first time)."""
        ...

    def put_aside(self, path: str) -> None:
        """Rename a file to NAME.drsync."""
        ...

    def names(self, directory: str) -> Sequence[str]:
        """The names in a directory, sorted; none if it is not there."""
        ...

    def run(self, command: str) -> str:
        """Run a shell command in the guest, as root; its output."""
        ...

    def uuid_of(self, device: str) -> str:
        """The UUID of what is on a device as this guest called it (`/dev/vda1`); empty if it is not known."""
        ...
