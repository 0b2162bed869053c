"""The scheduler: one job a VM on its RPO, a limited number at a time, and nothing else.

    run ──▶ generation (configuration, session, APScheduler) ──▶ a _VmJob per VM ──▶ Session.capture
     │        └ with [[protect]]: asks libvirt every half minute which VMs there are
     │  SIGHUP: a new generation takes over; captures that run go on to their end
     └─ SIGTERM: no new capture; those that run may finish for `stop_timeout`

A job that fails with something that a retry may cure comes again after a
back-off that grows to a minute; it gives its place to other VMs meanwhile. Any
other failure waits for the next slot. A VM that another drsync took over is
left alone until the configuration is read again. Every outcome is one line.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from enum import Enum
from typing import Final, Protocol

from apscheduler.events import EVENT_JOB_MAX_INSTANCES, EVENT_SCHEDULER_STARTED, JobSubmissionEvent
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.blocking import BlockingScheduler
from tenacity import RetryCallState, Retrying
from tenacity.wait import wait_exponential_jitter

from drsync.cadence import Cadence, Drift
from drsync.capture import Outcome, Result
from drsync.catalog import point_of
from drsync.config import Config, VmSettings
from drsync.errors import DrsyncError, Fenced
from drsync.model import Clock, NoProgress, Progress
from drsync.systemd import Notifier
from drsync.units import format_duration, format_size

_LOGGER = logging.getLogger(__name__)

POLL_S: Final = 1.0
"""How often the daemon looks at its clocks and pets the watchdog, at least."""
LOOK_S: Final = 30.0
"""How often patterns are matched anew: a VM that appears has its first point a minute later at most."""
_REPEAT_S: Final = 3600.0
"""A failure that goes on is logged once in this time; each attempt would bury what is new."""
_BACKOFF: Final = wait_exponential_jitter(initial=1, max=60, jitter=1)
"""1 s, 2 s, 4 s, ... 60 s: a glitch costs a second, and an outage of hours a request a minute."""


class Captures(Protocol):
    """What the daemon needs of a session. Called from several threads, for one VM by one at a time."""

    def capture(self, vm_name: str, progress: Progress, /) -> Outcome:
        """One cycle of one VM."""
        ...

    def vms(self) -> Sequence[VmSettings]:
        """The VMs to protect now, those that patterns find among them; may take seconds."""
        ...

    def beat(self) -> None:
        """Tell the repository that this host lives, and when each VM was last seen unchanged."""
        ...


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
    def entered(self, name: str) -> Iterator[bool]:
        """Whether the VM was free; it is taken until the end of the block."""
        with self._lock:
            free = name not in self._names
            self._names.add(name)
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._names.discard(name)


class _Generation:
    """One configuration at work: its session, its scheduler and its jobs."""

    def __init__(self, config: Config, captures: Captures, busy: _Busy, clock: Clock, look_s: float) -> None:
        self._clock = clock
        self._busy = busy
        self._captures = captures
        self._stopped = threading.Event()
        pool = ThreadPoolExecutor(config.daemon.parallel, {"thread_name_prefix": "vm"})
        defaults = {"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        self._scheduler = BlockingScheduler(executors={"default": pool}, job_defaults=defaults, timezone="UTC")
        self._scheduler.add_listener(self._on_still_busy, EVENT_JOB_MAX_INSTANCES)
        self._started = threading.Event()
        self._scheduler.add_listener(lambda _event: self._started.set(), EVENT_SCHEDULER_STARTED)
        self._thread = threading.Thread(target=self._scheduler.start, name="scheduler", daemon=True)
        self._jobs: dict[str, _VmJob] = {vm.name: _VmJob(vm, captures, clock, self) for vm in config.vms}
        self._named = frozenset(self._jobs)
        self._look_s = look_s if config.protects else None
        self._look_trouble = ""

    def start(self) -> None:
        """Give every VM its job."""
        for job in self._jobs.values():
            self._schedule(job)
        self._thread.start()
        self._started.wait()
        if self._look_s is not None:
            threading.Thread(target=self._keep_looking, name="patterns", daemon=True, args=[self._look_s]).start()

    def _schedule(self, job: "_VmJob") -> None:
        name = job.vm.name
        self._scheduler.add_job(self._run, job.cadence, args=[job], id=name, name=name)

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
        for name in sorted(self._jobs.keys() - wanted.keys() - self._named):
            del self._jobs[name]
            self.drop(name)
            _LOGGER.warning("vm=%s is gone from libvirt: no more captures; its points stay in the repository", name)
        for name in sorted(wanted.keys() - self._jobs.keys()):
            self._jobs[name] = _VmJob(wanted[name], self._captures, self._clock, self)
            self._schedule(self._jobs[name])
            _LOGGER.info("vm=%s was found: it is protected from now on, every %s", name, _rpo(wanted[name]))

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
        self._scheduler.shutdown(wait=False)

    def reset_due_times(self) -> None:
        """Tell the scheduler anew when each job is due, after the wall clock was set."""
        for name, job in list(self._jobs.items()):
            self._set_due_time(name, job.cadence.wall_time(self._clock.now()))

    def delay(self, name: str, seconds: float) -> None:
        """Let the next run of a VM come `seconds` from now."""
        job = self._jobs.get(name)
        if job is not None:  # else it is gone from libvirt meanwhile
            self._set_due_time(name, job.cadence.delay(seconds, self._clock.now()))

    def drop(self, name: str) -> None:
        """Run a VM no more."""
        with suppress(JobLookupError):  # this generation was stopped meanwhile
            self._scheduler.remove_job(name)

    def _set_due_time(self, name: str, due: datetime) -> None:
        with suppress(JobLookupError):  # dropped, or this generation was stopped meanwhile
            self._scheduler.modify_job(name, next_run_time=due)

    def _run(self, job: "_VmJob") -> None:
        with self._busy.entered(job.vm.name) as free:
            if free and not self._stopped.is_set():
                job.run()

    def _on_still_busy(self, event: JobSubmissionEvent) -> None:
        _LOGGER.debug("vm=%s is still busy with the capture before", event.job_id)


class _VmJob:
    """The cycles of one VM: runs them, says how they ended, and decides when to try again."""

    def __init__(self, vm: VmSettings, captures: Captures, clock: Clock, generation: _Generation) -> None:
        self.vm = vm
        self.cadence = Cadence(clock, vm.name, vm.rpo_s)
        self._captures = captures
        self._clock = clock
        self._generation = generation
        self._failures = 0
        self._failing_since_s = 0.0
        self._said: type[Exception] | None = None
        self._said_at_s = 0.0

    def run(self) -> None:
        """One cycle; whatever goes wrong in it stays in it."""
        started_s = self._clock.monotonic_s()
        try:
            outcome = self._captures.capture(self.vm.name, NoProgress())
        except Fenced as err:
            self._generation.drop(self.vm.name)
            _LOGGER.error("vm=%s fenced: %s, until drsync is reloaded; remedy: %s", self.vm.name, err, err.remedy)
        except DrsyncError as err:
            self._failed(err, retry=err.retryable)
        except Exception as err:  # noqa: BLE001  a bug in one VM's cycle must not stop the others
            self._failed(err, retry=True)
        else:
            self._succeeded(outcome, self._clock.monotonic_s() - started_s)
        self._beat()

    def _succeeded(self, outcome: Outcome, took_s: float) -> None:
        if self._failures:
            failing = format_duration(self._clock.monotonic_s() - self._failing_since_s)
            _LOGGER.info("vm=%s works again after %d failures in %s", self.vm.name, self._failures, failing)
        self._failures, self._said = 0, None
        level = logging.DEBUG if outcome.result is Result.UNCHANGED else logging.INFO
        _LOGGER.log(level, "%s", outcome_line(outcome, took_s))

    def _failed(self, err: Exception, *, retry: bool) -> None:
        now_s = self._clock.monotonic_s()
        self._failures += 1
        if self._failures == 1:
            self._failing_since_s = now_s
        if retry:
            self._generation.delay(self.vm.name, backoff_s(self._failures))
        if self._said is not type(err) or now_s - self._said_at_s >= _REPEAT_S:
            self._said, self._said_at_s = type(err), now_s
            self._say(err, "with back-off" if retry else f"every {format_duration(self.vm.rpo_s)}")

    def _say(self, err: Exception, when: str) -> None:
        vm, count = self.vm.name, self._failures
        if isinstance(err, DrsyncError):
            message = "vm=%s failed code=%d times=%d, tried again %s: %s; remedy: %s"
            _LOGGER.error(message, vm, err.code, count, when, err, err.remedy)
        else:
            _LOGGER.error("vm=%s failed times=%d, tried again %s: a bug in drsync", vm, count, when, exc_info=err)

    def _beat(self) -> None:
        try:
            self._captures.beat()
        except Exception as err:  # noqa: BLE001  the heartbeat is news, not data: the next one tells as much
            _LOGGER.debug("vm=%s no heartbeat: %s", self.vm.name, err)


def _rpo(vm: VmSettings) -> str:
    return format_duration(vm.rpo_s)


def backoff_s(failures: int) -> float:
    """How long to wait before the next attempt, after so many failures in a row."""
    attempt = RetryCallState(Retrying(), None, (), {})
    attempt.attempt_number = failures
    return _BACKOFF(attempt)


def outcome_line(outcome: Outcome, took_s: float) -> str:
    """What the log says of a cycle that went well."""
    took = f"took={took_s:.2f}s"
    point = point_of(outcome.segment, None) if outcome.segment is not None else None
    if point is None or outcome.result is Result.UNCHANGED:
        return f"vm={outcome.vm} unchanged point={point.number if point else '-'} {took}"
    sizes = f"changed={_size(point.changed_bytes)} stored={_size(point.stored_bytes)}"
    reason = f' reason="{point.reason}"' if point.reason else ""
    return f"vm={outcome.vm} point={point.number} kind={point.kind} {sizes} {took}{reason}"


def _size(size_bytes: int) -> str:
    return format_size(size_bytes).replace(" ", "")
