"""Locks in a bucket: what is asked of S3, and what its replies mean (S3 API reference, Object Lock)."""

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from fake_clock import FakeClock
from s3_lab import CREDENTIALS
from s3_stub import Reply, StubS3, error_reply

from drsync.errors import LocksMissing, ObjectMissing, StoreDenied, StoreUnavailable
from drsync.store.lock import Lock, LockMode, LockPolicy, LockSupport
from drsync.store.s3 import S3Options, S3Store

POLICY = LockPolicy(mode=LockMode.COMPLIANCE, period=timedelta(days=30))
STORED = Reply(headers={"ETag": '"x"'})
MISSING_LOCK = error_reply(400, "InvalidRequest", "Bucket is missing Object Lock Configuration")
UNTIL = datetime(2026, 2, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def credentials(clean_environ: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


def store_of(stub: StubS3, lock: LockPolicy | None = POLICY) -> S3Store:
    return S3Store(
        S3Options(bucket="bucket", prefix="site", endpoint_url=stub.endpoint_url), lock=lock, clock=FakeClock()
    )


def create(store: S3Store) -> None:
    store.create("repo.json", b"abc", sha256=hashlib.sha256(b"abc").digest())


def retention(mode: str, until: datetime = UNTIL) -> Reply:
    body = f"<Retention><Mode>{mode}</Mode><RetainUntilDate>{until:%Y-%m-%dT%H:%M:%SZ}</RetainUntilDate></Retention>"
    return Reply(body=body.encode())


def test_l1_the_lock_is_a_part_of_the_write() -> None:
    with StubS3(STORED, STORED) as stub:
        create(store_of(stub))
        create(store_of(stub, lock=None))
        locked, plain = stub.requests
    assert locked.headers["x-amz-object-lock-mode"] == "COMPLIANCE"
    until = datetime.fromisoformat(locked.headers["x-amz-object-lock-retain-until-date"])
    assert until == (FakeClock().now() + timedelta(days=30)).replace(microsecond=0)
    assert locked.headers["if-none-match"] == "*"
    assert locked.headers["x-amz-sdk-checksum-algorithm"] == "SHA256", "S3 demands it with a lock"
    assert locked.headers["x-amz-checksum-sha256"] == plain.headers["x-amz-checksum-sha256"]
    assert not [name for name in plain.headers if "object-lock" in name]


def test_l1_the_heartbeat_is_not_locked() -> None:
    with StubS3(STORED) as stub:
        store_of(stub).replace("host/alpha.json", b"abc")
        assert not [name for name in stub.requests[0].headers if "object-lock" in name]


@pytest.mark.parametrize("action", ["create", "extend"])
def test_a_bucket_without_object_lock_refuses_and_it_is_said_what_to_do(action: str) -> None:
    with StubS3(MISSING_LOCK) as stub, pytest.raises(LocksMissing, match="no Object Lock") as caught:
        if action == "create":
            create(store_of(stub))
        else:
            store_of(stub).extend_lock("repo.json", Lock(mode=LockMode.COMPLIANCE, until=UNTIL))
    assert "--object-lock-enabled-for-bucket" in caught.value.remedy


def test_a_lock_is_read() -> None:
    with StubS3(retention("GOVERNANCE"), MISSING_LOCK, error_reply(404, "NoSuchObjectLockConfiguration")) as stub:
        store = store_of(stub)
        assert store.lock_of("repo.json") == Lock(mode=LockMode.GOVERNANCE, until=UNTIL)
        assert store.lock_of("repo.json") is None
        assert store.lock_of("repo.json") is None


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (error_reply(404, "NoSuchKey"), ObjectMissing),
        (error_reply(403, "AccessDenied"), StoreDenied),
        (error_reply(503, "SlowDown"), StoreUnavailable),
    ],
)
def test_a_failure_is_told_as_one(reply: Reply, error: type[Exception]) -> None:
    lock = Lock(mode=LockMode.COMPLIANCE, until=UNTIL)
    with StubS3(reply) as stub, pytest.raises(error):
        store_of(stub).lock_of("repo.json")
    again = [error_reply(404, "NoSuchObjectLockConfiguration")] if error is StoreDenied else []
    with StubS3(reply, *again) as stub, pytest.raises(error):
        store_of(stub).extend_lock("repo.json", lock)


def test_a_lock_is_extended() -> None:
    with StubS3(Reply()) as stub:
        store_of(stub).extend_lock("repo.json", Lock(mode=LockMode.COMPLIANCE, until=UNTIL))
        (request,) = stub.requests
    assert request.path.endswith("/bucket/site/repo.json?retention")
    assert b"<Mode>COMPLIANCE</Mode>" in request.body
    assert b"<RetainUntilDate>2026-02-01T00:00:00Z</RetainUntilDate>" in request.body
    assert "x-amz-bypass-governance-retention" not in request.headers


@pytest.mark.parametrize(
    ("found", "wanted", "is_fine"),
    [
        (("COMPLIANCE", UNTIL), LockMode.COMPLIANCE, True),
        (("COMPLIANCE", UNTIL + timedelta(days=9)), LockMode.GOVERNANCE, True),
        (("GOVERNANCE", UNTIL + timedelta(days=9)), LockMode.GOVERNANCE, True),
        (("GOVERNANCE", UNTIL + timedelta(days=9)), LockMode.COMPLIANCE, False),
        (("COMPLIANCE", UNTIL - timedelta(days=9)), LockMode.COMPLIANCE, False),
    ],
)
def test_l2_what_is_refused_because_it_would_weaken_a_lock_is_done_already(
    found: tuple[str, datetime], wanted: LockMode, is_fine: bool
) -> None:
    lock = Lock(mode=wanted, until=UNTIL)
    with StubS3(error_reply(403, "AccessDenied"), retention(*found)) as stub:
        if is_fine:
            store_of(stub).extend_lock("repo.json", lock)
        else:
            with pytest.raises(StoreDenied):
                store_of(stub).extend_lock("repo.json", lock)


def configuration(rule: str = "") -> Reply:
    head = "<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled>"
    return Reply(body=f"{head}{rule}</ObjectLockConfiguration>".encode())


VERSIONED = Reply(body=b"<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>")
RULE = "<Rule><DefaultRetention><Mode>COMPLIANCE</Mode><{0}>2</{0}></DefaultRetention></Rule>"


@pytest.mark.parametrize(
    ("replies", "support"),
    [
        ((VERSIONED, configuration()), LockSupport(enabled=True, versioned=True)),
        (
            (VERSIONED, configuration(RULE.format("Days"))),
            LockSupport(enabled=True, versioned=True, default="compliance for 2 days"),
        ),
        (
            (VERSIONED, configuration(RULE.format("Years"))),
            LockSupport(enabled=True, versioned=True, default="compliance for 2 years"),
        ),
        (
            (Reply(body=b"<VersioningConfiguration/>"), error_reply(404, "ObjectLockConfigurationNotFoundError")),
            LockSupport(enabled=False, versioned=False),
        ),
    ],
)
def test_what_a_bucket_offers(replies: tuple[Reply, ...], support: LockSupport) -> None:
    with StubS3(*replies) as stub:
        assert store_of(stub).lock_support() == support


def test_what_may_not_be_asked_is_not_known() -> None:
    with StubS3(VERSIONED, error_reply(403, "AccessDenied")) as stub, pytest.raises(StoreDenied):
        store_of(stub).lock_support()
