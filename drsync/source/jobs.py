"""QEMU's background jobs: those of one capture, from their start to their end.

    created ─▶ running ─▶ concluded ─▶ (dismissed: null)
                  └─ cancelled ─▶ concluded with an error

Jobs are made so that they stay until they are dismissed, because that is how a
job's error can still be read. Events only say when to look.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from drsync.model import Clock, Pace
from drsync.source import NO_PACE
from drsync.source.monitor import CommandRefused, Monitor

TICK_S: Final = 0.5
"""How often a wait looks around (progress, free space); an event ends it earlier."""


class Job(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A job as QEMU reports it (JobInfo)."""

    id: str
    status: str
    current_progress: int = 0
    total_progress: int = 0
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the job does nothing any more and waits to be dismissed."""
        return self.status in {"concluded", "null"}


class JobFailed(Exception):
    """A job ended with an error, or is gone although nobody dismissed it."""


class Jobs:
    """Follows and ends jobs. Not thread-safe, as its monitor is not."""

    def __init__(self, monitor: Monitor, clock: Clock) -> None:
        self._monitor = monitor
        self._clock = clock

    def present(self, mine: Callable[[str], bool]) -> Sequence[Job]:
        """The jobs whose id is `mine`."""
        return [job for job in self._monitor.query("query-jobs", list[Job]) if mine(job.id)]

    def wait(
        self,
        ids: Collection[str],
        *,
        deadline_s: float,
        on_progress: Callable[[int, int], None],
        pace: Pace = NO_PACE,
        speed: int = 0,
    ) -> None:
        """Wait until all of `ids` have ended well; `on_progress` is told, now and then, the done and the total bytes.

        They were started at `speed`, and are kept to `pace`, all together, whatever its limit becomes.

        Raises:
            JobFailed: one has an error; the others may still run.
            TimeoutError: the clock's `monotonic_s` passed `deadline_s`.
            SourceLost: QEMU went away.
        """
        told = dict.fromkeys(ids, speed)
        while True:
            jobs = self.present(lambda job_id: job_id in ids)
            _check(jobs, ids)
            self._set_speeds([job.id for job in jobs if not job.ended], pace, told)
            on_progress(sum(job.current_progress for job in jobs), sum(job.total_progress for job in jobs))
            if all(job.ended for job in jobs):
                return
            left_s = deadline_s - self._clock.monotonic_s()
            if left_s <= 0:
                raise TimeoutError
            self._monitor.wait_for_job(min(left_s, TICK_S))

    def _set_speeds(self, running: Sequence[str], pace: Pace, told: dict[str, int]) -> None:
        speed = speed_of(pace, len(running))
        for job_id in running:
            if told[job_id] != speed:
                self._try("block-job-set-speed", {"device": job_id, "speed": speed})
                told[job_id] = speed

    def end(self, mine: Callable[[str], bool], *, timeout_s: float) -> None:
        """Cancel and dismiss every job that is `mine`; returns when they are gone.

        Raises:
            TimeoutError: a job does not end, which only a disk that hangs can cause.
            SourceLost: QEMU went away.
        """
        deadline_s = self._clock.monotonic_s() + timeout_s
        cancelled: set[str] = set()
        while jobs := self.present(mine):
            for job in jobs:
                if job.ended:
                    self.dismiss(job.id)
                elif job.id not in cancelled:
                    self._try("job-cancel", {"id": job.id})
                    cancelled.add(job.id)
            left_s = deadline_s - self._clock.monotonic_s()
            if left_s <= 0:
                raise TimeoutError
            if not all(job.ended for job in jobs):
                self._monitor.wait_for_job(min(left_s, TICK_S))

    def dismiss(self, job_id: str) -> None:
        """Let QEMU forget a job that has ended."""
        self._try("job-dismiss", {"id": job_id})

    def _try(self, command: str, arguments: Mapping[str, object]) -> None:
        with suppress(CommandRefused):  # it moved on between the look and the command: the next look tells
            self._monitor.execute(command, arguments)


def speed_of(pace: Pace, jobs: int) -> int:
    """The `speed` of each of so many block jobs that together keep to a pace; 0 is QEMU's word for no limit."""
    limit = pace.limit_bytes_per_s()
    return 0 if limit is None else max(1, int(limit / max(1, jobs)))


def _check(jobs: Sequence[Job], ids: Collection[str]) -> None:
    for job in jobs:
        if job.error is not None:
            raise JobFailed(job.error)
    gone = set(ids) - {job.id for job in jobs}
    if gone:
        raise JobFailed(f"job {min(gone)} is gone")
