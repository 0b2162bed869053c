"""A file under a `.partial` name until it is complete: the way in which everything that is restored gets its name."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from drsync.durable import by_link, by_rename, is_unsupported, make_directories
from drsync.errors import TargetExists, TargetFull, TargetUnusable
from drsync.units import format_size

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_WRITE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""O_NONBLOCK: somebody's FIFO under the partial name must not hang the restore."""


class PartialFile:
    """A file that has its final name only when it is complete; nobody else writes it meanwhile."""

    def __init__(self, path: Path, *, vm: str, overwrite: bool) -> None:
        """Make the partial file beside `path`; one of an earlier, broken restore is replaced.

        Raises:
            TargetExists: `path` exists and `overwrite` is not set.
            TargetUnusable: the file can't be made, or another restore is writing it.
        """
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._vm = vm
        self._overwrite = overwrite
        self._check_free()
        with translated(path.parent):
            make_directories(path.parent)
            self._folder_fd = os.open(path.parent, _FOLDER)
        try:
            with translated(self.partial):
                self.fd = _open_locked(self.partial)
        except BaseException:
            os.close(self._folder_fd)
            raise
        self._name = self.partial
        self.is_open = True

    def finish(self) -> None:
        """Have all of it on the disk, under its final name.

        Raises:
            TargetExists: `path` came into being meanwhile, and `overwrite` is not set.
            TargetFull, TargetUnusable: it can't be; `abandon` removes it, whatever name it has by now.
        """
        with translated(self.path):
            os.fsync(self.fd)
            self._check_free()
            if self._overwrite:
                self.partial.replace(self.path)
            else:
                self._publish()
            self._name = self.path
            os.fsync(self._folder_fd)
        self._close()

    def abandon(self) -> None:
        """Remove the file, unless it is finished; safe to call twice."""
        if self.is_open:
            with suppress(FileNotFoundError):
                self._name.unlink()
            self._close()

    def _check_free(self) -> None:
        if not self._overwrite and os.path.lexists(self.path):
            raise TargetExists(path=self.path, vm=self._vm)

    def _publish(self) -> None:
        """Give the final name if it is free; a rename first, since there is no moment with both names then."""
        for publish in (by_rename, by_link):
            try:
                publish(self.partial.name, self.path.name, source_fd=self._folder_fd, target_fd=self._folder_fd)
            except FileExistsError as err:
                raise TargetExists(path=self.path, vm=self._vm) from err
            except OSError as err:
                if not is_unsupported(err):
                    raise
            else:
                with suppress(FileNotFoundError):  # a rename took it
                    self.partial.unlink()
                return
        raise TargetUnusable(path=self.path, problem="its file system can't give a name only if it is free")

    def _close(self) -> None:
        """Give up the file, and only now its lock: its name is no longer the partial one."""
        self.is_open = False
        os.close(self.fd)
        os.close(self._folder_fd)


def _open_locked(path: Path) -> int:
    """The partial file, empty and locked: two restores that wrote one file would mix their points."""
    while True:
        fd = os.open(path, _WRITE, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(fd), path.stat()):  # it was finished in between
                raise BlockingIOError
            if os.fstat(fd).st_nlink == 1:
                os.ftruncate(fd, 0)
                return fd
            path.unlink()  # a restore was killed when the file had both of its names: the other one is complete
        except (BlockingIOError, FileNotFoundError) as err:
            os.close(fd)
            raise TargetUnusable(path=path, problem="another restore is writing it") from err
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def free_bytes(directory: Path) -> int:
    """Room on the file system of `directory`, which need not exist yet."""
    place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    return shutil.disk_usage(place).free


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise what goes wrong with `path` as a TargetError.

    Raises:
        TargetFull: no room is left.
        TargetUnusable: anything else.
    """
    try:
        yield
    except OSError as err:
        if err.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise TargetFull(path=path, needed="more room", free=format_size(free_bytes(path.parent))) from err
        raise TargetUnusable(path=path, problem=err.strerror) from err
