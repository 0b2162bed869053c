"""Restores of points that have lost something: refused with what is lost, or done without it, with a list."""

from collections.abc import Mapping, Sequence

import numpy as np

from drsync.damage import Damaged, read_records, runs_of
from drsync.errors import PointDamaged
from drsync.hurt import HurtPoint, Standing, find_hurt, is_point, standing_of
from drsync.log import Log
from drsync.model import BLOCK_SIZE
from drsync.restore import Salvage
from drsync.units import counted


def refuse_damaged(log: Log, number: int) -> None:
    """See, where the repository has damage records, that none of them is about this point: before hours of work.

    Raises:
        PointDamaged: blocks of it are lost, or its log is broken.
        StoreError: it could not be found out.
    """
    damaged = [found.damaged for found in read_records(log.objects)]
    if not damaged:
        return
    standing = standing_of(log)
    hurt = next(iter(find_hurt(standing, damaged, [number])), None)
    if hurt is not None:
        whole = _nearest_whole(standing, damaged, number)
        raise PointDamaged(point=number, vm=log.vm, what=what_is_lost(hurt), whole=whole)


def what_is_lost(hurt: HurtPoint) -> str:
    """For a message: how much, and where it begins."""
    if hurt.broken is not None and not hurt.disks:
        return str(hurt.broken)
    told = []
    for disk in hurt.disks:
        first, count = disk.runs[0]
        where = f"from block {first} on" if count == disk.blocks else f"the first at block {first}"
        told.append(
            f"disk {disk.name} has lost {counted(disk.blocks, 'block')}, {where}, with {', '.join(disk.objects)}"
        )
    return "; ".join(told)


def _nearest_whole(standing: Standing, damaged: Sequence[Damaged], number: int) -> str:
    """The number of the newest whole point before a damaged one, else of the first one behind it."""
    points = [s.seq for s in standing.segments if is_point(s)]
    hurt = {h.point for h in find_hurt(standing, damaged)}
    whole = [n for n in points if n not in hurt]
    before = [n for n in whole if n < number]
    return str(before[-1] if before else whole[0] if whole else "N")


def lost_document(vm: str, point: int, files: Mapping[str, tuple[str, int]], salvage: Salvage) -> dict[str, object]:
    """What is missing in restored disks: ranges of bytes of each, and why. `files`: name and size, by disk."""
    disks: list[dict[str, object]] = []
    for name, (file, size_bytes) in files.items():
        lost = salvage.lost.get(name, {})
        ranges = [
            _byte_range(first, count, size_bytes) | {"reason": str(lost[first])}
            for first, count in runs_of(np.array(sorted(lost), np.int64))
        ]
        disks.append({"name": name, "file": file, "lost_blocks": len(lost), "lost": ranges})
    return {"vm": vm, "point": point, "disks": disks}


def _byte_range(first: int, count: int, size_bytes: int) -> dict[str, object]:
    """A run of blocks, and where it lies in the disk's image."""
    offset = first * BLOCK_SIZE
    size = min((first + count) * BLOCK_SIZE, size_bytes) - offset
    return {"first_block": first, "blocks": count, "offset_bytes": offset, "size_bytes": size}
