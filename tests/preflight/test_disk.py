"""A point's disk, read at any place straight from the repository: right, authenticated, and cheap."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shipped_vm import DiskStep, ShippedVm, Step

from drsync.errors import ObjectDamaged, ObjectMissing
from drsync.image import load_image
from drsync.mapped import load_mapped_image
from drsync.model import BLOCK_SIZE, block_length
from drsync.preflight.disk import CACHE_BLOCKS, PointDisk
from drsync.store.memory import MemoryStore
from drsync.units import MiB, TiB

SIZE = 40 * BLOCK_SIZE + 512


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> ShippedVm:
    """Two points of a disk, in several packs, with zeros written over data and a short last block."""
    steps = [
        Step(disks={"vda": DiskStep(size_bytes=SIZE, writes={n: n for n in range(1, 41, 2)})}),
        Step(disks={"vda": DiskStep(size_bytes=SIZE, writes={3: 0, 4: 104, 40: 8, 21: 77})}),
    ]
    return ShippedVm(tmp_path_factory.mktemp("vm")).run(steps)


def content(vm: ShippedVm, point: int) -> bytes:
    held = vm.points[point]["vda"]
    blocks = [held.blocks.get(n, bytes(block_length(n, SIZE))) for n in range(-(-SIZE // BLOCK_SIZE))]
    return b"".join(blocks)


def open_disk(vm: ShippedVm, point: int) -> PointDisk:
    return PointDisk(vm.log.objects, load_mapped_image(vm.log, point), "vda")


@given(ranges=st.lists(st.tuples(st.integers(0, SIZE + 10), st.integers(0, 5 * BLOCK_SIZE)), max_size=12))
def test_any_range_reads_as_the_disk_held_it(vm: ShippedVm, ranges: list[tuple[int, int]]) -> None:
    for point in vm.points:
        disk, expected = open_disk(vm, point), content(vm, point)
        assert disk.size_bytes == SIZE
        for offset, length in ranges:
            assert disk.read(offset, length) == expected[offset : offset + length]


def test_what_was_read_is_not_fetched_again(vm: ShippedVm) -> None:
    disk = open_disk(vm, 2)
    disk.read(0, SIZE)
    fetched, requests = disk.fetched_bytes, disk.requests
    assert requests > 0
    disk.read(BLOCK_SIZE, 20 * BLOCK_SIZE)
    assert (disk.fetched_bytes, disk.requests) == (fetched, requests)


def test_a_jump_fetches_one_block_and_reading_on_fetches_ahead(vm: ShippedVm) -> None:
    disk = open_disk(vm, 1)
    disk.read(1 * BLOCK_SIZE, 10)
    assert disk.requests == 1
    assert disk.fetched_bytes < 2 * BLOCK_SIZE
    disk.read(2 * BLOCK_SIZE, 10)  # zeros: nothing to fetch
    assert disk.requests == 1


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    blocks = CACHE_BLOCKS + 100
    step = Step(disks={"vda": DiskStep(size_bytes=blocks * BLOCK_SIZE, writes=dict.fromkeys(range(blocks), 1))})
    vm = ShippedVm(tmp_path).run([step])
    disk = open_disk(vm, 1)
    for offset in range(0, blocks * BLOCK_SIZE, MiB):
        disk.read(offset, MiB)
    assert len(disk._blocks) <= CACHE_BLOCKS


def test_a_huge_disk_costs_what_is_looked_at(tmp_path: Path) -> None:
    size = 2 * TiB
    last = size // BLOCK_SIZE - 1
    step = Step(disks={"vda": DiskStep(size_bytes=size, writes={0: 2, last // 2: 4, last: 6})})
    vm = ShippedVm(tmp_path).run([step])
    disk = open_disk(vm, 1)
    assert disk.read(size - BLOCK_SIZE, BLOCK_SIZE) == vm.points[1]["vda"].blocks[last]
    assert disk.read(size // 2 - 5 * MiB, MiB) == bytes(MiB)
    assert disk.read(0, 512) == vm.points[1]["vda"].blocks[0][:512]
    assert disk.fetched_bytes < MiB
    assert disk.requests == 2


def test_damage_is_told_with_the_objects_name(tmp_path: Path) -> None:
    steps = [Step(disks={"vda": DiskStep(size_bytes=SIZE, writes={n: n for n in range(2, 20, 2)})})]
    damaged = ShippedVm(tmp_path).run(steps)
    image = load_image(damaged.log, 1)
    window = image.window("vda", 0)
    name = image.containers[int(window.containers[2])].name
    store = damaged.store
    assert isinstance(store, MemoryStore)
    body = bytearray(store.get(name, limit_bytes=64 * MiB))
    body[int(window.offsets[2]) + 5] ^= 1
    store.replace(name, bytes(body))
    with pytest.raises(ObjectDamaged, match="does not authenticate"):
        PointDisk(damaged.log.objects, image, "vda").read(2 * BLOCK_SIZE, 1)
    del store._objects[name]
    with pytest.raises(ObjectMissing):
        PointDisk(damaged.log.objects, image, "vda").read(2 * BLOCK_SIZE, 1)
