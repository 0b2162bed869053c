"""Runs a plan: wave after wave, the VMs of a wave side by side, each until it is up.

A run is a step towards "all are up": what an earlier run brought back is recognised by
the mark in its domain, started if it is off, waited for, and never restored a second time.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime

from drsync.catalog import Point
from drsync.config.plan import LibvirtSite, OnFailure, Plan, VmOverride, Wait, Wave
from drsync.errors import DrsyncError, HostRefused, NotStarted, PlanInvalid
from drsync.model import Clock, Progress
from drsync.recovery.lag import rpo_s
from drsync.recovery.planning import PlannedRoom
from drsync.recovery.recover import Recovery
from drsync.recovery.report import Came, PlanReport, VmOutcome
from drsync.recovery.request import RecoveryPlan, RecoveryRequest
from drsync.recovery.waiting import wait_until_up
from drsync.session import Session
from drsync.target.libvirt_host import Domain, LibvirtHost

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One VM of the plan."""

    vm: str
    wave: int
    request: RecoveryRequest
    wait: Wait
    timeout_s: float


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
        open_host: Callable[[str], LibvirtHost] = LibvirtHost,
    ) -> None:
        """Choose the site; `say` is told what happens, `lost_at` is what the RPO is reckoned to.

        Raises:
            PlanInvalid: there is no such site, or it is none that can be restored to.
        """
        self._plan = plan
        self._site_name, site = plan.site(site_name)
        if not isinstance(site, LibvirtSite):
            problem = f'[site.{self._site_name}]: target = "{site.target}" can\'t be restored to yet'
            raise PlanInvalid(path=plan.path, problem=problem)
        self._site = site
        self._session = session
        self._clock: Clock = session.clock
        self._say = say
        self._sleep = sleep
        self._open_host = open_host
        self._started_at = self._clock.now()
        self._started_s = self._clock.monotonic_s()
        self._lost_at = lost_at or self._started_at
        self._stopped = threading.Event()

    def check(self) -> PlanReport:
        """What a run would do, and everything that would refuse it; nothing is written.

        Raises:
            HostUnreachable, BindingMissing: the site can't be reached.
        """
        with self._open_host(self._site.uri) as host:
            recovery, rooms = Recovery(self._session, host), PlannedRoom()
            outcomes = [self._checked(recovery, host, task, rooms) for task in self._tasks()]
        return self._report(outcomes, dry_run=True)

    def _checked(self, recovery: Recovery, host: LibvirtHost, task: _Task, rooms: PlannedRoom) -> VmOutcome:
        try:
            found = self._came_before(host, task)
            if found is not None:
                return self._outcome(task, Came.CHECKED, domain=found.name, was_there=True)
            plan = recovery.plan(task.request)
            errors = [*plan.errors, *rooms.add(plan)]
        except DrsyncError as err:
            return self._outcome(task, Came.FAILED, errors=(err,))
        came = Came.FAILED if errors else Came.CHECKED
        return self._outcome(task, came, plan=plan, errors=tuple(errors))

    def run(self, progress: Progress) -> PlanReport:
        """Bring the VMs back.

        Raises:
            HostUnreachable, BindingMissing: the site can't be reached; nothing was done.
        """
        outcomes: list[VmOutcome] = []
        shared = _SharedProgress(progress, self._stopped)
        with self._open_host(self._site.uri) as host:
            recovery = Recovery(self._session, host)
            for number, wave in enumerate(self._plan.waves, 1):
                tasks = [task for task in self._tasks() if task.wave == number]
                if wave.delay_s and not self._stopped.is_set():
                    self._say(f"wave {number}: after {wave.delay_s:g} s")
                    self._sleep(wave.delay_s)
                outcomes += self._run_wave(recovery, host, tasks, shared)
        return self._report(outcomes, dry_run=False)

    def _run_wave(
        self, recovery: Recovery, host: LibvirtHost, tasks: Sequence[_Task], progress: "_SharedProgress"
    ) -> Sequence[VmOutcome]:
        with ThreadPoolExecutor(self._plan.top.parallel, thread_name_prefix="recover") as workers:
            futures = [workers.submit(self._bring_back, recovery, host, task, progress) for task in tasks]
            try:
                return [future.result() for future in futures]
            except BaseException:
                progress.abandon()
                _cancel(futures)
                raise

    def _bring_back(self, recovery: Recovery, host: LibvirtHost, task: _Task, progress: "_SharedProgress") -> VmOutcome:
        if self._stopped.is_set():
            return self._outcome(task, Came.SKIPPED)
        try:
            outcome = self._until_up(recovery, host, task, progress)
        except DrsyncError as err:
            self._say(f"{task.vm}: failed: {err}; remedy: {err.remedy}")
            if self._plan.top.on_failure is OnFailure.STOP:
                self._stopped.set()
            return self._outcome(task, Came.FAILED, errors=(err,))
        return outcome

    def _until_up(self, recovery: Recovery, host: LibvirtHost, task: _Task, progress: "_SharedProgress") -> VmOutcome:
        plan: RecoveryPlan | None = None
        found = self._came_before(host, task)
        if found is None:
            plan = recovery.plan(task.request)
            self._say(f"{task.vm}: restoring point {plan.point.number} of {plan.point.time:%Y-%m-%d %H:%M:%S}Z")
            recovery.run(plan, progress)
            uuid, domain = plan.uuid, plan.domain
        else:
            if not found.active:
                self._say(f"{task.vm}: was restored before; starting it")
                _start(host, found)
            uuid, domain = found.uuid, found.name
        wait_until_up(host, uuid, domain, task.wait, timeout_s=task.timeout_s, clock=self._clock, sleep=self._sleep)
        outcome = self._outcome(task, Came.UP, plan=plan, domain=domain, was_there=found is not None)
        self._say(f"{task.vm}: up after {outcome.rto_s or 0:.1f} s")
        return replace(outcome, point=outcome.point or (found.mark.point if found and found.mark else None))

    def _came_before(self, host: LibvirtHost, task: _Task) -> Domain | None:
        """The domain that an earlier run made of this VM: running, or at the point that is wanted now."""
        repository = self._session.repository.id.hex()
        for domain in host.domains():
            mark = domain.mark
            if mark is None or (mark.repository, mark.vm) != (repository, task.vm):
                continue
            if task.request.name is not None and domain.name != task.request.name:
                continue
            if domain.active or self._wanted(task).number == mark.point:
                return domain
        return None

    def _wanted(self, task: _Task) -> Point:
        point, _ = self._session.find_point(task.vm, number=task.request.number, at=task.request.at)
        return point

    def _outcome(
        self, task: _Task, came: Came, *, plan: RecoveryPlan | None = None, domain: str = "", **known: object
    ) -> VmOutcome:
        outcome = VmOutcome(vm=task.vm, wave=task.wave, came=came, domain=domain, **known)  # type: ignore[arg-type]
        if came is Came.UP:
            took_s = self._clock.monotonic_s() - self._started_s
            outcome = replace(outcome, up_at=self._clock.now(), rto_s=took_s)
        if plan is None:
            return outcome
        return replace(
            outcome,
            domain=plan.domain,
            point=plan.point.number,
            point_time=plan.point.time,
            rpo_s=rpo_s(self._session, plan.point, self._lost_at),
            live_bytes=sum(disk.live_bytes for disk in plan.disks),
            notes=tuple(f"{note.subject}: {note.text}" for note in plan.notes if note.effect != "problem"),
        )

    def _tasks(self) -> Sequence[_Task]:
        return [self._task(number, wave, vm) for number, wave in enumerate(self._plan.waves, 1) for vm in wave.vms]

    def _task(self, number: int, wave: Wave, vm: str) -> _Task:
        own = self._plan.overrides.get(vm)
        return _Task(
            vm=vm,
            wave=number,
            request=self._request(vm, own),
            wait=own.wait if own is not None and own.wait is not None else wave.wait,
            timeout_s=own.timeout_s if own is not None and own.timeout_s is not None else wave.timeout_s,
        )

    def _request(self, vm: str, own: VmOverride | None) -> RecoveryRequest:
        site = self._site
        request = RecoveryRequest(
            vm=vm,
            uri=site.uri,
            pool=site.pool,
            disk_dir=site.disk_dir,
            networks=site.networks,
            keep_mac=site.keep_mac,
            start=True,
        )
        if own is None:
            return request
        return replace(
            request,
            number=own.point,
            at=own.at,
            name=own.name,
            pool=own.pool or site.pool,
            disk_dir=None if own.pool else site.disk_dir,
            networks={**site.networks, **own.networks},
        )

    def _report(self, outcomes: Sequence[VmOutcome], *, dry_run: bool) -> PlanReport:
        return PlanReport(
            site=self._site_name,
            uri=self._site.uri,
            started_at=self._started_at,
            lost_at=self._lost_at,
            took_s=self._clock.monotonic_s() - self._started_s,
            dry_run=dry_run,
            vms=tuple(outcomes),
        )


def _start(host: LibvirtHost, found: Domain) -> None:
    try:
        host.start(found.uuid)
    except HostRefused as err:
        raise NotStarted(domain=found.name, uri=host.uri, problem=err.fields["problem"]) from err


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
