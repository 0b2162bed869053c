"""Names in the file system: given once, never taken from another file, and still there after a crash.

A plain rename overwrites, and opening the final name with O_EXCL would let a
reader see half of the bytes. link() does neither, also on NFS. A few file systems
have no hard links (FAT, some FUSE and SMB mounts); Linux's
renameat2(RENAME_NOREPLACE) is the same promise on those that support it.

A name is on the disk when its folder has been fsynced, not when its file has.
"""

import ctypes
import errno
import os
from pathlib import Path
from typing import Protocol

_RENAME_NOREPLACE = 1

_UNSUPPORTED = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL})
"""link(2) says EPERM where there are no hard links, FUSE and SMB the next ones; renameat2(2) EINVAL or ENOSYS."""


class Publish(Protocol):
    """Move or link `source` to `target`, each a name in an open directory.

    Raises:
        FileExistsError: `target` is taken; nothing changed.
        OSError: nothing changed.
    """

    def __call__(self, source: str, target: str, *, source_fd: int, target_fd: int) -> None: ...


def by_link(source: str, target: str, *, source_fd: int, target_fd: int) -> None:
    """Link `source` to `target`; `source` stays and is the caller's to remove."""
    os.link(source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd, follow_symlinks=False)


def by_rename(source: str, target: str, *, source_fd: int, target_fd: int) -> None:
    """Rename `source` to `target` if that is free; Python's os has no call for it, so libc is asked."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), target)
    if call(source_fd, os.fsencode(source), target_fd, os.fsencode(target), _RENAME_NOREPLACE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def is_unsupported(error: OSError) -> bool:
    """Whether `error` is how by_link or by_rename say that this file system can't do it."""
    return error.errno in _UNSUPPORTED


def sync_directory(path: Path) -> None:
    """Have the names in the folder `path` on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories(path: Path) -> None:
    """Make the folder `path` and what is missing above it, and have their names on the disk."""
    if path.is_dir():
        return
    if not path.parent.exists():
        make_directories(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)
