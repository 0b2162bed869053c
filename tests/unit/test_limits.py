"""The limits of a process: what shares which bucket, and new limits while something passes."""

import threading
from dataclasses import replace
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from fake_clock import FakeClock

from drsync.config import LimitsSettings
from drsync.limits import Limits, described
from drsync.model import Pace
from drsync.pace import UNLIMITED, Rate, Window

MIB = 1024 * 1024
NO_LIMITS = LimitsSettings(
    upload=UNLIMITED,
    seed_upload=UNLIMITED,
    increment_upload=UNLIMITED,
    restore=UNLIMITED,
    read=UNLIMITED,
    seed_read=UNLIMITED,
    cloud=UNLIMITED,
    time_zone=None,
)


def rate(mib: float) -> Rate:
    return Rate(bytes_per_s=mib * MIB)


def took_s(clock: FakeClock, *paces: Pace, mib: int = 10) -> float:
    """How long it takes until so much has passed each pace, turn by turn."""
    before_s = clock.monotonic_s()
    for _ in range(mib * 16):
        for pace in paces:
            pace.take(MIB // 16)
    return clock.monotonic_s() - before_s


def test_without_limits_nothing_waits() -> None:
    clock = FakeClock()
    limits = Limits(NO_LIMITS, clock, sleep=clock.sleep)
    paces = [limits.increments, limits.seeds, limits.restores, limits.reads("web"), limits.seed_reads("web")]
    assert took_s(clock, *paces) == 0
    assert [pace.limit_bytes_per_s() for pace in paces] == [None] * 5


def test_seeds_and_increments_share_the_upload_and_have_limits_of_their_own() -> None:
    clock = FakeClock()
    limits = Limits(replace(NO_LIMITS, upload=rate(10), seed_upload=rate(2)), clock, sleep=clock.sleep)
    assert took_s(clock, limits.seeds) == pytest.approx(5, rel=0.05)
    assert took_s(clock, limits.increments) == pytest.approx(1, rel=0.06)
    limits.set(replace(NO_LIMITS, upload=rate(10)))
    assert took_s(clock, limits.increments, limits.seeds) == pytest.approx(2, rel=0.05)
    limits.set(replace(NO_LIMITS, increment_upload=rate(5)))
    assert took_s(clock, limits.increments, limits.seeds) == pytest.approx(2, rel=0.05)


def test_restores_do_not_take_from_what_is_sent() -> None:
    clock = FakeClock()
    limits = Limits(replace(NO_LIMITS, upload=rate(1), restore=rate(5)), clock, sleep=clock.sleep)
    assert took_s(clock, limits.restores) == pytest.approx(2, rel=0.05)


def test_each_vm_is_read_at_a_rate_of_its_own_and_its_seed_within_it() -> None:
    clock = FakeClock()
    limits = Limits(replace(NO_LIMITS, read=rate(10), seed_read=rate(5)), clock, sleep=clock.sleep)
    assert took_s(clock, limits.reads("a"), limits.reads("b")) == pytest.approx(1, rel=0.06)
    assert took_s(clock, limits.reads("a"), limits.reads("a")) == pytest.approx(2, rel=0.05)
    assert took_s(clock, limits.seed_reads("a")) == pytest.approx(2, rel=0.05)
    assert limits.seed_reads("a").limit_bytes_per_s() == 5 * MIB


def test_new_limits_reach_what_waits_already() -> None:
    """A pace that was handed out goes on at the new limit: a reload does not wait for the end of an object."""
    clock = FakeClock()
    begun = threading.Event()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if not begun.is_set():
            begun.set()
            limits.set(replace(NO_LIMITS, upload=rate(10), read=rate(10)))

    limits = Limits(replace(NO_LIMITS, upload=rate(0.001), read=rate(1)), clock, sleep=sleep)
    reads = limits.reads("web")
    assert took_s(clock, limits.seeds) == pytest.approx(1 + 0.5, abs=0.6)
    assert took_s(clock, reads) == pytest.approx(1, rel=0.06)


def test_the_limits_of_the_moment_are_told_with_the_clock_they_go_by() -> None:
    office = Window(days=frozenset(range(5)), begin_min=480, end_min=1080, bytes_per_s=5 * MIB)
    berlin = ZoneInfo("Europe/Berlin")
    settings = replace(
        NO_LIMITS,
        upload=Rate(bytes_per_s=50 * MIB, windows=[office], zone=berlin),
        restore=rate(20),
        time_zone=berlin,
    )
    assert described(NO_LIMITS, datetime(2026, 1, 2, tzinfo=UTC)) == []
    assert described(settings, datetime(2026, 1, 2, 12, 0, tzinfo=UTC)) == [
        "upload: 5 MiB/s now, 50 MiB/s at other times",
        "restore: 20 MiB/s now",
        "windows go by the clock of Europe/Berlin: Friday 13:00",
    ]
    assert (
        described(settings, datetime(2026, 1, 3, 12, 0, tzinfo=UTC))[0]
        == "upload: 50 MiB/s now, 5 MiB/s at other times"
    )
