"""The limits on a real line: what passes a proxy that counts, in front of LocalStack."""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

import pytest
from s3_lab import Bucket
from tcp_proxy import Proxy

from drsync.model import Pace, SystemClock
from drsync.pace import Rate, TokenBucket
from drsync.store.s3 import S3Options, S3Store
from drsync.units import KiB, MiB

pytestmark = [pytest.mark.localstack, pytest.mark.alone]

LOGGER = logging.getLogger(__name__)
RATE: float = 4 * MiB
SECONDS = 6.0
WORKERS = 2


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[Proxy]:
    parts = urlsplit(bucket.endpoint_url)
    assert parts.hostname is not None
    assert parts.port is not None
    with Proxy(parts.hostname, parts.port, buffer_bytes=16 * KiB) as running:
        yield running


def store_of(bucket: Bucket, endpoint_url: str, *, pace: Pace | None = None, read_pace: Pace | None = None) -> S3Store:
    options = S3Options(bucket=bucket.name, prefix="dr", endpoint_url=endpoint_url, region=bucket.region)
    return S3Store(options, pace=pace, read_pace=read_pace)


def in_seconds(counts: Sequence[tuple[float, int]], began_s: float) -> list[int]:
    """The bytes of each whole second from then on; the first one, in which everything starts up, is left out."""
    found = [0] * int(SECONDS)
    for at_s, size in counts:
        if 0 <= at_s - began_s < len(found):
            found[int(at_s - began_s)] += size
    return found[1:]


def at_work(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=[number]) for number in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def told(what: str, seconds: Sequence[int]) -> None:
    shown = ", ".join(f"{size / RATE - 1:+.1%}" for size in seconds)
    LOGGER.info(
        "%s: %+.2f %% of the limit (each second: %s)", what, 100 * (sum(seconds) / len(seconds) / RATE - 1), shown
    )


def check(seconds: Sequence[int]) -> None:
    """No more than the limit passes; on a machine that has much else to do, it may be less."""
    assert 0.85 * RATE <= sum(seconds) / len(seconds) <= 1.05 * RATE
    assert max(seconds) <= 1.6 * RATE  # when the proxy itself had to wait for its turn, what waited passes at once


def test_what_is_sent_holds_the_rate(bucket: Bucket, proxy: Proxy) -> None:
    bucket_of_tokens = TokenBucket(Rate(bytes_per_s=RATE), SystemClock())
    store = store_of(bucket, proxy.endpoint_url, pace=bucket_of_tokens)
    body = os.urandom(2 * MiB)
    digest = hashlib.sha256(body).digest()
    store.create("vm/web/pack/warm", b"", sha256=hashlib.sha256(b"").digest())
    began_s = time.monotonic()

    def work(worker: int) -> None:
        number = 0
        while time.monotonic() - began_s < SECONDS:
            store.create(f"vm/web/pack/{worker}-{number}", body, sha256=digest)
            number += 1

    at_work(work)
    seconds = in_seconds(proxy.requested, began_s)
    told("sent", seconds)
    check(seconds)


def test_what_is_read_holds_the_rate(bucket: Bucket, proxy: Proxy) -> None:
    body = os.urandom(8 * MiB)
    store_of(bucket, bucket.endpoint_url).create("vm/web/pack/0", body, sha256=hashlib.sha256(body).digest())
    store = store_of(bucket, proxy.endpoint_url, read_pace=TokenBucket(Rate(bytes_per_s=RATE), SystemClock()))
    store.get_tail("vm/web/pack/0", 1)
    began_s = time.monotonic()

    def work(worker: int) -> None:
        while time.monotonic() - began_s < SECONDS:
            assert store.get_range("vm/web/pack/0", worker * MiB, 4 * MiB) == body[worker * MiB : (worker + 4) * MiB]

    at_work(work)
    seconds = in_seconds(proxy.replied, began_s)
    told("read", seconds)
    check(seconds)
