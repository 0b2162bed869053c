"""A point's disk as EBS blocks: with data only, or what differs from any earlier point; laid together, the disk."""

import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shipped_vm import ZEROED, Blocks, DiskStep, OracleDisk, ShippedVm, Step
from strategies import histories

from drsync.image import PointImage, load_image
from drsync.mapped import load_mapped_image
from drsync.mapping import write_map
from drsync.model import BLOCK_SIZE
from drsync.recovery.cloud.blocks import PER_BLOCK, CloudDisk, beside
from drsync.target.ec2.snapshot import BLOCK_BYTES

TIB = 2**40


@pytest.fixture
def vm(tmp_path: Path) -> ShippedVm:
    return ShippedVm(tmp_path)


def written(disk: CloudDisk) -> Blocks:
    """The EBS blocks that a snapshot of it gets."""
    plan = disk.plan()
    assert plan.dtype == np.uint32
    assert (np.diff(plan.astype(np.int64)) > 0).all()
    found = list(disk.read(plan))
    assert [index for index, _ in found] == plan.tolist()
    assert all(len(data) == BLOCK_BYTES for _, data in found)
    return dict(found)


def as_ebs(disk: OracleDisk) -> Blocks:
    """What the volume must hold: EBS blocks that are not all zeros."""
    blocks: dict[int, bytearray] = {}
    for number, data in disk.blocks.items():
        at = number % PER_BLOCK * BLOCK_SIZE
        blocks.setdefault(number // PER_BLOCK, bytearray(BLOCK_BYTES))[at : at + len(data)] = data
    return {index: bytes(data) for index, data in blocks.items()}


def held(blocks: Blocks) -> Blocks:
    return {index: data for index, data in blocks.items() if any(data)}


def of(vm: ShippedVm, image: PointImage, before: PointImage | None = None) -> CloudDisk:
    return CloudDisk(objects=vm.log.objects, image=image, name="root", before=before)


@settings(deadline=None, max_examples=40)
@given(histories(max_steps=7), st.sets(st.integers(1, 8)))
def test_any_two_points_the_difference_over_the_earlier_one_is_the_later_one(
    history: list[Step], mapped_points: set[int]
) -> None:
    with TemporaryDirectory() as directory:
        vm = ShippedVm(Path(directory))
        for step in history:
            seq = vm.capture(step).seq
            if seq in mapped_points:
                write_map(vm.log, seq, present=set())
        points = sorted(vm.points)
        for new in points:
            now = load_mapped_image(vm.log, new)
            for name, disk in vm.points[new].items():
                full = CloudDisk(objects=vm.log.objects, image=now, name=name)
                assert written(full) == as_ebs(disk)
            for old in (p for p in points if p < new):
                before = load_mapped_image(vm.log, old)
                image = beside(vm.log, before, new)
                for name, disk in vm.points[new].items():
                    if name not in vm.points[old]:
                        continue
                    change = written(CloudDisk(objects=vm.log.objects, image=image, name=name, before=before))
                    assert held(as_ebs(vm.points[old][name]) | change) == as_ebs(disk)


def test_only_what_changed_is_written_and_zeros_are_explicit(vm: ShippedVm) -> None:
    size = 64 * BLOCK_SIZE
    vm.capture(Step(disks={"root": DiskStep(size_bytes=size, writes={0: 2, 1: 4, 20: 6, 40: 8})}))
    vm.capture(Step(disks={"root": DiskStep(size_bytes=size, writes={1: 10, 20: ZEROED})}))
    vm.capture(Step(disks={"root": DiskStep(size_bytes=size, writes={})}))
    before = load_image(vm.log, 1)
    change = written(of(vm, beside(vm.log, before, 3), before))
    assert sorted(change) == [0, 2]
    assert not any(change[2])
    assert change[0][:BLOCK_SIZE] == vm.disks["root"].blocks[0]


def test_what_a_smaller_disk_no_longer_has_becomes_zeros(vm: ShippedVm) -> None:
    vm.capture(Step(disks={"root": DiskStep(size_bytes=64 * BLOCK_SIZE, writes={0: 2, 60: 4})}))
    vm.capture(Step(disks={"root": DiskStep(size_bytes=8 * BLOCK_SIZE, writes={})}))
    before = load_image(vm.log, 1)
    change = written(of(vm, beside(vm.log, before, 2), before))
    assert not any(change[60 // PER_BLOCK])


def test_two_tebibytes_with_little_data_cost_what_the_data_costs(vm: ShippedVm) -> None:
    last = 2 * TIB // BLOCK_SIZE - 1
    writes = dict.fromkeys((0, 9, 8192, last // 2, last), 2)
    vm.capture(Step(disks={"root": DiskStep(size_bytes=2 * TIB, writes=writes)}))
    tracemalloc.start()
    try:
        blocks = written(of(vm, load_image(vm.log, 1)))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sorted(blocks) == sorted({number // PER_BLOCK for number in writes})
    assert most < 64 * 2**20
