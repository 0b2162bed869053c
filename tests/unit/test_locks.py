"""The locks of a repository: extended while objects are there, and the alarm before they lapse (F44)."""

import hashlib
import logging
from datetime import timedelta

import pytest
from fake_clock import FakeClock
from hypothesis import given
from hypothesis import strategies as st

from drsync.errors import LocksLapsing, LocksMissing, ObjectMissing, StoreDenied, StoreUnavailable
from drsync.format import names
from drsync.locks import LockKeeper, LockPass, LockState, LockWatch, extend_locks, lock_status
from drsync.store.lock import Lock, LockMode, LockPolicy
from drsync.store.memory import MemoryStore
from drsync.store.retry import RetryingStore

DAY = timedelta(days=1)
POLICY = LockPolicy(mode=LockMode.COMPLIANCE, period=30 * DAY)
SEGMENTS = [names.segment("web", n) for n in (1, 2, 3)]


def put(store: MemoryStore, *keys: str) -> None:
    for key in keys:
        store.create(key, b"x", sha256=hashlib.sha256(b"x").digest())


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> MemoryStore:
    """A repository of a few objects, made just now."""
    made = MemoryStore(clock, lock=POLICY)
    put(made, names.REPOSITORY, *SEGMENTS)
    made.replace(names.heartbeat("alpha"), b"x")
    return made


def until(store: MemoryStore, key: str) -> timedelta:
    """How long an object is locked, from the beginning of the test on."""
    lock = store.lock_of(key)
    assert lock is not None
    return lock.until - FakeClock().now()


def run(store: MemoryStore, clock: FakeClock, **options: object) -> LockPass:
    return extend_locks(store, store, POLICY, clock, **{"budget_s": 60.0} | options)  # type: ignore[arg-type]


def test_l1_what_is_created_is_locked_and_the_heartbeat_is_not(store: MemoryStore) -> None:
    assert until(store, SEGMENTS[0]) == 30 * DAY
    assert store.lock_of(names.heartbeat("alpha")) is None


def test_a_pass_extends_nothing_that_has_half_of_its_time(store: MemoryStore, clock: FakeClock) -> None:
    clock.advance(15 * 86400)
    done = run(store, clock)
    assert (done.done, done.seen, done.extended) == (True, 3, 0)
    assert until(store, names.REPOSITORY) == 30 * DAY


def test_a_pass_extends_what_has_less_and_the_witness_last(store: MemoryStore, clock: FakeClock) -> None:
    clock.advance(10 * 86400)
    put(store, names.segment("web", 4))
    clock.advance(6 * 86400)
    done = run(store, clock)
    assert (done.seen, done.extended, done.unlocked) == (4, 3, 0)
    assert [until(store, key) for key in SEGMENTS] == [46 * DAY] * 3
    assert until(store, names.segment("web", 4)) == 40 * DAY, "it had more than half"
    assert until(store, names.REPOSITORY) == 40 * DAY, "no more than what is true of all"
    assert store.lock_of(names.heartbeat("alpha")) is None


def test_what_was_never_locked_is_locked_and_counted(store: MemoryStore, clock: FakeClock) -> None:
    bare = MemoryStore(clock)
    put(bare, "vm/web/pack/1")
    del store._locks[SEGMENTS[1]]
    done = run(store, clock)
    assert (done.extended, done.unlocked) == (1, 1)
    assert until(store, SEGMENTS[1]) == 30 * DAY


def test_a_pass_goes_on_where_its_time_ended(store: MemoryStore, clock: FakeClock) -> None:
    clock.advance(20 * 86400)
    found = run(store, clock, budget_s=0, batch_objects=2)
    assert (found.done, found.seen) == (False, 0)

    class Slow(MemoryStore):
        """Takes a second for each lock."""

        def extend_lock(self, key: str, lock: Lock) -> None:
            clock.advance(1)
            super().extend_lock(key, lock)

    slow = Slow(clock, lock=POLICY)
    slow._objects, slow._locks = store._objects, store._locks
    found = extend_locks(slow, slow, POLICY, clock, budget_s=1, resume=found, batch_objects=2)
    assert (found.done, found.seen) == (False, 1), "of a batch with repo.json"
    assert until(slow, names.REPOSITORY) == 30 * DAY, "a pass is worth nothing before its end"
    started = found.started
    while not found.done:
        found = extend_locks(slow, slow, POLICY, clock, budget_s=1, resume=found, batch_objects=2)
    assert (found.seen, found.extended, found.started) == (3, 3, started)
    assert until(slow, names.REPOSITORY) == 50 * DAY
    assert extend_locks(slow, slow, POLICY, clock, budget_s=9, resume=found, batch_objects=2).started > started, (
        "a new pass"
    )


def test_one_object_that_cant_be_extended_keeps_the_witness_and_not_the_others(
    store: MemoryStore, clock: FakeClock
) -> None:
    class Denying(MemoryStore):
        def extend_lock(self, key: str, lock: Lock) -> None:
            if key == SEGMENTS[0]:
                raise StoreDenied(url=self.url, operation=f"lock {key}", problem="scripted")
            super().extend_lock(key, lock)

    denying = Denying(clock, lock=POLICY)
    denying._objects, denying._locks = store._objects, store._locks
    clock.advance(20 * 86400)
    found = extend_locks(denying, denying, POLICY, clock, budget_s=60)
    assert (found.done, found.failed, found.extended) == (True, 1, 2)
    assert isinstance(found.problem, StoreDenied)
    assert until(denying, names.REPOSITORY) == 30 * DAY, "so the alarm comes"


def test_what_is_deleted_meanwhile_is_no_failure(store: MemoryStore, clock: FakeClock) -> None:
    class Deleted(MemoryStore):
        def lock_of(self, key: str) -> Lock | None:
            if key == SEGMENTS[0]:
                raise ObjectMissing(key=key, url=self.url)
            return super().lock_of(key)

    deleted = Deleted(clock, lock=POLICY)
    deleted._objects, deleted._locks = store._objects, store._locks
    found = extend_locks(deleted, deleted, POLICY, clock, budget_s=60)
    assert (found.done, found.seen, found.failed) == (True, 2, 0)


def test_a_dry_run_extends_nothing(store: MemoryStore, clock: FakeClock) -> None:
    clock.advance(20 * 86400)
    found = run(store, clock, dry_run=True)
    assert (found.done, found.extended) == (True, 3)
    assert until(store, SEGMENTS[0]) == until(store, names.REPOSITORY) == 30 * DAY


def test_l2_a_lock_is_neither_shortened_nor_weakened(store: MemoryStore, clock: FakeClock) -> None:
    store.extend_lock(SEGMENTS[0], Lock(mode=LockMode.COMPLIANCE, until=clock.now() + DAY))
    assert until(store, SEGMENTS[0]) == 30 * DAY
    with pytest.raises(StoreDenied):
        store.extend_lock(SEGMENTS[0], Lock(mode=LockMode.GOVERNANCE, until=clock.now() + 60 * DAY))
    weaker = LockPolicy(mode=LockMode.GOVERNANCE, period=30 * DAY)
    clock.advance(20 * 86400)
    assert extend_locks(store, store, weaker, clock, budget_s=60).problem is None, "it keeps the mode that it finds"
    lock = store.lock_of(SEGMENTS[0])
    assert lock is not None
    assert lock.mode is LockMode.COMPLIANCE


def test_without_locks_nothing_is_extended_and_that_is_said(clock: FakeClock) -> None:
    store = MemoryStore(clock)
    put(store, names.REPOSITORY, SEGMENTS[0])
    found = run(store, clock)
    assert isinstance(found.problem, LocksMissing)
    assert lock_status(store, None, clock.now()).state is LockState.OFF


@pytest.mark.parametrize(
    ("days", "state"),
    [
        (0, LockState.LOCKED),
        (22, LockState.LOCKED),
        (23, LockState.LAPSING),
        (29, LockState.LAPSING),
        (30, LockState.LAPSED),
    ],
)
def test_the_alarm_comes_before_the_locks_lapse(
    store: MemoryStore, clock: FakeClock, days: int, state: LockState
) -> None:
    clock.advance(days * 86400)
    found = lock_status(store, POLICY, clock.now())
    assert found.state is state
    assert (found.error is None) == (state is LockState.LOCKED)
    if found.error is not None:
        assert found.error.code == LocksLapsing.code
        assert found.error.remedy.startswith("drsync lock extend")


def test_a_repository_that_was_made_without_locks_is_an_alarm(clock: FakeClock) -> None:
    store = MemoryStore(clock)
    put(store, names.REPOSITORY)
    assert lock_status(store, POLICY, clock.now()).state is LockState.LAPSED


def test_who_may_not_ask_does_not_know(clock: FakeClock) -> None:
    class Closed(MemoryStore):
        def lock_of(self, key: str) -> Lock | None:
            raise StoreDenied(url=self.url, operation="look", problem="scripted")

    assert lock_status(Closed(clock), POLICY, clock.now()).state is LockState.UNKNOWN


def test_a_daemon_says_so_once_in_an_hour(
    store: MemoryStore, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    watch = LockWatch(store, POLICY, clock)
    watch.look()
    clock.advance(25 * 86400)
    with caplog.at_level(logging.WARNING):
        for _ in range(90):
            watch.look()
            clock.advance(60)
    said = [record for record in caplog.records if "drsync lock extend" in record.message]
    assert len(said) == 2
    assert {record.levelno for record in said} == {logging.ERROR}


def test_passing_failures_are_tried_again(store: MemoryStore, clock: FakeClock) -> None:
    failures = [StoreUnavailable(url="memory:", problem="scripted")] * 2

    class Flaky(MemoryStore):
        def extend_lock(self, key: str, lock: Lock) -> None:
            if failures:
                raise failures.pop()
            super().extend_lock(key, lock)

    flaky = Flaky(clock, lock=POLICY)
    flaky._objects, flaky._locks = store._objects, store._locks
    retrying = RetryingStore(flaky, clock=clock, sleep=clock.sleep)
    clock.advance(20 * 86400)
    assert extend_locks(retrying, retrying, POLICY, clock, budget_s=60).problem is None
    assert failures == []


def test_the_maintenance_extends_when_it_is_time_and_slice_by_slice(
    store: MemoryStore, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = LockKeeper(store, store, POLICY, clock)
    assert keeper.work(60) is None
    clock.advance(17 * 86400)
    assert not keeper.is_due(), "thirteen of thirty days are left"
    clock.advance(2 * 86400)
    assert LockKeeper(store, store, POLICY, clock).is_due(), "whoever asks: the witness tells"
    begun = keeper.work(0)
    assert begun is not None
    assert (begun.done, keeper.is_due()) == (False, True)
    ended = keeper.work(60)
    assert ended is not None
    assert (ended.done, ended.extended, ended.started) == (True, 3, begun.started)
    assert keeper.work(60) is None
    assert lock_status(store, POLICY, clock.now()).state is LockState.LOCKED


def test_the_maintenance_tries_again_an_hour_after_a_failure_and_says_so(
    store: MemoryStore, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Denying(MemoryStore):
        def extend_lock(self, key: str, lock: Lock) -> None:
            raise StoreDenied(url=self.url, operation=f"lock {key}", problem="scripted")

    denying = Denying(clock, lock=POLICY)
    denying._objects, denying._locks = store._objects, store._locks
    clock.advance(20 * 86400)
    keeper = LockKeeper(denying, denying, POLICY, clock)
    failed = keeper.work(60)
    assert failed is not None
    assert failed.failed == 3
    assert "3 of 3 locks could not be extended" in caplog.text
    assert not keeper.is_due()
    clock.advance(3601)
    assert keeper.is_due()


@given(st.lists(st.tuples(st.sampled_from(["point", "pass", "wait"]), st.integers(1, 12)), max_size=30))
def test_no_object_is_ever_locked_shorter_than_the_witness_says(steps: list[tuple[str, int]]) -> None:
    clock = FakeClock()
    store = MemoryStore(clock, lock=POLICY)
    put(store, names.REPOSITORY)
    for number, (what, days) in enumerate(steps, 1):
        if what == "point":
            put(store, names.segment("web", number))
        elif what == "pass":
            run(store, clock)
        clock.advance(days * 86400)
        witness = until(store, names.REPOSITORY)
        if clock.now() - FakeClock().now() < witness:
            assert all(until(store, info.key) >= witness for info in store.list("vm/"))
