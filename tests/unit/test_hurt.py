"""Which points damage hurts: exactly those whose restore fails, and the blocks that it is about."""

import os
import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from damaging import REGIONS, damaged, flipped
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_vm import PrunedVm
from shipped_vm import (
    NO_PROGRESS,
    ZEROED,
    BlockTarget,
    DiskStep,
    OracleDisk,
    ShippedVm,
    Step,
    objects_of,
    reopened,
    restored_disk,
    store_of,
)
from strategies import histories

from drsync.damage import Damaged, lost_pack, read_records, record, says_the_same, write_record
from drsync.errors import ChainBroken, ObjectDamaged, ObjectMissing, PointPruned, PrunedMeanwhile
from drsync.format import names
from drsync.hurt import HurtPoint, assess, image_of, standing_of
from drsync.log import Log
from drsync.mapped import listed_maps, load_mapped_image
from drsync.mapping import write_map
from drsync.model import BLOCK_SIZE, block_count, block_length
from drsync.restore import Salvage, lost_mark, restore_disk
from drsync.verify import verify

NOT_AS_WRITTEN = (ChainBroken, ObjectDamaged, ObjectMissing, PrunedMeanwhile, PointPruned)


def restores(log: Log, point: int, expected: Mapping[str, OracleDisk]) -> bool:
    """Whether a point restores, by the way that `drsync restore` takes; if so, it is what was captured."""
    try:
        image = load_mapped_image(log, point)
        assert image.seq == point
        found = {disk.name: restored_disk(image, log, disk.name) for disk in image.point.disks}
    except NOT_AS_WRITTEN:
        return False
    assert found == expected
    return True


def check_salvage(log: Log, hurt: HurtPoint, expected: Mapping[str, OracleDisk]) -> None:
    """What is not told to be lost comes back exactly; what is, is marked and listed."""
    image, _ = image_of(standing_of(log), hurt.point)
    if image is None or image.seq != hurt.point:
        return
    told = {disk.name: {b for first, n in disk.runs for b in range(first, first + n)} for disk in hurt.disks}
    salvage = Salvage()
    for disk in image.point.disks:
        target = BlockTarget()
        restore_disk(log.objects, image, disk.name, target, NO_PROGRESS, salvage)
        lost = told.get(disk.name, set())
        assert salvage.lost.get(disk.name, {}).keys() == lost
        for block in range(block_count(disk.size_bytes)):
            length = block_length(block, disk.size_bytes)
            mark = lost_mark(disk.name, block, length)
            whole = expected[disk.name].blocks.get(block, bytes(length))
            assert target.written.get(block, bytes(length)) == (mark if block in lost else whole)


def audit(log: Log) -> list[HurtPoint]:
    return list(verify(log, committed_seq=0, read_data=True, progress=NO_PROGRESS).hurt)


@settings(deadline=None, max_examples=300 if os.environ.get("DRSYNC_SOAK") else 30)
@given(
    histories(max_steps=7),
    st.sets(st.integers(1, 12), max_size=2),
    st.one_of(st.none(), st.tuples(st.integers(2, 7), st.sets(st.integers(1, 7), max_size=3))),
    st.integers(0, 2**32),
)
def test_the_points_that_damage_hurts_are_exactly_those_that_do_not_restore(
    history: list[Step], mapped_points: set[int], pruned: tuple[int, set[int]] | None, seed: int
) -> None:
    """Whatever is damaged of whatever history, with maps and without, pruned in the middle or not."""
    chance = random.Random(seed)
    with TemporaryDirectory() as directory:
        vm = PrunedVm(Path(directory))
        for change in history:
            seq = vm.capture(change).seq
            if seq in mapped_points:
                write_map(vm.log, seq, present={name for name, _ in listed_maps(vm.log.objects)})
            if pruned is not None and seq == pruned[0]:
                vm.prune(keep=pruned[1])
        whole = objects_of(vm.store)
    candidates = [name for name in whole if name.startswith("vm/")]
    chosen = chance.sample(candidates, min(len(candidates), chance.choice([1, 1, 2])))
    changed, told = damaged(whole, chosen, chance)
    log = reopened(vm, store_of(changed))
    hurt = {point.point: point for point in audit(log)}
    newest = max((int(name[-16:], 16) for name in changed if "/log/" in name), default=0)
    for point, disks in vm.points.items():
        if point > newest:  # nobody can know of it but by a heartbeat, or a horizon
            assert not restores(log, point, disks)
            continue
        assert restores(log, point, disks) == (point not in hurt), (point, told, hurt)
        if point in hurt:
            check_salvage(log, hurt[point], disks)


@pytest.fixture
def vm(tmp_path: Path) -> ShippedVm:
    """Three points of eight blocks in packs of three; block 7 never changes, block 0 always does."""
    size = 8 * BLOCK_SIZE
    first = Step(disks={"root": DiskStep(size_bytes=size, writes={n: n + 1 for n in range(8)})})
    second = Step(disks={"root": DiskStep(size_bytes=size, writes={0: 21, 1: 23, 2: ZEROED})})
    third = Step(disks={"root": DiskStep(size_bytes=size, writes={0: 25, 4: 27})})
    return ShippedVm(tmp_path).run([first, second, third])


def lost(hurt: Sequence[HurtPoint]) -> dict[int, dict[str, list[tuple[int, int]]]]:
    return {p.point: {d.name: list(d.runs) for d in p.disks} for p in hurt}


@pytest.mark.parametrize("how", sorted(REGIONS))
@pytest.mark.parametrize("number", [0, 1], ids=["first pack", "second pack"])
def test_each_region_of_a_pack_hurts_what_its_blocks_are_needed_for(vm: ShippedVm, how: str, number: int) -> None:
    segment = vm.log.read(1)
    name = names.pack(vm.vm, segment.packs.ids[number].tobytes())
    objects = objects_of(vm.store)
    data = REGIONS[how](objects.pop(name), random.Random(1))
    log = reopened(vm, store_of(objects if data is None else objects | {name: data}))
    report = verify(log, committed_seq=0, read_data=True, progress=NO_PROGRESS)
    assert [str(p.error.fields["key"]) for p in report.problems] == [name]
    told = lost(report.hurt)
    if how in {"magic", "footer"} and not told:  # nothing is read from there
        return
    whole = (
        {1: {"root": [(0, 3)]}}
        if number == 0
        else {n: {"root": [(3, 3)]} for n in (1, 2)} | {3: {"root": [(3, 1), (5, 1)]}}
    )
    for point, disks in told.items():
        assert set(disks) == {"root"}
        blocks = {b for first, n in disks["root"] for b in range(first, first + n)}
        assert blocks <= {b for first, n in whole[point]["root"] for b in range(first, first + n)}
    if how not in {"frame", "frame, rehashed", "cut", "magic", "footer"}:
        assert told == whole


def test_what_newer_points_have_overwritten_hurts_only_older_ones(vm: ShippedVm) -> None:
    """F52: the index of the pack is lost, so any of its blocks may be; segment 2 tells of all of them."""
    name = names.pack(vm.vm, vm.log.read(1).packs.ids[0].tobytes())
    objects = objects_of(vm.store)
    del objects[name]
    log = reopened(vm, store_of(objects))
    assert lost(audit(log)) == {1: {"root": [(0, 3)]}}
    for point in (2, 3):
        assert restores(log, point, vm.points[point])


def test_a_lost_segment_hurts_all_points_behind_it_but_for_those_that_a_map_carries(vm: ShippedVm) -> None:
    write_map(vm.log, 3, present=set())
    objects = objects_of(vm.store)
    del objects[names.segment(vm.vm, 2)]
    log = reopened(vm, store_of(objects))
    hurt = {p.point: p for p in audit(log)}
    assert sorted(hurt) == [2, 3]
    assert hurt[2].broken is not None
    assert hurt[3].broken is None  # its map says where all is: what is lost are the blocks that lay in segment 2
    assert lost([hurt[3]]) == {3: {"root": [(1, 1)]}}


def test_f53_a_damaged_block_is_read_from_another_frame_of_the_same_content(tmp_path: Path) -> None:
    size = 4 * BLOCK_SIZE
    steps = [{0: 2, 1: 4}, {0: 6}, {0: 2}]
    vm = ShippedVm(tmp_path).run(Step(disks={"root": DiskStep(size_bytes=size, writes=w)}) for w in steps)
    objects = objects_of(vm.store)
    name = names.segment(vm.vm, 1)
    objects[name] = flipped(objects[name], 20)  # in the frame of block 0, which point 3 holds anew
    log = reopened(vm, store_of(objects))
    assert audit(log) == []
    assert all(restores(log, point, disks) for point, disks in vm.points.items())
    objects[names.segment(vm.vm, 3)] = flipped(objects[names.segment(vm.vm, 3)], 20)
    assert lost(audit(reopened(vm, store_of(objects)))) == {n: {"root": [(0, 1)]} for n in (1, 3)}


def test_f51_a_record_of_damage_that_is_not_there_hurts_no_point(vm: ShippedVm) -> None:
    for seq in (1, 2, 3):
        segment = vm.log.read(seq)
        for number in range(len(segment.packs)):
            error = ObjectDamaged(key="it", problem="somebody says so")
            write_record(vm.log.objects, lost_pack(vm.vm, segment, number, error), datetime.now(UTC))
    told = assess(vm.log, datetime.now(UTC))
    assert (told.hurt, told.newest, told.newest_is_hurt) == ([], 3, False)


def test_f50_records_come_back_as_they_were_written_and_junk_is_passed_over(
    vm: ShippedVm, caplog: pytest.LogCaptureFixture
) -> None:
    segment = vm.log.read(1)
    pack = lost_pack(vm.vm, segment, 0, ObjectMissing(key="p", url="memory:"))
    own = Damaged(
        name=segment.name,
        object_id=b"",
        seq=1,
        pack=False,
        error=ObjectMissing(key="s", url="m"),
        whole=True,
        blocks={},
    )
    for found in (pack, own, pack, own):
        record(vm.log, [found], datetime.now(UTC))
    vm.store.replace("vm/web/damage/junk", b"junk")
    real = next(info.key for info in vm.store.list("vm/web/damage/0"))
    data = vm.store.get(real, limit_bytes=2**20)
    vm.store.replace(real[:-32] + 32 * "0", data)  # another name than its own
    vm.store.replace(real[:-33][:-16] + 15 * "0" + "2" + real[-33:], data)  # another segment
    with caplog.at_level("WARNING"):
        read = [found.damaged for found in read_records(vm.log.objects)]
    assert len(read) == 2
    assert all(any(says_the_same(one, other) for other in read) for one in (pack, own))
    assert sum("passed over a damage record" in r.getMessage() for r in caplog.records) == 3
