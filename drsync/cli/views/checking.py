"""What verify, repair and a restore in part found."""

from typing import TYPE_CHECKING

from drsync.cli.views.shape import Document, byte_range, error, instant

if TYPE_CHECKING:  # values of modules that only some commands need
    from drsync.hurt import HurtPoint
    from drsync.repair import RepairReport
    from drsync.restore import Salvage
    from drsync.restoring import RestorePlan
    from drsync.verify import VmReport


def report(value: "VmReport") -> Document:
    """What an audit of a VM's log found."""
    return {
        "vm": value.vm,
        "points": value.points,
        "objects": value.objects,
        "stored_bytes": value.stored_bytes,
        "frames": value.frames,
        "problems": [{**error(problem.error), "point": problem.point} for problem in value.problems],
        "hurt": [hurt(point) for point in value.hurt],
    }


def hurt(value: "HurtPoint") -> Document:
    """A point that does not restore as it was captured."""
    return {
        "point": value.point,
        "broken": None if value.broken is None else error(value.broken),
        "disks": [
            {
                "name": disk.name,
                "size_bytes": disk.size_bytes,
                "lost_blocks": disk.blocks,
                "lost": [byte_range(first, count, disk.size_bytes) for first, count in disk.runs],
                "objects": list(disk.objects),
            }
            for disk in value.disks
        ],
    }


def repair(value: "RepairReport", *, dry_run: bool) -> Document:
    """What was, or would be, done to a VM's block maps, and what its points have lost."""
    return {
        "vm": value.vm,
        "dry_run": dry_run,
        "checked": instant(value.checked_at),
        "points": value.points,
        "maps": value.maps,
        "made": [
            {
                "point": made.point,
                "reason": made.reason,
                "name": made.name,
                "error": None if made.error is None else error(made.error),
            }
            for made in value.repairs
        ],
        "useless": list(value.useless),
        "hurt": [hurt(point) for point in value.hurt],
    }


def salvage(plan: "RestorePlan", done_without: "Salvage", *, done: bool) -> Document:
    """What a restore had to do without; before it is done, what is known to be lost."""
    if plan.lost_path is None:
        return {"lost": None}
    if not done:
        return {"lost": None if plan.hurt is None else hurt(plan.hurt)["disks"]}
    from drsync.salvage import lost_document  # noqa: PLC0415 - only this view needs it

    files = {d.name: (d.path.name, d.size_bytes) for d in plan.disks}
    return {"lost": lost_document(plan.point.vm, plan.point.number, files, done_without)["disks"]}
