"""`drsync repair`: maps made anew, identical; and what is lost, exactly."""

import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest
from damaging import REGIONS
from faulty import Fault, FaultyStore
from shipped_vm import DiskStep, ShippedVm, Step, objects_of, reopened, restored_disk, store_of

from drsync.errors import MapUnwritable, ObjectDamaged, ObjectMissing
from drsync.format import names
from drsync.image import load_image
from drsync.log import Log
from drsync.mapped import MapPages, check_same, listed_maps, load_mapped_image, read_map
from drsync.mapping import MapPolicy, write_map
from drsync.model import BLOCK_SIZE
from drsync.repair import RepairReport, repair

NOW: Final = datetime(2026, 4, 1, tzinfo=UTC)
RARELY: Final = MapPolicy(every=1000)


def step(writes: dict[int, int], *, whole: bool = False) -> Step:
    return Step(disks={"root": DiskStep(size_bytes=6 * BLOCK_SIZE, writes=writes, whole=whole)}, compare=not whole)


@pytest.fixture
def vm(tmp_path: Path) -> ShippedVm:
    """Five points, maps of 2 and 4; point 5 holds all in full."""
    vm = ShippedVm(tmp_path)
    for number in range(1, 5):
        vm.capture(step({n: 8 * number + n for n in range(6) if number in {1, n}}))
        if number % 2 == 0:
            write_map(vm.log, number, present={name for name, _ in listed_maps(vm.log.objects)})
    vm.capture(step({0: 99}, whole=True))
    return vm


def mended(log: Log, *, dry_run: bool = False, policy: MapPolicy = RARELY) -> RepairReport:
    return repair(log, NOW, dry_run=dry_run, policy=policy)


def check_all_maps_say_what_the_log_says(log: Log, points: set[int]) -> None:
    usable = set()
    for name, seq in listed_maps(log.objects):
        try:
            block_map = read_map(log.objects, name)
            check_same(load_image(log, seq), MapPages(log.objects, block_map), name)
            usable.add(seq)
        except (ObjectDamaged, ObjectMissing):  # one that is no good still lies there
            pass
    assert usable >= points


def test_a_repository_that_is_whole_is_left_alone(vm: ShippedVm) -> None:
    before = objects_of(vm.store)
    report = mended(vm.log)
    assert (report.repairs, report.useless, report.hurt, report.maps, report.points) == ([], [], [], 2, 5)
    assert objects_of(vm.store) == before


@pytest.mark.parametrize("how", sorted(REGIONS))
def test_a_map_that_is_damaged_anywhere_is_made_anew_and_says_the_same(vm: ShippedVm, how: str) -> None:
    objects = objects_of(vm.store)
    name = next(name for name in objects if "/map/" in name)
    data = REGIONS[how](objects.pop(name), random.Random(3))
    log = reopened(vm, store_of(objects if data is None else objects | {name: data}))
    would = mended(log, dry_run=True)
    assert objects_of(log.objects.store) == (objects if data is None else objects | {name: data})
    report = mended(log)
    assert [(r.point, r.reason) for r in report.repairs] == [(r.point, r.reason) for r in would.repairs]
    assert all(r.name is None for r in would.repairs)
    if how not in {"gone", "magic", "footer"}:  # who looks for a map does not miss one, nor read its first bytes
        assert [r.point for r in report.repairs][:1] == [2]
        assert report.useless[0] == name
    check_all_maps_say_what_the_log_says(log, {4} if how == "gone" else {2, 4})
    assert report.hurt == []
    assert all(r.name is None for r in mended(log, dry_run=True).repairs)
    assert mended(log).repairs == []


def test_a_map_of_a_point_that_is_not_there_is_of_no_use(vm: ShippedVm) -> None:
    objects = {k: v for k, v in objects_of(vm.store).items() if "/log/" not in k or int(k[-1], 16) < 4}
    log = reopened(vm, store_of(objects))  # the log is cut to 3, its maps are not
    report = mended(log)
    assert [name[-49:-33] for name in report.useless] == [f"{4:016x}"]
    assert report.repairs == []  # there is no point 4 to make one of


def test_all_maps_gone_means_one_of_the_newest_point(vm: ShippedVm) -> None:
    objects = {k: v for k, v in objects_of(vm.store).items() if "/map/" not in k}
    log = reopened(vm, store_of(objects))
    assert mended(log, policy=MapPolicy(every=6)).repairs == []
    report = mended(log, policy=MapPolicy(every=5))
    assert [(r.point, r.reason) for r in report.repairs] == [(5, "there is none of the newest points")]
    check_all_maps_say_what_the_log_says(log, {5})


def test_f54_behind_a_lost_segment_a_full_point_gets_a_map_of_its_own_and_restores(vm: ShippedVm) -> None:
    vm.capture(step({3: 201}))
    objects = {k: v for k, v in objects_of(vm.store).items() if "/map/" not in k}
    del objects[names.segment("web", 2)]
    log = reopened(vm, store_of(objects))
    assert [p.point for p in mended(log, dry_run=True).hurt] == [2, 3, 4, 5, 6]
    report = mended(log)
    assert [r.point for r in report.repairs] == [5]
    assert [p.point for p in report.hurt] == [2, 3, 4]
    for number in (5, 6):
        image = load_mapped_image(log, number)
        assert {"root": restored_disk(image, log, "root")} == vm.points[number]
    assert mended(log).repairs == []


def test_a_store_that_cant_be_written_is_told_for_the_map_and_the_loss_all_the_same(vm: ShippedVm) -> None:
    objects = objects_of(vm.store)
    name = next(name for name in objects if "/map/" in name)
    store = store_of(objects | {name: bytes(900)})
    with FaultyStore(store, Fault("create", key=names.map_prefix("web"))) as faulty:
        report = mended(reopened(vm, faulty))
    errors = [r.error for r in report.repairs]
    assert isinstance(errors[0], MapUnwritable)
    assert errors[0].remedy == "drsync repair web   (when the store can be written)"
