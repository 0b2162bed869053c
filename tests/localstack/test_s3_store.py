"""The S3 store against LocalStack over a line that breaks, and against replies that LocalStack never gives."""

import base64
import hashlib
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from fake_clock import FakeClock
from s3_lab import CREDENTIALS, Bucket
from s3_stub import Reply, StubS3, error_reply
from tcp_proxy import (
    CONTINUE_BYTES,
    Answer,
    BlackHole,
    EndReply,
    Fault,
    Proxy,
    ResetReply,
    ResetRequest,
    Slow,
    unavailable,
)

from drsync.errors import (
    DrsyncError,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    StoreDenied,
    StoreMisconfigured,
    StoreUnavailable,
    StoreUnsafe,
)
from drsync.store import ObjectStore, Tail
from drsync.store.retry import RetryingStore
from drsync.store.s3 import S3Options, S3Store
from drsync.units import KiB, MiB

pytestmark = pytest.mark.localstack

KEY = "vm/web/log/0000000000000001"


def digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def put(store: ObjectStore, key: str, body: bytes) -> None:
    store.create(key, body, sha256=digest(body))


def direct(bucket: Bucket) -> S3Store:
    return S3Store(S3Options(bucket=bucket.name, prefix="dr", endpoint_url=bucket.endpoint_url, region=bucket.region))


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[Proxy]:
    parts = urlsplit(bucket.endpoint_url)
    assert parts.hostname is not None
    assert parts.port is not None
    with Proxy(parts.hostname, parts.port) as running:
        yield running


@pytest.fixture
def far(bucket: Bucket, proxy: Proxy) -> S3Store:
    """The bucket, behind the line that breaks."""
    return S3Store(
        S3Options(
            bucket=bucket.name,
            prefix="dr",
            endpoint_url=proxy.endpoint_url,
            region=bucket.region,
            connect_timeout_s=1.0,
            read_timeout_s=1.0,
        )
    )


def retrying(store: ObjectStore) -> RetryingStore:
    clock = FakeClock()
    return RetryingStore(store, clock=clock, sleep=clock.sleep)


def fault_id(fault: Fault) -> str:
    match fault:
        case Answer(reply=reply):
            return f"answer-{reply[:12].decode()}"
        case ResetReply(after_bytes=count) | ResetRequest(after_bytes=count) | EndReply(after_bytes=count):
            return f"{type(fault).__name__}-{count}"
        case _:
            return type(fault).__name__


READ_FAULTS: list[Fault] = [
    unavailable(),
    unavailable("500 Internal Server Error", "InternalError"),
    Answer(reply=b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 5\r\nConnection: close\r\n\r\n<html"),
    Answer(reply=b"garbage that is no HTTP\r\n\r\n"),
    Answer(reply=b""),
    ResetReply(after_bytes=0),
    ResetReply(after_bytes=100 * KiB),
    EndReply(after_bytes=100 * KiB),
    BlackHole(),
]


@pytest.mark.parametrize("fault", READ_FAULTS, ids=fault_id)
def test_s6_a_read_over_a_broken_line_is_unavailable_and_a_retry_gets_it(
    bucket: Bucket, proxy: Proxy, far: S3Store, fault: Fault
) -> None:
    body = random.Random(4).randbytes(300 * KiB)
    put(direct(bucket), KEY, body)
    reads: list[Callable[[ObjectStore], object]] = [
        lambda store: store.get(KEY, limit_bytes=MiB) == body,
        lambda store: store.get_range(KEY, 1000, 200_000) == body[1000:201_000],
        lambda store: store.get_tail(KEY, 200_000) == Tail(data=body[-200_000:], object_size_bytes=len(body)),
    ]
    for read in reads:
        proxy.arm(fault)
        with pytest.raises(StoreUnavailable):
            read(far)
        proxy.arm(fault, fault)
        assert read(retrying(far))


WRITE_FAULTS: list[Fault] = [
    unavailable(),
    ResetRequest(after_bytes=200),
    ResetRequest(after_bytes=200 * KiB),
    ResetReply(after_bytes=0),
    ResetReply(after_bytes=CONTINUE_BYTES),
    EndReply(after_bytes=CONTINUE_BYTES),
    ResetReply(after_bytes=CONTINUE_BYTES + 30),
    BlackHole(),
]


@pytest.mark.parametrize("fault", WRITE_FAULTS, ids=fault_id)
def test_s1_a_create_over_a_broken_line_stores_all_or_nothing_and_a_retry_settles_it(
    bucket: Bucket, proxy: Proxy, far: S3Store, fault: Fault
) -> None:
    body = random.Random(5).randbytes(300 * KiB)
    proxy.arm(fault)
    with pytest.raises(StoreUnavailable):
        put(far, KEY, body)
    try:
        stored = direct(bucket).get(KEY, limit_bytes=MiB)
    except ObjectMissing:
        stored = body
    assert stored == body
    proxy.arm(fault)
    put(retrying(far), KEY, body)
    proxy.arm(fault)
    put(retrying(far), "vm/web/log/0000000000000002", body)
    for info in direct(bucket).list("vm/web/log/"):
        assert direct(bucket).get(info.key, limit_bytes=MiB) == body


def test_s2_the_reply_to_a_create_is_lost_and_the_retry_knows_its_own_object(
    bucket: Bucket, proxy: Proxy, far: S3Store
) -> None:
    proxy.arm(EndReply(after_bytes=CONTINUE_BYTES))
    with pytest.raises(StoreUnavailable):
        put(far, KEY, b"mine")
    assert direct(bucket).get(KEY, limit_bytes=10) == b"mine"
    put(retrying(far), KEY, b"mine")
    with pytest.raises(ObjectExists):
        put(retrying(far), KEY, b"hers")
    with pytest.raises(ObjectExists):
        put(far, KEY, b"mine")


def test_a_listing_over_a_broken_line_is_complete_after_a_retry(bucket: Bucket, proxy: Proxy, far: S3Store) -> None:
    names = [f"vm/web/log/{number:016x}" for number in range(1200)]
    store = direct(bucket)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: put(store, name, b"x"), names))
    proxy.arm(ResetReply(after_bytes=50_000))
    with pytest.raises(StoreUnavailable):
        list(far.list("vm/"))
    proxy.arm(ResetReply(after_bytes=50_000), unavailable())
    assert [info.key for info in retrying(far).list("vm/")] == names
    listing = retrying(far).list("vm/")
    first = [next(listing).key for _ in range(1000)]
    proxy.arm(unavailable(), ResetReply(after_bytes=10_000))
    assert first + [info.key for info in listing] == names


def test_a_slow_line_is_no_failure_as_long_as_something_moves(bucket: Bucket, proxy: Proxy, far: S3Store) -> None:
    body = random.Random(6).randbytes(128 * KiB)
    put(direct(bucket), KEY, body)
    proxy.arm(Slow(wait_s=0.06))
    started = time.monotonic()
    assert far.get(KEY, limit_bytes=MiB) == body
    assert time.monotonic() - started > 1.5, "not slower than the time limit of 1 s: this proves nothing"


def test_a_store_that_is_down_is_unavailable_and_found_again(bucket: Bucket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    down = S3Store(S3Options(bucket=bucket.name, endpoint_url=f"http://127.0.0.1:{port}", region=bucket.region))
    with pytest.raises(StoreUnavailable):
        down.get(KEY, limit_bytes=1)


def test_a_missing_bucket_is_misconfigured_and_no_empty_listing(bucket: Bucket) -> None:
    store = S3Store(S3Options(bucket=f"{bucket.name}-not", endpoint_url=bucket.endpoint_url, region=bucket.region))
    for use in (
        lambda: put(store, KEY, b"x"),
        lambda: store.get(KEY, limit_bytes=1),
        lambda: store.get_tail(KEY, 1),
        lambda: list(store.list("")),
    ):
        with pytest.raises(StoreMisconfigured, match="NoSuchBucket"):
            use()


def test_objects_that_are_not_drsyncs_are_not_listed(bucket: Bucket) -> None:
    store = direct(bucket)
    put(store, KEY, b"x")
    for key in ("dr/", "dr/vm/", "dr/vm/web/log/with space", "dr/vm/web/.hidden", "drx/vm/web", "other"):
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"")
    assert [info.key for info in store.list("")] == [KEY]
    assert [info.key for info in store.list("vm/")] == [KEY]


def test_without_credentials_it_is_denied(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    with pytest.raises(StoreDenied, match="credentials"):
        put(direct(bucket), KEY, b"x")


def test_threads_share_one_store(bucket: Bucket) -> None:
    store = direct(bucket)
    bodies = [random.Random(number).randbytes(200 * KiB) for number in range(24)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: put(store, f"vm/web/pack/{n}", bodies[n]), range(24)))
        assert list(pool.map(lambda n: store.get(f"vm/web/pack/{n}", limit_bytes=MiB), range(24))) == bodies


# From here on: a stub, for replies that LocalStack does not give and for what a request looks like.


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, clean_environ: None) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


def stubbed(stub: StubS3) -> S3Store:
    options = S3Options(
        bucket="bucket", prefix="dr", endpoint_url=stub.endpoint_url, region="us-east-1", read_timeout_s=5.0
    )
    return S3Store(options)


STORED = Reply(headers={"ETag": '"d41d8cd98f00b204e9800998ecf8427e"'})


def test_a_create_is_one_conditional_signed_request_with_the_callers_checksum() -> None:
    body = os.urandom(300 * KiB)
    with StubS3(STORED) as stub:
        put(stubbed(stub), KEY, memoryview(body))  # type: ignore[arg-type]
    (request,) = stub.requests
    assert (request.method, request.path) == ("PUT", f"/bucket/dr/{KEY}")
    assert request.body == body
    assert request.headers["if-none-match"] == "*"
    assert request.headers["x-amz-checksum-sha256"] == base64.b64encode(digest(body)).decode()
    assert request.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    assert "drsync/" in request.headers["user-agent"]
    signed = request.headers["authorization"].split("SignedHeaders=")[1].split(",")[0].split(";")
    assert {"if-none-match", "x-amz-checksum-sha256"} <= set(signed)


def test_a_success_that_is_not_of_s3_is_none() -> None:
    with StubS3(Reply(body=b"<html>log in to the network</html>"), Reply()) as stub:
        store = stubbed(stub)
        with pytest.raises(StoreUnavailable):
            put(store, KEY, b"x")
        with pytest.raises(StoreUnavailable):
            store.replace("host/hv1.json", b"x")


def test_a_replace_is_not_conditional() -> None:
    with StubS3(STORED) as stub:
        stubbed(stub).replace("host/hv1.json", b"x")
    assert "if-none-match" not in stub.requests[0].headers
    assert stub.requests[0].headers["x-amz-checksum-sha256"] == base64.b64encode(digest(b"x")).decode()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "ExpiredToken", StoreDenied),
        (400, "InvalidToken", StoreDenied),
        (403, "AccessDenied", StoreDenied),
        (403, "InvalidAccessKeyId", StoreDenied),
        (403, "SignatureDoesNotMatch", StoreDenied),
        (403, "RequestTimeTooSkewed", StoreDenied),
        (409, "ConditionalRequestConflict", StoreUnavailable),
        (412, "PreconditionFailed", ObjectExists),
        (500, "InternalError", StoreUnavailable),
        (503, "SlowDown", StoreUnavailable),
        (400, "RequestTimeout", StoreUnavailable),
        (400, "BadDigest", StoreUnavailable),
        (501, "NotImplemented", StoreUnsafe),
        (404, "NoSuchBucket", StoreMisconfigured),
        (400, "AuthorizationHeaderMalformed", StoreMisconfigured),
    ],
)
def test_s6_the_error_replies_of_aws(status: int, code: str, expected: type[DrsyncError]) -> None:
    secrets = "<AWSAccessKeyId>AKIAEXAMPLE</AWSAccessKeyId><StringToSign>top secret</StringToSign>"
    with StubS3(error_reply(status, code, more=secrets)) as stub, pytest.raises(expected) as raised:
        put(stubbed(stub), KEY, b"x")
    assert type(raised.value) is expected
    assert len(stub.requests) == 1, "the SDK retried"
    assert "AKIAEXAMPLE" not in str(raised.value)
    assert "top secret" not in str(raised.value)


def test_expired_credentials_are_told_as_such_by_every_method() -> None:
    uses: list[Callable[[S3Store], object]] = [
        lambda store: put(store, KEY, b"x"),
        lambda store: store.replace("host/hv1.json", b"x"),
        lambda store: store.get(KEY, limit_bytes=1),
        lambda store: store.get_range(KEY, 0, 1),
        lambda store: store.get_tail(KEY, 1),
        lambda store: list(store.list("")),
    ]
    reply = error_reply(400, "ExpiredToken", "The provided token has expired.")
    with StubS3(*[reply] * len(uses)) as stub:
        store = stubbed(stub)
        for use in uses:
            with pytest.raises(StoreDenied, match=r"The provided token has expired\."):
                use(store)


def test_an_empty_object_whose_tail_is_refused_as_aws_does_is_empty() -> None:
    more = "<RangeRequested>bytes=-5</RangeRequested><ActualObjectSize>0</ActualObjectSize>"
    with StubS3(error_reply(416, "InvalidRange", more=more)) as stub:
        assert stubbed(stub).get_tail(KEY, 5) == Tail(data=b"", object_size_bytes=0)


def whole(body: bytes) -> Reply:
    return Reply(body=body, headers={"Content-Type": "binary/octet-stream"})


def part(body: bytes, content_range: str) -> Reply:
    return Reply(status=206, body=body, headers={"Content-Range": content_range})


@pytest.mark.parametrize(
    "reply",
    [
        whole(b"0123456789"),
        part(b"0123456789", "bytes 0-9/10"),
        part(b"34", "bytes 3-4/10"),
        part(b"345", "bytes 3-5/*"),
        part(b"345", "nonsense"),
    ],
)
def test_a_store_that_does_not_answer_ranges_is_misconfigured(reply: Reply) -> None:
    with StubS3(reply, reply) as stub:
        with pytest.raises(StoreMisconfigured):
            stubbed(stub).get_range(KEY, 3, 3)
        with pytest.raises(StoreMisconfigured):
            stubbed(stub).get_tail(KEY, 4)


def test_no_more_than_the_limit_is_kept_when_the_size_is_not_declared() -> None:
    undeclared = Reply(body=b"x" * 5000, headers={"Content-Length": "", "Connection": "close"})
    with StubS3(undeclared, undeclared) as stub:
        with pytest.raises(ObjectDamaged):
            stubbed(stub).get(KEY, limit_bytes=4999)
        assert len(stubbed(stub).get(KEY, limit_bytes=5000)) == 5000


def listing(*keys: str, truncated: bool = False, following: str = "") -> Reply:
    entries = "".join(
        f"<Contents><Key>{key}</Key><Size>1</Size><LastModified>2026-01-02T03:04:05.000Z</LastModified></Contents>"
        for key in keys
    )
    state = f"<IsTruncated>{str(truncated).lower()}</IsTruncated>"
    if following:
        state += f"<NextContinuationToken>{following}</NextContinuationToken>"
    return Reply(body=f"<ListBucketResult>{state}{entries}</ListBucketResult>".encode())


def test_s5_pages_are_followed_also_empty_ones() -> None:
    pages = (
        listing("dr/a", truncated=True, following="1"),
        listing(truncated=True, following="2"),
        listing("dr/b"),
    )
    with StubS3(*pages) as stub:
        assert [info.key for info in stubbed(stub).list("")] == ["a", "b"]
    assert "continuation-token=2" in stub.requests[2].path


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ([listing("dr/a", truncated=True)], StoreUnavailable),
        ([listing("dr/a", truncated=True, following="1"), listing(truncated=True, following="1")], StoreUnavailable),
        ([listing("dr/b", "dr/a")], StoreMisconfigured),
        ([listing("dr/a", "dr/a")], StoreMisconfigured),
        ([listing("elsewhere/a")], StoreMisconfigured),
        ([Reply(body=b"<html>log in to the network</html>")], StoreUnavailable),
    ],
    ids=["no-way-on", "circle", "wrong-order", "twice", "of-another-prefix", "no-listing"],
)
def test_s5_a_listing_that_can_not_be_trusted_raises(pages: list[Reply], expected: type[DrsyncError]) -> None:
    with StubS3(*pages) as stub, pytest.raises(expected):
        list(stubbed(stub).list(""))
