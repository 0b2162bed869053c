"""A point is pinned while prune drops it: one of the two notices (F42)."""

from datetime import timedelta
from pathlib import Path

import pytest
from command_line import Cli
from faulty import Effect, Fault, FaultyStore
from pruned_vm import PrunedVm
from shipped_vm import DiskStep, ShippedVm, Step

from drsync.config import load_config
from drsync.errors import DrsyncError, ObjectDamaged, PinsBroken, PruneRefused, StoreUnavailable, UnknownPoint
from drsync.format import names
from drsync.keyfile import read_key_file
from drsync.log import Log
from drsync.model import BLOCK_SIZE, SystemClock
from drsync.pins import pin_point, unpin_point
from drsync.prune.run import PruneOptions, prune_vm
from drsync.repository import open_repository
from drsync.retention import Rules
from drsync.session import Session
from drsync.store.directory import DirectoryStore
from drsync.store.retry import RetryingStore
from drsync.upkeep import Upkeep


def step(value: int) -> Step:
    return Step(disks={"root": DiskStep(size_bytes=2 * BLOCK_SIZE, writes={0: value})})


@pytest.fixture
def vm(tmp_path: Path) -> PrunedVm:
    made = PrunedVm(tmp_path)
    for value in (1, 2, 3):
        made.capture(step(value))
    return made


def test_f42_what_was_pinned_after_the_rules_were_asked_is_not_dropped(vm: PrunedVm) -> None:
    now = vm.clock.now()
    pin_point(vm.log.objects, 1, until=now + timedelta(days=1), note="", now=now)
    with pytest.raises(PruneRefused, match="point 1 was pinned while it worked"):
        vm.prune()  # which was told of no pins
    vm.check()
    assert list(vm.store.list(names.horizon_prefix("web"))) == []
    unpin_point(vm.log.objects, 1, now=now)
    assert [verdict.point for verdict in vm.prune().dropped] == [2, 1]
    vm.check()


def test_f42_a_pin_that_has_ended_keeps_nothing(vm: PrunedVm) -> None:
    now = vm.clock.now()
    pin_point(vm.log.objects, 1, until=now, note="", now=now)
    assert [verdict.point for verdict in vm.prune().dropped] == [2, 1]
    vm.check()


@pytest.mark.parametrize("effect", ["lost", "damaged"])
def test_f42_who_cant_read_the_pins_drops_nothing(vm: PrunedVm, effect: str) -> None:
    now = vm.clock.now()
    for point in (1, 2):
        pin_point(vm.log.objects, point, until=None, note="", now=now)
    first = names.pin("web", 1)
    wanted: type[DrsyncError]
    if effect == "lost":
        vm.store.delete(first)
        wanted = PinsBroken
    else:
        vm.store.replace(first, b"x" * 100)
        wanted = ObjectDamaged
    with pytest.raises(wanted):
        vm.prune()
    vm.check()


def test_who_pins_a_point_that_is_dropped_at_this_moment_is_told(tmp_path: Path) -> None:
    """The horizon comes right before the pin's record: the record is stored, and keeps nothing."""
    cli = Cli(tmp_path)
    cli.ok("init")
    root, store = read_key_file(cli.key_file), DirectoryStore(cli.repository)
    repository = open_repository(store, root, cli.key_file)
    shipped = ShippedVm(tmp_path, repository=repository)
    for value in (1, 2):
        shipped.capture(step(value))

    def prune_first() -> BaseException:
        options = PruneOptions(grace=timedelta(days=1), orphan_grace=timedelta(days=14))
        log = Log(open_repository(store, root, cli.key_file).vm("web"))
        assert prune_vm(log, Rules(last=1), [], committed=0, now=store.now(), options=options).dropped
        return StoreUnavailable(url=store.url, problem="scripted")

    session = Session(load_config(cli.config), SystemClock())
    fault = Fault("create", key=names.pin_prefix("web"), effect=Effect.REFUSED, error=prune_first)
    with FaultyStore(store, fault) as faulty:
        session.__dict__["store"] = RetryingStore(faulty, sleep=lambda _: None)
        with pytest.raises(UnknownPoint):
            Upkeep(session).pin("web", 1, until=None, note="", dry_run=False)
