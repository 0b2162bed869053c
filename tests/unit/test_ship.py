"""Shipping: any history, in objects of any size, restores at every point to what the oracle knows."""

import secrets
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from faulty import Effect, Fault, FaultyStore
from hypothesis import given
from msgspec import structs
from shipped_vm import (
    WRITTEN_ZEROS,
    ZEROED,
    CountingProgress,
    DiskStep,
    ShippedVm,
    Step,
    objects_of,
    reopened,
    restored,
)
from strategies import histories

from drsync.errors import Fenced, PointUnwritable, StoreUnavailable
from drsync.format import names
from drsync.image import load_image
from drsync.model import BLOCK_SIZE, Kind
from drsync.ship import ShipLimits
from drsync.writer import open_writer


@pytest.fixture
def vm(tmp_path: Path) -> ShippedVm:
    return ShippedVm(tmp_path)


def disk(blocks: int, writes: dict[int, int] | None = None, *, whole: bool = False, cut: int = 0) -> DiskStep:
    return DiskStep(size_bytes=blocks * BLOCK_SIZE - cut, writes=writes or {}, whole=whole)


def one(blocks: int, writes: dict[int, int] | None = None, *, whole: bool = False, compare: bool = True) -> Step:
    return Step(disks={"root": disk(blocks, writes, whole=whole)}, compare=compare)


def kinds(vm: ShippedVm, point: int) -> dict[str, Kind]:
    meta = vm.log.read(point).meta.point
    assert meta is not None
    return {d.name: d.kind for d in meta.disks}


@given(histories())
def test_any_history_in_any_split_restores_at_every_point_to_what_the_oracle_knows(history: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        vm = ShippedVm(Path(directory)).run(history)
        assert len(vm.points) == len(history)
        for point, disks in vm.points.items():
            assert restored(vm.log, point) == disks


def test_only_an_unbroken_bitmap_makes_an_increment_and_only_a_known_disk_a_resync(vm: ShippedVm) -> None:
    vm.run(
        [
            one(4, {0: 1}),
            one(4, {1: 3}),
            one(4, {2: 5}, whole=True),
            one(4, {3: 7}, whole=True, compare=False),
            one(6, {5: 9}),
            Step(disks={"root": disk(6), "data": disk(2, {0: 2})}),
            Step(disks={"data": disk(2)}),
            Step(disks={"root": disk(6, {0: 4}), "data": disk(2)}),
        ]
    )
    found = [kinds(vm, point) for point in vm.points]
    full, resync, increment = Kind.FULL, Kind.RESYNC, Kind.INCREMENTAL
    assert [f.get("root") for f in found] == [full, increment, resync, full, resync, increment, None, full]
    assert [f.get("data") for f in found[5:]] == [full, increment, increment]


def test_f15_an_increment_names_the_capture_of_the_point_before_and_nothing_else_names_one(vm: ShippedVm) -> None:
    vm.run([one(4, {0: 1}), one(4, {1: 3}), one(4, whole=True)])
    metas = [vm.log.read(point).meta.point for point in vm.points]
    assert [m.base for m in metas if m is not None] == [None, vm.captures[0], None]


def test_a_resync_sends_only_what_differs(vm: ShippedVm) -> None:
    vm.run([one(8, dict.fromkeys(range(6), 2)), one(8, {0: 4, 1: ZEROED, 2: WRITTEN_ZEROS, 7: 6}, whole=True)])
    segment = vm.log.read(2)
    (rows,) = segment.rows
    assert rows.blocks.tolist() == [0, 7]
    assert list(zip(rows.zero_first.tolist(), rows.zero_count.tolist(), strict=True)) == [(1, 2)]
    assert segment.meta.point is not None
    assert segment.meta.point.disks[0].changed_bytes == 4 * BLOCK_SIZE


def test_a_resync_without_a_difference_commits_a_point_without_blocks(vm: ShippedVm) -> None:
    vm.run([one(8, dict.fromkeys(range(6), 2)), one(8, whole=True)])
    segment = vm.log.read(2)
    assert segment.rows == []
    assert len(segment.packs) == 0
    assert restored(vm.log, 2) == restored(vm.log, 1)


def test_zeros_are_not_stored_and_need_no_row_in_a_full(vm: ShippedVm) -> None:
    step = DiskStep(size_bytes=6 * BLOCK_SIZE, writes={0: WRITTEN_ZEROS, 1: ZEROED, 2: 1}, explicit_zeros=True)
    (rows,) = vm.capture(Step(disks={"root": step}, limits=ShipLimits())).rows
    assert rows.blocks.tolist() == [2]
    assert len(rows.zero_first) == 0


def test_what_fits_one_object_is_one_object(vm: ShippedVm) -> None:
    vm.capture(one(4, {0: 1, 2: 3, 3: 5}))
    assert [name for name in objects_of(vm.store) if name.startswith("vm/")] == [names.segment("web", 1)]


def test_no_object_holds_more_blocks_than_the_limit_and_f14_packs_are_in_order(vm: ShippedVm) -> None:
    segment = vm.capture(
        Step(disks={"a": disk(20, dict.fromkeys(range(7), 2)), "b": disk(20, dict.fromkeys(range(4, 9), 4))})
    )
    entries = [segment.packs.entry(n) for n in range(len(segment.packs))]
    assert len(entries) == 3
    assert sum(len(r.blocks) for r in segment.rows) == 3
    assert all(left.last < right.first for left, right in pairwise(entries))
    assert [(e.first >> 32, e.last >> 32) for e in entries] == [(0, 0), (0, 0), (0, 1)]


def test_a_pack_of_nothing_but_zeros_is_not_stored(vm: ShippedVm) -> None:
    segment = vm.capture(one(12, dict.fromkeys(range(6), WRITTEN_ZEROS) | dict.fromkeys(range(6, 12), 2)))
    packs = [name for name in objects_of(vm.store) if "/pack/" in name]
    assert len(packs) == len(segment.packs) == 1
    assert restored(vm.log, 1) == vm.points[1]


def test_an_object_of_what_does_not_compress_and_as_many_zero_runs_as_can_be_fits_its_buffer(vm: ShippedVm) -> None:
    limits = ShipLimits(object_blocks=4, object_zero_runs=2, workers=1)
    blocks = 3 * 8192
    writes = dict.fromkeys(range(8193, 16384, 2), ZEROED) | dict.fromkeys(range(4), 2) | {8192: WRITTEN_ZEROS}
    vm.capture(Step(disks={"root": disk(blocks)}))
    vm.capture(Step(disks={"root": disk(blocks, writes)}, limits=limits))
    assert max(map(len, objects_of(vm.store).values())) <= limits.object_bytes
    assert restored(vm.log, 2) == vm.points[2]


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("effect", [Effect.REFUSED, Effect.REPLY_LOST])
def test_f18_a_shipment_that_fails_anywhere_commits_nothing_or_all_and_can_be_shipped_again(
    vm: ShippedVm, call: int, effect: Effect
) -> None:
    vm.capture(one(12, {0: 1}))
    step = one(12, dict.fromkeys(range(1, 10), 4))
    spooled, layers = vm.spool(step)
    with FaultyStore(vm.store, Fault("create", call=call, key="vm/", effect=effect)) as faulty:
        writer = open_writer(reopened(vm, faulty), vm.writer_id)
        with pytest.raises(StoreUnavailable):
            vm.ship(spooled, layers, step, writer=writer)
    is_committed = call == 3 and effect is Effect.REPLY_LOST  # two packs, then the segment
    assert vm.log.newest() == (2 if is_committed else 1)
    if not is_committed:
        vm.ship(spooled, layers, step)
    assert restored(vm.log, 2) == vm.disks
    assert restored(vm.log, 1) == vm.points[1]


def test_f20_a_writer_whose_number_another_one_took_is_fenced_and_commits_nothing(vm: ShippedVm) -> None:
    vm.capture(one(4, {0: 1}))
    late = vm.writer()
    open_writer(vm.log, "another")
    before = objects_of(vm.store)
    with pytest.raises(Fenced) as caught:
        vm.capture(one(4, {0: 3}), writer=late)
    assert caught.value.fields["writer"] == "another"
    assert objects_of(vm.store) == before


def test_f19_what_no_reader_would_take_is_not_committed(vm: ShippedVm) -> None:
    disks = {f"d{n}": disk(1, {0: 1}) for n in range(65)}
    with pytest.raises(PointUnwritable) as caught:
        vm.capture(Step(disks=disks))
    assert vm.log.newest() == 0
    assert caught.value.remedy.startswith("drsync config check")


def test_what_is_known_of_a_vm_may_be_large(vm: ShippedVm) -> None:
    spooled, layers = vm.spool(one(4, {0: 1}))
    known = {"xml": secrets.token_hex(500_000)}
    vm.ship(structs.replace(spooled, definition=known), layers, one(4))
    assert load_image(vm.log, 1).point.definition == known


def test_the_progress_of_a_shipment_is_the_bytes_that_its_layers_hold(vm: ShippedVm) -> None:
    progress = CountingProgress()
    vm.capture(one(12, dict.fromkeys(range(9), 2)), progress=progress)
    assert progress.done_bytes == 9 * BLOCK_SIZE


def test_a_pack_of_zero_runs_alone_is_listed(vm: ShippedVm) -> None:
    whole = {n: 2 * n + 2 for n in range(12)}
    vm.capture(Step(disks={"data": disk(12, whole), "root": disk(12, whole)}))
    zeros = dict.fromkeys(range(0, 12, 2), ZEROED)  # so many runs that the object takes no more
    segment = vm.capture(Step(disks={"data": disk(12, zeros), "root": disk(12, {3: 100})}))
    assert len(segment.packs) == 1
    assert restored(vm.log, segment.seq) == vm.points[segment.seq]
