"""The file that holds the root key on a host: one line, readable by its owner alone."""

import errno
import os
import stat
from pathlib import Path

from drsync.durable import make_directories, sync_directory
from drsync.errors import KeyFileExists, KeyFileExposed, KeyFileMissing
from drsync.format import Malformed
from drsync.format.keys import RootKey

_MAX_BYTES = 1024


def read_key_file(path: Path) -> RootKey:
    """The root key in the file at `path`.

    Raises:
        KeyFileMissing: there is none, or it is not a key file.
        KeyFileExposed: others than its owner may read it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise KeyFileExposed(path=path, mode=oct(stat.S_IMODE(mode)))
            return RootKey.from_text(file.read(_MAX_BYTES).decode("ascii", "replace"))
    except OSError as err:
        raise KeyFileMissing(path=path, problem=err.strerror) from err
    except Malformed as err:
        raise KeyFileMissing(path=path, problem=err) from err


def write_key_file(path: Path, key: RootKey) -> None:
    """Write a new key file, mode 0600; on the disk when this returns.

    Raises:
        KeyFileExists: there is a file at `path`; it is unchanged.
        KeyFileMissing: the file can't be made.
    """
    if path.exists():
        raise KeyFileExists(path=path)
    try:
        make_directories(path.parent)
        _write_new(path, key.to_text().encode())
        sync_directory(path.parent)
    except OSError as err:
        if path.exists() and err.errno == errno.EEXIST:
            raise KeyFileExists(path=path) from err
        raise KeyFileMissing(path=path, problem=err.strerror) from err


def _write_new(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()  # it is ours, and half a key is none
        raise
