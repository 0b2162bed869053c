"""One suite for every store: the rules S1 to S9 of drsync/store/__init__.py."""

import hashlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fake_clock import FakeClock
from no_hard_links import refuse_link
from s3_lab import Bucket

from drsync.durable import by_rename
from drsync.errors import (
    KeyUnusable,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreMisconfigured,
    StoreUnavailable,
)
from drsync.model import SystemClock
from drsync.store import Bytes, ObjectStore, Tail
from drsync.store.directory import DirectoryStore
from drsync.store.memory import MemoryStore
from drsync.store.probe import create_in_a_race, probe_create_only
from drsync.store.retry import RetryingStore
from drsync.store.s3 import S3Options, S3Store
from drsync.units import KiB, MiB

LIMIT_BYTES = MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A store under test, and what is its own."""

    store: ObjectStore
    checks_sha256: bool


def _memory(request: pytest.FixtureRequest) -> Subject:
    return Subject(store=MemoryStore(SystemClock()), checks_sha256=True)


def _directory(request: pytest.FixtureRequest) -> Subject:
    tmp_path: Path = request.getfixturevalue("tmp_path")
    root = tmp_path / "repository"
    root.mkdir()
    return Subject(store=DirectoryStore(root), checks_sha256=False)


def _directory_without_hard_links(request: pytest.FixtureRequest) -> Subject:
    tmp_path: Path = request.getfixturevalue("tmp_path")
    root = tmp_path / "repository"
    root.mkdir()
    return Subject(store=DirectoryStore(root, publishers=(refuse_link, by_rename)), checks_sha256=False)


def _s3(request: pytest.FixtureRequest) -> Subject:
    bucket: Bucket = request.getfixturevalue("bucket")
    options = S3Options(bucket=bucket.name, prefix="dr/site-1", endpoint_url=bucket.endpoint_url, region=bucket.region)
    return Subject(store=S3Store(options), checks_sha256=True)


def _retrying(make: Callable[[pytest.FixtureRequest], Subject]) -> Callable[[pytest.FixtureRequest], Subject]:
    def made(request: pytest.FixtureRequest) -> Subject:
        inner = make(request)
        clock = FakeClock()
        store = RetryingStore(inner.store, clock=clock, sleep=clock.sleep)
        return Subject(store=store, checks_sha256=inner.checks_sha256)

    return made


@pytest.fixture(
    params=[
        pytest.param(_memory, id="memory"),
        pytest.param(_directory, id="directory"),
        pytest.param(_directory_without_hard_links, id="directory-without-hard-links"),
        pytest.param(_s3, id="s3", marks=pytest.mark.localstack),
        pytest.param(_retrying(_memory), id="retrying-memory"),
        pytest.param(_retrying(_directory), id="retrying-directory"),
        pytest.param(_retrying(_s3), id="retrying-s3", marks=pytest.mark.localstack),
    ]
)
def subject(request: pytest.FixtureRequest) -> Subject:
    make: Callable[[pytest.FixtureRequest], Subject] = request.param
    return make(request)


@pytest.fixture
def store(subject: Subject) -> ObjectStore:
    return subject.store


def put(store: ObjectStore, key: str, body: Bytes) -> None:
    store.create(key, body, sha256=hashlib.sha256(body).digest())


def keys(store: ObjectStore, prefix: str = "", after: str = "") -> list[str]:
    return [info.key for info in store.list(prefix, after=after)]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00", id="one-byte"),
        pytest.param(bytearray(b"a" * 70_000), id="bytearray"),
        pytest.param(memoryview(b"0123456789")[2:7], id="part-of-a-memoryview"),
        pytest.param(memoryview(bytearray(range(64))).cast("I"), id="memoryview-of-words"),
    ],
)
def test_what_was_created_is_read_back(store: ObjectStore, body: Bytes) -> None:
    put(store, "vm/web/log/0000000000000001", body)
    assert store.get("vm/web/log/0000000000000001", limit_bytes=LIMIT_BYTES) == bytes(body)


def test_a_large_object_comes_back_whole_and_in_parts(store: ObjectStore) -> None:
    body = random.Random(1).randbytes(40 * MiB)
    put(store, "vm/web/pack/large", memoryview(body))
    read = store.get("vm/web/pack/large", limit_bytes=len(body))
    assert hashlib.sha256(read).digest() == hashlib.sha256(body).digest()
    offset = 13 * MiB + 7
    assert store.get_range("vm/web/pack/large", offset, 3 * MiB) == body[offset : offset + 3 * MiB]
    assert store.get_tail("vm/web/pack/large", 64 * KiB) == Tail(data=body[-64 * KiB :], object_size_bytes=len(body))


def test_s1_a_reader_never_sees_a_part(store: ObjectStore) -> None:
    body = random.Random(2).randbytes(8 * MiB)
    done = threading.Event()
    seen: list[bytes] = []

    def read_until_there() -> None:
        while not seen and not done.is_set():
            try:
                seen.append(store.get("vm/web/pack/slow", limit_bytes=len(body)))
            except ObjectMissing:
                continue

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read_until_there) for _ in range(2)]
        put(store, "vm/web/pack/slow", body)
        done.set()
        for reader in readers:
            reader.result()
    assert all(data == body for data in seen)
    assert store.get("vm/web/pack/slow", limit_bytes=len(body)) == body


def test_s2_create_of_a_taken_key_raises_and_changes_nothing(store: ObjectStore) -> None:
    put(store, "vm/web/log/0000000000000001", b"first")
    with pytest.raises(ObjectExists) as raised:
        put(store, "vm/web/log/0000000000000001", b"other")
    assert raised.value.fields["key"] == "vm/web/log/0000000000000001"
    assert store.get("vm/web/log/0000000000000001", limit_bytes=LIMIT_BYTES) == b"first"


def test_s2_of_two_creators_that_race_exactly_one_wins(store: ObjectStore) -> None:
    together = threading.Barrier(4)

    def create(key: str, body: bytes) -> bool:
        together.wait()
        try:
            put(store, key, body)
        except ObjectExists:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        for number in range(15):
            bodies = [f"writer {writer}".encode() * 5000 for writer in range(4)]
            key = f"vm/race/log/{number:016x}"
            won = list(pool.map(create, [key] * 4, bodies))
            assert won.count(True) == 1
            assert store.get(key, limit_bytes=LIMIT_BYTES) == bodies[won.index(True)]


def test_s2_the_probes_find_a_real_store_safe(subject: Subject) -> None:
    if isinstance(subject.store, RetryingStore):  # which settles equal bytes: probes are for what it wraps
        return
    body = b'{"id": "0123"}'
    sha256 = hashlib.sha256(body).digest()
    create_in_a_race(subject.store, "repo.json", body, sha256)
    probe_create_only(subject.store, "repo.json", body, sha256)
    assert subject.store.get("repo.json", limit_bytes=LIMIT_BYTES) == body


def test_s4_bytes_that_do_not_match_their_checksum_are_refused(subject: Subject) -> None:
    if not subject.checks_sha256:  # the rule is for stores that check
        subject.store.create("vm/web/pack/wrong", b"body", sha256=bytes(32))
        return
    with pytest.raises(StoreUnavailable):
        subject.store.create("vm/web/pack/wrong", b"body", sha256=bytes(32))
    with pytest.raises(ObjectMissing):
        subject.store.get("vm/web/pack/wrong", limit_bytes=LIMIT_BYTES)


def test_replace_overwrites_and_creates(store: ObjectStore) -> None:
    store.replace("host/hv1.json", b"one")
    assert store.get("host/hv1.json", limit_bytes=LIMIT_BYTES) == b"one"
    store.replace("host/hv1.json", memoryview(b"two and more"))
    assert store.get("host/hv1.json", limit_bytes=LIMIT_BYTES) == b"two and more"
    assert keys(store) == ["host/hv1.json"]


def test_a_missing_object_is_missing_for_every_read(store: ObjectStore) -> None:
    put(store, "vm/web/log/0000000000000001", b"body")
    for key in ("vm/web/log/0000000000000002", "vm/db/log/0000000000000001", "repo.json"):
        with pytest.raises(ObjectMissing):
            store.get(key, limit_bytes=LIMIT_BYTES)
        with pytest.raises(ObjectMissing):
            store.get_range(key, 0, 1)
        with pytest.raises(ObjectMissing):
            store.get_range(key, 0, 0)
        with pytest.raises(ObjectMissing):
            store.get_tail(key, 1)
        with pytest.raises(ObjectMissing):
            store.get_tail(key, 0)


def test_the_folder_of_an_object_is_no_object(store: ObjectStore) -> None:
    put(store, "vm/web/log/0000000000000001", b"body")
    with pytest.raises(ObjectMissing):
        store.get("vm/web", limit_bytes=LIMIT_BYTES)
    with pytest.raises(ObjectMissing):
        store.get("vm/web/log/0000000000000001/below", limit_bytes=LIMIT_BYTES)


def test_get_refuses_an_object_larger_than_its_limit(store: ObjectStore) -> None:
    put(store, "vm/web/pack/big", b"x" * 1001)
    with pytest.raises(ObjectDamaged):
        store.get("vm/web/pack/big", limit_bytes=1000)
    assert len(store.get("vm/web/pack/big", limit_bytes=1001)) == 1001


@pytest.mark.parametrize(("offset", "length"), [(0, 10), (0, 3), (4, 3), (9, 1), (5, 0), (10, 0), (0, 0)])
def test_a_range_within_the_object(store: ObjectStore, offset: int, length: int) -> None:
    put(store, "vm/web/pack/p", b"0123456789")
    assert store.get_range("vm/web/pack/p", offset, length) == b"0123456789"[offset : offset + length]


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (9, 2), (10, 1), (11, 0), (1000, 5)])
def test_a_range_that_leaves_the_object_is_damage(store: ObjectStore, offset: int, length: int) -> None:
    put(store, "vm/web/pack/p", b"0123456789")
    with pytest.raises(ObjectDamaged):
        store.get_range("vm/web/pack/p", offset, length)


@pytest.mark.parametrize(("length", "data"), [(3, b"789"), (10, b"0123456789"), (11, b"0123456789"), (0, b"")])
def test_the_tail_tells_the_size_of_the_whole(store: ObjectStore, length: int, data: bytes) -> None:
    put(store, "vm/web/log/1", b"0123456789")
    assert store.get_tail("vm/web/log/1", length) == Tail(data=data, object_size_bytes=10)


def test_the_tail_of_an_empty_object_is_empty(store: ObjectStore) -> None:
    put(store, "vm/web/log/1", b"")
    assert store.get_tail("vm/web/log/1", 5) == Tail(data=b"", object_size_bytes=0)


def test_s5_a_listing_is_in_key_order_and_not_in_that_of_folders(store: ObjectStore) -> None:
    names = ["a-b", "a.b", "a/b-c/d", "a/b.d", "a/bc", "A/z", "b", "_x/y", "a-b-/c", "a0/x/y/z"]
    for name in names:
        put(store, name, name.encode())
    assert keys(store) == sorted(names)
    for prefix in ("a", "a/", "a-", "a/b", "b", "zz", "a0/x"):
        assert keys(store, prefix) == sorted(name for name in names if name.startswith(prefix))
    for after in [*sorted(names), "a/", "a/b", "a/c", "a0/\x7f", "", "zzz"]:
        assert keys(store, after=after) == sorted(name for name in names if name > after)
        assert keys(store, "a/", after) == sorted(name for name in names if name.startswith("a/") and name > after)


def test_s5_folders_are_told_once_whatever_they_hold(store: ObjectStore) -> None:
    names = ["vm/a-b/log/1", "vm/a/log/1", "vm/a/log/2", "vm/a/pack/3", "vm/x", "vm/b/c/d/e", "vm-2/y/z", "top"]
    for name in names:
        put(store, name, name.encode())
    assert list(store.folders("vm/")) == ["a-b", "a", "b"]
    assert list(store.folders("vm/a/")) == ["log", "pack"]
    assert list(store.folders("vm/a/log/")) == list(store.folders("nothing/")) == []
    assert sorted(store.folders("")) == ["vm", "vm-2"]
    for prefix in ("vm", "../", "vm//"):
        with pytest.raises(KeyUnusable):
            list(store.folders(prefix))


def test_s5_more_than_a_thousand_folders_are_told(store: ObjectStore) -> None:
    names = [f"vm/vm-{number:04}/log/1" for number in range(1003)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: put(store, name, b"x"), names))
    assert list(store.folders("vm/")) == [name.split("/")[1] for name in names]


def test_s5_a_listing_of_more_than_a_thousand_keys_is_complete(store: ObjectStore) -> None:
    names = [f"vm/web/log/{number:016x}" for number in range(2005)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: put(store, name, b"x"), names))
    assert keys(store, "vm/web/log/") == names
    assert keys(store, "vm/web/log/", after=names[999]) == names[1000:]
    assert keys(store, "vm/web/log/", after=names[-1]) == []


def test_s5_a_key_is_listed_as_soon_as_create_returned(store: ObjectStore) -> None:
    for number in range(5):
        put(store, f"vm/web/log/{number:016x}", b"x" * number)
        assert keys(store, "vm/web/")[-1] == f"vm/web/log/{number:016x}"


def test_a_listing_tells_size_and_time(store: ObjectStore) -> None:
    put(store, "vm/web/log/1", b"12345")
    (info,) = store.list("vm/")
    assert (info.key, info.size_bytes) == ("vm/web/log/1", 5)
    assert info.modified.tzinfo is UTC
    assert abs(datetime.now(UTC) - info.modified) < timedelta(minutes=5)


def test_an_empty_store_lists_nothing(store: ObjectStore) -> None:
    assert keys(store) == []
    assert keys(store, "vm/web/") == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../outside",
        "vm/../../outside",
        "vm/./web",
        "vm//web",
        "vm/web/",
        "vm/we\0b",
        "vm/web\n",
        "vm\\web",
        ".tmp/x",
        "vm/\u00e4",
        "a" * 256,
        "a/" * 500 + "a",
    ],
)
def test_s6_a_key_that_names_no_object_is_refused_by_every_method(store: ObjectStore, key: str) -> None:
    with pytest.raises(KeyUnusable):
        put(store, key, b"x")
    with pytest.raises(KeyUnusable):
        store.replace(key, b"x")
    with pytest.raises(KeyUnusable):
        store.get(key, limit_bytes=1)
    with pytest.raises(KeyUnusable):
        store.get_range(key, 0, 1)
    with pytest.raises(KeyUnusable):
        store.get_tail(key, 1)
    with pytest.raises(KeyUnusable):
        store.delete(key)


def test_s7_what_was_deleted_is_gone_for_every_reader(store: ObjectStore) -> None:
    put(store, "vm/web/log/0000000000000001", b"first")
    put(store, "vm/web/log/0000000000000002", b"second")
    store.delete("vm/web/log/0000000000000001")
    with pytest.raises(ObjectMissing):
        store.get("vm/web/log/0000000000000001", limit_bytes=LIMIT_BYTES)
    with pytest.raises(ObjectMissing):
        store.get_range("vm/web/log/0000000000000001", 0, 1)
    with pytest.raises(ObjectMissing):
        store.get_tail("vm/web/log/0000000000000001", 1)
    assert keys(store) == ["vm/web/log/0000000000000002"]


def test_s7_deleting_what_is_not_there_is_no_error(store: ObjectStore) -> None:
    put(store, "vm/web/log/0000000000000002", b"second")
    for _ in range(2):
        store.delete("vm/web/log/0000000000000001")
        store.delete("vm/web/log/0000000000000002")
        store.delete("vm/db/log/0000000000000002/below")
    assert keys(store) == []


def test_s7_a_folder_is_no_object_and_stays(store: ObjectStore) -> None:
    put(store, "vm/web/log/0000000000000002", b"second")
    store.delete("vm/web/log")
    store.delete("vm/web")
    assert keys(store) == ["vm/web/log/0000000000000002"]


def test_s7_a_deleted_key_is_free_again(store: ObjectStore) -> None:
    put(store, "vm/web/pack/p", b"first")
    store.delete("vm/web/pack/p")
    put(store, "vm/web/pack/p", b"other")
    assert store.get("vm/web/pack/p", limit_bytes=LIMIT_BYTES) == b"other"


def test_s7_nothing_outside_of_a_directory_store_is_deleted(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "repository")
    put(store, "vm/web/pack/p", b"first")
    (tmp_path / "precious").write_bytes(b"somebody's")
    (tmp_path / "repository" / "vm" / "web" / "link").symlink_to(tmp_path)
    store.delete("vm/web/link/precious")
    assert (tmp_path / "precious").exists()
    assert keys(store) == ["vm/web/pack/p"]


def test_s9_the_store_tells_the_time_by_which_it_stamps_objects(store: ObjectStore) -> None:
    before = store.now()
    put(store, "vm/web/pack/p", b"first")
    (info,) = store.list("vm/")
    second = timedelta(seconds=1)  # what S3 tells is no finer
    assert before - second <= info.modified <= store.now() + second
    assert before.tzinfo is UTC
    assert keys(store) == ["vm/web/pack/p"]


def test_s8_nothing_is_unfinished_that_was_stored_or_refused(store: ObjectStore) -> None:
    put(store, "vm/web/pack/p", b"first")
    with pytest.raises(ObjectExists):
        put(store, "vm/web/pack/p", b"other")
    assert list(store.unfinished()) == []


def test_s8_what_a_dead_writer_left_in_a_directory_is_found_and_freed(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "repository")
    put(store, "vm/web/pack/p", b"first")
    (tmp_path / "repository" / ".tmp" / "0123abcd").write_bytes(b"half")
    (left,) = store.unfinished()
    assert abs(datetime.now(UTC) - left.began) < timedelta(minutes=5)
    for _ in range(2):
        store.abandon(left)
    assert list(store.unfinished()) == []
    assert keys(store) == ["vm/web/pack/p"]


@pytest.mark.localstack
def test_s8_an_upload_in_parts_that_was_not_ended_is_found_and_freed(bucket: Bucket) -> None:
    options = S3Options(bucket=bucket.name, prefix="dr/a", endpoint_url=bucket.endpoint_url, region=bucket.region)
    store = S3Store(options)
    for key in ("dr/a/image/one", "dr/b/other"):
        bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    (left,) = store.unfinished()
    assert left.key == "image/one"
    for _ in range(2):
        store.abandon(left)
    assert list(store.unfinished()) == []
    assert len(bucket.client.list_multipart_uploads(Bucket=bucket.name)["Uploads"]) == 1, "another prefix's stays"


@pytest.mark.parametrize("prefix", ["/", "../", "vm/../", "vm//", ".", "vm/\0"])
def test_s6_a_prefix_that_no_key_has_is_refused(store: ObjectStore, prefix: str) -> None:
    with pytest.raises(KeyUnusable):
        keys(store, prefix)


def test_the_url_of_a_store_is_for_messages(store: ObjectStore) -> None:
    assert store.url.startswith(("memory:", "file:///", "s3://"))
    with pytest.raises(StoreError) as raised:
        store.get("missing", limit_bytes=1)
    assert store.url in str(raised.value)


RACER = """
import hashlib, sys, time
from pathlib import Path
from drsync.errors import ObjectExists
from drsync.store.directory import DirectoryStore

root, me, start = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
store = DirectoryStore(root)
body = me.encode() * 20000
digest = hashlib.sha256(body).digest()
print("ready", flush=True)
while not start.exists():
    time.sleep(0.001)
for number in range(200):
    try:
        store.create(f"vm/race/log/{number:016x}", body, sha256=digest)
        print(number, flush=True)
    except ObjectExists:
        pass
"""


@pytest.fixture
def racers(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-c", RACER, str(tmp_path / "repository")]
    started = [
        subprocess.Popen([*command, name, str(tmp_path / "start")], stdout=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_s2_of_two_processes_that_race_in_a_directory_exactly_one_wins(
    tmp_path: Path, racers: list[subprocess.Popen[str]]
) -> None:
    for process in racers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "start").touch()
    won = [{int(line) for line in process.communicate(timeout=60)[0].split()} for process in racers]
    assert all(process.returncode == 0 for process in racers)
    assert won[0] & won[1] == set()
    assert won[0] | won[1] == set(range(200))
    assert won[0] and won[1], "they never met: this proves nothing"
    store = DirectoryStore(tmp_path / "repository")
    for number in range(200):
        body = (b"a" if number in won[0] else b"b") * 20000
        assert store.get(f"vm/race/log/{number:016x}", limit_bytes=LIMIT_BYTES) == body


def test_s5_a_missing_directory_is_no_empty_listing(tmp_path: Path) -> None:
    with pytest.raises(StoreMisconfigured):
        keys(DirectoryStore(tmp_path / "not there"))


def test_a_directory_store_does_not_pay_for_the_import_of_boto3() -> None:
    code = (
        "import sys; from drsync.store.open import open_store;"
        "open_store('file:///srv/dr', endpoint_url=None, region=None);"
        "sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
