"""The pace: what passes in a time, by a clock that tests move and by the real one."""

import threading
import time

import pytest
from fake_clock import FakeClock

from drsync.model import SystemClock
from drsync.pace import BURST_S, UNLIMITED, Rate, TokenBucket

MIB = 1024 * 1024


def took_s(bucket: TokenBucket, clock: FakeClock, sizes: list[int]) -> float:
    before = clock.monotonic_s()
    for size in sizes:
        bucket.take(size)
    return clock.monotonic_s() - before


@pytest.mark.parametrize("size", [1, 1000, 16384, MIB, 33 * MIB])
@pytest.mark.parametrize("rate", [1024, 100_000, 20 * MIB])
def test_the_rate_holds_whatever_the_size_of_what_passes(rate: int, size: int) -> None:
    clock = FakeClock()
    bucket = TokenBucket(Rate(bytes_per_s=rate), clock, sleep=clock.sleep)
    count = min(300, max(1, 20 * rate // size))
    assert took_s(bucket, clock, [size] * count) == pytest.approx(count * size / rate, rel=0.01, abs=2 * BURST_S)


def test_without_a_limit_nothing_waits() -> None:
    clock = FakeClock()
    assert took_s(TokenBucket(UNLIMITED, clock, sleep=clock.sleep), clock, [10**12]) == 0


def test_what_was_not_used_for_a_while_is_not_made_up_for() -> None:
    clock = FakeClock()
    bucket = TokenBucket(Rate(bytes_per_s=MIB), clock, sleep=clock.sleep)
    clock.advance(3600)
    assert took_s(bucket, clock, [10 * MIB]) >= 10 - BURST_S - 0.001


def test_a_sleep_that_lasts_too_long_is_made_up_for() -> None:
    clock = FakeClock()
    bucket = TokenBucket(Rate(bytes_per_s=MIB), clock, sleep=lambda seconds: clock.sleep(seconds + 0.03))
    assert took_s(bucket, clock, [MIB] * 20) == pytest.approx(20, rel=0.01)


def test_a_new_rate_holds_from_then_on() -> None:
    clock = FakeClock()
    bucket = TokenBucket(Rate(bytes_per_s=MIB), clock, sleep=clock.sleep)
    bucket.take(MIB)
    bucket.set_rate(Rate(bytes_per_s=10 * MIB))
    assert took_s(bucket, clock, [10 * MIB]) == pytest.approx(1, abs=0.1)
    bucket.set_rate(UNLIMITED)
    assert took_s(bucket, clock, [10**12]) == 0


def test_a_rate_that_never_comes_to_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="1024 is the least"):
        Rate(bytes_per_s=1023)


def test_several_threads_share_the_rate_by_the_real_clock() -> None:
    """20 MiB/s of real time, by four threads with objects of 1 MiB: within 5 %."""
    bucket = TokenBucket(Rate(bytes_per_s=20 * MIB), SystemClock())

    def ten() -> None:
        for _ in range(10):
            bucket.take(MIB)

    threads = [threading.Thread(target=ten) for _ in range(4)]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began_s == pytest.approx(2.0, rel=0.05)
