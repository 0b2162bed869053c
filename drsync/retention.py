"""Which points stay, and why: a pure function of their numbers and the store's times.

A point stays if anything wants it: it is the newest; it is pinned; it is
younger than the minimum age; it is among the `last` ones; or it stands for an
hour, day, week, month or year. Reasons add up, so a rule more never drops a point.

Which point stands for a bucket of time: its **oldest**. A bucket's oldest point
is settled when the bucket begins; whatever is written later into the same hour or
month, by a wrong clock, a loop gone wild or a thief with the host's key, can't
take its place. Were it the newest, as it is in many tools, then whoever breaks in
on the 20th would own the month: one forged point, and the good ones of the 1st to
the 19th live only as long as the daily rule does. That the oldest is settled early
has two more uses: a point's fate does not change with each new one, so prune need
not copy the same blocks forward twice; and N buckets reach back by up to a whole
period more. The price: the point of a past month is of its first moment, not of its last.

What forged points can do, then. Their time is the store's, so they are of now,
whatever their host says: buckets that have begun are out of reach, and in each
later bucket they do what an honest point would do, no more. `last` counts
points, and a flood fills it in minutes; `minimum_age` is the answer to that: it
keeps all for as long as it takes to notice. (Bought with space: it is the only rule
that grows with how often points are made.)

N buckets are the newest N *that have points*, not the newest N of the calendar:
a VM that was idle or off for a year keeps what it had. Buckets are UTC's; a week
begins on Monday (ISO 8601).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final


@dataclass(frozen=True, slots=True)
class Aged:
    """A point, and when the store took its segment."""

    point: int
    time: datetime
    """By the store's clock (`ObjectInfo.modified`), never what a host wrote into the point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How many points stay. What no rule wants is dropped; with no rule at all, everything but the newest."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    minimum_age: timedelta = timedelta(0)
    """Younger points stay, however many there are."""

    def __post_init__(self) -> None:
        counts = (self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly)
        if min(counts) < 0 or self.minimum_age < timedelta(0):
            raise ValueError("a rule can't be negative")

    @property
    def keeps_all(self) -> bool:
        """Whether these are no rules at all (KEEP_ALL)."""
        return self.minimum_age == timedelta.max

    def __str__(self) -> str:
        if self.keeps_all:
            return "everything stays"
        counts = [f"{p.name} {count}" for p in _PERIODS if (count := getattr(self, p.name))]
        last = [f"last {self.last}"] if self.last else []
        return ", ".join([*last, *counts, f"younger than {_age(self.minimum_age)}"])


KEEP_ALL: Final = Rules(minimum_age=timedelta.max)
"""For who has set no rules: nothing is ever dropped."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A person wants this point."""

    point: int
    until: datetime | None
    """None: until it is unpinned."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a point, and all the reasons: for it if it stays, against it if not."""

    point: int
    keep: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Period:
    """A way to cut time into buckets."""

    name: str
    noun: str
    bucket: Callable[[datetime], datetime]
    """The beginning of the bucket that a time is in."""
    shown: str
    """strftime's format for a bucket."""


def _midnight(time: datetime) -> datetime:
    return time.replace(hour=0, minute=0, second=0, microsecond=0)


def _monday(time: datetime) -> datetime:
    """As `_midnight`, of the week; the first days of all time, which have no Monday, are a week of their own."""
    days = min(time.weekday(), (_midnight(time) - datetime.min.replace(tzinfo=UTC)).days)
    return _midnight(time) - timedelta(days=days)


_PERIODS: Final = (
    _Period("hourly", "hour", lambda t: t.replace(minute=0, second=0, microsecond=0), "%Y-%m-%d %H:00Z"),
    _Period("daily", "day", _midnight, "%Y-%m-%d"),
    _Period("weekly", "week", _monday, "%G-W%V"),
    _Period("monthly", "month", lambda t: _midnight(t).replace(day=1), "%Y-%m"),
    _Period("yearly", "year", lambda t: _midnight(t).replace(month=1, day=1), "%Y"),
)


def decide(points: Sequence[Aged], rules: Rules, pins: Collection[Pin], now: datetime) -> tuple[Verdict, ...]:
    """For each point whether it stays, with the reasons; the newest first.

    `points` are those of one VM, in any order, each number once; `now` is the
    store's or a trusted clock's. A pin holds until its time has come; of several
    pins of a point each holds by itself. A pin of a point that is not there does nothing.

    The newest point (by number: the log's order, not a clock's) always stays.
    Deciding again over those that stay drops none at the same `now`.
    """
    ordered = sorted(points, key=lambda p: p.point, reverse=True)
    for_it: dict[int, list[str]] = {p.point: [] for p in ordered}
    against: dict[int, list[str]] = {p.point: [] for p in ordered}
    _newest(ordered, for_it)
    _pinned(pins, now, for_it, against)
    _young(ordered, rules.minimum_age, now, for_it, against)
    _last(ordered, rules.last, for_it, against)
    for period in _PERIODS:
        _buckets(ordered, period, getattr(rules, period.name), for_it, against)
    return tuple(
        Verdict(p.point, keep=bool(for_it[p.point]), reasons=tuple(for_it[p.point] or against[p.point]))
        for p in ordered
    )


_Reasons = Mapping[int, list[str]]


def _newest(ordered: Sequence[Aged], for_it: _Reasons) -> None:
    if ordered:
        for_it[ordered[0].point].append("the newest point")


def _pinned(pins: Collection[Pin], now: datetime, for_it: _Reasons, against: _Reasons) -> None:
    for pin in sorted(pins, key=lambda pin: (pin.until is not None, pin.until or now)):
        if pin.point not in for_it:
            continue
        if pin.until is None:
            for_it[pin.point].append("pinned")
        elif pin.until > now:
            for_it[pin.point].append(f"pinned until {_moment(pin.until)}")
        else:
            against[pin.point].append(f"its pin ended {_moment(pin.until)}")


def _young(ordered: Sequence[Aged], minimum_age: timedelta, now: datetime, for_it: _Reasons, against: _Reasons) -> None:
    if minimum_age == KEEP_ALL.minimum_age:
        for reasons in for_it.values():
            reasons.append("no rules are set: everything stays")
        return
    if not minimum_age:
        return
    shown = _age(minimum_age)
    for point in ordered:
        young = now - point.time < minimum_age
        (for_it if young else against)[point.point].append(f"{'younger' if young else 'older'} than {shown}")


def _last(ordered: Sequence[Aged], count: int, for_it: _Reasons, against: _Reasons) -> None:
    for place, point in enumerate(ordered, 1):
        if place <= count:
            for_it[point.point].append(f"last: {place} of {count}")
        elif count:
            against[point.point].append(f"last: not among the newest {count}")


def _buckets(ordered: Sequence[Aged], period: _Period, count: int, for_it: _Reasons, against: _Reasons) -> None:
    """The oldest point of each of the newest `count` buckets that have any."""
    if not count:
        return
    bucket_of = {p.point: period.bucket(p.time.astimezone(UTC)) for p in ordered}
    oldest = {bucket_of[p.point]: p.point for p in ordered}  # the lowest number is seen last
    kept = set(sorted(oldest, reverse=True)[:count])
    for point in ordered:
        bucket = bucket_of[point.point]
        if bucket not in kept:
            against[point.point].append(f"{period.name}: its {period.noun} is not among the newest {count}")
        elif oldest[bucket] == point.point:
            for_it[point.point].append(f"{period.name}: the first of {bucket.strftime(period.shown)}")
        else:
            against[point.point].append(f"{period.name}: point {oldest[bucket]} stands for its {period.noun}")


def _moment(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M}Z"


def _age(age: timedelta) -> str:
    """An age in the largest unit that says it exactly: "3 days", "36 hours"."""
    seconds = round(age.total_seconds())
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds and seconds % length == 0:
            return f"{seconds // length} {unit}{'s' if seconds > length else ''}"
    return f"{age.total_seconds():g} seconds"
