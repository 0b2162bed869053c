"""A preflight of one point: its disks through the fence, the facts through the checks."""

import logging
from typing import Final

from drsync.catalog import Point
from drsync.image import PointImage
from drsync.model import Clock
from drsync.preflight.disk import PointDisk
from drsync.preflight.fence import Limits, look_inside
from drsync.preflight.machine import read_machine
from drsync.preflight.report import Report, judge
from drsync.repository import VmObjects

_LOGGER = logging.getLogger(__name__)
_LIMITS: Final = Limits()


def preflight(
    objects: VmObjects,
    point: Point,
    image: PointImage,
    clock: Clock,
    *,
    target: str = "ec2",
    reader: str = "",
    limits: Limits = _LIMITS,
) -> Report:
    """Whether a point would boot on the target. Reads the repository, writes nothing.

    `reader` reads file systems: `dissect` or `libguestfs`; empty: the first of them that is installed.

    Raises:
        ObjectMissing, ObjectDamaged: a block that was looked at can't be had as it was captured.
        StoreError: the store does not answer.
    """
    started_s = clock.monotonic_s()
    disks = [PointDisk(objects, image, disk.name) for disk in image.point.disks]
    machine = read_machine(image.point.definition, {disk.name: disk.size_bytes for disk in disks})
    facts = look_inside(disks, reader=reader, limits=limits)
    read_bytes, requests = sum(d.fetched_bytes for d in disks), sum(d.requests for d in disks)
    looked = f"looked into {len(disks)} disks: {read_bytes} bytes by {requests} requests"
    _LOGGER.info("vm=%s point=%d %s", point.vm, point.number, looked)
    return Report(
        target=target,
        vm=point.vm,
        point=point.number,
        point_time=point.time,
        checked_at=clock.now(),
        reader=facts.reader,
        findings=tuple(judge(machine, facts)),
        read_bytes=read_bytes,
        took_s=round(clock.monotonic_s() - started_s, 3),
    )
