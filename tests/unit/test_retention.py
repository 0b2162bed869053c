"""Which points stay: the rules one by one, and what no history of points can break."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsync.retention import KEEP_ALL, Aged, Pin, Rules, Verdict, decide

NOW = datetime(2026, 11, 25, 12, 30, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def at(*ages: timedelta) -> list[Aged]:
    """Points 1, 2, … of these ages, oldest first."""
    return [Aged(number, NOW - age) for number, age in enumerate(ages, 1)]


def rules_of(counts: dict[str, int]) -> Rules:
    return Rules(**{"minimum_age": timedelta(0)} | counts)  # type: ignore[arg-type]  # names are drawn


def kept(verdicts: tuple[Verdict, ...]) -> set[int]:
    return {v.point for v in verdicts if v.keep}


def reasons(verdicts: tuple[Verdict, ...], point: int) -> tuple[str, ...]:
    return next(v.reasons for v in verdicts if v.point == point)


def test_no_points_have_no_verdicts() -> None:
    assert decide([], Rules(last=3), [Pin(4, None)], NOW) == ()


def test_the_newest_point_stays_without_any_rule() -> None:
    verdicts = decide(at(3 * DAY, 2 * DAY, DAY), Rules(), [], NOW)
    assert verdicts[0] == Verdict(3, keep=True, reasons=("the newest point",))
    assert [v.point for v in verdicts] == [3, 2, 1], "the newest first"
    assert kept(verdicts) == {3}


def test_last_counts_points() -> None:
    verdicts = decide(at(4 * DAY, 3 * DAY, 2 * DAY, DAY), Rules(last=2), [], NOW)
    assert kept(verdicts) == {3, 4}
    assert reasons(verdicts, 3) == ("last: 2 of 2",)
    assert reasons(verdicts, 2) == ("last: not among the newest 2",)


def test_the_first_point_of_a_bucket_stands_for_it() -> None:
    minutes = [timedelta(minutes=m) for m in (95, 80, 70, 25, 10, 5)]  # 10:55, 11:10, 11:20, 12:05, 12:20, 12:25
    verdicts = decide(at(*minutes), Rules(hourly=2), [], NOW)
    assert kept(verdicts) == {2, 4, 6}
    assert reasons(verdicts, 2) == ("hourly: the first of 2026-11-25 11:00Z",)
    assert reasons(verdicts, 3) == ("hourly: point 2 stands for its hour",)
    assert reasons(verdicts, 1) == ("hourly: its hour is not among the newest 2",)


@pytest.mark.parametrize(
    ("rules", "stays", "reason"),
    [
        (Rules(daily=1), 8, "daily: the first of 2026-11-25"),
        (Rules(weekly=1), 6, "weekly: the first of 2026-W48"),
        (Rules(monthly=1), 4, "monthly: the first of 2026-11"),
        (Rules(yearly=1), 2, "yearly: the first of 2026"),
        (Rules(yearly=2), 1, "yearly: the first of 2025"),
    ],
)
def test_buckets_are_those_of_the_calendar(rules: Rules, stays: int, reason: str) -> None:
    days = [
        (2025, 12, 31),
        (2026, 1, 1),
        (2026, 10, 31),
        (2026, 11, 1),
        (2026, 11, 22),  # a Sunday
        (2026, 11, 23),
        (2026, 11, 24),
        (2026, 11, 25),
    ]
    points = [Aged(n, datetime(*day, tzinfo=UTC)) for n, day in enumerate(days, 1)]
    verdicts = decide(points, rules, [], NOW)
    assert stays in kept(verdicts)
    assert reason in reasons(verdicts, stays)


def test_a_vm_that_was_off_for_a_year_keeps_its_days() -> None:
    points = at(402 * DAY, 401 * DAY, 400 * DAY)
    assert kept(decide(points, Rules(daily=3), [], NOW)) == {1, 2, 3}


def test_times_of_another_zone_fall_into_utc_buckets() -> None:
    east = timezone(timedelta(hours=9))
    points = [Aged(1, datetime(2026, 11, 25, 1, tzinfo=east)), Aged(2, datetime(2026, 11, 25, 1, tzinfo=UTC))]
    assert reasons(decide(points, Rules(daily=2), [], NOW), 1) == ("daily: the first of 2026-11-24",)


def test_the_minimum_age_keeps_a_flood() -> None:
    points = at(4 * DAY, *[timedelta(seconds=s) for s in range(300, 0, -1)])
    verdicts = decide(points, Rules(last=1, minimum_age=3 * DAY), [], NOW)
    assert kept(verdicts) == set(range(2, 302))
    assert reasons(verdicts, 2) == ("younger than 3 days",)
    assert reasons(verdicts, 1) == ("older than 3 days", "last: not among the newest 1")
    assert "younger than 36 hours" in reasons(decide(points, Rules(minimum_age=36 * HOUR), [], NOW), 2)


def test_a_pin_holds_until_its_time() -> None:
    points = at(4 * DAY, 3 * DAY, 2 * DAY, DAY)
    pins = [Pin(1, None), Pin(2, NOW + DAY), Pin(3, NOW), Pin(99, None)]
    verdicts = decide(points, Rules(last=1), pins, NOW)
    assert kept(verdicts) == {1, 2, 4}
    assert reasons(verdicts, 1) == ("pinned",)
    assert reasons(verdicts, 2) == ("pinned until 2026-11-26 12:30Z",)
    assert reasons(verdicts, 3)[0] == "its pin ended 2026-11-25 12:30Z"


def test_without_rules_everything_stays() -> None:
    verdicts = decide(at(10000 * DAY, DAY), KEEP_ALL, [], NOW)
    assert kept(verdicts) == {1, 2}
    assert reasons(verdicts, 1) == ("no rules are set: everything stays",)


def test_rules_are_not_negative() -> None:
    with pytest.raises(ValueError, match="negative"):
        Rules(daily=-1)
    with pytest.raises(ValueError, match="negative"):
        Rules(minimum_age=-DAY)


counts = st.integers(0, 4)
some_rules = st.builds(
    Rules,
    last=counts,
    hourly=counts,
    daily=counts,
    weekly=counts,
    monthly=counts,
    yearly=counts,
    minimum_age=st.sampled_from([timedelta(0), HOUR, DAY, 30 * DAY, timedelta.max]),
)
times = st.one_of(
    st.datetimes(min_value=datetime(2024, 1, 1), max_value=datetime(2026, 12, 31)),  # noqa: DTZ001  the strategy's bounds are naive
    st.datetimes(),
).map(lambda time: time.replace(tzinfo=UTC))
histories = st.lists(times, max_size=30).map(lambda found: [Aged(n, t) for n, t in enumerate(found, 1)])
in_order = st.lists(times, max_size=30).map(lambda found: [Aged(n, t) for n, t in enumerate(sorted(found), 1)])
pins = st.lists(st.builds(Pin, st.integers(1, 40), st.none() | times), max_size=5)


@given(histories, some_rules, pins, times)
def test_the_newest_always_stays_and_everything_has_a_reason(
    points: list[Aged], rules: Rules, pins: list[Pin], now: datetime
) -> None:
    verdicts = decide(points, rules, pins, now)
    assert [v.point for v in verdicts] == sorted((p.point for p in points), reverse=True)
    assert not points or verdicts[0].keep
    assert all(v.reasons for v in verdicts) or rules == Rules()


@given(histories, some_rules, pins, times)
def test_deciding_again_over_what_stays_drops_nothing(
    points: list[Aged], rules: Rules, pins: list[Pin], now: datetime
) -> None:
    stay = kept(decide(points, rules, pins, now))
    assert kept(decide([p for p in points if p.point in stay], rules, pins, now)) == stay


@given(histories, some_rules, pins, times, st.lists(times, max_size=10))
def test_more_points_never_drop_a_pinned_one(
    points: list[Aged], rules: Rules, pins: list[Pin], now: datetime, more: list[datetime]
) -> None:
    after = [*points, *(Aged(len(points) + n, time) for n, time in enumerate(more, 1))]
    pinned = {pin.point for pin in pins if pin.until is None or pin.until > now}
    assert pinned & {p.point for p in points} <= kept(decide(after, rules, pins, now))


@given(histories, some_rules, some_rules, times)
def test_a_larger_rule_never_drops_more(points: list[Aged], one: Rules, other: Rules, now: datetime) -> None:
    both = Rules(
        last=max(one.last, other.last),
        hourly=max(one.hourly, other.hourly),
        daily=max(one.daily, other.daily),
        weekly=max(one.weekly, other.weekly),
        monthly=max(one.monthly, other.monthly),
        yearly=max(one.yearly, other.yearly),
        minimum_age=max(one.minimum_age, other.minimum_age),
    )
    assert kept(decide(points, one, [], now)) | kept(decide(points, other, [], now)) <= kept(
        decide(points, both, [], now)
    )


@given(in_order, some_rules, st.integers(1, 50), st.timedeltas(timedelta(0), timedelta(minutes=59)))
def test_a_flood_into_the_present_buckets_takes_nothing_that_stands_for_one(
    good: list[Aged], rules: Rules, forged: int, late: timedelta
) -> None:
    """A forged point is of now, whatever its host says: while no bucket begins, it takes nobody's place in one."""
    if not good:
        return
    by_buckets = Rules(
        hourly=rules.hourly, daily=rules.daily, weekly=rules.weekly, monthly=rules.monthly, yearly=rules.yearly
    )
    start = good[-1].time
    now = min(start + late, start.replace(minute=59, second=59, microsecond=999999))  # within the hour that has begun
    flood = [Aged(good[-1].point + n, now) for n in range(1, forged + 1)]
    before = {v.point for v in decide(good, by_buckets, [], now) if v.reasons != ("the newest point",) and v.keep}
    assert before <= kept(decide([*good, *flood], by_buckets, [], now))


@given(
    in_order, st.sampled_from(["hourly", "daily", "weekly", "monthly", "yearly"]), counts, st.lists(times, max_size=20)
)
def test_forged_points_push_no_more_out_than_one_honest_point_for_each_bucket_that_begins(
    good: list[Aged], rule: str, count: int, later: list[datetime]
) -> None:
    if not good:
        return
    rules = rules_of({rule: count})
    start = good[-1].time
    forged = [Aged(good[-1].point + n, time) for n, time in enumerate(sorted(t for t in later if t >= start), 1)]
    now = max([start, *(f.time for f in forged)])
    first = kept(decide(forged, rules_of({rule: 1000}), [], now)) if forged else set()
    honest = [f for f in forged if f.point in first]
    good_numbers = {p.point for p in good[:-1]}
    assert (kept(decide([*good, *honest], rules, [], now)) & good_numbers) == (
        kept(decide([*good, *forged], rules, [], now)) & good_numbers
    )
