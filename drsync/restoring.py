"""Restores points of a session's VMs into image files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from drsync import catalog
from drsync.catalog import Point
from drsync.damage import read_records
from drsync.errors import PointDamaged, TargetExists, UnknownDisk
from drsync.finding import Finding
from drsync.hurt import HurtPoint, find_hurt, image_of, standing_of
from drsync.image import PointImage
from drsync.model import Progress
from drsync.restore import Salvage, restore_disk
from drsync.salvage import lost_document
from drsync.session import Session
from drsync.target.image import ImageDisk, ImageFormat, check_room, write_text_file


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreRequest:
    """What to restore, and where to."""

    vm: str
    output: Path
    number: int | None = None
    at: datetime | None = None
    image_format: ImageFormat = ImageFormat.QCOW2
    disks: Sequence[str] = ()
    """Just these disks; empty = all."""
    overwrite: bool = False
    allow_damaged: bool = False
    """Restore also a point that has lost something: the rest, with a list of what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredDisk:
    """A disk that was, or would be, restored."""

    name: str
    path: Path
    size_bytes: int
    live_bytes: int
    """Bytes of blocks that hold data: what the file takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """What a restore does."""

    point: Point
    image: PointImage
    disks: Sequence[RestoredDisk]
    definition_path: Path
    hurt: HurtPoint | None = None
    """What is known to be lost of the point, if it is restored all the same."""
    lost_path: Path | None = None
    """Where the list of what is lost goes; None if all of it has to be there."""


class Restoring:
    """Plans a restore, and does it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._finding = Finding(session)

    def plan_restore(self, request: RestoreRequest) -> RestorePlan:
        """What a restore would write; everything that can refuse it has been checked.

        Raises:
            UnknownVm, UnknownPoint, UnknownDisk: there is nothing like that.
            PointLost: no number was given, and newer points than the log has are known to have been committed.
            PointDamaged: the point is known to have lost something, and that was not said to be done without.
            TargetExists, TargetFull: the output can't take it.
        """
        if request.allow_damaged:
            return self._plan_salvage(request)
        point, image = self._finding.find_point(request.vm, number=request.number, at=request.at)
        disks = [self._planned(image, name, request) for name in _chosen(point, request.disks)]
        definition = request.output / f"{request.vm}.json"
        _check_free(request, [definition, *(d.path for d in disks)])
        check_room(request.output, sum(d.live_bytes for d in disks))
        return RestorePlan(point=point, image=image, disks=disks, definition_path=definition)

    def _plan_salvage(self, request: RestoreRequest) -> RestorePlan:
        """What a restore would write that does without what is lost."""
        self._session.known_vms(request.vm)
        log = self._session.log(request.vm)
        standing = standing_of(log)
        known = catalog.points_of(standing.segments)
        point = catalog.choose(request.vm, known, number=request.number, at=request.at)
        image, broken = image_of(standing, point.number)
        if image is None:
            raise PointDamaged(point=point.number, vm=log.vm, what=broken, whole="N")
        disks = [self._planned(image, name, request) for name in _chosen(point, request.disks)]
        definition = request.output / f"{request.vm}.json"
        lost = request.output / f"{request.vm}.lost.json"
        _check_free(request, [definition, lost, *(d.path for d in disks)])
        check_room(request.output, sum(d.live_bytes for d in disks))
        damaged = [found.damaged for found in read_records(log.objects)]
        hurt = next(iter(find_hurt(standing, damaged, [point.number])), None)
        return RestorePlan(point=point, image=image, disks=disks, definition_path=definition, hurt=hurt, lost_path=lost)

    def _planned(self, image: PointImage, name: str, request: RestoreRequest) -> RestoredDisk:
        return RestoredDisk(
            name=name,
            path=request.output / f"{name}{'.damaged' if request.allow_damaged else ''}.{request.image_format}",
            size_bytes=image.disk(name).size_bytes,
            live_bytes=image.live_bytes(name, tolerant=request.allow_damaged),
        )

    def restore(self, request: RestoreRequest, plan: RestorePlan, progress: Progress) -> Salvage:
        """Write the disks and the definition of a planned restore; what it had to do without.

        With `allow_damaged` that is also listed in a file beside the disks; else it is nothing.

        Raises:
            ObjectMissing, ObjectDamaged: the point can't be had as it was captured; nothing finished-looking is left.
            TargetError: the output can't be written.
        """
        objects = self._session.log(request.vm).objects
        salvage = Salvage()
        progress.start(f"restore {request.vm}", sum(d.size_bytes for d in plan.disks))
        for disk in plan.disks:
            target = ImageDisk(
                disk.path, disk.size_bytes, request.image_format, vm=request.vm, overwrite=request.overwrite
            )
            chosen = salvage if request.allow_damaged else None
            restore_disk(objects, plan.image, disk.name, target, progress, chosen)
        if plan.lost_path is not None:
            files = {d.name: (d.path.name, d.size_bytes) for d in plan.disks}
            _write_json(plan.lost_path, lost_document(request.vm, plan.point.number, files, salvage), request)
        _write_json(plan.definition_path, _definition(plan, request, salvage), request)
        return salvage


def _check_free(request: RestoreRequest, paths: Sequence[Path]) -> None:
    """Raise TargetExists if one of the files that are to be written is there, and must not be overwritten."""
    for path in paths:
        if os.path.lexists(path) and not request.overwrite:
            raise TargetExists(path=path, vm=request.vm)


def _write_json(path: Path, document: dict[str, object], request: RestoreRequest) -> None:
    text = msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    write_text_file(path, text + "\n", vm=request.vm, overwrite=request.overwrite)


def _chosen(point: Point, wanted: Sequence[str]) -> list[str]:
    known = [d.name for d in point.disks]
    for name in wanted:
        if name not in known:
            raise UnknownDisk(point=point.number, vm=point.vm, disk=name, known=", ".join(known))
    return [name for name in known if not wanted or name in wanted]


def _definition(plan: RestorePlan, request: RestoreRequest, salvage: Salvage) -> dict[str, object]:
    """What is written beside the disks: all that is needed to start the VM again."""
    lost = sum(map(len, salvage.lost.values()))
    damaged = {"damaged": {"lost_blocks": lost, "list": plan.lost_path.name}} if lost and plan.lost_path else {}
    return {
        **damaged,
        "vm": request.vm,
        "point": plan.point.number,
        "time": plan.point.time.isoformat().replace("+00:00", "Z"),
        "consistency": plan.point.consistency,
        "disks": [
            {"name": d.name, "file": d.path.name, "format": request.image_format, "size_bytes": d.size_bytes}
            for d in plan.disks
        ],
        "definition": plan.image.point.definition,
    }
