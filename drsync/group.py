"""Captures several VMs at one instant: a consistency group.

Each member runs its own cycle in a thread of its own; at the steps of `quiesce.Step`
they wait for each other:

    web  survey ─┤ layers ready ─┤ freeze ─┤ pause ─┤ CALL ─┤ resume, thaw, copy ─┤ ship
    db   survey ─┤ layers ready ─┤ freeze ─┤ pause ─┤ CALL ─┤ resume, thaw, copy ─┤ ship
              changed?        ready     frozen   paused  captured             copied

No guest runs on (or writes on, where none is paused) before the instant of every member is
fixed. So what one member did because of something that another did after its instant, is
in no point: the points of one group instant fit together.

A member that fails, or does not come in time, is left behind: the others go on and
take their points, which then say that they are not group-consistent, and why.
"""

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from drsync.model import CaptureId
from drsync.quiesce import Company, Step

T = TypeVar("T")

_DYING_S: Final = 60.0
"""How long an interrupted group may take to let its guests go."""


class GroupAbandoned(Exception):
    """The program is being ended; the member's cycle ends where it waits."""


@dataclass(slots=True)
class _Instant:
    """When a member was captured."""

    capture: CaptureId
    began_s: float
    ended_s: float


class Assembly:
    """Where the members of a group wait for each other. Thread-safe."""

    def __init__(
        self,
        group: str,
        members: Sequence[str],
        *,
        pauses: bool,
        gather_s: float,
        copy_s: float,
        absent: Mapping[str, str] | None = None,
    ) -> None:
        """How long is waited for a member: `gather_s` until its layers are ready, `copy_s` until they are written.

        `absent` are members that are not captured at all, and why.
        """
        self.group = group
        self.pauses = pauses
        self._gather_s = gather_s
        self._copy_s = copy_s
        self._id = secrets.token_hex(8)
        self._condition = threading.Condition()
        self._steps = dict.fromkeys(members, 0)
        self._changed: dict[str, bool] = {}
        self._instants: dict[str, _Instant] = {}
        self._flaws = dict(absent or {})
        self._description: Mapping[str, object] | None = None
        self._abandoned = False

    def member(self, name: str) -> "GroupMember":
        """What the cycle of one member sees of this group."""
        return GroupMember(self, name)

    def vote(self, name: str, *, changed: bool) -> None:
        """Note whether a member has changed."""
        with self._condition:
            self._changed[name] = changed

    def any_changed(self, name: str) -> bool:
        """Whether one of those that are together has changed; of one left behind, whether it has itself."""
        with self._condition:
            if name not in self._steps:
                return self._changed[name]
            return any(changed for member, changed in self._changed.items() if member in self._steps)

    def meet(self, name: str, step: Step, patience_s: float | None) -> None:
        """Wait until all that are together have come to `step`; those who have not in time are left behind.

        Raises:
            GroupAbandoned: `abandon` was called.
        """
        with self._condition:
            if name in self._steps:
                self._steps[name] = step
                self._condition.notify_all()
                if patience_s is None:
                    patience_s = self._copy_s if step is Step.COPIED else self._gather_s
                if not self._condition.wait_for(lambda: self._all_at(name, step), patience_s):
                    for late in [member for member, at in self._steps.items() if at < step]:
                        self._leave(late, f"was not {step.name.lower()} in time")
            if self._abandoned:
                raise GroupAbandoned

    def leave(self, name: str, why: str) -> None:
        """A member takes no further part; `why` is empty if its cycle ended well, with a point or without one."""
        with self._condition:
            took_point = self._steps.get(name, 0) >= Step.COPIED
            self._leave(name, why or ("" if took_point else "took no point"))

    def captured(self, name: str, instant: _Instant, *, still: bool) -> None:
        """Note a member's instant."""
        with self._condition:
            self._instants[name] = instant
            if not still:
                self._flaws.setdefault(name, "did not stand still at the instant")

    def abandon(self) -> None:
        """Let everybody who waits, or will wait, give up."""
        with self._condition:
            self._abandoned = True
            self._condition.notify_all()

    def described(self, name: str) -> Mapping[str, object]:
        """What a member's point tells of its group: the same for all that have come to COPIED together."""
        with self._condition:
            if name not in self._steps:
                return self._describe([name])
            if self._description is None:
                self._description = self._describe(sorted(set(self._steps) & set(self._instants)))
            return self._description

    def _describe(self, members: Sequence[str]) -> Mapping[str, object]:
        instants = {member: self._instants[member] for member in members}
        flaws = [f"{member} {why}" for member, why in sorted(self._flaws.items())]
        skew_s = max(i.ended_s for i in instants.values()) - min(i.began_s for i in instants.values())
        return {
            "name": self.group,
            "id": self._id,
            "consistent": not flaws,
            "reason": "; ".join(flaws),
            "skew_ms": round(skew_s * 1000, 1),
            "members": {member: instant.capture for member, instant in instants.items()},
        }

    def _all_at(self, name: str, step: Step) -> bool:
        return self._abandoned or name not in self._steps or all(at >= step for at in self._steps.values())

    def _leave(self, name: str, why: str) -> None:
        if self._steps.pop(name, None) is not None:
            if why:
                self._flaws.setdefault(name, why)
            self._condition.notify_all()


class GroupMember:
    """A Company: one member's view of its group."""

    alone = False

    def __init__(self, assembly: Assembly, name: str) -> None:
        self._assembly = assembly
        self._name = name

    @property
    def pauses(self) -> bool:
        return self._assembly.pauses

    def agree(self, *, changed: bool) -> bool:
        self._assembly.vote(self._name, changed=changed)
        self.meet(Step.SURVEYED)
        return self._assembly.any_changed(self._name)

    def meet(self, step: Step, *, patience_s: float | None = None) -> None:
        self._assembly.meet(self._name, step, patience_s)

    def captured(self, capture: CaptureId, began_s: float, ended_s: float, *, still: bool) -> None:
        instant = _Instant(capture=capture, began_s=began_s, ended_s=ended_s)
        self._assembly.captured(self._name, instant, still=still)

    def described(self) -> Mapping[str, object] | None:
        return self._assembly.described(self._name)


class _Thread(threading.Thread, Generic[T]):
    """A member's cycle: how it ends is kept, and told to the group."""

    def __init__(self, assembly: Assembly, name: str, work: Callable[[Company], T]) -> None:
        # A daemon, so that a program that is told to end need not wait for a copy to be shipped.
        super().__init__(name=f"group {assembly.group}: {name}", daemon=True)
        self._assembly = assembly
        self._member = name
        self._work = work
        self.result: T | Exception = GroupAbandoned()
        self.done = threading.Event()  # Thread.join takes a thread for ended once it was interrupted (bpo-45274)

    def run(self) -> None:
        why = ""
        try:
            self.result = self._work(self._assembly.member(self._member))
        except Exception as err:  # noqa: BLE001 - kept for the caller, whatever it is
            self.result = err
            why = f"failed: {err}"
        self._assembly.leave(self._member, why)
        self.done.set()


def run_together(
    assembly: Assembly, work: Mapping[str, Callable[[Company], T]], holds_guest: Callable[[str], bool]
) -> Mapping[str, T | Exception]:
    """Run each member's work in its own thread; what each came to.

    `holds_guest` tells whether a member's guest is held still now: when this call is
    interrupted (Ctrl-C), it returns only after no guest is.
    """
    threads = {name: _Thread(assembly, name, member) for name, member in work.items()}
    for thread in threads.values():
        thread.start()
    try:
        for thread in threads.values():
            thread.done.wait()
    except BaseException:
        assembly.abandon()
        for name, thread in threads.items():
            _wait_until_free(thread.done, name, holds_guest)
        raise
    return {name: thread.result for name, thread in threads.items()}


def _wait_until_free(done: threading.Event, name: str, holds_guest: Callable[[str], bool]) -> None:
    for _ in range(int(_DYING_S * 10)):
        if not holds_guest(name) or done.wait(0.1):
            return
