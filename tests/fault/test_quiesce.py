"""A guest is held still around the instant and let go again, whatever its agent, its QEMU or drsync do."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_agent import HANG_UP, Answer, FakeAgent, fake_agent, refusal
from protected_vm import VM, Contents, ProtectedVm

from drsync.capture import Outcome
from drsync.catalog import Point, QuiesceTold, point_of
from drsync.errors import CaptureFailed, FreezeFailed, GuestHeld, SpoolUnusable
from drsync.model import Consistency, OnFreezeFailure, SystemClock
from drsync.quiesce import Quiesce, QuiescePolicy
from drsync.source.agent import AgentSocket
from drsync.spool import VmSpool, boot_id
from drsync.spooled import HeldGuest


class Lab:
    """A VM with one point and writes since, and an agent in its guest."""

    def __init__(self, place: Path, agent: FakeAgent) -> None:
        self.vm = ProtectedVm(place)
        self.agent = agent
        self.vm.cycle()
        self.vm.write()
        self.spool = self.vm.spool().vm(VM)
        self.at_the_instant: Callable[[], None] = lambda: None
        contents = self.vm.contents

        def witness() -> Contents:
            self.at_the_instant()
            return contents()

        self.vm.contents = witness  # type: ignore[method-assign]  # what the Witness calls within the instant

    def capture(
        self,
        *,
        consistency: Consistency = Consistency.FILESYSTEM,
        limit_s: float = 5.0,
        let_go_s: float = 0.2,
        on_failure: OnFreezeFailure = OnFreezeFailure.CRASH,
        agent_timeout_s: float = 0.3,
    ) -> Outcome:
        policy = QuiescePolicy(consistency=consistency, limit_s=limit_s, let_go_s=let_go_s, on_failure=on_failure)
        clock = SystemClock()

        def open_agent() -> AgentSocket:
            return AgentSocket(self.agent.path, clock=clock, timeout_s=agent_timeout_s)

        return self.vm.cycle(quiesce=Quiesce(policy, self.spool, open_agent, self.vm.source, clock))

    def point(self, **options: Any) -> tuple[Point, QuiesceTold]:
        outcome = self.capture(**options)
        assert outcome.segment is not None
        return told_of(outcome)

    def check_let_go(self) -> None:
        assert not self.agent.frozen
        assert self.vm.vm.running
        assert self.spool.held() is None


def told_of(outcome: Outcome) -> tuple[Point, QuiesceTold]:
    assert outcome.segment is not None
    point = point_of(outcome.segment, None)
    assert point is not None
    assert point.quiesce is not None
    return point, point.quiesce


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with fake_agent() as agent:
        yield Lab(tmp_path, agent)


def test_a_guest_is_frozen_at_the_instant_noted_before_and_thawed_before_anything_is_copied(lab: Lab) -> None:
    seen: list[tuple[str, bool, bool]] = []

    def see(when: str) -> None:
        seen.append((when, lab.agent.frozen, lab.spool.held() is not None))

    def freeze(command: str, arguments: dict[str, Any]) -> Answer:
        see("freezing")
        return lab.agent.answer(command, arguments)

    lab.at_the_instant = lambda: see("instant")
    lab.vm.vm.during_capture = lambda: see("copying")
    lab.agent.script["guest-fsfreeze-freeze"] = freeze
    point, told = lab.point()
    assert seen == [("freezing", False, True), ("instant", True, True), ("copying", False, False)]
    assert point.consistency is Consistency.FILESYSTEM
    assert (told.asked, told.reason, told.file_systems) == (Consistency.FILESYSTEM, "", 2)
    assert told.frozen_ms is not None
    assert 0 < told.frozen_ms < 5000
    assert told.paused_ms is None
    lab.check_let_go()
    lab.vm.check_settled()


def test_a_crash_consistent_point_asks_the_guest_nothing(lab: Lab) -> None:
    outcome = lab.capture(consistency=Consistency.CRASH)
    assert outcome.segment is not None
    point = point_of(outcome.segment, None)
    assert point is not None
    assert (point.consistency, point.quiesce) == (Consistency.CRASH, None)
    assert lab.agent.commands == []


def hangs(lab: Lab) -> None:
    lab.agent.hangs.set()


def is_not_there(lab: Lab) -> None:
    lab.agent.close()


def refuses(lab: Lab) -> None:
    lab.agent.script["guest-fsfreeze-freeze"] = lambda *_: refusal("hook script has failed with status 1")


def was_frozen_already(lab: Lab) -> None:
    lab.agent.frozen = True


def has_nothing_to_freeze(lab: Lab) -> None:
    lab.agent.file_systems = 0


def thaws_by_itself(lab: Lab) -> None:
    lab.agent.thaws_itself = True


def hangs_up_while_freezing(lab: Lab) -> None:
    lab.agent.script["guest-fsfreeze-freeze"] = lambda c, a: (lab.agent.answer(c, a), HANG_UP)[1]


def answers_nonsense(lab: Lab) -> None:
    lab.agent.script["guest-fsfreeze-freeze"] = lambda c, a: (lab.agent.answer(c, a), b"{}\n")[1]


TROUBLES = [
    (hangs, "no answer from the guest agent: it gave no answer in time"),
    (is_not_there, "no answer from the guest agent: nobody listens at "),
    (refuses, "guest-fsfreeze-freeze: hook script has failed with status 1"),
    (was_frozen_already, "the file systems are frozen already, by another program"),
    (has_nothing_to_freeze, "the guest agent found no file system to freeze"),
    (thaws_by_itself, "2 file systems were frozen, but 0 were still so at the end"),
    (hangs_up_while_freezing, "the guest did not freeze: QEMU closed the connection"),
    (answers_nonsense, "the guest did not freeze: guest-fsfreeze-freeze is answered with nonsense"),
]


@pytest.mark.parametrize(("trouble", "reason"), TROUBLES, ids=[t.__name__ for t, _ in TROUBLES])
def test_a_guest_that_was_not_frozen_makes_a_crash_consistent_point_that_says_why(
    lab: Lab, trouble: Callable[[Lab], None], reason: str
) -> None:
    trouble(lab)
    point, told = lab.point()
    assert point.consistency is Consistency.CRASH
    assert told.reason.startswith(reason)
    if trouble is was_frozen_already:
        assert lab.agent.frozen, "it was not ours to thaw"
        lab.agent.frozen = False
    lab.check_let_go()
    lab.vm.check_settled()


@pytest.mark.parametrize(("trouble", "reason"), TROUBLES, ids=[t.__name__ for t, _ in TROUBLES])
def test_or_no_point_if_that_is_wanted(lab: Lab, trouble: Callable[[Lab], None], reason: str) -> None:
    trouble(lab)
    with pytest.raises(FreezeFailed) as caught:
        lab.capture(on_failure=OnFreezeFailure.FAIL)
    assert reason in str(caught.value)
    lab.agent.frozen = lab.agent.frozen and trouble is not was_frozen_already
    lab.check_let_go()
    assert len(lab.vm.check_points()) == 1
    assert lab.vm.spooled() == []
    assert "no filesystem-consistent point" in lab.spool.state().error
    lab.vm.cycle()
    lab.vm.check_settled()


def test_an_agent_that_hangs_is_never_asked_to_freeze(lab: Lab) -> None:
    lab.agent.hangs.set()
    lab.point()
    lab.agent.hangs.clear()
    time.sleep(0.1)
    assert "guest-fsfreeze-freeze" not in lab.agent.commands
    assert lab.spool.held() is None


def test_a_guest_that_is_paused_is_not_asked(lab: Lab) -> None:
    lab.vm.vm.running = False
    _, told = lab.point()
    assert told.reason == "the guest does not run"
    assert lab.agent.commands == []
    assert not lab.vm.vm.running


def test_a_freeze_that_takes_too_long_is_given_up_and_undone(lab: Lab) -> None:
    def freeze_late(command: str, arguments: dict[str, Any]) -> Answer:
        time.sleep(0.8)
        return lab.agent.answer(command, arguments)

    lab.agent.script["guest-fsfreeze-freeze"] = freeze_late
    point, told = lab.point(limit_s=0.3, let_go_s=5, agent_timeout_s=5)
    assert point.consistency is Consistency.CRASH
    assert told.reason == "the guest did not freeze: it gave no answer in time"
    assert lab.agent.froze.is_set()
    lab.check_let_go()


def test_a_guest_is_thawed_in_time_by_the_watchdog_when_the_instant_hangs(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    thawed_after: list[float] = []

    def hang() -> None:
        assert lab.agent.frozen
        started_s = time.monotonic()
        while lab.agent.frozen and time.monotonic() < started_s + 10:
            time.sleep(0.01)
        thawed_after.append(time.monotonic() - started_s)
        time.sleep(0.1)

    lab.at_the_instant = hang
    point, told = lab.point(limit_s=0.5)
    assert point.consistency is Consistency.CRASH
    assert told.reason == "the instant was not over in 0.5 s"
    assert thawed_after[0] < 3
    assert "vm=web is thawed by the watchdog" in caplog.text
    lab.check_let_go()


def test_a_failed_instant_lets_the_guest_go(lab: Lab) -> None:
    def fail() -> None:
        raise CaptureFailed(vm=VM, operation="transaction", problem="no")

    lab.at_the_instant = fail
    with pytest.raises(CaptureFailed):
        lab.capture()
    assert lab.agent.froze.is_set()
    lab.check_let_go()


def test_a_guest_that_does_not_thaw_is_an_error_but_its_point_is_kept_and_the_next_cycle_thaws_it(lab: Lab) -> None:
    lab.agent.script["guest-fsfreeze-thaw"] = lambda *_: refusal("not now")
    with pytest.raises(GuestHeld) as caught:
        lab.capture()
    assert caught.value.retryable
    assert str(caught.value).startswith("VM web: its guest may still be frozen: ")
    assert caught.value.remedy.startswith("drsync capture web ")
    assert lab.agent.frozen
    assert lab.spool.held() is not None
    assert lab.vm.check_settled().consistency is Consistency.CRASH
    with pytest.raises(GuestHeld, match="not now"):  # another cycle, nothing changed meanwhile
        lab.capture()
    assert "may still be frozen" in lab.spool.state().error
    lab.agent.script.clear()
    lab.vm.write()
    point, told = lab.point()
    assert (point.consistency, told.reason) == (Consistency.FILESYSTEM, "")
    assert lab.spool.state().error == ""
    lab.check_let_go()


def test_a_thaw_is_tried_again_until_it_works(lab: Lab) -> None:
    tries: list[str] = []

    def thaw(command: str, arguments: dict[str, Any]) -> Answer:
        tries.append(command)
        return lab.agent.answer(command, arguments) if len(tries) > 2 else None

    lab.agent.script["guest-fsfreeze-thaw"] = thaw
    _, told = lab.point(let_go_s=30)
    assert len(tries) == 3
    assert told.reason.startswith("the guest did not thaw at once: ")
    lab.check_let_go()


def test_a_note_that_can_not_be_written_keeps_the_guest_from_being_frozen(lab: Lab) -> None:
    class FullSpool(VmSpool):
        def hold(self, held: HeldGuest) -> None:
            raise SpoolUnusable(path=self.path, problem="No space left on device")

    lab.spool = FullSpool(lab.vm.spool(), VM)
    with pytest.raises(SpoolUnusable):
        lab.capture()
    assert lab.agent.commands == ["guest-ping"]


# ---- what a process left that was killed while it held a guest ---------------------------------


def killed(lab: Lab, *, frozen: bool = True, paused: bool = False, vm_run: str = "", boot: str = "") -> None:
    """As if drsync had been killed within the instant."""
    if not vm_run:
        agent = AgentSocket(lab.agent.path, clock=SystemClock())
        vm_run = agent.vm_run
        agent.close()
    lab.agent.frozen, lab.vm.vm.running = frozen, not paused
    since = "2026-11-25T10:00:00+00:00"
    lab.spool.hold(
        HeldGuest(boot_id=boot or boot_id(), pid=1, vm_run=vm_run if frozen else "", paused=paused, since=since)
    )


@pytest.mark.parametrize(("frozen", "paused"), [(True, False), (False, True), (True, True)])
def test_the_next_cycle_lets_a_guest_go_before_anything_else(
    lab: Lab, frozen: bool, paused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    killed(lab, frozen=frozen, paused=paused)
    surveyed: list[bool] = []
    source = lab.vm.source

    def open_source() -> Any:
        surveyed.append(lab.agent.frozen)
        return source()

    lab.vm.source = open_source  # type: ignore[method-assign]
    lab.point()
    assert surveyed[-1] is False
    assert "vm=web was let go" in caplog.text
    lab.check_let_go()
    lab.vm.check_settled()


def test_it_does_so_although_nothing_is_to_be_frozen_now(lab: Lab) -> None:
    killed(lab)
    lab.capture(consistency=Consistency.CRASH)
    lab.check_let_go()


@pytest.mark.parametrize(("vm_run", "boot"), [("1-2", ""), ("", "another")])
def test_a_guest_that_was_started_anew_is_not_thawed(lab: Lab, vm_run: str, boot: str) -> None:
    """Whatever is frozen in it now, another program froze."""
    killed(lab, vm_run=vm_run, boot=boot)
    lab.point()
    assert lab.agent.frozen
    assert "guest-fsfreeze-thaw" not in lab.agent.commands
    assert lab.spool.held() is None


def test_a_vm_that_is_off_is_not_held(lab: Lab) -> None:
    killed(lab)
    lab.agent.close()
    lab.capture(consistency=Consistency.CRASH)
    assert lab.spool.held() is None


def test_while_the_agent_is_silent_points_are_taken_and_the_trouble_is_told(lab: Lab) -> None:
    killed(lab)
    lab.agent.hangs.set()
    with pytest.raises(GuestHeld, match="it gave no answer in time"):
        lab.capture(consistency=Consistency.CRASH)
    assert len(lab.vm.check_points()) == 2
    lab.agent.hangs.clear()
    lab.capture(consistency=Consistency.CRASH)
    lab.check_let_go()


def test_a_broken_note_is_no_note(lab: Lab) -> None:
    (lab.spool.path / "held.json").write_text("{")
    lab.point()
    assert lab.spool.held() is None


def test_a_note_names_the_process_that_holds_the_guest(lab: Lab) -> None:
    notes: list[HeldGuest | None] = []
    lab.at_the_instant = lambda: notes.append(lab.spool.held())
    lab.point()
    (note,) = notes
    assert note is not None
    assert (note.pid, note.paused, note.what) == (os.getpid(), False, "frozen")
