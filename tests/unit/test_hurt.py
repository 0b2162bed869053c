"""Which points damage hurts: exactly those whose restore fails, and the blocks that it is about."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from forged import rehashed
from hypothesis import given, settings
from hypothesis import strategies as st
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

from drsync.errors import ChainBroken, ObjectDamaged, ObjectMissing
from drsync.hurt import HurtPoint, image_of, standing_of
from drsync.log import Log
from drsync.mapped import listed_maps, load_mapped_image
from drsync.mapping import write_map
from drsync.model import BLOCK_SIZE, block_count, block_length
from drsync.restore import Salvage, lost_mark, restore_disk
from drsync.verify import verify

NOT_AS_WRITTEN = (ChainBroken, ObjectDamaged, ObjectMissing)
Objects = Mapping[str, bytes]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


DAMAGES: Mapping[str, Callable[[bytes, random.Random], bytes | None]] = {
    "gone": lambda data, chance: None,
    "cut": lambda data, chance: data[: chance.randrange(len(data))],
    "front": lambda data, chance: flipped(data, chance.randrange(8)),
    "frame": lambda data, chance: flipped(data, min(len(data) - 1, 8 + chance.randrange(max(1, len(data) // 2)))),
    "frame, rehashed": lambda data, chance: rehashed(flipped(data, 8 + chance.randrange(max(1, len(data) // 2)))),
    "index": lambda data, chance: rehashed(flipped(data, len(data) - 60 - chance.randrange(60))),
    "footer": lambda data, chance: flipped(data, len(data) - 1 - chance.randrange(56)),
}


def damaged(objects: Objects, names: list[str], chance: random.Random) -> tuple[dict[str, bytes], list[str]]:
    """A repository some of whose objects are damaged, and how."""
    changed, told = dict(objects), []
    for name in names:
        how = chance.choice(sorted(DAMAGES))
        data = DAMAGES[how](objects[name], chance)
        told.append(f"{name}: {how}")
        if data is None:
            del changed[name]
        else:
            changed[name] = data
    return changed, told


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


@settings(deadline=None, max_examples=60)
@given(histories(max_steps=7), st.sets(st.integers(1, 12), max_size=2), st.randoms(use_true_random=False))
def test_the_points_that_damage_hurts_are_exactly_those_that_do_not_restore(
    history: list[Step], mapped_points: set[int], chance: random.Random
) -> None:
    with TemporaryDirectory() as directory:
        vm = ShippedVm(Path(directory))
        for change in history:
            seq = vm.capture(change).seq
            if seq in mapped_points:
                write_map(vm.log, seq, present={name for name, _ in listed_maps(vm.log.objects)})
        whole = objects_of(vm.store)
    candidates = [name for name in whole if name.startswith("vm/")]
    chosen = chance.sample(candidates, min(len(candidates), chance.choice([1, 1, 2])))
    changed, told = damaged(whole, chosen, chance)
    log = reopened(vm, store_of(changed))
    hurt = {point.point: point for point in audit(log)}
    newest = max(int(name[-16:], 16) for name in changed if "/log/" in name) if any("/log/" in n for n in changed) else 0
    for point, disks in vm.points.items():
        if point > newest:  # nobody can know of it but by a heartbeat
            assert not restores(log, point, disks)
            continue
        assert restores(log, point, disks) == (point not in hurt), (point, told, hurt)
        if point in hurt:
            check_salvage(log, hurt[point], disks)
