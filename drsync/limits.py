"""What one process may move: the buckets behind `[limits]`, shared by all of its VMs.

    captures ─▶ increment_upload ─┐
    seeds ────▶ seed_upload ──────┴▶ upload ─▶ repository ─▶ restore ─▶ restores
    disks of each VM ─▶ read ─▶ captures
                          └───▶ seed_read ─▶ seeds

The daemon has one for its whole life: what an older configuration began goes on at the limits of the newer one.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from drsync.config import LimitsSettings
from drsync.config.limits import RATES
from drsync.model import Clock, Pace
from drsync.pace import Rate, Together, TokenBucket
from drsync.units import format_size


def described(settings: LimitsSettings, now: datetime) -> list[str]:
    """The limits that hold now, for people, and by whose clock; nothing if nothing is limited at any time."""
    rates: dict[str, Rate] = {name: getattr(settings, name) for name in RATES}
    limited = {name: rate for name, rate in rates.items() if rate.bytes_per_s is not None or rate.windows}
    lines = [f"{name}: {_shown(rate.at(now))} now{_otherwise(rate, now)}" for name, rate in limited.items()]
    if any(rate.windows for rate in limited.values()):
        zone = settings.time_zone.key if settings.time_zone is not None else "this host"
        lines.append(f"windows go by the clock of {zone}: {now.astimezone(settings.time_zone):%A %H:%M}")
    return lines


def _otherwise(rate: Rate, now: datetime) -> str:
    others = {limit for limit in (rate.bytes_per_s, *(w.bytes_per_s for w in rate.windows)) if limit != rate.at(now)}
    return f", {' or '.join(sorted(map(_shown, others)))} at other times" if others else ""


def _shown(limit: float | None) -> str:
    return "unlimited" if limit is None else f"{format_size(limit)}/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Disks:
    """The buckets of one VM's disks."""

    read: TokenBucket
    seed_read: TokenBucket


class Limits:
    """The paces of one process. Safe to use from several threads."""

    def __init__(self, settings: LimitsSettings, clock: Clock, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """`sleep` waits for so many seconds."""
        self._settings = settings
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._disks: dict[str, _Disks] = {}
        self._upload = self._bucket("upload")
        self._seed_upload = self._bucket("seed_upload")
        self._increment_upload = self._bucket("increment_upload")
        self._restore = self._bucket("restore")

    def set(self, settings: LimitsSettings) -> None:
        """Go on at other limits; what is on its way notices within half a second."""
        with self._lock:
            self._settings = settings
            self._upload.set_rate(settings.upload)
            self._seed_upload.set_rate(settings.seed_upload)
            self._increment_upload.set_rate(settings.increment_upload)
            self._restore.set_rate(settings.restore)
            for disks in self._disks.values():
                disks.read.set_rate(settings.read)
                disks.seed_read.set_rate(settings.seed_read)

    @property
    def increments(self) -> Pace:
        """What captures send."""
        return Together(self._increment_upload, self._upload)

    @property
    def seeds(self) -> Pace:
        """What seeds send."""
        return Together(self._seed_upload, self._upload)

    @property
    def restores(self) -> Pace:
        """What is read from the repository."""
        return self._restore

    def reads(self, vm: str) -> Pace:
        """What a capture reads of a VM's disks."""
        return self._disks_of(vm).read

    def seed_reads(self, vm: str) -> Pace:
        """What a seed reads of a VM's disks."""
        disks = self._disks_of(vm)
        return Together(disks.seed_read, disks.read)

    def _disks_of(self, vm: str) -> _Disks:
        with self._lock:
            if vm not in self._disks:
                self._disks[vm] = _Disks(read=self._bucket("read"), seed_read=self._bucket("seed_read"))
            return self._disks[vm]

    def _bucket(self, name: str) -> TokenBucket:
        return TokenBucket(getattr(self._settings, name), self._clock, sleep=self._sleep)
