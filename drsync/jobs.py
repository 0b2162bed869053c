"""The cycles of one VM, or of the VMs of a group: a job of the daemon, which decides when it runs again.

run ──▶ capture, a cycle ──▶ history: what the log says ──▶ next slot, back-off, or never
         └ a seed is due ──▶ SeedJob, with workers of its own, until the VM comes home
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

from tenacity import RetryCallState, Retrying
from tenacity.wait import wait_exponential_jitter

from drsync.cadence import Cadence
from drsync.capture import Outcome, Result
from drsync.catalog import point_of
from drsync.config import VmSettings
from drsync.history import History, Verdict
from drsync.model import Clock, Kind, NoProgress, Progress
from drsync.units import format_duration

_LOGGER = logging.getLogger(__name__)

CAPTURES: Final = "default"
"""The workers of captures; this is APScheduler's name for them."""
SEEDS: Final = "seeds"
"""The workers of seeds."""
_PARTIAL_RETRIES: Final = 3
"""How often a group is tried again before its next slot when only some of its members fail."""
_BACKOFF: Final = wait_exponential_jitter(initial=1, max=60, jitter=1)
"""1 s, 2 s, 4 s, ... 60 s: a glitch costs a second, and an outage of hours a request a minute."""


class Captures(Protocol):
    """What the daemon needs of a session (duties.Duties). Called from several threads, for one VM by one at a time."""

    def capture(self, vm_name: str, progress: Progress, /, *, may_seed: bool, stop: Callable[[], bool]) -> Outcome:
        """One cycle of one VM; `stop` ends a seed."""
        ...

    def capture_together(
        self, names: Sequence[str], progress_of: Callable[[str], Progress], /, *, may_seed: bool
    ) -> Mapping[str, Outcome | Exception]:
        """One cycle of each VM of a group, at one instant; how each one ended."""
        ...

    def vms(self) -> Sequence[VmSettings]:
        """The VMs to protect now, those that patterns find among them; may take seconds."""
        ...

    def scrub(self, vm: str, /, *, stop: Callable[[], bool]) -> object:
        """Read what is due of what is stored of a VM, and check it; `stop` ends that."""
        ...

    def beat(self) -> None:
        """Tell the repository that this host lives, and when each VM was last seen unchanged."""
        ...


class Agenda(Protocol):
    """What a job asks of who schedules it."""

    def is_stopped(self) -> bool:
        """Whether no more shall be begun."""
        ...

    def delay(self, name: str, seconds: float) -> None:
        """Let the next run of a job come `seconds` from now."""
        ...

    def drop(self, name: str) -> None:
        """Run a job no more, but know of it still: what a pattern finds again is not new."""
        ...

    def begin_seed(self, seed: "SeedJob") -> None:
        """Run a seed from now on, unless its VM is gone from libvirt meanwhile."""
        ...

    def end_seed(self, vm_name: str) -> None:
        """Run the seed of a VM no more, if there is one."""
        ...

    def tell(self) -> None:
        """There is news for the repository: let it have a heartbeat, now or with others' soon."""
        ...


class Job:
    """The cycles of one VM, or of the VMs of one group: runs them, and decides when to try again.

    A VM that has to be seeded is left out until its SeedJob is done.
    """

    workers: str = CAPTURES
    may_seed: bool = False

    def __init__(
        self,
        vms: Sequence[VmSettings],
        captures: Captures,
        clock: Clock,
        agenda: Agenda,
        *,
        found: bool = False,
    ) -> None:
        """`found`: a pattern has found the VM, and may lose it again."""
        first = vms[0]
        self.found = {first.name} if found else set[str]()
        self.key = job_key(first)
        self.cadence = Cadence(clock, first.group or first.name, first.rpo_s)
        self._is_group = first.group is not None
        self._label = f"vm={first.name}" if first.group is None else f"group={first.group}"
        self._rpo_s = first.rpo_s
        self._is_too_slow = False
        self._vms = {vm.name: vm for vm in vms}
        self._histories = {vm.name: History(vm, clock) for vm in vms}
        self._seeding: set[str] = set()
        self._to_seed: list[str] = []
        self._captures = captures
        self._clock = clock
        self._agenda = agenda

    @property
    def vm_names(self) -> Sequence[str]:
        """The VMs to capture now: neither given up nor being seeded."""
        return [name for name in list(self._histories) if name not in self._seeding]

    @property
    def rests(self) -> bool:
        """Whether all its VMs were given up, so that it is not scheduled any more."""
        return not self._histories

    @property
    def is_empty(self) -> bool:
        """Whether it has no VM at all any more, not even one that was given up."""
        return not self._vms

    def join(self, vm: VmSettings) -> None:
        """Capture one more VM of the group, from the next cycle on."""
        self.found.add(vm.name)
        self._vms[vm.name] = vm
        self._histories[vm.name] = History(vm, self._clock)

    def leave(self, name: str) -> None:
        """Forget a VM that a pattern had found; a cycle of it that runs now ends as it may."""
        self.found.discard(name)
        self._vms.pop(name, None)
        self._histories.pop(name, None)
        self._seeding.discard(name)

    def run(self, names: Sequence[str]) -> None:
        """One cycle of the VMs in `names`; whatever goes wrong in it stays in it."""
        started_s = self._clock.monotonic_s()
        results = self._capture(names)
        took_s = self._clock.monotonic_s() - started_s
        is_overdue = self.cadence.ended(usual=all(_is_usual(result) for result in results.values()))
        self._say_if_too_slow()
        for name, result in results.items():
            self._note(name, result, took_s)
        if not self._histories:
            self._agenda.drop(self.key)
        elif (failures := self._failures_to_retry(names)) is not None:
            self._agenda.delay(self.key, backoff_s(failures))
        elif is_overdue:
            self._agenda.delay(self.key, 0.0)
        self._agenda.tell()

    def settle(self) -> None:
        """Called after `run`, when its VMs are free again: begin the seeds that are due, which may start at once."""
        for name in self._to_seed:
            vm, history = self._vms.get(name), self._histories.get(name)
            if vm is not None and history is not None:  # else it is gone from libvirt meanwhile
                self._agenda.begin_seed(SeedJob(vm, history, self, self._captures, self._clock, self._agenda))
        self._to_seed = []

    def seeded(self, name: str) -> None:
        """Capture a VM again: its seed is done."""
        self._seeding.discard(name)

    def give_up(self, name: str) -> None:
        """Capture a VM no more: another drsync has taken it over."""
        self._histories.pop(name, None)
        self._seeding.discard(name)
        if not self._histories:
            self._agenda.drop(self.key)

    def _say_if_too_slow(self) -> None:
        """Say once that points take too long for the RPO, even one right behind the other."""
        too_slow = self.cadence.lead_s * 2 > self._rpo_s
        if too_slow and not self._is_too_slow:
            message = "%s takes %s to get a point into the repository: an RPO of %s can't be held"
            _LOGGER.warning(message, self._label, format_duration(self.cadence.lead_s), format_duration(self._rpo_s))
        self._is_too_slow = too_slow

    def _note(self, name: str, result: Outcome | Exception, took_s: float) -> None:
        history = self._histories.get(name)
        if history is None:  # it is gone from libvirt meanwhile
            return
        if history.note(result, took_s) is Verdict.NEVER:
            self._histories.pop(name, None)
        else:
            self._go_on(name, result)

    def _go_on(self, name: str, result: Outcome | Exception) -> None:
        """What comes next for a VM that was not given up."""
        if _is_seed_due(result):
            self._seeding.add(name)
            self._to_seed.append(name)

    def _capture(self, names: Sequence[str]) -> Mapping[str, Outcome | Exception]:
        stop = self._agenda.is_stopped
        try:
            if self._is_group:
                return self._captures.capture_together(names, lambda _name: NoProgress(), may_seed=self.may_seed)
            return {
                name: self._captures.capture(name, NoProgress(), may_seed=self.may_seed, stop=stop) for name in names
            }
        except Exception as err:  # noqa: BLE001  a bug in one VM's cycle must not stop the others
            return dict.fromkeys(names, err)

    def _failures_to_retry(self, names: Sequence[str]) -> int | None:
        """How many failures in a row there were, if it is to be tried again before the next slot.

        A group is tried again at once a few times, as points without one member are no
        group's points; but one that stays away does not make the others be captured all the time.
        """
        histories = [self._histories[name] for name in names if name in self._histories]
        due = [history.failures for history in histories if history.verdict is Verdict.SOON]
        if not due:
            return None
        return max(due) if len(due) == len(histories) or max(due) <= _PARTIAL_RETRIES else None


class SeedJob(Job):
    """The seed of one VM: runs until it is done, then gives the VM back to the job that it is from."""

    workers = SEEDS
    may_seed = True

    def __init__(
        self,
        vm: VmSettings,
        history: History,
        home: Job,
        captures: Captures,
        clock: Clock,
        agenda: Agenda,
    ) -> None:
        super().__init__([replace(vm, group=None)], captures, clock, agenda)
        self.key = seed_key(vm.name)
        self.cadence.delay(0.0, clock.now())
        self._name = vm.name
        self._histories = {vm.name: history}
        self.home = home
        self._is_done = False

    def settle(self) -> None:
        if self._histories and not self._is_done:
            return
        self._agenda.end_seed(self._name)  # before the VM goes home, which may ask for its next seed at once
        if self._histories:
            self.home.seeded(self._name)
        else:
            self.home.give_up(self._name)

    def _go_on(self, name: str, result: Outcome | Exception) -> None:
        self._is_done = isinstance(result, Outcome) and not _is_seed_due(result)


def _is_usual(result: Outcome | Exception) -> bool:
    """Whether a cycle was one as most are: it neither read everything nor sent what an earlier one had left."""
    if not isinstance(result, Outcome) or result.shipped_before is not None:
        return False
    if result.result is not Result.COMMITTED or result.segment is None:
        return result.result is Result.UNCHANGED
    point = point_of(result.segment, None)
    return point is not None and point.kind is Kind.INCREMENTAL


def _is_seed_due(result: Outcome | Exception) -> bool:
    return isinstance(result, Outcome) and result.result in {Result.SEED_DUE, Result.SEEDING}


def job_key(vm: VmSettings) -> str:
    """The key of a VM's job among the jobs: its group's, if it is in one."""
    return vm.name if vm.group is None else f"group {vm.group}"


def seed_key(vm_name: str) -> str:
    """The key of a VM's seed among the jobs."""
    return f"seed {vm_name}"  # no VM's name has a space in it


def backoff_s(failures: int) -> float:
    """How long to wait before the next attempt, after so many failures in a row."""
    attempt = RetryCallState(Retrying(), None, (), {})
    attempt.attempt_number = failures
    return _BACKOFF(attempt)
