"""Rules L1 to L3 of drsync/store/lock.py: the memory twin, and LocalStack's Object Lock."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.exceptions import ClientError
from s3_lab import Bucket

from drsync.errors import ObjectMissing, StoreDenied
from drsync.model import SystemClock
from drsync.store.lock import Lock, LockMode, LockPolicy
from drsync.store.memory import MemoryStore
from drsync.store.retry import RetryingStore
from drsync.store.s3 import S3Options, S3Store

DAY = timedelta(days=1)
MODES = list(LockMode)
Make = Callable[[LockMode], RetryingStore]


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.localstack)])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes a store that locks for ten days."""
    if request.param == "memory":
        return lambda mode: RetryingStore(MemoryStore(SystemClock(), lock=LockPolicy(mode=mode, period=10 * DAY)))
    bucket: Bucket = request.getfixturevalue("bucket")
    bucket.client.create_bucket(Bucket=f"{bucket.name}-lock", ObjectLockEnabledForBucket=True)
    options = S3Options(bucket=f"{bucket.name}-lock", prefix="site", endpoint_url=bucket.endpoint_url)
    return lambda mode: RetryingStore(S3Store(options, lock=LockPolicy(mode=mode, period=10 * DAY)))


def put(store: RetryingStore, key: str = "vm/web/pack/1") -> str:
    store.create(key, b"abc", sha256=hashlib.sha256(b"abc").digest())
    return key


def left(store: RetryingStore, key: str) -> timedelta:
    lock = store.lock_of(key)
    assert lock is not None
    return lock.until - datetime.now(UTC)


@pytest.mark.parametrize("mode", MODES)
def test_l1_what_is_created_is_locked_and_what_is_overwritten_is_not(make: Make, mode: LockMode) -> None:
    store = make(mode)
    key = put(store)
    lock = store.lock_of(key)
    assert lock is not None
    assert lock.mode is mode
    assert 10 * DAY - timedelta(minutes=5) < left(store, key) <= 10 * DAY
    store.replace("host/alpha.json", b"1")
    store.replace("host/alpha.json", b"2")
    assert store.lock_of("host/alpha.json") is None
    assert store.lock_support().enabled
    assert store.lock_support().versioned


@pytest.mark.parametrize("mode", MODES)
def test_l2_a_lock_is_extended_and_never_shortened(make: Make, mode: LockMode) -> None:
    store = make(mode)
    key, now = put(store), datetime.now(UTC)
    store.extend_lock(key, Lock(mode=mode, until=now + 30 * DAY))
    assert left(store, key) > 29 * DAY
    store.extend_lock(key, Lock(mode=mode, until=now + 20 * DAY))
    assert left(store, key) > 29 * DAY, "it is locked for longer already"


def test_l2_a_lock_is_never_weakened(make: Make) -> None:
    store = make(LockMode.COMPLIANCE)
    key, now = put(store), datetime.now(UTC)
    with pytest.raises(StoreDenied):
        store.extend_lock(key, Lock(mode=LockMode.GOVERNANCE, until=now + 30 * DAY))
    lock = store.lock_of(key)
    assert lock is not None
    assert lock.mode is LockMode.COMPLIANCE


def test_what_has_no_lock_gets_one(make: Make) -> None:
    store = make(LockMode.COMPLIANCE)
    store.replace("vm/web/pack/2", b"abc")
    store.extend_lock("vm/web/pack/2", Lock(mode=LockMode.COMPLIANCE, until=datetime.now(UTC) + 3 * DAY))
    assert left(store, "vm/web/pack/2") > 2 * DAY


def test_what_is_not_there_has_no_lock(make: Make) -> None:
    store = make(LockMode.COMPLIANCE)
    with pytest.raises(ObjectMissing):
        store.lock_of("vm/web/pack/9")
    with pytest.raises(ObjectMissing):
        store.extend_lock("vm/web/pack/9", Lock(mode=LockMode.COMPLIANCE, until=datetime.now(UTC) + DAY))


def test_a_locked_object_is_deleted_as_any_other_and_its_name_is_free(make: Make) -> None:
    """S7: a mark is put over it. L3: its bytes stay, which test_l3 looks at."""
    store = make(LockMode.COMPLIANCE)
    key = put(store)
    store.delete(key)
    assert list(store.list("vm/")) == []
    with pytest.raises(ObjectMissing):
        store.get(key, limit_bytes=10)
    put(store)
    assert left(store, key) > 9 * DAY


@pytest.mark.localstack
@pytest.mark.parametrize("mode", MODES)
def test_l3_the_bytes_of_a_locked_object_stay_whatever_is_deleted(bucket: Bucket, mode: LockMode) -> None:
    name = f"{bucket.name}-lock"
    bucket.client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    options = S3Options(bucket=name, endpoint_url=bucket.endpoint_url)
    store = RetryingStore(S3Store(options, lock=LockPolicy(mode=mode, period=10 * DAY)))
    key = put(store)
    (version,) = bucket.client.list_object_versions(Bucket=name)["Versions"]
    store.delete(key)
    at: Any = {"Bucket": name, "Key": key, "VersionId": version["VersionId"]}
    with pytest.raises(ClientError, match="AccessDenied"):
        bucket.client.delete_object(**at)
    if mode is LockMode.COMPLIANCE:
        with pytest.raises(ClientError, match="AccessDenied"):
            bucket.client.delete_object(**at, BypassGovernanceRetention=True)
    assert bucket.client.get_object(**at)["Body"].read() == b"abc"
