"""When a VM's next capture is due: reckoned on the monotonic clock, told to APScheduler in wall time.

APScheduler compares wall times. If the clock is set back by an hour, a job that
was due in a minute would wait for an hour and a minute; if it is set forward by
a year, a plain interval trigger counts every run in between. So a `Cadence`
never looks at the wall clock to decide; it keeps the due time in monotonic
seconds, and `Drift` tells when the two clocks have parted, so that every job
can be given its due time anew.

    slots of a VM   ──┼───────┼───────┼───────┼──▶ monotonic time, one every interval
    phase           ├─┘ hash of the VM's name: VMs of one RPO don't start together

A point is oldest at the moment before the next one is in the repository:

    slot ├─ lead ─┤ committed       slot ├─ lead ─┤ committed
         ├────────── interval ───────────┤        │
         └────────── how old a point gets ────────┘

So the interval is the RPO less the lead, which is measured: the time from a slot
to its point in the repository, with the wait for a free worker in it.
"""

import hashlib
from datetime import datetime, timedelta
from math import ceil, floor
from typing import Final

from apscheduler.triggers.base import BaseTrigger

from drsync.model import Clock

FIRST_WITHIN_S: Final = 30.0
"""A VM's first capture comes this soon after the start: it may be late already."""
_EARLY: Final = 0.1
"""Part of an interval that a run may be early for its slot: the clocks never agree to the microsecond."""
_STEPS: Final = 20
"""The interval changes in steps of this part of an RPO, so that slots mostly stay where they are."""
_MARGIN: Final = 1.25
"""A lead is reckoned so much longer than it was: the next one may be."""
_FADING: Final = 0.9
"""A long lead counts less with every run after it."""
_DRIFT_S: Final = 1.0
"""The clocks have parted; less is slewing by NTP, which shifts one run by that much at most."""


class Cadence(BaseTrigger):  # type: ignore[misc]  # APScheduler 3.x has no types
    """Slots so often that no point gets older than `rpo_s`, at a phase that belongs to `name`."""

    def __init__(self, clock: Clock, name: str, rpo_s: float) -> None:
        self._clock = clock
        self._rpo_s = rpo_s
        self._share = _share(name)
        self._lead_s = 0.0
        self._fired_s = clock.monotonic_s()
        self._is_overdue = False
        self.due_s = clock.monotonic_s() + self._share * min(rpo_s, FIRST_WITHIN_S)
        """The monotonic time of the next run."""

    @property
    def interval_s(self) -> float:
        """From slot to slot; half the RPO at least, since a run that takes longer than that is followed at once."""
        step_s = self._rpo_s / _STEPS
        return max(self._rpo_s / 2, self._rpo_s - ceil(self._lead_s * _MARGIN / step_s) * step_s)

    @property
    def lead_s(self) -> float:
        """How long it takes from a slot until its point is in the repository."""
        return self._lead_s

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime:
        """The next slot after now; the first time, soon. Runs that were missed are one run (coalesced)."""
        if previous_fire_time is not None:
            self.due_s = min(self._next_slot_s(), self._clock.monotonic_s() + self.interval_s)
        return self.wall_time(now)

    def fired(self) -> None:
        """A slot has come, and its run waits for a worker from now on."""
        self._fired_s = self._clock.monotonic_s()
        self._is_overdue = False

    def skipped(self) -> None:
        """A slot has come while the run before it still went on."""
        self._is_overdue = True

    def ended(self, *, usual: bool) -> bool:
        """The run has ended; whether the next one is overdue. `usual`: it took as long as others will."""
        if usual:
            self._lead_s = max(self._clock.monotonic_s() - self._fired_s, self._lead_s * _FADING)
        return self._is_overdue

    def delay(self, seconds: float, now: datetime) -> datetime:
        """Set the next run aside from the slots: `seconds` from now."""
        self.due_s = self._clock.monotonic_s() + seconds
        return self.wall_time(now)

    def wall_time(self, now: datetime) -> datetime:
        """The due time in the wall clock's present terms."""
        return now + timedelta(seconds=max(0.0, self.due_s - self._clock.monotonic_s()))

    def _next_slot_s(self) -> float:
        interval_s = self.interval_s
        slots = self._clock.monotonic_s() / interval_s - self._share
        return (floor(slots + _EARLY) + 1 + self._share) * interval_s


class Drift:
    """Notices that the wall clock was set."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_s = self._measure_s()

    def jumped_s(self) -> float:
        """How far the wall clock has moved against the monotonic one since the last jump; 0.0 if it went along."""
        offset_s = self._measure_s()
        jump_s = offset_s - self._offset_s
        if abs(jump_s) < _DRIFT_S:
            return 0.0
        self._offset_s = offset_s
        return jump_s

    def _measure_s(self) -> float:
        return self._clock.now().timestamp() - self._clock.monotonic_s()


def _share(name: str) -> float:
    """A number from 0 to 1 that belongs to a name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest()) / 2**32
