"""What is written to a store keeps to a pace: each byte counts once, and the rate holds by the real clock."""

import hashlib
import time
from pathlib import Path

import pytest
from s3_lab import CREDENTIALS
from s3_stub import Reply, StubS3

from drsync.model import Pace, SystemClock
from drsync.pace import Rate, TokenBucket
from drsync.store import ObjectStore
from drsync.store.directory import DirectoryStore
from drsync.store.open import open_store
from drsync.store.s3 import S3Options, S3Store

MIB = 1024 * 1024
BODY = bytes(range(256)) * (4 * 4096)
STORED = Reply(headers={"ETag": '"1"'})


class CountingPace:
    """A Pace that lets everything pass and keeps what was asked."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def take(self, size_bytes: int) -> None:
        self.taken.append(size_bytes)

    def take_now(self, size_bytes: int) -> bool:
        self.taken.append(size_bytes)
        return True

    def limit_bytes_per_s(self) -> float | None:
        return 1e9


def put(store: ObjectStore, key: str = "vm/web/pack/0") -> None:
    store.create(key, BODY, sha256=hashlib.sha256(BODY).digest())


def s3(stub: StubS3, pace: Pace) -> S3Store:
    return S3Store(S3Options(bucket="bucket", endpoint_url=stub.endpoint_url, region="eu-central-1"), pace=pace)


@pytest.fixture(autouse=True)
def credentials(clean_environ: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


def test_s3_counts_what_goes_out_on_the_line_once() -> None:
    pace = CountingPace()
    with StubS3(STORED, STORED) as stub:
        store = s3(stub, pace)
        put(store)
        assert sum(pace.taken) == len(BODY)
        assert max(pace.taken) <= 128 * 1024  # in blocks: a rate holds within one object, too
        store.replace("host/alpha.json", b"beat")
        assert sum(pace.taken) == len(BODY) + 4
        store._client.close()
    assert [request.body for request in stub.requests] == [BODY, b"beat"]


@pytest.mark.alone
def test_an_upload_to_s3_holds_its_rate_within_5_percent() -> None:
    pace = TokenBucket(Rate(bytes_per_s=2 * MIB), SystemClock())
    with StubS3(*[STORED] * 2) as stub:
        store = s3(stub, pace)
        put(store, "warm")  # boto3 takes its time when it is first used
        began_s = time.monotonic()
        put(store)
        took_s = time.monotonic() - began_s
        store._client.close()
    assert took_s == pytest.approx(len(BODY) / (2 * MIB), rel=0.05)


def test_a_directory_takes_an_object_when_the_pace_allows_it(tmp_path: Path) -> None:
    pace = CountingPace()
    store = open_store(f"file://{tmp_path}/store", endpoint_url=None, region=None, pace=pace)
    put(store)
    store.replace("host/alpha.json", b"beat")
    assert pace.taken == [len(BODY), 4]
    assert store.get("vm/web/pack/0", limit_bytes=2**30) == BODY
    assert store.get_tail("vm/web/pack/0", 2).data == BODY[-2:]
    assert store.get_range("vm/web/pack/0", 1, 2) == BODY[1:3]
    assert [info.key for info in store.list("vm/")] == ["vm/web/pack/0"]
    assert pace.taken == [len(BODY), 4]


def test_what_is_read_of_a_directory_keeps_to_a_pace_of_its_own(tmp_path: Path) -> None:
    pace = CountingPace()
    store = open_store(f"file://{tmp_path}/store", endpoint_url=None, region=None, read_pace=pace)
    put(store)
    store.get("vm/web/pack/0", limit_bytes=2**30)
    store.get_tail("vm/web/pack/0", 2)
    store.get_range("vm/web/pack/0", 1, 1000)
    assert pace.taken == [len(BODY), 2, 1000]


def test_s3_counts_what_is_read_block_by_block() -> None:
    pace = CountingPace()
    whole = Reply(headers={"ETag": '"1"'}, body=BODY)
    with StubS3(whole) as stub:
        store = S3Store(
            S3Options(bucket="bucket", endpoint_url=stub.endpoint_url, region="eu-central-1"), read_pace=pace
        )
        assert store.get("vm/web/pack/0", limit_bytes=len(BODY)) == BODY
        store._client.close()
    assert sum(pace.taken) == len(BODY)
    assert max(pace.taken) <= (16 + 128) * 1024


def test_what_s3_sends_ahead_is_paid_for_before_it_is_asked_for() -> None:
    pace = CountingPace()
    part = Reply(
        status=206, headers={"ETag": '"1"', "Content-Range": f"bytes 0-{MIB - 1}/{len(BODY)}"}, body=BODY[:MIB]
    )
    small = Reply(status=206, headers={"ETag": '"1"', "Content-Range": f"bytes 0-9/{len(BODY)}"}, body=BODY[:10])
    with StubS3(part, small) as stub:
        store = S3Store(
            S3Options(bucket="bucket", endpoint_url=stub.endpoint_url, region="eu-central-1"), read_pace=pace
        )
        assert store.get_range("vm/web/pack/0", 0, MIB) == BODY[:MIB]
        assert pace.taken[0] == 128 * 1024
        assert sum(pace.taken) == MIB
        assert store.get_range("vm/web/pack/0", 0, 10) == BODY[:10]
        store._client.close()
    assert sum(pace.taken) == MIB + 10


def test_without_a_pace_a_directory_is_opened_as_it_is(tmp_path: Path) -> None:
    assert isinstance(open_store(f"file://{tmp_path}/store", endpoint_url=None, region=None), DirectoryStore)
