"""The file that holds a host's keys, readable by its owner alone: the root keys, or those of some VMs."""

import errno
import os
import stat
from pathlib import Path

from drsync.durable import make_directories, sync_directory
from drsync.errors import KeyFileExists, KeyFileExposed, KeyFileMissing
from drsync.format import Malformed
from drsync.format.keys import Keys, RootKey, RootKeys
from drsync.format.keytext import MAX_KEY_FILE_BYTES, decode_keys, encode_keys


def read_key_file(path: Path) -> Keys:
    """The keys in the file at `path`.

    Raises:
        KeyFileMissing: there is none, or it is not a key file.
        KeyFileExposed: others than its owner may read it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise KeyFileExposed(path=path, mode=oct(stat.S_IMODE(mode)))
            content = file.read(MAX_KEY_FILE_BYTES + 1)
        if len(content) > MAX_KEY_FILE_BYTES:
            raise Malformed("is not a drsync key file")
        return decode_keys(content.decode("ascii", "replace"))
    except OSError as err:
        raise KeyFileMissing(path=path, problem=err.strerror) from err
    except Malformed as err:
        raise KeyFileMissing(path=path, problem=err) from err


def write_key_file(path: Path, keys: Keys | RootKey) -> None:
    """Write a new key file, mode 0600; on the disk when this returns.

    Raises:
        KeyFileExists: there is a file at `path`; it is unchanged.
        KeyFileMissing: the file can't be made.
    """
    if path.exists():
        raise KeyFileExists(path=path)
    try:
        make_directories(path.parent)
        _write_new(path, _encoded(keys))
        sync_directory(path.parent)
    except OSError as err:
        if path.exists() and err.errno == errno.EEXIST:
            raise KeyFileExists(path=path) from err
        raise KeyFileMissing(path=path, problem=err.strerror) from err


def replace_key_file(path: Path, keys: Keys) -> None:
    """Put newer keys in the place of a key file; a crash leaves the old one or the new one.

    Raises:
        KeyFileMissing: the file can't be written; the old one is as it was.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        new.unlink(missing_ok=True)  # a run that died left it; it was never a key file's name
        _write_new(new, _encoded(keys))
        new.replace(path)
        sync_directory(path.parent)
    except OSError as err:
        raise KeyFileMissing(path=path, problem=err.strerror) from err


def _encoded(keys: Keys | RootKey) -> bytes:
    return encode_keys(RootKeys((keys,)) if isinstance(keys, RootKey) else keys).encode()


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
