"""Recovery points: what there is, what stays, what goes, how long it is locked, and under which keys."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drsync.cli.views.shape import Document, error, instant

if TYPE_CHECKING:  # values of modules that only some commands need
    from drsync.catalog import GroupPoint, GroupTold, Point
    from drsync.format.keys import Keys
    from drsync.format.ring import Slot
    from drsync.locks import LockPass, LockStatus
    from drsync.pins import PinRecord
    from drsync.prune.report import Pruned, VmPruned
    from drsync.source import DiskSurvey
    from drsync.upkeep import Retained


def point(value: "Point", pin: "PinRecord | None" = None) -> Document:
    """A recovery point; `pin` is what keeps it, if a person does."""
    return {
        "vm": value.vm,
        "point": value.number,
        "time": instant(value.time),
        "kind": value.kind,
        "consistency": value.consistency,
        "disks": [
            {
                "name": disk.name,
                "size_bytes": disk.size_bytes,
                "changed_bytes": disk.changed_bytes,
                "kind": disk.kind,
                "reason": disk.reason,
            }
            for disk in value.disks
        ],
        "changed_bytes": value.changed_bytes,
        "stored_bytes": value.stored_bytes,
        "parent": value.parent,
        "reason": value.reason,
        "capture": value.capture,
        "epoch": value.epoch,
        "pin": None if pin is None else {"until": instant(pin.until), "note": pin.note, "pinned": instant(pin.time)},
        "quiesce": _quiesce(value),
        "group": _group(value.quiesce.group) if value.quiesce and value.quiesce.group else None,
    }


def _quiesce(value: "Point") -> Document | None:
    told = value.quiesce
    if told is None:
        return None
    return {
        "asked": told.asked,
        "reached": value.consistency,
        "reason": told.reason,
        "file_systems": told.file_systems,
        "frozen_seconds": None if told.frozen_ms is None else told.frozen_ms / 1000,
        "paused_seconds": None if told.paused_ms is None else told.paused_ms / 1000,
    }


def _group(told: "GroupTold") -> Document:
    return {
        "name": told.name,
        "id": told.id,
        "consistent": told.consistent,
        "reason": told.reason,
        "skew_seconds": told.skew_ms / 1000,
        "members": dict(told.members),
    }


def group_point(value: "GroupPoint") -> Document:
    """One instant of a group."""
    return {
        "group": value.group,
        "id": value.id,
        "time": instant(value.time),
        "consistent": value.consistent,
        "reason": value.reason,
        "skew_seconds": value.skew_ms / 1000,
        "points": {vm: point.number for vm, point in value.points.items()},
        "consistency": {vm: point.consistency for vm, point in value.points.items()},
        "missing": list(value.missing),
    }


def retained(value: "Retained", *, explained: bool) -> Document:
    """What becomes of the points of a VM."""
    rules = value.rules
    taken = {aged.point: aged.time for aged in value.aged}
    points = [
        {"point": v.point, "stored_at": instant(taken[v.point]), "keep": v.keep, "reasons": list(v.reasons)}
        for v in value.verdicts
    ]
    return {
        "vm": value.vm,
        "rules": None
        if rules.keeps_all
        else {
            "last": rules.last,
            "hourly": rules.hourly,
            "daily": rules.daily,
            "weekly": rules.weekly,
            "monthly": rules.monthly,
            "yearly": rules.yearly,
            "minimum_age_seconds": rules.minimum_age.total_seconds(),
        },
        "kept": len(value.verdicts) - value.dropped,
        "dropped": value.dropped,
        "points": points if explained else None,
    }


def pruned(value: "Pruned") -> Document:
    """What a prune did, or would do."""
    return {
        "dry_run": value.dry_run,
        "abandoned_uploads": value.abandoned_uploads,
        "vms": [_pruned_vm(one) for one in value.vms],
    }


def _pruned_vm(one: "VmPruned") -> Document:
    return {
        "vm": one.vm,
        "horizon": one.horizon,
        "kept": one.kept,
        "dropped": [{"point": verdict.point, "reasons": list(verdict.reasons)} for verdict in one.dropped],
        "deleted_objects": one.deleted_objects,
        "deleted_bytes": one.deleted_bytes,
        "denied_objects": one.denied_objects,
        "waiting_objects": one.waiting_objects,
        "waiting_bytes": one.waiting_bytes,
        "waiting_until": instant(one.waiting_until),
        "orphans": one.orphans,
        "copied_bytes": one.copied_bytes,
        "new_objects": one.new_objects,
        "freed_bytes": one.freed_bytes,
        "cost_dollars": one.cost_dollars,
        "saved_dollars_month": one.saved_dollars_month,
        "error": error(one.error) if one.error is not None else None,
    }


def locks(value: "LockStatus") -> Document:
    """How long all objects of the repository are locked."""
    return {
        "state": value.state,
        "until": instant(value.until),
        "error": None if value.error is None else error(value.error),
    }


def lock_pass(value: "LockPass", *, dry_run: bool) -> Document:
    """What a pass over all locks has done."""
    return {
        "done": value.done,
        "seen": value.seen,
        "extended": value.extended,
        "unlocked": value.unlocked,
        "failed": value.failed,
        "earliest": instant(value.earliest),
        "dry_run": dry_run,
        "error": None if value.problem is None else error(value.problem),
    }


def survey(disks: "Sequence[DiskSurvey]") -> Sequence[Document]:
    """What a capture would do now."""
    return [
        {
            "name": disk.name,
            "size_bytes": disk.size_bytes,
            "kind": disk.kind,
            "reason": disk.reason,
            "copy_bytes": disk.copy_bytes,
            "persistent_bitmap": disk.persistent,
        }
        for disk in disks
    ]


def key_slots(slots: "Sequence[Slot]", *, generation: int, ring: int, held: "Keys | None") -> Document:
    """What opens the repository, and what this host's key file has."""
    vms: object = getattr(held, "vms", None)
    here = None if held is None else {"generation": held.newest, "vms": sorted(vms) if isinstance(vms, dict) else None}
    return {
        "generation": generation,
        "ring": ring,
        "slots": [
            {
                "name": slot.name,
                "kind": slot.kind,
                "added": slot.added,
                "kms_key": slot.key or None,
                "kms_region": slot.region or None,
            }
            for slot in slots
        ],
        "key_file": here,
    }
