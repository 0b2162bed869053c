"""What is done around the instant of a capture, so that a point is worth more than a power cut would leave.

    recover ─▶ … survey … ─▶ agree ─▶ layers ready ─▶ instant ─▶ copying ─▶ described ─▶ … ship … ─▶ settle
                                                         │
       reach the agent ─ ready ─ freeze ─ frozen ─ pause ─ paused ─ CALL ─ captured ─ resume, thaw

`Quiesce` is what a cycle knows. The words between the dashes are where the members of a
group wait for each other (`Company`); a VM that is `Alone` waits nowhere.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol

from drsync.errors import FreezeFailed, GuestHeld
from drsync.hold import LET_GO_S, Hold, OpenAgent, OpenSource, let_go_of_the_dead
from drsync.model import CaptureId, Clock, Consistency, OnFreezeFailure
from drsync.source import CaptureResult, Instant, Source, at_once
from drsync.spool import VmSpool


class Step(IntEnum):
    """How far a member of a group has come; at each step it waits for the others."""

    SURVEYED = 1
    READY = 2
    FROZEN = 3
    PAUSED = 4
    CAPTURED = 5
    COPIED = 6


class Company(Protocol):
    """Those who are captured at the same instant."""

    @property
    def alone(self) -> bool:
        """Whether there is nobody else."""
        ...

    @property
    def pauses(self) -> bool:
        """Whether the guests are paused until all are captured."""
        ...

    def agree(self, *, changed: bool) -> bool:
        """Wait until all are surveyed; whether a point is to be taken, as something changed in one of them."""
        ...

    def meet(self, step: Step, *, patience_s: float | None = None) -> None:
        """Wait until all have come to `step`, or for `patience_s`: then those who have not are left behind."""
        ...

    def captured(self, capture: CaptureId, began_s: float, ended_s: float, *, still: bool) -> None:
        """Tell that the instant lies between two monotonic times, and whether the guest stood still in it."""
        ...

    def described(self) -> Mapping[str, object] | None:
        """What a point tells of its group, when all have been copied; None if it has none."""
        ...


class Alone:
    """The Company of a VM that has none."""

    alone = True
    pauses = False

    def agree(self, *, changed: bool) -> bool:
        return changed

    def meet(self, step: Step, *, patience_s: float | None = None) -> None:
        pass

    def captured(self, capture: CaptureId, began_s: float, ended_s: float, *, still: bool) -> None:
        pass

    def described(self) -> Mapping[str, object] | None:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuiescePolicy:
    """What is asked for."""

    consistency: Consistency = Consistency.CRASH
    limit_s: float = 10.0
    """The longest that a guest may be held still."""
    on_failure: OnFreezeFailure = OnFreezeFailure.CRASH
    let_go_s: float = LET_GO_S

    @property
    def freezes(self) -> bool:
        return self.consistency is Consistency.FILESYSTEM


class Quiescing(Protocol):
    """What a cycle calls, in this order."""

    def recover(self) -> None:
        """Let the guest go if a process that has ended held it."""
        ...

    def agree(self, *, changed: bool) -> bool:
        """Whether to take a point, given whether this VM has changed."""
        ...

    def instant(self, capture: CaptureId, source: Source) -> Instant:
        """What to do around the call that fixes the instant."""
        ...

    def described(self, result: CaptureResult) -> CaptureResult:
        """The result, with what was reached; waits for the others of a group."""
        ...

    def settle(self) -> None:
        """Check, at the end, that the guest was let go.

        Raises:
            GuestHeld: that is not known.
        """
        ...


class NoQuiesce:
    """The Quiescing of a guest that nobody touches."""

    def recover(self) -> None:
        pass

    def agree(self, *, changed: bool) -> bool:
        return changed

    def instant(self, capture: CaptureId, source: Source) -> Instant:
        return at_once

    def described(self, result: CaptureResult) -> CaptureResult:
        return result

    def settle(self) -> None:
        pass


class Quiesce:
    """The Quiescing of one cycle of one VM."""

    def __init__(
        self,
        policy: QuiescePolicy,
        spool: VmSpool,
        open_agent: OpenAgent | None,
        open_source: OpenSource,
        clock: Clock,
        company: Company | None = None,
    ) -> None:
        self._policy = policy
        self._spool = spool
        self._open_agent = open_agent
        self._open_source = open_source
        self._clock = clock
        self._company = company or Alone()
        self._hold: Hold | None = None
        self._held_problem = "it did not answer"

    def recover(self) -> None:
        self._held_problem = let_go_of_the_dead(self._spool, self._open_agent, self._open_source) or self._held_problem

    def agree(self, *, changed: bool) -> bool:
        return self._company.agree(changed=changed)

    def instant(self, capture: CaptureId, source: Source) -> Instant:
        if self._company.alone and not self._policy.freezes:
            return at_once
        return lambda: self._around(capture, source)

    @contextmanager
    def _around(self, capture: CaptureId, source: Source) -> Iterator[float]:
        self._hold = hold = Hold(
            self._spool,
            self._open_agent,
            self._open_source,
            self._clock,
            limit_s=self._policy.limit_s,
            let_go_s=self._policy.let_go_s,
        )
        try:
            if self._policy.freezes:
                hold.reach(source)
                self._insist(hold)
            self._company.meet(Step.READY)
            hold.begin(pauses=self._company.pauses)
            still = self._stand_still(hold, source)
            began_s = self._clock.monotonic_s()
            yield hold.call_limit_s()
            ended_s = self._clock.monotonic_s()
            still = still and (self._company.pauses or hold.is_frozen)
            self._company.captured(capture, began_s, ended_s, still=still)
            self._company.meet(Step.CAPTURED, patience_s=hold.patience_s())
        finally:
            hold.let_go(source)
        self._insist(hold)

    def _stand_still(self, hold: Hold, source: Source) -> bool:
        """Freeze, then pause, each when all others are as far; whether the guest can write nothing any more."""
        hold.freeze()
        self._insist(hold)
        self._company.meet(Step.FROZEN, patience_s=hold.patience_s())
        still = hold.pause(source) if self._company.pauses else hold.is_frozen
        self._company.meet(Step.PAUSED, patience_s=hold.patience_s())
        return still

    def _insist(self, hold: Hold) -> None:
        if self._policy.freezes and hold.problem and self._policy.on_failure is OnFreezeFailure.FAIL:
            raise FreezeFailed(vm=hold.vm, problem=hold.problem)

    def described(self, result: CaptureResult) -> CaptureResult:
        if self._hold is None:
            return result
        self._company.meet(Step.COPIED)
        frozen = self._policy.freezes and not self._hold.problem
        reached = Consistency.FILESYSTEM if frozen else result.consistency
        told: dict[str, object] = {
            "asked": self._policy.consistency,
            "reached": reached,
            "reason": self._hold.problem if self._policy.freezes else "",
            "file_systems": self._hold.file_systems,
            "frozen_ms": _rounded(self._hold.frozen_ms),
            "paused_ms": _rounded(self._hold.paused_ms),
        }
        if group := self._company.described():
            told["group"] = group
        return replace(result, consistency=reached, definition={**result.definition, "quiesce": told})

    def settle(self) -> None:
        if held := self._spool.held():
            raise GuestHeld(vm=self._spool.vm, what=held.what, problem=self._held_problem)


def _rounded(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds, 1)
