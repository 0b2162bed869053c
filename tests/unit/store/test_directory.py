"""What is the directory store's own: files, modes, the order of its writes, and what somebody else put there."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from no_hard_links import refuse_link

from drsync.durable import Publish, by_link, by_rename
from drsync.errors import (
    DirectoryDenied,
    KeyUnusable,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreMisconfigured,
    StoreUnavailable,
    StoreUnsafe,
)
from drsync.store.directory import DirectoryStore

KEY = "vm/web/log/0000000000000001"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "new" / "repository"


def put(store: DirectoryStore, key: str = KEY, body: bytes = b"body") -> None:
    store.create(key, body, sha256=hashlib.sha256(body).digest())


def keys(store: DirectoryStore) -> list[str]:
    return [info.key for info in store.list("")]


def staged(root: Path) -> list[str]:
    return [path.name for path in (root / ".tmp").iterdir()]


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def failing(code: int) -> Publish:
    def publish(source: str, target: str, *, source_fd: int, target_fd: int) -> None:
        raise OSError(code, os.strerror(code), target)

    return publish


def test_files_and_directories_are_the_owners_alone(root: Path) -> None:
    old = os.umask(0)
    try:
        put(DirectoryStore(root))
    finally:
        os.umask(old)
    assert stat.S_IMODE((root / KEY).stat().st_mode) == 0o600
    for path in (root.parent, root, root / "vm", root / "vm/web", root / "vm/web/log", root / ".tmp"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


def test_nothing_is_left_in_tmp(root: Path) -> None:
    store = DirectoryStore(root)
    put(store)
    store.replace("host/hv1.json", b"1")
    with pytest.raises(ObjectExists):
        put(store)
    assert staged(root) == []


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """What reaches the disk, in order: each fsync with the path, each new name."""
    taken: list[str] = []
    real_fsync, real_link, real_rename = os.fsync, os.link, os.rename

    def fsync(fd: int) -> None:
        real_fsync(fd)
        path = Path(f"/proc/self/fd/{fd}").readlink()
        taken.append(f"fsync {'file' if path.parent.name == '.tmp' else path.relative_to(root.parents[1])}")

    def link(*args: Any, **options: Any) -> None:
        real_link(*args, **options)
        taken.append("name")

    def rename(*args: Any, **options: Any) -> None:
        real_rename(*args, **options)
        taken.append("name")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "rename", rename)
    return taken


def test_s3_bytes_then_name_then_folder_reach_the_disk_and_new_folders_before(root: Path, steps: list[str]) -> None:
    store = DirectoryStore(root)
    put(store)
    made = ["fsync .", "fsync new"]
    below = ["fsync new/repository", "fsync new/repository/vm", "fsync new/repository/vm/web"]
    staged = ["fsync new/repository", "fsync file"]
    assert steps == [*made, *below, *staged, "name", "fsync new/repository/vm/web/log"]
    steps.clear()
    put(store, "vm/web/log/0000000000000002")
    assert steps == ["fsync file", "name", "fsync new/repository/vm/web/log"]
    steps.clear()
    store.replace("vm/web/log/0000000000000002", b"other")
    assert steps == ["fsync file", "name", "fsync new/repository/vm/web/log"]


def test_s3_a_folder_that_another_writer_made_is_fsynced_too(root: Path, steps: list[str]) -> None:
    put(DirectoryStore(root))
    steps.clear()
    put(DirectoryStore(root), "vm/web/log/0000000000000002")
    assert "fsync new/repository/vm/web" in steps


def test_a_folder_that_somebody_removed_is_made_again(root: Path) -> None:
    store = DirectoryStore(root)
    put(store)
    (root / KEY).unlink()
    (root / "vm/web/log").rmdir()
    put(store)
    assert keys(store) == [KEY]


def test_what_a_dead_writer_left_is_no_object_and_goes_when_it_is_a_day_old(root: Path) -> None:
    put(DirectoryStore(root))
    old, recent = root / ".tmp" / "old", root / ".tmp" / "recent"
    for path in (old, recent):
        path.write_bytes(b"half of an object")
    os.utime(old, (0, old.stat().st_mtime - 86401))
    os.utime(recent, (0, recent.stat().st_mtime - 86000))
    store = DirectoryStore(root)
    assert keys(store) == [KEY]
    put(store, "vm/web/log/0000000000000002")
    assert staged(root) == ["recent"]


@pytest.mark.parametrize("publish", [by_link, by_rename], ids=["link", "rename"])
def test_a_name_is_given_only_if_it_is_free(tmp_path: Path, publish: Publish) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        (tmp_path / "one").write_bytes(b"1")
        publish("one", "final", source_fd=fd, target_fd=fd)
        (tmp_path / "two").write_bytes(b"2")
        with pytest.raises(FileExistsError):
            publish("two", "final", source_fd=fd, target_fd=fd)
    finally:
        os.close(fd)
    assert (tmp_path / "final").read_bytes() == b"1"
    assert (tmp_path / "two").read_bytes() == b"2"


def test_without_hard_links_the_rename_that_never_overwrites_is_used(root: Path) -> None:
    used: list[str] = []

    def watched(source: str, target: str, *, source_fd: int, target_fd: int) -> None:
        used.append(target)
        by_rename(source, target, source_fd=source_fd, target_fd=target_fd)

    put(DirectoryStore(root, publishers=(refuse_link, watched)))
    assert used == ["0000000000000001"]
    assert (root / KEY).read_bytes() == b"body"


def test_without_either_the_store_is_unsafe_and_takes_nothing(root: Path) -> None:
    store = DirectoryStore(root, publishers=(refuse_link, failing(errno.EINVAL)))
    with pytest.raises(StoreUnsafe):
        put(store)
    assert keys(store) == []
    assert staged(root) == []


def test_a_link_whose_reply_was_lost_is_ones_own_success(root: Path) -> None:
    def link_twice(source: str, target: str, *, source_fd: int, target_fd: int) -> None:
        by_link(source, target, source_fd=source_fd, target_fd=target_fd)
        by_link(source, target, source_fd=source_fd, target_fd=target_fd)  # what an NFS client does

    store = DirectoryStore(root, publishers=(link_twice,))
    put(store)
    assert store.get(KEY, limit_bytes=10) == b"body"
    with pytest.raises(ObjectExists):
        put(store)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EACCES, DirectoryDenied),
        (errno.EROFS, DirectoryDenied),
        (errno.EXDEV, StoreMisconfigured),
        (errno.EIO, StoreUnavailable),
        (errno.ESTALE, StoreUnavailable),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else None,
)
def test_s6_what_the_file_system_refuses(root: Path, code: int, expected: type[StoreError]) -> None:
    store = DirectoryStore(root, publishers=(failing(code),))
    with pytest.raises(expected) as raised:
        put(store)
    assert type(raised.value) is expected
    assert store.url in str(raised.value)
    assert os.strerror(code) in str(raised.value)
    assert raised.value.remedy
    assert keys(store) == []
    assert staged(root) == []


def test_a_directory_that_may_not_be_used_says_whose_it_must_be(root: Path) -> None:
    store = DirectoryStore(root, publishers=(failing(errno.EACCES),))
    with pytest.raises(StoreDenied) as raised:
        put(store)
    assert raised.value.remedy.startswith(f"ls -ld {root}")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link_to_a_secret(path: Path) -> None:
    secret = path.parent / ".secret"
    secret.write_bytes(b"secret")
    path.symlink_to(secret)


@pytest.mark.parametrize("make", [_fifo, _link_to_a_secret])
def test_what_is_no_regular_file_is_damage_and_is_not_listed(root: Path, make: Callable[[Path], None]) -> None:
    store = DirectoryStore(root)
    put(store)
    make(root / "vm/web/log/0000000000000002")
    with pytest.raises(ObjectDamaged):
        store.get("vm/web/log/0000000000000002", limit_bytes=100)
    with pytest.raises(StoreError):
        put(store, "vm/web/log/0000000000000002")
    assert keys(store) == [KEY]


def test_no_key_leaves_the_root_through_a_link_to_a_directory(root: Path, tmp_path: Path) -> None:
    store = DirectoryStore(root)
    put(store)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"secret")
    (root / "vm/evil").symlink_to(outside)
    with pytest.raises(ObjectMissing):
        store.get("vm/evil/x", limit_bytes=100)
    with pytest.raises(KeyUnusable):
        put(store, "vm/evil/y")
    assert keys(store) == [KEY]
    assert [path.name for path in outside.iterdir()] == ["x"]


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    put(DirectoryStore(root))
    (tmp_path / "link").symlink_to(root)
    assert keys(DirectoryStore(tmp_path / "link")) == [KEY]


def test_a_key_that_is_a_folder_can_not_become_an_object(root: Path) -> None:
    store = DirectoryStore(root)
    put(store)
    with pytest.raises(KeyUnusable):
        put(store, "vm/web")
    with pytest.raises(KeyUnusable):
        put(store, KEY + "/below")
    assert keys(store) == [KEY]


def test_files_that_are_not_drsyncs_are_not_listed(root: Path) -> None:
    store = DirectoryStore(root)
    put(store)
    for name in ("vm/web/log/.hidden", "vm/web/log/with space", "lost+found"):
        (root / name).write_bytes(b"x")
    (root / os.fsdecode(b"not\xffutf8")).write_bytes(b"x")
    assert keys(store) == [KEY]


@pytest.mark.parametrize("seconds", [-5e9, 4e11])
def test_a_file_from_an_impossible_time_is_listed_all_the_same(root: Path, seconds: float) -> None:
    store = DirectoryStore(root)
    put(store)
    os.utime(root / KEY, (seconds, seconds))
    assert keys(store) == [KEY]


def test_a_listing_goes_on_when_objects_vanish_under_it(root: Path) -> None:
    store = DirectoryStore(root)
    for name in ("a/1", "a/2", "b/1", "c/1"):
        put(store, name)
    listing = store.list("")
    assert next(listing).key == "a/1"
    (root / "a/2").unlink()
    (root / "b/1").unlink()
    (root / "b").rmdir()
    assert [info.key for info in listing] == ["c/1"]


def test_no_file_stays_open(root: Path) -> None:
    store = DirectoryStore(root)
    before = open_files()
    put(store)
    store.replace("host/hv1.json", b"1")
    with pytest.raises(ObjectDamaged):
        store.get(KEY, limit_bytes=1)
    with pytest.raises(ObjectDamaged):
        store.get_range(KEY, 9, 9)
    with pytest.raises(ObjectExists):
        put(store)
    with pytest.raises(ObjectMissing):
        store.get("vm/web/log/none", limit_bytes=1)
    assert next(store.list("")).key == "host/hv1.json"  # and the rest of the listing is dropped
    assert open_files() == before
