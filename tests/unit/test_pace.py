"""The pace: what passes in a time, by a clock that tests move and by the real one."""

import threading
import time
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from fake_clock import FakeClock

from drsync.model import SystemClock
from drsync.pace import BURST_S, UNLIMITED, Rate, Together, TokenBucket, Window

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


@pytest.mark.alone
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


EVERY_DAY = frozenset(range(7))
WEEK = frozenset(range(5))
BERLIN = ZoneInfo("Europe/Berlin")
OFFICE = Window(days=WEEK, begin_min=8 * 60, end_min=18 * 60, bytes_per_s=5 * MIB)
NIGHT = Window(days=frozenset({4}), begin_min=22 * 60, end_min=6 * 60, bytes_per_s=None)


class WallClock(FakeClock):
    """A fake clock that begins at a moment, and keeps what passed when."""

    def __init__(self, moment: datetime) -> None:
        super().__init__()
        self._now = moment


def passed_by_second(bucket: TokenBucket | Together, clock: FakeClock, seconds: float, piece: int = 16384) -> list[int]:
    """The bytes that pass in each second, asked for piece after piece without a pause."""
    began_s, passed = clock.monotonic_s(), [0] * int(seconds)
    while True:
        bucket.take(piece)
        at = int(clock.monotonic_s() - began_s)
        if at >= seconds:
            return passed
        passed[at] += piece


@pytest.mark.parametrize("piece", [1000, 16384, MIB // 4])
def test_each_second_holds_the_rate_within_5_percent(piece: int) -> None:
    clock = FakeClock()
    bucket = TokenBucket(Rate(bytes_per_s=10 * MIB), clock, sleep=clock.sleep)
    clock.advance(3600)
    for passed in passed_by_second(bucket, clock, 20, piece):
        assert passed == pytest.approx(10 * MIB, rel=0.05)


@pytest.mark.parametrize(
    ("moment", "limit"),
    [
        ("2026-01-02T07:59:59", 50),  # a Friday
        ("2026-01-02T08:00:00", 5),
        ("2026-01-02T17:59:59", 5),
        ("2026-01-02T18:00:00", 50),
        ("2026-01-03T12:00:00", 50),  # a Saturday
        ("2026-01-02T22:00:00", None),  # Friday night goes on until Saturday morning
        ("2026-01-03T05:59:59", None),
        ("2026-01-03T06:00:00", 50),
        ("2026-01-02T05:00:00", 50),  # Thursday night is no Friday night
        ("2026-07-03T08:00:00", 5),  # summer time
    ],
)
def test_a_window_counts_by_the_clock_of_its_time_zone(moment: str, limit: int | None) -> None:
    rate = Rate(bytes_per_s=50 * MIB, windows=[OFFICE, NIGHT], zone=BERLIN)
    at = datetime.fromisoformat(moment).replace(tzinfo=BERLIN).astimezone(UTC)
    assert rate.at(at) == (None if limit is None else limit * MIB)


def test_on_the_days_when_the_clock_is_changed_a_window_goes_by_the_wall() -> None:
    """02:00 to 04:00 is an hour long when the hour from 2 to 3 is left out, and three when it comes twice."""
    rate = Rate(windows=[Window(days=EVERY_DAY, begin_min=120, end_min=240, bytes_per_s=MIB)], zone=BERLIN)

    def minutes(day: datetime) -> int:
        return sum(rate.at(day + timedelta(minutes=n)) is not None for n in range(24 * 60))

    assert minutes(datetime(2026, 3, 28, 12, tzinfo=UTC)) == 60
    assert minutes(datetime(2026, 10, 24, 12, tzinfo=UTC)) == 180
    assert minutes(datetime(2026, 6, 1, 12, tzinfo=UTC)) == 120


def test_the_edge_of_a_window_takes_effect_in_the_midst_of_one_object() -> None:
    clock = WallClock(datetime(2026, 1, 2, 7, 59, 50, tzinfo=UTC))
    rate = Rate(bytes_per_s=20 * MIB, windows=[OFFICE], zone=UTC)
    bucket = TokenBucket(rate, clock, sleep=clock.sleep)
    assert took_s(bucket, clock, [300 * MIB]) == pytest.approx(10 + (300 - 200) / 5, abs=0.6)


def test_a_limit_that_begins_while_something_large_passes_holds_at_once() -> None:
    """What began without a limit is not stuck when there is one: nothing larger than the burst is asked for at once."""
    clock = WallClock(datetime(2026, 1, 2, 7, 59, 59, 999999, tzinfo=UTC))
    bucket = TokenBucket(Rate(windows=[OFFICE], zone=UTC), clock, sleep=clock.sleep)
    clock.advance(0.00001)
    assert took_s(bucket, clock, [50 * MIB]) == pytest.approx(10, rel=0.05)


def test_a_window_that_ends_lets_what_waits_go_on() -> None:
    clock = WallClock(datetime(2026, 1, 2, 17, 59, 50, tzinfo=UTC))
    bucket = TokenBucket(Rate(windows=[OFFICE], zone=UTC), clock, sleep=clock.sleep)
    assert took_s(bucket, clock, [10**12]) == pytest.approx(10, abs=0.6)


def test_both_paces_hold_of_what_keeps_to_two() -> None:
    clock = FakeClock()
    buckets = [TokenBucket(Rate(bytes_per_s=rate * MIB), clock, sleep=clock.sleep) for rate in (20, 5)]
    both = Together(*buckets)
    assert both.limit_bytes_per_s() == 5 * MIB
    for passed in passed_by_second(both, clock, 10):
        assert passed == pytest.approx(5 * MIB, rel=0.05)
    buckets[1].set_rate(UNLIMITED)
    assert both.limit_bytes_per_s() == 20 * MIB
    for passed in passed_by_second(both, clock, 10):
        assert passed == pytest.approx(20 * MIB, rel=0.05)
    assert Together(TokenBucket(UNLIMITED, clock)).limit_bytes_per_s() is None


def test_what_does_not_pass_costs_nothing() -> None:
    clock = FakeClock()
    wide, narrow = (TokenBucket(Rate(bytes_per_s=rate), clock, sleep=clock.sleep) for rate in (100 * MIB, MIB))
    clock.advance(1)
    assert not Together(wide, narrow).take_now(MIB)
    assert wide.take_now(int(100 * MIB * BURST_S))
