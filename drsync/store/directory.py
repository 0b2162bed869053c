"""Objects as files below one directory, on a local disk or a network file system.

A key is a path below the root. Every write goes to a file in ``.tmp`` first, is
fsynced there, and gets its final name in one step, so a reader or a crash never
sees a part of it (S1, S3). A writer that dies leaves a file in ``.tmp``: listings
don't see it, and a later writer removes it when it is a day old.

Folders are opened one below the other without following symbolic links, so no
key leaves the root, whatever somebody puts there. (The root itself may be one.)
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from drsync.direct import write_whole
from drsync.durable import Publish, by_link, by_rename, is_unsupported
from drsync.errors import (
    DirectoryDenied,
    KeyUnusable,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreFull,
    StoreMisconfigured,
    StoreUnavailable,
    StoreUnsafe,
)
from drsync.store import Bytes, ObjectInfo, Tail, Unfinished
from drsync.store.key import check_folder, check_key, check_prefix, is_key

_STAGING = ".tmp"
_STALE_S = 86400.0
"""No writer needs a day for one object; an older file in .tmp belongs to a dead one."""

_YEAR_9999_S = 253402300799.0
"""A file can claim to be from later, Python's datetime ends here."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""O_NONBLOCK: somebody's FIFO under an object's name must not hang the reader."""
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR})
_NO_FILE = frozenset({errno.ELOOP, errno.ENXIO})
"""What opening a symbolic link or a socket in place of an object says."""
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class _Staged:
    """A complete, fsynced file that has no final name yet."""

    folder_fd: int
    name: str
    fd: int


class DirectoryStore:
    """An ObjectStore in the directory `root`, which is made when the first object is written.

    It does not check `sha256` (S4 is for stores that do): what is read back is
    authenticated anyway, and hashing would cost more than writing.

    `publishers` are the ways to give a file its final name, tried in this order.
    """

    def __init__(self, root: Path, *, publishers: tuple[Publish, ...] = (by_link, by_rename)) -> None:
        if not root.is_absolute():
            raise StoreMisconfigured(url=str(root), problem="the path of a directory store must be absolute")
        self._root = root
        self._publishers = publishers
        self._durable: set[str] = set()
        self._swept = False

    @property
    def url(self) -> str:
        return self._root.as_uri()

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        with self._translated("create", key), self._folder_of(key, make=True) as (folder_fd, name):
            with self._staged(body) as staged:
                self._publish(staged, folder_fd, name, key)
            os.fsync(folder_fd)

    def replace(self, key: str, body: Bytes) -> None:
        with self._translated("replace", key), self._folder_of(key, make=True) as (folder_fd, name):
            with self._staged(body) as staged:
                os.rename(staged.name, name, src_dir_fd=staged.folder_fd, dst_dir_fd=folder_fd)
            os.fsync(folder_fd)

    def get(self, key: str, *, limit_bytes: int) -> bytes:
        with self._reading("get", key) as (fd, size_bytes):
            if size_bytes > limit_bytes:
                problem = f"it has {size_bytes} bytes, more than the {limit_bytes} it may have"
                raise ObjectDamaged(key=key, problem=problem)
            return _read(fd, 0, size_bytes, key)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        with self._reading("get", key) as (fd, size_bytes):
            if offset + length > size_bytes:
                raise ObjectDamaged(key=key, problem=f"it ends at byte {size_bytes}, before {offset + length}")
            return _read(fd, offset, length, key)

    def get_tail(self, key: str, length: int) -> Tail:
        with self._reading("get", key) as (fd, size_bytes):
            wanted = min(length, size_bytes)
            return Tail(data=_read(fd, size_bytes - wanted, wanted, key), object_size_bytes=size_bytes)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix, self.url)
        path = prefix[: prefix.rfind("/") + 1]
        with self._translated("list", prefix), ExitStack() as stack:
            if not self._root.is_dir():
                # Not an empty listing: the file system may just not be mounted.
                raise StoreMisconfigured(url=self.url, problem="there is no such directory")
            try:
                fd = stack.enter_context(self._folder(path.split("/")[:-1]))
            except FileNotFoundError:
                return
            yield from _walk(fd, path, prefix, after)

    def folders(self, prefix: str) -> Iterator[str]:
        check_folder(prefix, self.url)
        with self._translated("list", prefix), ExitStack() as stack:
            if not self._root.is_dir():
                raise StoreMisconfigured(url=self.url, problem="there is no such directory")  # as in `list`
            try:
                fd = stack.enter_context(self._folder(prefix.split("/")[:-1]))
            except FileNotFoundError:
                return
            for name in _names(fd):
                path = prefix + name
                if name.endswith("/") and any(True for _ in _walk_below(fd, name[:-1], path, path, "")):
                    yield name[:-1]

    def now(self) -> datetime:
        with self._translated("create", _STAGING), self._staged(b"") as staged:
            return _modified(os.fstat(staged.fd))

    def delete(self, key: str) -> None:
        with self._translated("delete", key), ExitStack() as stack:
            try:
                folder_fd, name = stack.enter_context(self._folder_of(key))
                found = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
            except OSError as err:
                if err.errno in _NOT_THERE:
                    return
                raise
            if stat.S_ISDIR(found.st_mode):
                return  # other keys lie below it; as an object it is not there
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder_fd)
            os.fsync(folder_fd)

    def unfinished(self) -> Iterator[Unfinished]:
        with self._translated("list", _STAGING), ExitStack() as stack:
            try:
                folder_fd = stack.enter_context(self._folder([_STAGING]))
            except FileNotFoundError:
                return
            with os.scandir(folder_fd) as entries:
                staged = sorted(entry.name for entry in entries)
            for name in staged:
                found = _stat(folder_fd, name)
                if found is not None:
                    yield Unfinished(key="", upload=name, began=_modified(found))

    def abandon(self, unfinished: Unfinished) -> None:
        with self._translated("abandon", unfinished.upload):
            check_key(unfinished.upload, self.url)
            with suppress(FileNotFoundError), self._folder([_STAGING]) as fd:
                os.unlink(unfinished.upload, dir_fd=fd)

    def _publish(self, staged: _Staged, folder_fd: int, name: str, key: str) -> None:
        for publish in self._publishers:
            try:
                publish(staged.name, name, source_fd=staged.folder_fd, target_fd=folder_fd)
            except FileExistsError:
                self._settle_existing(staged, folder_fd, name, key)
            except OSError as err:
                if not is_unsupported(err):
                    raise
                continue
            return
        raise StoreUnsafe(url=self.url)

    def _settle_existing(self, staged: _Staged, folder_fd: int, name: str, key: str) -> None:
        """Tell one's own file under the final name from another's.

        On NFS a reply can get lost: the client asks again, and the server says
        that the name exists, which it does since the first time (link(2), open(2)).
        """
        found = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
        if os.path.samestat(found, os.fstat(staged.fd)):
            return
        if stat.S_ISREG(found.st_mode):
            raise ObjectExists(key=key, url=self.url)
        raise KeyUnusable(key=repr(key), url=self.url)

    @contextmanager
    def _staged(self, body: Bytes) -> Iterator[_Staged]:
        """A file in .tmp with `body` in it, safe on the disk; its name there is gone afterwards."""
        with self._folder([_STAGING], make=True) as folder_fd:
            name = secrets.token_hex(16)
            fd = os.open(name, _WRITE, 0o600, dir_fd=folder_fd)
            try:
                self._sweep(folder_fd, fd)
                _write(fd, body)
                os.fsync(fd)
                yield _Staged(folder_fd=folder_fd, name=name, fd=fd)
            finally:
                os.close(fd)
                with suppress(FileNotFoundError):  # a rename took it
                    os.unlink(name, dir_fd=folder_fd)

    def _sweep(self, folder_fd: int, own_fd: int) -> None:
        """Once per store: remove what dead writers left, judged by the file system's own clock."""
        if self._swept:
            return
        self._swept = True
        limit = os.fstat(own_fd).st_mtime - _STALE_S
        for name in os.listdir(folder_fd):
            with suppress(OSError):  # another writer sweeps too, and this is only tidiness
                if os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mtime < limit:
                    os.unlink(name, dir_fd=folder_fd)

    @contextmanager
    def _reading(self, operation: str, key: str) -> Iterator[tuple[int, int]]:
        """The object's file, open, and its size."""
        with self._translated(operation, key), ExitStack() as stack:
            try:
                folder_fd, name = stack.enter_context(self._folder_of(key))
                fd = os.open(name, _READ, dir_fd=folder_fd)
            except OSError as err:
                if err.errno in _NOT_THERE:
                    raise ObjectMissing(key=key, url=self.url) from err
                if err.errno in _NO_FILE:
                    raise ObjectDamaged(key=key, problem="it is not a regular file") from err
                raise
            stack.callback(os.close, fd)
            found = os.fstat(fd)
            if stat.S_ISDIR(found.st_mode):
                raise ObjectMissing(key=key, url=self.url)
            if not stat.S_ISREG(found.st_mode):
                raise ObjectDamaged(key=key, problem="it is not a regular file")
            yield fd, found.st_size

    @contextmanager
    def _folder_of(self, key: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The folder that holds (or, with `make`, will hold) the object, open, and the object's name in it."""
        check_key(key, self.url)
        *parts, name = key.split("/")
        with self._folder(parts, make=make) as fd:
            yield fd, name

    @contextmanager
    def _folder(self, parts: Sequence[str], *, make: bool = False) -> Iterator[int]:
        """The folder `parts` below the root, open."""
        with ExitStack() as stack:
            if make and not self._root.is_dir():
                _make_path(self._root)
            fd = os.open(self._root, _FOLDER)
            stack.callback(os.close, fd)
            for depth, part in enumerate(parts):
                if make:
                    self._settle("/".join(parts[: depth + 1]), part, fd)
                fd = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
                stack.callback(os.close, fd)
            yield fd

    def _settle(self, path: str, name: str, parent_fd: int) -> None:
        """See to it that a folder exists and that its name survives a crash.

        Another writer may have made it just now and not have fsynced it yet, so
        every store does that once for each folder that it writes to.
        """
        if path in self._durable:
            with suppress(FileNotFoundError):
                os.stat(name, dir_fd=parent_fd)
                return
        _make_folder(name, parent_fd)
        self._durable.add(path)

    @contextmanager
    def _translated(self, operation: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise self._translate(err, operation, key) from err

    def _translate(self, err: OSError, operation: str, key: str) -> StoreError:
        problem = f"{err.strerror or err} ({operation} {key})"
        match err.errno:
            case errno.ENOSPC | errno.EDQUOT:
                return StoreFull(url=self.url, problem=problem, path=self._root)
            case errno.EACCES | errno.EPERM | errno.EROFS:
                return DirectoryDenied(
                    url=self.url, operation=operation, problem=err.strerror or str(err), path=self._root
                )
            case errno.ENOTDIR | errno.ELOOP | errno.EISDIR | errno.ENAMETOOLONG:
                return KeyUnusable(key=repr(key), url=self.url)
            case errno.EXDEV:
                return StoreMisconfigured(url=self.url, problem=f"{problem}: all of it must be on one file system")
            case _:
                return StoreUnavailable(url=self.url, problem=problem)


def _walk(fd: int, folder: str, prefix: str, after: str) -> Iterator[ObjectInfo]:
    """The objects in the open folder `fd` and below, in key order; `folder` is its key with a final slash, or ""."""
    for name in _names(fd):
        path = folder + name
        if name.endswith("/"):
            if _may_hold(path, prefix, after):
                yield from _walk_below(fd, name[:-1], path, prefix, after)
        elif path.startswith(prefix) and path > after:
            found = _stat(fd, name)
            if found is not None:
                yield ObjectInfo(key=path, size_bytes=found.st_size, modified=_modified(found))


def _walk_below(fd: int, name: str, path: str, prefix: str, after: str) -> Iterator[ObjectInfo]:
    try:
        below_fd = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
    except FileNotFoundError:  # deleted since the folder above was read
        return
    try:
        yield from _walk(below_fd, path, prefix, after)
    finally:
        os.close(below_fd)


def _modified(found: os.stat_result) -> datetime:
    return datetime.fromtimestamp(min(max(found.st_mtime, 0.0), _YEAR_9999_S), UTC)


def _stat(fd: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:  # deleted since the folder was read
        return None


def _names(fd: int) -> list[str]:
    """The objects and folders in an open folder, in the order of the keys.

    A folder sorts with its slash: that is how the keys below it go on, and "a-b"
    comes before "a/b" although "a" comes before "a-b". What is neither (somebody's
    links, names that no key can have, .tmp) is not an object.
    """
    try:
        with os.scandir(fd) as entries:
            return sorted(
                f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                for entry in entries
                if is_key(entry.name) and (entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False))
            )
    except FileNotFoundError:  # the folder was deleted: nothing was left in it
        return []


def _may_hold(folder: str, prefix: str, after: str) -> bool:
    """Whether keys below `folder` can start with `prefix` and sort behind `after`."""
    matches = folder.startswith(prefix) or prefix.startswith(folder)
    return matches and (folder > after or after.startswith(folder))


def _read(fd: int, offset: int, length: int, key: str) -> bytes:
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise ObjectDamaged(key=key, problem=f"it was cut to {offset + len(data)} bytes while it was read")
        data += more
    return data


def _write(fd: int, body: Bytes) -> None:
    write_whole(fd, memoryview(body).cast("B"))


def _make_folder(name: str, parent_fd: int) -> None:
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent_fd)
    os.fsync(parent_fd)


def _make_path(path: Path) -> None:
    """Make the folder `path` and what is missing above it, and have the names on the disk."""
    if not path.parent.is_dir():
        _make_path(path.parent)
    fd = os.open(path.parent, _FOLDER)
    try:
        _make_folder(path.name, fd)
    finally:
        os.close(fd)
