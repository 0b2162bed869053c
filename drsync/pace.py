"""How fast bytes may pass: a rate, and the token bucket that holds all that one process moves to it.

    take(n) ──▶ level ≥ 0 ?  ──▶ level -= n ──▶ pass
                   │ no: wait until it has risen to 0; it rises by the rate, up to a short burst

The level is reckoned from the clock, so a sleep that lasts too long is made up
for, and what is asked for is paid before it passes, in small parts: over any
second or more the rate holds, however large the objects are.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from drsync.model import Clock

LEAST_BYTES_PER_S: Final = 1024
"""Below this an object would be on its way for hours, which no store waits for."""
BURST_S: Final = 0.1
"""What an idle bucket lets pass at once, as a time: covers a late wake-up, and nobody on the line notices it."""
_PART_S: Final = 0.05
"""A larger request is paid in parts of this length, so that several threads take turns."""
_ROUNDING: Final = 0.5
"""Of a byte: what is asked for is a whole number, and floats never quite meet."""
_LONGEST_SLEEP_S: Final = 0.5
"""A changed rate is noticed after this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How many bytes may pass in a second; a day's course can come in here without a change elsewhere."""

    bytes_per_s: float | None = None
    """None: no limit."""

    def __post_init__(self) -> None:
        if self.bytes_per_s is not None and self.bytes_per_s < LEAST_BYTES_PER_S:
            raise ValueError(f"{self.bytes_per_s:g} bytes a second is too little; {LEAST_BYTES_PER_S} is the least")

    def at(self, moment: datetime) -> float | None:
        """The limit at a moment; None: there is none."""
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

    def take(self, size_bytes: int) -> None:
        left = size_bytes
        while left > 0:
            limit = self._rate.at(self._clock.now())
            part = left if limit is None else min(left, max(1, int(limit * _PART_S)))
            while (wait_s := self._try(part)) > 0:
                self._sleep(min(wait_s, _LONGEST_SLEEP_S))
            left -= part

    def take_now(self, size_bytes: int) -> bool:
        return self._try(size_bytes) == 0.0

    def _try(self, size_bytes: int) -> float:
        """Pay for `size_bytes`, or say how long it takes until that can be done."""
        with self._lock:
            limit = self._refill()
            if limit is None:
                return 0.0
            if self._level < size_bytes - _ROUNDING:
                return (size_bytes - self._level) / limit
            self._level -= size_bytes
            return 0.0

    def _refill(self) -> float | None:
        limit = self._rate.at(self._clock.now())
        now_s = self._clock.monotonic_s()
        if limit is not None:
            self._level = min(limit * BURST_S, self._level + (now_s - self._filled_s) * limit)
        self._filled_s = now_s
        return limit
