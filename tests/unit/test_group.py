"""The members of a group wait for each other, leave each other behind, and say so in their points."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from protected_vm import VM, Contents, ProtectedVm, restored

from drsync.capture import Outcome, Result
from drsync.catalog import GroupTold, point_of
from drsync.errors import CaptureFailed, DrsyncError, SourceLost
from drsync.group import Assembly, run_together
from drsync.model import SystemClock
from drsync.quiesce import Company, Quiesce, QuiescePolicy, Quiescing, Step
from drsync.seed import SeedOptions
from drsync.source import Source

DEADLINE_S = 20.0


class Lab:
    """VMs in memory, each with its own repository, captured as one group."""

    def __init__(self, place: Path, names: tuple[str, ...] = ("db", "app")) -> None:
        self.vms = {name: ProtectedVm(place / name) for name in names}
        self.at_the_instant: dict[str, Callable[[], None]] = {}
        for name, vm in self.vms.items():
            (place / name).mkdir()
            vm.cycle()
            self._watch(name, vm)

    def _watch(self, name: str, vm: ProtectedVm) -> None:
        contents = vm.contents

        def witness() -> Contents:
            self.at_the_instant.get(name, lambda: None)()
            return contents()

        vm.contents = witness  # type: ignore[method-assign]  # what the Witness calls within the instant

    def write(self) -> None:
        for vm in self.vms.values():
            vm.write()

    def capture(
        self, *, pauses: bool = True, gather_s: float = DEADLINE_S, absent: Mapping[str, str] | None = None
    ) -> Mapping[str, Outcome | Exception]:
        assembly = Assembly("shop", list(self.vms), pauses=pauses, gather_s=gather_s, copy_s=DEADLINE_S, absent=absent)

        def work(vm: ProtectedVm) -> Callable[[Company], Outcome]:
            return lambda company: vm.cycle(
                quiesce=Quiesce(QuiescePolicy(limit_s=2.0), vm.spool().vm(VM), None, vm.source, SystemClock(), company)
            )

        done = run_together(assembly, {name: work(vm) for name, vm in self.vms.items()}, self._holds)
        self.check_let_go()
        return done

    def _holds(self, name: str) -> bool:
        return self.vms[name].spool().vm(VM).held() is not None

    def check_let_go(self) -> None:
        for name, vm in self.vms.items():
            assert vm.vm.running, name
            assert not self._holds(name)

    def told(self, outcome: Outcome | Exception) -> GroupTold:
        assert isinstance(outcome, Outcome), outcome
        assert outcome.segment is not None
        point = point_of(outcome.segment, None)
        assert point is not None
        assert point.quiesce is not None
        assert point.quiesce.group is not None
        return point.quiesce.group


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    lab = Lab(tmp_path)
    lab.write()
    return lab


def test_all_members_stand_still_until_the_last_is_captured(lab: Lab) -> None:
    running: list[list[bool]] = []
    for name in lab.vms:
        lab.at_the_instant[name] = lambda: running.append([vm.vm.running for vm in lab.vms.values()])
    done = lab.capture()
    assert running == [[False, False], [False, False]]
    db, app = lab.told(done["db"]), lab.told(done["app"])
    assert db == app
    assert (db.name, db.consistent, db.reason) == ("shop", True, "")
    assert 0 < db.skew_ms < 2000
    assert db.members == {name: vm.points()[-1].capture for name, vm in lab.vms.items()}
    for vm in lab.vms.values():
        told = vm.points()[-1].quiesce
        assert told is not None
        assert told.paused_ms is not None
        vm.check_settled()


@contextmanager
def sequence(lab: Lab) -> Iterator[None]:
    """One guest writes n, then the other one does, again and again; no processor runs while it is paused."""
    stop = threading.Event()

    def write(name: str, number: int) -> None:
        vm = lab.vms[name].vm
        while not vm.running:
            if stop.wait(0.0005):
                return
        vm.disks["root"].write(0, number.to_bytes(8) + bytes(504))

    def work() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            write("db", number)
            write("app", number)
            time.sleep(0.0002)

    for vm in lab.vms.values():
        vm.vm.disks["root"].write(0, bytes(512))
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_no_restored_member_is_ahead_of_what_it_saw_of_the_other(lab: Lab) -> None:
    numbers = []
    with sequence(lab):
        for _ in range(8):
            done = lab.capture()
            assert lab.told(done["db"]).consistent
            number = {}
            for name, vm in lab.vms.items():
                content = restored(vm.log(), vm.points()[-1].number)
                number[name] = int.from_bytes(content["root"][:8])
            numbers.append((number["db"], number["app"]))
    assert all(app <= db <= app + 1 for db, app in numbers), numbers
    assert numbers[0][0] < numbers[-1][0]


def test_one_member_that_changed_is_enough_and_an_idle_group_gets_no_points(lab: Lab) -> None:
    lab.capture()
    done = lab.capture()
    assert [o.result for o in done.values() if isinstance(o, Outcome)] == [Result.UNCHANGED] * 2
    lab.vms["app"].write()
    done = lab.capture()
    assert [o.result for o in done.values() if isinstance(o, Outcome)] == [Result.COMMITTED] * 2
    assert lab.told(done["db"]).consistent
    assert lab.vms["db"].points()[-1].changed_bytes == 0


def fail() -> None:
    raise CaptureFailed(vm="db", operation="transaction", problem="no")


@pytest.mark.parametrize("where", ["opening", "instant", "copying"])
def test_a_member_that_fails_leaves_the_others_their_points_and_a_reason(lab: Lab, where: str) -> None:
    db = lab.vms["db"]
    if where == "opening":

        def refuse() -> Source:
            raise SourceLost(vm="db", operation="connect", problem="no")

        db.source = refuse  # type: ignore[method-assign]
    elif where == "instant":
        lab.at_the_instant["db"] = fail
    else:
        db.vm.during_capture = fail
    done = lab.capture()
    assert isinstance(done["db"], DrsyncError)
    told = lab.told(done["app"])
    assert not told.consistent
    assert told.reason.startswith("db failed: VM db: ")
    assert set(told.members) == {"app"}
    lab.vms["app"].check_settled()
    assert len(db.points()) == 1


def test_a_member_that_is_late_is_left_behind_and_gets_its_own_point(lab: Lab) -> None:
    source = lab.vms["db"].source

    def slowly() -> Source:
        time.sleep(1.0)
        return source()

    lab.vms["db"].source = slowly  # type: ignore[method-assign]
    done = lab.capture(gather_s=0.3)
    app, db = lab.told(done["app"]), lab.told(done["db"])
    assert (app.consistent, app.reason, set(app.members)) == (False, "db was not surveyed in time", {"app"})
    assert (db.consistent, set(db.members)) == (False, {"db"})
    for vm in lab.vms.values():
        vm.check_settled()


def test_an_instant_that_takes_too_long_is_not_waited_for_with_a_paused_guest(lab: Lab) -> None:
    lab.at_the_instant["db"] = lambda: time.sleep(4.0)
    started_s = time.monotonic()
    resumed_after: list[float] = []

    def watch() -> None:
        time.sleep(0.5)
        while not lab.vms["app"].vm.running and time.monotonic() < started_s + 10:
            time.sleep(0.01)
        resumed_after.append(time.monotonic() - started_s)

    thread = threading.Thread(target=watch)
    thread.start()
    done = lab.capture()
    thread.join()
    assert resumed_after[0] < 3.5
    told = lab.told(done["app"])
    assert (told.consistent, told.reason) == (False, "db was not captured in time")


def test_a_member_that_is_left_out_is_told(lab: Lab) -> None:
    done = lab.capture(absent={"queue": "was left out"})
    assert (lab.told(done["db"]).consistent, lab.told(done["db"]).reason) == (False, "queue was left out")


def make_seed_due(vm: ProtectedVm) -> None:
    """From now on this VM has to be seeded, which its cycle shall leave to another."""
    cycle = vm.cycle

    def cycle_of_a_seed(*, quiesce: Quiescing) -> Outcome:
        return cycle(quiesce=quiesce, full=True, may_seed=False, seed=SeedOptions(stream_above_bytes=0))

    vm.cycle = cycle_of_a_seed  # type: ignore[method-assign,assignment]  # as the lab calls it


def test_a_member_that_has_to_be_seeded_leaves_at_once_and_the_others_are_captured(lab: Lab) -> None:
    make_seed_due(lab.vms["db"])
    began_s = time.monotonic()
    done = lab.capture()
    assert time.monotonic() - began_s < DEADLINE_S / 2
    assert isinstance(done["db"], Outcome)
    assert done["db"].result is Result.SEED_DUE
    told = lab.told(done["app"])
    assert (told.consistent, told.reason, list(told.members)) == (False, "db took no point", ["app"])


def test_a_member_that_has_to_be_seeded_makes_no_points_of_an_idle_group(lab: Lab) -> None:
    lab.told(lab.capture()["app"])
    make_seed_due(lab.vms["db"])
    done = lab.capture()
    results = {name: outcome.result for name, outcome in done.items() if isinstance(outcome, Outcome)}
    assert results == {"db": Result.SEED_DUE, "app": Result.UNCHANGED}


def test_without_a_pause_members_that_are_not_frozen_are_not_together(lab: Lab) -> None:
    running: list[bool] = []
    lab.at_the_instant["db"] = lambda: running.append(lab.vms["db"].vm.running)
    told = lab.told(lab.capture(pauses=False)["db"])
    assert running == [True]
    assert not told.consistent
    assert told.reason == "app did not stand still at the instant; db did not stand still at the instant"


def test_a_guest_that_does_not_run_stands_still_and_stays_so(lab: Lab) -> None:
    lab.vms["db"].vm.running = False
    paused = lab.vms["db"].vm
    lab._holds = lambda name: False  # type: ignore[method-assign]
    check, lab.check_let_go = lab.check_let_go, lambda: None  # type: ignore[method-assign]
    assert lab.told(lab.capture()["db"]).consistent
    assert not paused.running
    paused.running = True
    check()


def test_an_interrupted_group_lets_its_guests_go_first(lab: Lab) -> None:
    there = threading.Event()

    def wait() -> None:
        there.set()
        time.sleep(0.5)

    lab.at_the_instant["db"] = wait

    def interrupt() -> None:
        assert there.wait(DEADLINE_S)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        lab.capture()
    thread.join()
    lab.check_let_go()


def test_a_bug_in_one_member_is_handed_over_as_it_is(lab: Lab) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    lab.at_the_instant["db"] = bug
    done = lab.capture()
    assert isinstance(done["db"], ZeroDivisionError)
    assert not lab.told(done["app"]).consistent


def test_more_members_than_two_and_many_times(tmp_path: Path) -> None:
    lab = Lab(tmp_path, ("a", "b", "c", "d", "e"))
    for _ in range(3):
        lab.write()
        told = {name: lab.told(outcome) for name, outcome in lab.capture().items()}
        assert len({t.id for t in told.values()}) == 1
        assert all(t.consistent and set(t.members) == set(lab.vms) for t in told.values())
    for vm in lab.vms.values():
        vm.check_settled()


def test_a_member_whose_cycle_ends_without_a_point_is_told(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.write()
    assembly = Assembly("shop", list(lab.vms), pauses=True, gather_s=DEADLINE_S, copy_s=DEADLINE_S)
    app = lab.vms["app"]

    def captured(company: Company) -> Outcome:
        policy, spool = QuiescePolicy(), app.spool().vm(VM)
        return app.cycle(quiesce=Quiesce(policy, spool, None, app.source, SystemClock(), company))

    def busy_with_something_else(_company: Company) -> Outcome:
        return Outcome(
            vm="db", result=Result.UNCHANGED, segment=None, shipped_before=None, checked_at=datetime.now(UTC)
        )

    done = run_together(assembly, {"app": captured, "db": busy_with_something_else}, lambda _: False)
    told = lab.told(done["app"])
    assert (told.consistent, told.reason) == (False, "db took no point")


def test_who_was_left_behind_waits_for_nobody() -> None:
    assembly = Assembly("shop", ["a", "b"], pauses=False, gather_s=0.05, copy_s=0.05)
    a, b = assembly.member("a"), assembly.member("b")
    a.meet(Step.READY)
    started_s = time.monotonic()
    for step in Step:
        b.meet(step)
        a.meet(step)
    assert time.monotonic() - started_s < 1
