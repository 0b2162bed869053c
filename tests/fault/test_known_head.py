"""A daemon that knows the heads of its logs: idle cycles ask the store nothing, and two daemons make one chain."""

from pathlib import Path

import pytest
from counting_store import CountingStore
from fake_clock import FakeClock
from faulty import Effect, Fault, FaultyStore
from protected_vm import ProtectedVm

from drsync.capture import Result
from drsync.errors import Fenced, StoreUnavailable
from drsync.heads import FRESH_S, Heads
from drsync.mapping import MapPolicy

NO_MAPS = MapPolicy(every=10**9, step=10**9)


@pytest.fixture
def vm(tmp_path: Path) -> ProtectedVm:
    return ProtectedVm(tmp_path)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_an_idle_cycle_asks_nothing_of_the_store(vm: ProtectedVm, clock: FakeClock) -> None:
    heads, store = Heads(clock), CountingStore(vm.store)
    vm.cycle(store=store, heads=heads)
    vm.cycle(store=store, heads=heads)  # looks for damage, which it does every hour
    with store.counted() as requests:
        for _ in range(100):
            assert vm.cycle(store=store, heads=heads).result is Result.UNCHANGED
    assert requests.total == 0
    clock.advance(FRESH_S + 1)
    with store.counted() as requests:
        vm.cycle(store=store, heads=heads)
        vm.cycle(store=store, heads=heads)
    assert (requests.put, requests.get, requests.list) == (0, 2, 1)


def test_a_point_is_one_put_and_two_looks_behind_it(vm: ProtectedVm, clock: FakeClock) -> None:
    heads, store = Heads(clock), CountingStore(vm.store)
    vm.cycle(store=store, heads=heads)
    vm.cycle(store=store, heads=heads)  # looks for damage, which it does every hour
    vm.write()
    with store.counted() as requests:
        assert vm.cycle(store=store, heads=heads, maps=NO_MAPS).result is Result.COMMITTED
    assert (requests.put, requests.get, requests.list) == (1, 2, 0)
    vm.check_settled()


def test_a_daemon_that_knows_an_old_head_is_fenced_when_it_writes(vm: ProtectedVm, clock: FakeClock) -> None:
    heads = Heads(clock)
    vm.cycle("alpha", heads=heads)
    vm.cycle("beta", take_over=True)
    vm.write()
    before = len(vm.log().numbers())
    with pytest.raises(Fenced):
        vm.cycle("alpha", heads=heads)
    assert len(vm.log().numbers()) == before
    with pytest.raises(Fenced):
        vm.cycle("alpha", heads=heads)
    vm.cycle("beta")
    vm.check_points()


def test_an_idle_daemon_learns_in_time_that_it_was_fenced(vm: ProtectedVm, clock: FakeClock) -> None:
    heads = Heads(clock)
    vm.cycle("alpha", heads=heads)
    vm.cycle("beta", take_over=True)
    assert vm.cycle("alpha", heads=heads).result is Result.UNCHANGED
    clock.advance(FRESH_S + 1)
    with pytest.raises(Fenced):
        vm.cycle("alpha", heads=heads)


def test_what_another_process_of_this_host_wrote_is_found(vm: ProtectedVm, clock: FakeClock) -> None:
    heads = Heads(clock)
    vm.cycle(heads=heads)
    vm.write()
    vm.cycle()  # drsync capture, by hand
    assert vm.cycle(heads=heads).result is Result.UNCHANGED
    vm.write()
    vm.cycle(heads=heads)
    assert [point.number for point in vm.check_points()] == [1, 2, 3]
    vm.check_settled()


@pytest.mark.parametrize("effect", [Effect.REFUSED, Effect.REPLY_LOST])
def test_after_a_failure_the_head_is_looked_for_again(vm: ProtectedVm, clock: FakeClock, effect: Effect) -> None:
    heads = Heads(clock)
    vm.cycle(heads=heads)
    vm.write()
    with FaultyStore(vm.store, Fault("create", effect=effect)) as faulty, pytest.raises(StoreUnavailable):
        vm.cycle(store=faulty, heads=heads)
    vm.cycle(heads=heads)
    assert [point.number for point in vm.check_points()] == [1, 2]
    vm.check_settled()
