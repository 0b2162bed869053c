"""Prune beside captures and restores, dying anywhere, with stores that lie and writers that come late."""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final, cast

import pytest
from crashing import WHENS, Bomb, Crash, When
from faulty import Effect, Fault, FaultyStore
from protected_vm import ProtectedVm
from pruned_vm import AT_ONCE, SOAK, DyingStore, HidingStore, InterruptedStore, PrunedVm, snapshot, twin
from shipped_vm import NO_PROGRESS, ZEROED, DiskStep, Step, objects_of, reopened, restored, restored_disk

from drsync import catalog
from drsync.capture import Result
from drsync.errors import (
    ChainBroken,
    Fenced,
    LogAdvanced,
    ObjectDamaged,
    ObjectMissing,
    PointPruned,
    PrunedMeanwhile,
    PruneRaced,
    PruneRefused,
    StoreDenied,
    StoreUnavailable,
)
from drsync.format import names
from drsync.image import PointImage, load_image
from drsync.log import Log
from drsync.mapped import load_mapped_image, newest_stretch
from drsync.mapping import MapPolicy, write_map
from drsync.model import BLOCK_SIZE, Kind
from drsync.prune.run import PruneOptions, prune_vm
from drsync.retention import Rules
from drsync.seed import SeedOptions
from drsync.ship import ShipLimits
from drsync.store import ObjectStore
from drsync.verify import verify
from drsync.writer import open_writer

SIZE: Final = 14 * BLOCK_SIZE
WITH_GRACE: Final = PruneOptions(grace=timedelta(days=1), orphan_grace=timedelta(days=14))
EVERY: Final = 1 if SOAK else 7
"""Of the steps at which something may happen, so many are tried."""


def step(writes: dict[int, int], *, whole: bool = False, taken_over: bool = False) -> Step:
    disks = {"root": DiskStep(size_bytes=SIZE, writes=writes, whole=whole), "data": DiskStep(size_bytes=SIZE // 2)}
    return Step(disks=disks, taken_over=taken_over)


def history() -> list[Step]:
    """Points in packs and segments, most of whose blocks are overwritten soon, some zeroed, with a fence between."""
    steps = [step({n: 2 * n + 2 for n in range(14)})]
    steps += [
        step({n % 14: 30 + 2 * n, (n + 5) % 14: 60 + 2 * n, 3: 90 + 2 * n, 4: ZEROED, 9: 200 + 2 * n}) for n in range(9)
    ]
    steps[5] = replace(steps[5], taken_over=True)
    return steps


@pytest.fixture
def vm(tmp_path: Path) -> PrunedVm:
    vm = PrunedVm(tmp_path)
    for change in history():
        vm.capture(change)
        vm.clock.advance(3600)
    return vm


def keep_of(vm: PrunedVm) -> list[int]:
    return sorted(vm.points)[3::4]


def check_old_or_new(vm: PrunedVm, keep: set[int]) -> None:
    """After a crash, the points are those of before or those of after, and all restore."""
    known = {p.number for p in catalog.points(Log(vm.repository.vm(vm.vm)))}
    assert known in (set(vm.points), keep)
    vm.points = {n: disks for n, disks in vm.points.items() if n in known}
    vm.check()


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("grace", [AT_ONCE, WITH_GRACE], ids=["at-once", "with-grace"])
def test_dying_at_any_write_leaves_every_point_and_the_next_run_ends_the_work(
    vm: PrunedVm, when: When, grace: PruneOptions
) -> None:
    write_map(vm.log, max(vm.points), present=set())
    before = snapshot(vm.store)
    keep = {*keep_of(vm), max(vm.points)}
    fired = 0
    for number in range(1, 200, min(EVERY, 3)):
        dying = twin(vm, before)
        bomb = Bomb(number, when)
        with suppress(Crash):
            dying.prune(keep, options=grace, store=cast(ObjectStore, DyingStore(dying.store, bomb)))
        if not bomb.fired_at:
            break
        fired += 1
        dying.points = dict(vm.points)
        check_old_or_new(dying, keep)
        dying.clock.advance(3 * 86400)
        dying.prune(keep, options=grace)
        dying.clock.advance(3 * 86400)
        dying.prune(keep, options=grace)
        assert set(dying.points) == keep
        dying.check()
        dying.capture(step({1: 300}))
        dying.check()
        assert not verify(dying.log, committed_seq=0, read_data=True, progress=NO_PROGRESS).problems
    assert fired > 1
    assert number < 199


def steps_of(action: Callable[[ObjectStore], object], store: ObjectStore) -> int:
    """How many calls of a store something makes."""
    counting = InterruptedStore(store, 0, lambda: None)
    action(cast(ObjectStore, counting))
    return counting.calls


def test_a_capture_at_any_step_of_a_prune_loses_nothing(vm: PrunedVm) -> None:
    before = snapshot(vm.store)
    keep = {*keep_of(vm), max(vm.points)}
    calls = steps_of(lambda store: twin(vm, before).prune(keep, store=store), twin(vm, before).store)
    for at in range(1, calls + 1, EVERY):
        busy = twin(vm, before)
        change = step({0: 400, 5: ZEROED, 7: 402, 9: 404, 11: 406}, whole=at % 2 == 0)
        store = InterruptedStore(busy.store, at, partial(busy.capture, change))
        busy.prune(keep, store=cast(ObjectStore, store))
        assert store.calls >= at, "the capture never happened"
        newest = max(busy.points)
        assert newest > max(vm.points)
        busy.check()
        busy.clock.advance(3 * 86400)
        busy.prune(keep)
        busy.check()


def test_a_restore_that_began_before_a_prune_may_end_within_the_grace_time(vm: PrunedVm) -> None:
    write_map(vm.log, max(vm.points), present=set())
    before = snapshot(vm.store)
    keep = {*keep_of(vm), max(vm.points)}
    calls = steps_of(lambda store: twin(vm, before).prune(keep, options=WITH_GRACE, store=store), vm.store)
    for at in range(1, calls + 1, 2 * EVERY):
        busy = twin(vm, before)
        images = [load_image(busy.log, min(keep)), load_mapped_image(busy.log, max(keep)), load_image(busy.log, 2)]

        def restore(busy: PrunedVm = busy, images: list[PointImage] = images) -> None:
            for image in images:
                for disk in image.point.disks:
                    assert restored_disk(image, busy.log, disk.name) == vm.points[image.seq][disk.name]

        store = InterruptedStore(busy.store, at, restore)
        busy.prune(keep, options=WITH_GRACE, store=cast(ObjectStore, store))
        restore()
        busy.check()


def test_a_prune_without_grace_time_at_any_step_of_a_restore_is_told_and_a_second_restore_is_right(
    vm: PrunedVm,
) -> None:
    before = snapshot(vm.store)
    keep = {*keep_of(vm), max(vm.points)}
    target = max(keep - {max(keep)})
    calls = steps_of(lambda store: restored(reopened(vm, store), target), vm.store)
    told = 0
    for at in range(1, calls + 1, EVERY):
        busy = twin(vm, before)
        store = InterruptedStore(busy.store, at, partial(busy.prune, keep))
        log = reopened(busy, cast(ObjectStore, store))
        try:
            assert restored(log, target) == vm.points[target]
        except PrunedMeanwhile as err:
            assert err.retryable
            told += 1
        assert restored(log, target) == vm.points[target]
    assert told


def test_a_prune_at_any_step_of_a_capture_costs_at_most_that_capture(vm: PrunedVm) -> None:
    before = snapshot(vm.store)
    keep = {*keep_of(vm), max(vm.points)}
    change = step({0: 400, 5: ZEROED, 7: 402, 9: 404, 11: 406}, whole=True)

    def capture(busy: PrunedVm, store: ObjectStore) -> None:
        busy.log = reopened(busy, store)
        busy.capture(change)

    trial = twin(vm, before)
    calls = steps_of(lambda store: capture(trial, store), trial.store)
    for at in range(1, calls + 1, EVERY):
        busy = twin(vm, before)
        store = InterruptedStore(busy.store, at, partial(busy.prune, keep))
        captures, points = [*busy.captures], dict(busy.points)
        try:
            capture(busy, cast(ObjectStore, store))
        except (PrunedMeanwhile, LogAdvanced):
            busy.captures = captures
        assert store.calls >= at, "the prune never happened"
        busy.log = Log(busy.repository.vm(busy.vm))
        busy.forget(set(points) - keep)
        busy.check()


def test_10_a_zombie_that_writes_into_a_slot_that_prune_freed_is_not_acknowledged(vm: PrunedVm) -> None:
    """Fault 10 of the list: create-only forgets what was deleted."""
    stalled = open_writer(vm.log, vm.writer_id)
    slot = stalled.next_seq
    vm.capture(step({0: 500}, taken_over=True))
    for n in range(3):
        vm.capture(step({0: 502 + 2 * n, 1: 510 + 2 * n}))
        vm.clock.advance(3600)
    vm.prune()
    with pytest.raises(ObjectMissing):
        vm.log.read(slot)
    with pytest.raises(Fenced) as caught:
        stalled.fence()
    assert caught.value.fields["writer"] == vm.writer_id
    assert vm.log.read(slot).meta.writer != vm.writer_id, "the store took it: it is what the writer must not believe"
    vm.check()
    assert not verify(vm.log, committed_seq=0, read_data=True, progress=NO_PROGRESS).problems
    vm.capture(step({0: 600}))
    vm.clock.advance(3600)
    vm.prune()
    vm.check()
    with pytest.raises(ObjectMissing):
        vm.log.read(slot)


def test_10_a_writer_that_slept_through_several_prunes_learns_it_too(vm: PrunedVm) -> None:
    vm.prune()
    stalled = open_writer(vm.log, vm.writer_id, known_horizon=1)
    vm.capture(step({0: 500}, taken_over=True))
    for n in range(3):
        vm.capture(step({0: 502 + 2 * n, 1: 510 + 2 * n}))
        vm.clock.advance(3600)
        vm.prune()
    with pytest.raises(Fenced):
        stalled.fence()


def test_a_prune_while_a_writer_writes_does_not_stop_it(vm: PrunedVm) -> None:
    writer = open_writer(vm.log, vm.writer_id)
    vm.prune(keep_of(vm), options=WITH_GRACE)
    vm.capture(step({0: 500}), writer=writer)
    vm.capture(step({0: 502}), writer=writer)
    vm.check()


@pytest.mark.parametrize("prefix", ["log", "pack", "merged", "horizon"])
@pytest.mark.parametrize("pruned_before", [False, True])
def test_9_a_listing_that_is_cut_deletes_nothing_that_is_needed(
    vm: PrunedVm, prefix: str, *, pruned_before: bool
) -> None:
    """Fault 9 of the list, at each length that a listing can be cut to, whichever listing of the run it is."""
    keep = {*keep_of(vm), max(vm.points)}
    if pruned_before:
        vm.prune(keep, options=WITH_GRACE)
        vm.capture(step({0: 700}))
        vm.clock.advance(20 * 86400)
    before, key = snapshot(vm.store), f"vm/web/{prefix}/"
    listed = len(list(vm.store.list(key)))
    fired = 0
    for cut in range(0, listed, 1 if SOAK else 1 + listed // 4):
        for call in (1, 2):
            trial = twin(vm, before)
            faulty = FaultyStore(trial.store, Fault("list", call=call, effect=Effect.CUT, key=key, at=cut))
            with suppress(PruneRefused, ChainBroken):
                trial.prune(keep, options=WITH_GRACE, store=faulty)
            fired += not faulty.not_fired
            trial.points = {p.number: vm.points[p.number] for p in catalog.points(trial.log)}
            assert keep <= set(trial.points)
            trial.check()
            assert not verify(trial.log, committed_seq=0, read_data=True, progress=NO_PROGRESS).problems
    assert fired >= min(1, listed)


def test_9_a_log_that_is_never_listed_is_no_new_vm(vm: PrunedVm) -> None:
    before = objects_of(vm.store)
    vm.clock.advance(365 * 86400)
    cuts = [Fault("list", call=call, effect=Effect.CUT, key="vm/web/log/", at=0) for call in (1, 2)]
    with FaultyStore(vm.store, *cuts) as faulty, pytest.raises(PruneRefused, match="the store does not list it"):
        vm.prune(store=faulty)
    assert objects_of(vm.store) == before


@pytest.mark.parametrize("pruned_before", [False, True])
def test_9_a_segment_that_is_left_out_of_a_listing_is_missed(vm: PrunedVm, *, pruned_before: bool) -> None:
    if pruned_before:
        vm.prune(keep_of(vm))
    segments = [seq for seq, _ in vm.log.listed()]
    before = objects_of(vm.store)
    for seq in segments[:-1]:
        store = cast(ObjectStore, HidingStore(vm.store, names.segment("web", seq)))
        with pytest.raises(PruneRefused, match=f"segment {seq}, which must be there"):
            vm.prune(store=store)
    assert objects_of(vm.store) == before


def test_9_a_listing_that_fails_ends_the_run(vm: PrunedVm) -> None:
    before = objects_of(vm.store)
    with (
        FaultyStore(vm.store, Fault("list", effect=Effect.REPLY_LOST, key="vm/web/pack/", at=2)) as faulty,
        pytest.raises(StoreUnavailable),
    ):
        vm.prune(store=faulty)
    assert objects_of(vm.store) == before


def test_a_log_that_lost_its_newest_points_is_not_pruned(vm: PrunedVm) -> None:
    newest = max(vm.points)
    vm.store.delete(names.segment("web", newest))
    with pytest.raises(PruneRefused, match=f"{newest} was committed"):
        vm.prune_knowing(newest)


def test_a_log_that_lost_everything_but_its_horizon_is_no_new_vm(vm: PrunedVm) -> None:
    vm.prune(keep_of(vm))
    for info in list(vm.store.list("vm/web/log/")):
        vm.store.delete(info.key)
    with pytest.raises(ChainBroken):
        vm.log.newest()
    with pytest.raises(ChainBroken):
        open_writer(vm.log, "another")
    with pytest.raises(PruneRefused):
        vm.prune()


def test_a_pruned_log_without_its_horizon_is_broken_and_no_shorter_log(vm: PrunedVm) -> None:
    vm.prune(keep_of(vm))
    vm.store.delete(names.horizon("web", 1))
    log = Log(vm.repository.vm("web"))
    with pytest.raises((ChainBroken, ObjectMissing)):
        restored(log, max(vm.points))
    with pytest.raises((ChainBroken, ObjectMissing)):
        catalog.points(log)


def test_a_horizon_of_an_older_state_is_refused_where_it_no_longer_fits(vm: PrunedVm) -> None:
    vm.prune(keep_of(vm))
    vm.capture(step({0: 700}))
    vm.prune()
    vm.store.delete(names.horizon("web", 2))
    log = Log(vm.repository.vm("web"))
    with pytest.raises((ChainBroken, ObjectMissing, ObjectDamaged)):
        restored(log, max(vm.points))


class Locked:
    """A store that denies every deletion, as Object Lock or a policy does."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def delete(self, key: str) -> None:
        raise StoreDenied(url="locked:", operation=f"delete {key}", problem="AccessDenied")


def test_18_deletions_that_are_denied_are_later_and_not_fatal(vm: PrunedVm) -> None:
    """Fault 18 of the list: prune goes on, and what was locked goes when the lock has ended."""
    locked = cast(ObjectStore, Locked(vm.store))
    done = vm.prune(keep_of(vm), store=locked)
    assert (done.deleted_objects, done.denied_objects > 0) == (0, True)
    vm.check()
    vm.capture(step({0: 700, 1: 702}))
    vm.clock.advance(86400)
    again = vm.prune(store=locked)
    assert [v.point for v in again.dropped]
    vm.check()
    vm.clock.advance(86400)
    assert vm.prune().deleted_objects >= done.denied_objects
    vm.check()
    assert vm.prune().deleted_objects == 0


def test_of_two_prunes_at_once_one_wins_and_nothing_is_lost(vm: PrunedVm) -> None:
    before = snapshot(vm.store)
    keep = {*keep_of(vm), max(vm.points)}
    calls = steps_of(lambda store: twin(vm, before).prune(keep, store=store), twin(vm, before).store)
    raced = 0
    for at in range(1, calls + 1, EVERY):
        busy = twin(vm, before)
        store = InterruptedStore(busy.store, at, partial(busy.prune, [*keep, 2]))
        try:
            busy.prune(keep, store=cast(ObjectStore, store))
        except (PruneRaced, PrunedMeanwhile, PruneRefused):
            raced += 1
        busy.points = {p.number: vm.points[p.number] for p in catalog.points(busy.log)}
        assert set(busy.points) in (keep, {*keep, 2})
        busy.check()
        busy.clock.advance(30 * 86400)
        busy.prune(keep)
        busy.check()
        assert {p.number for p in catalog.points(busy.log)} == keep
    assert raced


def orphan(vm: PrunedVm, number: int = 2) -> str:
    """A pack that nothing lists: of a seed that runs, or of a process that died. Its name."""
    known = set(objects_of(vm.store))
    spooled, layers = vm.spool(step({n: number + 2 * n for n in range(8)}))
    with (
        FaultyStore(vm.store, Fault("create", key="vm/web/log/", error=Crash)) as faulty,
        pytest.raises(Crash),
    ):
        log, vm.log = vm.log, reopened(vm, faulty)
        try:
            vm.ship(spooled, layers, step({}))
        finally:
            vm.log = log
    return next(name for name in set(objects_of(vm.store)) - known if "/pack/" in name)


def test_packs_of_a_seed_that_still_sends_stay_however_old_they_are(vm: PrunedVm) -> None:
    first = orphan(vm)
    for _ in range(40):
        vm.clock.advance(86400)
        last = orphan(vm)
        vm.prune(keep_of(vm))
    assert {first, last} <= set(objects_of(vm.store))


def test_packs_that_nothing_lists_go_after_the_orphan_grace_and_the_grace_time(vm: PrunedVm) -> None:
    left = orphan(vm)
    vm.clock.advance(13 * 86400)
    vm.prune(vm.points, options=WITH_GRACE)
    assert left in objects_of(vm.store)
    vm.clock.advance(2 * 86400)
    done = vm.prune(vm.points, options=WITH_GRACE)
    assert done.orphans > 0
    assert left in objects_of(vm.store)
    vm.clock.advance(3600)
    assert vm.prune(vm.points, options=WITH_GRACE).waiting_objects == done.orphans
    vm.clock.advance(86400)
    assert vm.prune(vm.points, options=WITH_GRACE).deleted_objects >= done.orphans
    assert left not in objects_of(vm.store)
    vm.check()


def test_packs_older_than_the_newest_point_can_be_no_seeds_and_go_sooner(vm: PrunedVm) -> None:
    left = orphan(vm)
    vm.clock.advance(3600)
    vm.disks = {name: disk.copy() for name, disk in vm.points[max(vm.points)].items()}
    vm.capture(step({0: 800}))
    vm.clock.advance(2 * 86400)
    vm.prune(vm.points)
    assert left not in objects_of(vm.store)
    vm.check()


def test_a_vm_that_is_being_seeded_for_the_first_time_is_left_alone(tmp_path: Path) -> None:
    vm = PrunedVm(tmp_path)
    left = orphan(vm)
    vm.clock.advance(86400)
    assert vm.prune().horizon == 0
    assert left in objects_of(vm.store)
    vm.clock.advance(20 * 86400)
    assert vm.prune().orphans > 0
    assert left not in objects_of(vm.store)
    vm.disks = {}
    vm.capture(step({0: 800}))
    vm.check()


@pytest.mark.parametrize("points", [0, 1, 3])
def test_a_capture_that_sleeps_over_its_packs_at_any_step_commits_none_that_are_gone(
    tmp_path: Path, points: int
) -> None:
    """Prune takes its packs for orphans, rightly: so it must not be let commit them when it wakes up."""
    vm = PrunedVm(tmp_path)
    for change in history()[:points]:
        vm.capture(change)
    before = snapshot(vm.store)
    change = step({n: 400 + 2 * n for n in range(12)}, whole=True)
    ends = Counter[str]()

    def sleep(busy: PrunedVm) -> None:
        busy.clock.advance(20 * 86400)
        busy.prune(vm.points)

    def capture(busy: PrunedVm, store: ObjectStore) -> None:
        busy.log = reopened(busy, store)
        busy.capture(change)

    trial = twin(vm, before)
    calls = steps_of(lambda store: capture(trial, store), trial.store)
    for at in range(1, calls + 1):
        busy = twin(vm, before)
        captures = [*busy.captures]
        store = InterruptedStore(busy.store, at, partial(sleep, busy))
        try:
            capture(busy, cast(ObjectStore, store))
            ends["committed"] += 1
        except LogAdvanced:
            busy.captures = captures
            busy.disks = {name: disk.copy() for name, disk in vm.disks.items()}
            ends["refused"] += 1
        busy.log = Log(busy.repository.vm(busy.vm))
        busy.check()
        assert not verify(busy.log, committed_seq=0, read_data=True, progress=NO_PROGRESS).problems
        busy.capture(step({2: 900}, whole=True))
        busy.check()
    assert min(ends["committed"], ends["refused"]) > 0, ends


def test_prune_appends_nothing_to_a_log_that_went_on_by_itself(vm: PrunedVm) -> None:
    orphan(vm)
    vm.disks = {name: disk.copy() for name, disk in vm.points[max(vm.points)].items()}
    vm.clock.advance(15 * 86400)
    assert vm.prune(vm.points, options=WITH_GRACE).orphans
    vm.clock.advance(3600)
    newest = vm.capture(step({0: 800})).seq
    vm.clock.advance(86400)
    assert vm.prune(vm.points, options=WITH_GRACE).deleted_objects
    assert vm.log.newest() == newest
    orphan(vm)
    vm.clock.advance(15 * 86400)
    assert vm.prune(vm.points, options=WITH_GRACE).orphans
    vm.clock.advance(86400)
    assert vm.prune(vm.points, options=WITH_GRACE).deleted_objects
    assert vm.log.newest() == newest + 1


def test_a_point_that_was_dropped_says_so(vm: PrunedVm) -> None:
    vm.prune(keep_of(vm))
    gone = next(hole for hole in vm.log.horizon().merged())
    if gone.last > gone.first:
        with pytest.raises(PointPruned):
            restored(vm.log, gone.first)


def test_17_maps_of_an_older_horizon_are_passed_over_and_prune_makes_a_new_one(vm: PrunedVm) -> None:
    """A map from before names objects that are gone; a reader that took it would find nothing there."""
    old = write_map(vm.log, max(vm.points), present=set())
    vm.prune(keep_of(vm))
    stretch = newest_stretch(vm.log, max(vm.points))
    assert stretch.ground is not None
    assert stretch.ground.block_map is not None
    assert stretch.ground.block_map.meta.horizon == 1
    assert stretch.ground.block_map.name != old
    vm.check()
    stale = twin(vm, snapshot(vm.store))
    stale.store.delete(stretch.ground.block_map.name)
    assert newest_stretch(stale.log, max(vm.points)).ground is None
    stale.check()


def test_a_map_that_a_capture_wrote_by_an_older_view_is_not_used(vm: PrunedVm) -> None:
    before = snapshot(vm.store)
    newest = max(vm.points)
    calls = steps_of(lambda store: write_map(reopened(vm, store), newest, present=set()), vm.store)
    for at in range(1, calls + 1, EVERY):
        busy = twin(vm, before)
        store = InterruptedStore(busy.store, at, partial(busy.prune, keep_of(vm)))
        with suppress(PrunedMeanwhile, ObjectMissing):
            write_map(reopened(busy, cast(ObjectStore, store)), newest, present=set())
        busy.check()


def test_11_what_can_not_be_copied_faithfully_stays_where_it_is(vm: PrunedVm) -> None:
    """Fault 11 of the list: sources are kept until what was copied was read back."""
    before = objects_of(vm.store)
    for fault in (
        Fault("create", effect=Effect.CORRUPT, key="vm/web/pack/", at=20),
        Fault("create", effect=Effect.CORRUPT, key="vm/web/merged/", at=20),
        Fault("get_range", effect=Effect.CORRUPT, key="vm/web/log/", at=3),
    ):
        trial = twin(vm, snapshot(vm.store))
        with FaultyStore(trial.store, fault) as faulty, pytest.raises(ObjectDamaged):
            trial.prune(keep_of(vm), options=replace(AT_ONCE, copy_below=1.0), store=faulty)
        assert set(before) <= set(objects_of(trial.store))
        assert trial.log.horizon().number == 0
        trial.points = dict(vm.points)
        trial.check()


def test_a_dry_run_writes_nothing_and_says_what_the_run_then_does(vm: PrunedVm) -> None:
    before = objects_of(vm.store)
    told = vm.prune(keep_of(vm), options=replace(AT_ONCE, dry_run=True))
    assert objects_of(vm.store) == before
    done = vm.prune(keep_of(vm))
    assert (told.dropped, told.freed_bytes, told.copied_bytes) == (done.dropped, done.freed_bytes, done.copied_bytes)
    after = objects_of(vm.store)
    size = sum(map(len, before.values())) - sum(map(len, after.values()))
    horizon = sum(len(data) for name, data in after.items() if "/horizon/" in name)
    assert abs(size + horizon - done.freed_bytes) < 2000, "what was freed is what was told"


def test_hosts_capture_on_as_if_nothing_was_pruned(tmp_path: Path) -> None:
    """Whole cycles, with prunes between them: increments, resyncs, block maps, a seed, and another host."""
    lab = ProtectedVm(tmp_path)
    often = MapPolicy(every=2, step=1)
    for number in range(14):
        if number == 5:
            lab.vm.crash()  # the bitmaps are gone: a resync, which compares with hashes across a hole
        if number == 11:
            lab.vm.crash()
        seed = SeedOptions(stream_above_bytes=0) if number == 11 else SeedOptions()
        host = "alpha" if number < 8 else "bravo"
        lab.write()
        outcome = lab.cycle(host, maps=often, seed=seed)
        assert outcome.result is Result.COMMITTED
        prune_vm(lab.log(), Rules(last=2), [], committed=0, now=lab.clock.now(), options=replace(AT_ONCE, copy_below=1))
        assert len(lab.check_settled(host).disks) == 2
        assert len(lab.points()) == min(number + 1, 2)
    assert lab.spool("bravo").vm("web").state().horizon == lab.log().horizon().number - 1 > 5
    assert not verify(lab.log(), committed_seq=0, read_data=True, progress=NO_PROGRESS).problems
    kinds = {disk.kind for point in lab.points() for disk in point.disks}
    assert kinds == {Kind.INCREMENTAL}


SMALL: Final = ShipLimits(object_blocks=3)


@pytest.mark.parametrize(
    "seed", [SeedOptions(limits=SMALL), SeedOptions(limits=SMALL, stream_above_bytes=0)], ids=["spool", "seed"]
)
def test_a_cycle_that_finds_the_log_gone_on_sends_what_it_has_anew(tmp_path: Path, seed: SeedOptions) -> None:
    lab = ProtectedVm(tmp_path)
    lab.cycle()
    for disk in lab.vm.disks.values():
        disk.write(0, bytes(range(1, 9)) * (len(disk.content) // 8))  # so that there is more than the segment takes
    lab.vm.crash()  # so that the seed reads everything
    deleted: list[int] = []

    def sleep() -> None:
        lab.clock.wall += timedelta(days=20)
        done = prune_vm(lab.log(), Rules(last=9), [], committed=0, now=lab.clock.now(), options=AT_ONCE)
        deleted.append(done.deleted_objects)

    store = cast(ObjectStore, InterruptedStore(lab.store, 1, sleep, only="create vm/web/log/"))
    outcome = lab.cycle(seed=seed, store=store)
    assert deleted[0] > 0
    assert outcome.segment is not None
    assert outcome.segment.seq == 3, "2 is prune's"
    lab.check_settled()
    assert not verify(lab.log(), committed_seq=0, read_data=True, progress=NO_PROGRESS).problems


def test_a_host_that_was_fenced_learns_it_from_a_log_whose_segments_it_knew_are_gone(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    lab.cycle("alpha")
    for _ in range(4):
        lab.write()
        lab.cycle("bravo")
        prune_vm(lab.log(), Rules(last=1), [], committed=0, now=lab.clock.now(), options=AT_ONCE)
    with pytest.raises(Fenced):
        lab.cycle("alpha")
    lab.write()
    assert lab.cycle("alpha", take_over=True).result is Result.COMMITTED
    lab.check_settled("alpha")
