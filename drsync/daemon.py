"""The scheduler: one job a VM on its RPO, a limited number at a time, and nothing else.

    run ──▶ generation (configuration, session, APScheduler) ──▶ a Job per VM or group ──▶ Duties.capture
     │        ├ with [[protect]]: asks libvirt every half minute which VMs there are
    │        └ Verifier: reads what is stored again, slice by slice, in [verify] within
     │  SIGHUP: a new generation takes over; captures that run go on to their end, seeds are handed over
     └─ SIGTERM: no new capture; those that run may finish for `stop_timeout`, seeds stop at once

A VM that has to be seeded (read live, which can take days) gets a job of its own with
the workers for seeds until that is done: `parallel` does not count it, and its group goes on without it.

A job that fails with something that a retry may cure comes again after a
back-off that grows to a minute; it gives its place to other VMs meanwhile. Any
other failure waits for the next slot. The VMs of a group are one job. A VM that another
drsync took over is left alone until the configuration is read again. Every outcome is one line.
All VMs of the host share its heartbeats.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from enum import Enum
from typing import Final

from apscheduler.events import EVENT_JOB_MAX_INSTANCES, EVENT_SCHEDULER_STARTED, JobSubmissionEvent
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.job import Job as ApsJob
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.blocking import BlockingScheduler

from drsync.cadence import Drift
from drsync.config import Config, VmSettings, captured_together
from drsync.errors import DrsyncError
from drsync.heart import Heart
from drsync.jobs import CAPTURES, SEEDS, Captures, Job, SeedJob, job_key, seed_key
from drsync.model import Clock
from drsync.systemd import Notifier
from drsync.units import format_duration
from drsync.verifier import Verifier

_LOGGER = logging.getLogger(__name__)

POLL_S: Final = 1.0
"""How often the daemon looks at its clocks and pets the watchdog, at least."""
LAST_BEAT_S: Final = 5.0
"""How long a stop waits for its heartbeat, which is news and no data."""
LOOK_S: Final = 30.0
"""How often patterns are matched anew: a VM that appears has its first point a minute later at most."""


class Request(Enum):
    """What a signal asks of the daemon."""

    STOP = "stop"
    RELOAD = "reload"


class Daemon:
    """Captures every configured VM on its RPO until it is asked to stop."""

    def __init__(
        self,
        config: Config,
        *,
        load: Callable[[], Config],
        open_captures: Callable[[Config], Captures],
        clock: Clock,
        notifier: Notifier,
        poll_s: float = POLL_S,
        look_s: float = LOOK_S,
    ) -> None:
        """`load` reads the configuration again, `open_captures` makes a session of it; neither may block for long.

        Raises:
            DrsyncError: `open_captures` can't work with this configuration.
        """
        self._config = config
        self._load = load
        self._open_captures = open_captures
        self._clock = clock
        self._notifier = notifier
        self._poll_s = min(poll_s, notifier.watchdog_s / 3) if notifier.watchdog_s else poll_s
        # A SimpleQueue, since its put is the one that a signal handler may interrupt anything with.
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._busy = _Busy()
        self._look_s = look_s
        self._generation = self._new_generation(config)

    @property
    def config(self) -> Config:
        """The configuration that is worked with now."""
        return self._config

    def ask(self, request: Request) -> None:
        """Ask for something, from any thread or from a signal handler."""
        self._requests.put(request)

    def run(self) -> bool:
        """Work until asked to stop; whether every capture that ran was finished.

        If not, threads are still at it: the caller ends the process without
        waiting for them. That is safe, as a crash at any step is.

        Raises:
            RuntimeError: the scheduler itself has died; a new process has to be started.
        """
        drift = Drift(self._clock)
        self._generation.start()
        self._notifier.ready(self._summary())
        _LOGGER.info("started: %s", self._summary())
        while True:
            request = self._next_request(self._poll_s)
            if request is Request.STOP:
                return self._stop()
            if request is Request.RELOAD:
                self._reload()
            if jump_s := drift.jumped_s():
                _LOGGER.warning("clock was set by %+.0f s: captures keep their pace", jump_s)
                self._generation.reset_due_times()
            self._generation.check_alive()
            self._notifier.watchdog()

    def _next_request(self, timeout_s: float) -> Request | None:
        try:
            return self._requests.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def _new_generation(self, config: Config) -> "_Generation":
        return _Generation(config, self._open_captures(config), self._busy, self._clock, self._look_s)

    def _reload(self) -> None:
        """Take the new configuration, or say why not and go on with the old one."""
        self._notifier.reloading()
        try:
            config = self._load()
            following = self._new_generation(config)
        except DrsyncError as err:
            _LOGGER.error("kept the old configuration: %s; remedy: %s", err, err.remedy)
        else:
            self._generation.stop()
            self._config, self._generation = config, following
            self._generation.start()
            _LOGGER.info("reloaded: %s", self._summary())
        self._notifier.ready(self._summary())

    def _stop(self) -> bool:
        """Start nothing more, and give what runs its time; a second request to stop cuts that short."""
        self._notifier.stopping()
        self._generation.stop()
        deadline_s = self._clock.monotonic_s() + self._config.daemon.stop_timeout_s
        if names := self._busy.names():
            _LOGGER.info("stopping: waiting for %s", ", ".join(names))
        while self._busy.names() and self._clock.monotonic_s() < deadline_s:
            if self._next_request(min(self._poll_s, 0.1)) is Request.STOP:
                break
            self._notifier.watchdog()
        if not self._generation.wait_for_heart(LAST_BEAT_S):
            _LOGGER.info("stopped without a last heartbeat")
        if names := self._busy.names():
            _LOGGER.warning("stopped; abandoned, to be settled by the next capture: %s", ", ".join(names))
            return False
        _LOGGER.info("stopped")
        return True

    def _summary(self) -> str:
        vms, parallel = len(self._config.vms), self._config.daemon.parallel
        patterns = [f"{protect.match!r}" for protect in self._config.protects]
        found = f" and those that match {', '.join(patterns)}" if patterns else ""
        return f"{vms} {'VM' if vms == 1 else 'VMs'}{found}, {parallel} at a time, to {self._config.repository.url}"


class _Busy:
    """The VMs that are being captured now, whichever generation began it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: set[str] = set()

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._names)

    @contextmanager
    def entered(self, names: Sequence[str]) -> Iterator[bool]:
        """Whether all these VMs were free; if so, they are taken until the end of the block."""
        with self._lock:
            free = self._names.isdisjoint(names)
            if free:
                self._names.update(names)
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._names.difference_update(names)


class _Generation:
    """One configuration at work: its session, its scheduler and its jobs."""

    def __init__(self, config: Config, captures: Captures, busy: _Busy, clock: Clock, look_s: float) -> None:
        self._clock = clock
        self._busy = busy
        self._captures = captures
        self._stopped = threading.Event()
        pools = {
            CAPTURES: _Workers(config.daemon.parallel, {"thread_name_prefix": "vm"}),
            SEEDS: _Workers(config.daemon.seeds, {"thread_name_prefix": "seed"}),
        }
        defaults = {"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        self._scheduler = BlockingScheduler(executors=pools, job_defaults=defaults, timezone="UTC")
        self._scheduler.add_listener(self._on_still_busy, EVENT_JOB_MAX_INSTANCES)
        self._started = threading.Event()
        self._scheduler.add_listener(lambda _event: self._started.set(), EVENT_SCHEDULER_STARTED)
        self._thread = threading.Thread(target=self._scheduler.start, name="scheduler", daemon=True)
        jobs = [Job(vms, captures, clock, self) for vms in captured_together(config.vms)]
        self._jobs: dict[str, Job] = {job.key: job for job in jobs}
        self._named = frozenset(vm.name for vm in config.vms)
        self._heart = Heart(captures.beat, config.daemon.heartbeat_s)
        self._look_s = look_s if config.protects else None
        self._look_trouble = ""
        self._verifier = Verifier(self._vm_names, captures.scrub, self._stopped)

    def start(self) -> None:
        """Give every VM or group its job."""
        for job in self._jobs.values():
            self._schedule(job)
        self._thread.start()
        self._started.wait()
        self._heart.start()
        self._verifier.start()
        if self._look_s is not None:
            threading.Thread(target=self._keep_looking, name="patterns", daemon=True, args=[self._look_s]).start()

    def _vm_names(self) -> Sequence[str]:
        """The VMs that are captured now, whoever named or found them; not those that another drsync took over."""
        return sorted({name for job in list(self._jobs.values()) for name in job.vm_names})

    def _schedule(self, job: Job) -> None:
        self._scheduler.add_job(self._run, job.cadence, args=[job], id=job.key, name=job.key, executor=job.workers)

    def _keep_looking(self, look_s: float) -> None:
        """Match the patterns, now and then. Waits by itself: libvirt may hang, and must not hold up a capture."""
        while True:
            self._look()
            if self._stopped.wait(look_s):
                return

    def _look(self) -> None:
        try:
            vms = self._captures.vms()
        except DrsyncError as err:  # who can't be asked has not taken any VM away
            if str(err) != self._look_trouble:
                _LOGGER.error("VMs can't be looked for: %s; remedy: %s", err, err.remedy)
            self._look_trouble = str(err)
        except Exception as err:
            _LOGGER.exception("VMs can't be looked for: a bug in drsync", exc_info=err)
        else:
            self._look_trouble = ""
            if not self._stopped.is_set():
                self._take(vms)

    def _take(self, vms: Sequence[VmSettings]) -> None:
        """Begin with VMs that are new, and leave those that are gone."""
        wanted = {vm.name: vm for vm in vms}
        found = {name: job for job in list(self._jobs.values()) for name in job.found}
        for name in sorted(found.keys() - wanted.keys()):
            self._leave(name, found[name])
            _LOGGER.warning("vm=%s is gone from libvirt: no more captures; its points stay in the repository", name)
        for name in sorted(wanted.keys() - found.keys() - self._named):
            vm = wanted[name]
            self._join(vm)
            group = f", in the group {vm.group}" if vm.group else ""
            message = "vm=%s was found: it is protected from now on, every %s%s"
            _LOGGER.info(message, name, format_duration(vm.rpo_s), group)

    def _leave(self, name: str, job: Job) -> None:
        """Capture a VM no more that a pattern had found."""
        job.leave(name)
        if job.is_empty:
            del self._jobs[job.key]
            self.drop(job.key)
        self.end_seed(name)

    def _join(self, vm: VmSettings) -> None:
        """Capture a VM that a pattern has found: with the others of its group, if it is in one that is captured."""
        job = self._jobs.get(job_key(vm))
        if job is None:
            job = Job([vm], self._captures, self._clock, self, found=True)
            self._jobs[job.key] = job
            self._schedule(job)
            return
        rests = job.rests
        job.join(vm)
        if rests:
            self._schedule(job)

    def check_alive(self) -> None:
        """Check that the scheduler works; taking its lock shows that it is not stuck, either.

        Raises:
            RuntimeError: its thread has ended.
        """
        self._scheduler.get_jobs()
        if not self._thread.is_alive():
            raise RuntimeError("the scheduler's thread has ended")

    def stop(self) -> None:
        """Start no capture any more; those that run go on."""
        self._stopped.set()
        self._heart.stop()
        self._scheduler.shutdown(wait=False)

    def reset_due_times(self) -> None:
        """Tell the scheduler anew when each job is due, after the wall clock was set."""
        for name, job in list(self._jobs.items()):
            self._set_due_time(name, job.cadence.wall_time(self._clock.now()))

    def delay(self, name: str, seconds: float) -> None:
        """Let the next run of a job come `seconds` from now."""
        job = self._jobs.get(name)
        if job is not None:  # else it is gone from libvirt meanwhile
            self._set_due_time(name, job.cadence.delay(seconds, self._clock.now()))

    def is_stopped(self) -> bool:
        """Whether no more shall be begun."""
        return self._stopped.is_set()

    def begin_seed(self, seed: SeedJob) -> None:
        """Run a seed from now on, unless its VM is gone from libvirt meanwhile."""
        if self._jobs.get(seed.home.key) is seed.home:
            self._jobs[seed.key] = seed
            self._schedule(seed)

    def end_seed(self, vm_name: str) -> None:
        """Run the seed of a VM no more, if there is one."""
        key = seed_key(vm_name)
        self._jobs.pop(key, None)
        self.drop(key)

    def wait_for_heart(self, timeout_s: float) -> bool:
        """Wait, after a stop, until the repository knows the news; whether it does."""
        return self._heart.wait(timeout_s)

    def tell(self) -> None:
        """Let the repository have a heartbeat: at once, or with what else there is to tell soon."""
        self._heart.tell()

    def drop(self, name: str) -> None:
        """Run a job no more, but know of it still: what a pattern finds again is not new."""
        with suppress(JobLookupError):  # this generation was stopped meanwhile
            self._scheduler.remove_job(name)

    def _set_due_time(self, name: str, due: datetime) -> None:
        with suppress(JobLookupError):  # dropped, or this generation was stopped meanwhile
            self._scheduler.modify_job(name, next_run_time=due)

    def _run(self, job: Job) -> None:
        names = job.vm_names
        with self._busy.entered(names) as free:
            if not names or not free or self._stopped.is_set():
                return
            job.run(names)
        if not self._stopped.is_set():
            job.settle()

    def _on_still_busy(self, event: JobSubmissionEvent) -> None:
        _LOGGER.debug("vm=%s is still busy with the capture before", event.job_id)
        if (job := self._jobs.get(event.job_id)) is not None:
            job.cadence.skipped()


class _Workers(ThreadPoolExecutor):  # type: ignore[misc]  # APScheduler 3.x has no types
    """Workers, for whom a job may have to wait; its cadence reckons from when it began to."""

    def _do_submit_job(self, job: ApsJob, run_times: Sequence[datetime]) -> None:
        job.args[0].cadence.fired()
        super()._do_submit_job(job, run_times)
