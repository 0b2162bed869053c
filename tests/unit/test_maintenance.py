"""The agenda of the maintenance: what is due is done, one after the other, and nothing ends it."""

import logging
import threading

import pytest
from fake_clock import FakeClock

from drsync.errors import StoreDenied, StoreUnavailable
from drsync.maintenance import RETRY_S, Chore, Maintenance


class Work:
    """A chore that notes when it was done."""

    def __init__(self, clock: FakeClock, *, slices: int = 1) -> None:
        self._clock = clock
        self._slices = slices
        self.done: list[float] = []
        self.error: Exception | None = None

    def run(self, budget_s: float) -> str:
        assert budget_s > 0
        self.done.append(self._clock.monotonic_s())
        self._slices -= 1
        if self.error is not None:
            raise self.error
        return "did it"

    def is_ended(self) -> bool:
        return self._slices <= 0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def days(maintenance: Maintenance, clock: FakeClock, seconds: float) -> None:
    """Let time pass, and do what becomes due."""
    end_s = clock.monotonic_s() + seconds
    while clock.monotonic_s() < end_s:
        clock.advance(min(max(1.0, maintenance.run_due()), end_s - clock.monotonic_s()))


def test_each_chore_is_done_at_once_and_then_as_often_as_it_wants(clock: FakeClock) -> None:
    often, seldom = Work(clock), Work(clock)
    chores = [Chore("often", 100, often.run, often.is_ended), Chore("seldom", 1000, seldom.run, seldom.is_ended)]
    days(Maintenance(chores, clock), clock, 2001)
    assert [s - often.done[0] for s in often.done] == [100 * n for n in range(21)]
    assert [s - seldom.done[0] for s in seldom.done] == [0, 1000, 2000]


def test_a_chore_in_slices_goes_on_but_lets_the_others_have_their_turn(clock: FakeClock) -> None:
    sliced, other = Work(clock, slices=5), Work(clock)
    chores = [Chore("sliced", 1000, sliced.run, sliced.is_ended), Chore("other", 1, other.run, other.is_ended)]
    days(Maintenance(chores, clock), clock, 10)
    assert len(sliced.done) == 5
    assert len(other.done) >= 5


def test_a_failure_is_told_with_its_remedy_and_the_chore_comes_again(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    failing, other = Work(clock), Work(clock)
    chores = [Chore("failing", 4000, failing.run, failing.is_ended), Chore("other", 4000, other.run, other.is_ended)]
    maintenance = Maintenance(chores, clock)
    failing.error = StoreUnavailable(url="memory:", problem="away")
    days(maintenance, clock, RETRY_S + 1)
    assert len(failing.done) == 2
    failing.error = StoreDenied(url="memory:", operation="delete", problem="no")
    days(maintenance, clock, 4000)
    assert len(failing.done) == 3, "what a retry does not cure waits"
    failing.error = RuntimeError("a mistake")
    days(maintenance, clock, 8000)
    assert len(other.done) >= 3
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert any("chore=failing failed code=30" in line and "remedy: drsync config check" in line for line in said)
    assert any("a bug in drsync" in line for line in said)


def test_stopping_waits_for_what_runs_and_begins_nothing_more(clock: FakeClock) -> None:
    begun, may_end, more = threading.Event(), threading.Event(), threading.Event()

    def slow(_budget_s: float) -> str:
        begun.set()
        assert may_end.wait(60)
        return ""

    def never(_budget_s: float) -> str:
        more.set()
        return ""

    maintenance = Maintenance([Chore("slow", 1000, slow), Chore("more", 1000, never)], clock)
    maintenance.start()
    maintenance.check_alive()
    assert begun.wait(60)
    assert not maintenance.stop(0.05)
    may_end.set()
    assert maintenance.stop(60)
    assert not more.is_set()
    maintenance.check_alive()
