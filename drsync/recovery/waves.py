"""Runs a plan: wave after wave, the VMs of a wave side by side, each until it is up.

A run is a step towards "all are up": what an earlier run brought back is recognised by its site,
started if it is off, waited for, and never restored a second time.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime

from drsync.config.plan import Plan, Wave
from drsync.config.plan_sites import Ec2Site, LibvirtSite
from drsync.config.plan_values import OnFailure
from drsync.errors import DrsyncError
from drsync.model import Clock, Progress
from drsync.recovery.lag import rpo_s
from drsync.recovery.report import Came, PlanReport, VmOutcome
from drsync.recovery.site import Arrival, Site, Task
from drsync.session import Session


def open_site(settings: LibvirtSite | Ec2Site, session: Session, sleep: Callable[[float], None]) -> Site:
    """The site that the plan means; nothing is reached yet."""
    if isinstance(settings, LibvirtSite):
        from drsync.recovery.libvirt_site import LibvirtSite as OnLibvirt  # noqa: PLC0415 - a region needs no libvirt

        return OnLibvirt(settings, session, sleep=sleep)
    from drsync.recovery.cloud.site import CloudSite  # noqa: PLC0415 - a host needs no AWS

    return CloudSite(settings, session, sleep=sleep)


class PlanRun:
    """One run of a plan on one site."""

    def __init__(
        self,
        plan: Plan,
        site_name: str | None,
        session: Session,
        *,
        lost_at: datetime | None = None,
        say: Callable[[str], None] = lambda _line: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Choose the site; `say` is told what happens, `lost_at` is what the RPO is reckoned to.

        Raises:
            PlanInvalid: there is no such site.
        """
        self._plan = plan
        self._site_name, settings = plan.site(site_name)
        self._site = open_site(settings, session, sleep)
        self._session = session
        self._clock: Clock = session.clock
        self._say = say
        self._sleep = sleep
        self._started_at = self._clock.now()
        self._started_s = self._clock.monotonic_s()
        self._lost_at = lost_at or self._started_at
        self._stopped = threading.Event()

    def check(self) -> PlanReport:
        """What a run would do, and everything that would refuse it; nothing is written.

        Raises:
            HostUnreachable, BindingMissing, CloudError: the site can't be reached.
        """
        with self._site.opened():
            outcomes = [self._checked(task) for task in self._tasks()]
        return self._report(outcomes, dry_run=True)

    def _checked(self, task: Task) -> VmOutcome:
        try:
            arrival = self._site.check(task)
        except DrsyncError as err:
            return self._outcome(task, Came.FAILED, errors=(err,))
        came = Came.FAILED if arrival.errors else Came.CHECKED
        return self._outcome(task, came, arrival, errors=arrival.errors)

    def run(self, progress: Progress) -> PlanReport:
        """Bring the VMs back.

        Raises:
            HostUnreachable, BindingMissing, CloudError: the site can't be reached; nothing was done.
        """
        outcomes: list[VmOutcome] = []
        shared = _SharedProgress(progress, self._stopped)
        with self._site.opened():
            for number, wave in enumerate(self._plan.waves, 1):
                tasks = [task for task in self._tasks() if task.wave == number]
                if wave.delay_s and not self._stopped.is_set():
                    self._say(f"wave {number}: after {wave.delay_s:g} s")
                    self._sleep(wave.delay_s)
                outcomes += self._run_wave(tasks, shared)
        return self._report(outcomes, dry_run=False)

    def _run_wave(self, tasks: Sequence[Task], progress: "_SharedProgress") -> Sequence[VmOutcome]:
        with ThreadPoolExecutor(self._plan.top.parallel, thread_name_prefix="recover") as workers:
            futures = [workers.submit(self._bring_back, task, progress) for task in tasks]
            try:
                return [future.result() for future in futures]
            except BaseException:
                progress.abandon()
                _cancel(futures)
                raise

    def _bring_back(self, task: Task, progress: "_SharedProgress") -> VmOutcome:
        if self._stopped.is_set():
            return self._outcome(task, Came.SKIPPED)
        try:
            arrival = self._site.bring_up(task, progress, self._say)
        except DrsyncError as err:
            self._say(f"{task.vm}: failed: {err}; remedy: {err.remedy}")
            if self._plan.top.on_failure is OnFailure.STOP:
                self._stopped.set()
            return self._outcome(task, Came.FAILED, errors=(err,))
        outcome = self._outcome(task, Came.UP, arrival)
        self._say(f"{task.vm}: up after {outcome.rto_s or 0:.1f} s")
        return outcome

    def _outcome(
        self, task: Task, came: Came, arrival: Arrival | None = None, *, errors: Sequence[DrsyncError] = ()
    ) -> VmOutcome:
        outcome = VmOutcome(vm=task.vm, wave=task.wave, came=came, errors=tuple(errors))
        if came is Came.UP:
            took_s = self._clock.monotonic_s() - self._started_s
            outcome = replace(outcome, up_at=self._clock.now(), rto_s=took_s)
        if arrival is None:
            return outcome
        point = arrival.point
        return replace(
            outcome,
            domain=arrival.name,
            was_there=arrival.was_there,
            point=arrival.number,
            point_time=None if point is None else point.time,
            rpo_s=None if point is None else rpo_s(self._session, point, self._lost_at),
            live_bytes=arrival.live_bytes,
            notes=arrival.notes,
        )

    def _tasks(self) -> Sequence[Task]:
        return [self._task(number, wave, vm) for number, wave in enumerate(self._plan.waves, 1) for vm in wave.vms]

    def _task(self, number: int, wave: Wave, vm: str) -> Task:
        own = self._plan.overrides.get(vm)
        return Task(
            vm=vm,
            wave=number,
            wait=own.wait if own is not None and own.wait is not None else wave.wait,
            timeout_s=own.timeout_s if own is not None and own.timeout_s is not None else wave.timeout_s,
            own=own,
        )

    def _report(self, outcomes: Sequence[VmOutcome], *, dry_run: bool) -> PlanReport:
        return PlanReport(
            site=self._site_name,
            uri=self._site.address,
            started_at=self._started_at,
            lost_at=self._lost_at,
            took_s=self._clock.monotonic_s() - self._started_s,
            dry_run=dry_run,
            vms=tuple(outcomes),
        )


def _cancel(futures: Sequence[Future[VmOutcome]]) -> None:
    for future in futures:
        future.cancel()


class _SharedProgress:
    """Sums up what several restores report: their steps begin and end as they like."""

    def __init__(self, progress: Progress, stopped: threading.Event) -> None:
        self._progress = progress
        self._stopped = stopped
        self._abandoned = False
        self._lock = threading.Lock()
        self._total = self._done = 0

    def start(self, step: str, total_bytes: int) -> None:
        del step
        with self._lock:
            self._total += total_bytes
            self._progress.start("restore", self._total)
            self._progress.advance(self._done)

    def advance(self, done_bytes: int) -> None:
        if self._abandoned:  # Ctrl-C reaches the main thread alone; this ends the restores of the others
            raise KeyboardInterrupt
        with self._lock:
            self._done += done_bytes
            self._progress.advance(done_bytes)

    def abandon(self) -> None:
        """Make every restore that still runs end, and remove what it made."""
        self._abandoned = True
        self._stopped.set()
