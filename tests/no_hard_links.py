"""A file system without hard links, as far as a directory store can tell."""

import errno
import os


def refuse_link(source: str, target: str, *, source_fd: int, target_fd: int) -> None:
    """What link(2) answers on FAT."""
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), target)
