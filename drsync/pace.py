"""How fast bytes may pass: a rate, and the token bucket that holds all that one process moves to it.

    take(n) ──▶ level ≥ a part ?  ──▶ level -= the part ──▶ … ──▶ pass
                   │ no: wait until it has risen so far; it rises by the rate, up to a short burst

The level is reckoned from the clock, so a sleep that lasts a bit too long is made up
for, and what is asked for is paid before it passes, in small parts: in any second the
rate holds within a twentieth, however large the objects are. A rate may have a course
over the week; the clock is looked at before every part, so its edges take effect in the
midst of what passes.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import Final

from drsync.model import Clock

LEAST_BYTES_PER_S: Final = 1024
"""Below this an object would be on its way for hours, which no store waits for."""
BURST_S: Final = 0.05
"""What an idle bucket lets pass at once, as a time: covers a late wake-up, and is all that a second has too much."""
_PART_S: Final = 0.02
"""A larger request is paid in parts of this length, so that several threads take turns."""
_ROUNDING: Final = 0.5
"""Of a byte: what is asked for is a whole number, and floats never quite meet."""
_LONGEST_SLEEP_S: Final = 0.5
"""A changed rate is noticed after this."""
MINUTES_OF_DAY: Final = 24 * 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Hours of the week, by the clock on the wall, in which another rate holds."""

    days: frozenset[int]
    """On which it begins; 0 is Monday."""
    begin_min: int
    end_min: int
    """Minutes since midnight; an end that is not behind the beginning is of the next day."""
    bytes_per_s: float | None
    """None: no limit in these hours."""

    def holds(self, local: datetime) -> bool:
        """Whether a moment, by the clock on the wall, lies in it."""
        minute, day = local.hour * 60 + local.minute, local.weekday()
        if self.begin_min < self.end_min:
            return day in self.days and self.begin_min <= minute < self.end_min
        yesterday = (local - timedelta(days=1)).weekday()
        return (day in self.days and minute >= self.begin_min) or (yesterday in self.days and minute < self.end_min)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How many bytes may pass in a second, with its course over the week."""

    bytes_per_s: float | None = None
    """Outside of all windows; None: no limit."""
    windows: Sequence[Window] = ()
    """The first one that a moment lies in counts."""
    zone: tzinfo | None = None
    """Whose clock on the wall it is; None: this host's."""

    def __post_init__(self) -> None:
        for limit in (self.bytes_per_s, *(window.bytes_per_s for window in self.windows)):
            if limit is not None and limit < LEAST_BYTES_PER_S:
                raise ValueError(f"{limit:g} bytes a second is too little; {LEAST_BYTES_PER_S} is the least")

    def at(self, moment: datetime) -> float | None:
        """The limit at a moment; None: there is none."""
        if self.windows:
            local = moment.astimezone(self.zone)
            for window in self.windows:
                if window.holds(local):
                    return window.bytes_per_s
        return self.bytes_per_s


UNLIMITED: Final = Rate()


class TokenBucket:
    """A Pace that holds the sum of everything that passes to a rate."""

    def __init__(self, rate: Rate, clock: Clock, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """`sleep` waits for so many seconds; it may raise to give up at once."""
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._level = 0.0
        self._filled_s = clock.monotonic_s()

    def set_rate(self, rate: Rate) -> None:
        """Go on at another rate; what waits notices it within half a second."""
        with self._lock:
            self._refill()
            self._rate = rate

    def limit_bytes_per_s(self) -> float | None:
        return self._rate.at(self._clock.now())

    def take(self, size_bytes: int) -> None:
        left = size_bytes
        while left > 0:
            paid, wait_s = self._pay(left)
            left -= paid
            if not paid:
                self._sleep(min(wait_s, _LONGEST_SLEEP_S))

    def take_now(self, size_bytes: int) -> bool:
        with self._lock:
            if self._refill() is None:
                return True
            if self._level < size_bytes - _ROUNDING:
                return False
            self._level -= size_bytes
            return True

    def give_back(self, size_bytes: int) -> None:
        """What was taken does not pass after all."""
        with self._lock:
            self._level += size_bytes

    def _pay(self, left: int) -> tuple[int, float]:
        """Pay for a part of `left`: how much, or 0 and how long it takes until that can be done."""
        with self._lock:
            limit = self._refill()
            if limit is None:
                return left, 0.0
            part = min(left, max(1, int(limit * _PART_S)))
            if self._level < part - _ROUNDING:
                return 0, (part - self._level) / limit
            self._level -= part
            return part, 0.0

    def _refill(self) -> float | None:
        limit = self._rate.at(self._clock.now())
        now_s = self._clock.monotonic_s()
        if limit is not None:
            self._level = min(limit * BURST_S, self._level + (now_s - self._filled_s) * limit)
        self._filled_s = now_s
        return limit


class Together:
    """A Pace that keeps to several buckets at once."""

    def __init__(self, *buckets: TokenBucket) -> None:
        self._buckets = buckets

    def limit_bytes_per_s(self) -> float | None:
        limits = [limit for bucket in self._buckets if (limit := bucket.limit_bytes_per_s()) is not None]
        return min(limits, default=None)

    def take(self, size_bytes: int) -> None:
        for bucket in self._buckets:
            bucket.take(size_bytes)

    def take_now(self, size_bytes: int) -> bool:
        for number, bucket in enumerate(self._buckets):
            if not bucket.take_now(size_bytes):
                for paid in self._buckets[:number]:
                    paid.give_back(size_bytes)
                return False
        return True
