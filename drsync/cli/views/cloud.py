"""What is done with a cloud, there and back."""

from typing import TYPE_CHECKING

from drsync.cli.views.shape import Document, error, instant

if TYPE_CHECKING:  # values of modules that only some commands need
    from drsync.recovery.cloud.cost import Cost
    from drsync.recovery.cloud.pilot import Cleaned, PilotStatus, SyncOutcome
    from drsync.recovery.cloud.request import CloudOutcome, CloudPlan
    from drsync.recovery.failback.request import FailbackDisk, FailbackOutcome, FailbackPlan, Pass


def cloud_recovery(plan: "CloudPlan", outcome: "CloudOutcome | None") -> Document:
    """What came up in AWS, or would come up (`outcome` is None)."""
    snapshots = {} if outcome is None else outcome.snapshots
    found: Document = {
        "vm": plan.request.vm,
        "point": plan.point.number,
        "time": instant(plan.point.time),
        "consistency": plan.point.consistency,
        "region": plan.region,
        "via": plan.request.via,
        "name": plan.request.instance_name,
        "instance_type": plan.instance_type.name if plan.instance_type is not None else None,
        "vcpus": plan.guest.vcpus,
        "memory_bytes": plan.guest.memory_mib * 1024 * 1024,
        "boot_mode": plan.boot_mode,
        "tpm": plan.tpm,
        "disks": [
            {
                "name": disk.name,
                "size_bytes": disk.size_bytes,
                "volume_gib": disk.volume_gib,
                "put_bytes": disk.put_bytes,
                "parent": disk.parent.id if disk.parent is not None else None,
                "snapshot": snapshots.get(disk.name, disk.existing.id if disk.existing is not None else None),
            }
            for disk in plan.disks
        ],
        "notes": [{"effect": n.effect, "subject": n.subject, "text": n.text} for n in plan.notes],
        "errors": [error(err) for err in plan.errors],
        "cost": cost(plan.cost if outcome is None else outcome.cost),
        "dry_run": outcome is None,
    }
    return {**found, **_came_up(outcome)}


_CAME_UP = (
    "instance",
    "state",
    "image",
    "private_ip",
    "public_ip",
    "zone",
    "was_there",
    "sent_bytes",
    "steps",
    "rto_seconds",
    "rpo_seconds",
)


def _came_up(outcome: "CloudOutcome | None") -> Document:
    if outcome is None:
        return dict.fromkeys(_CAME_UP)
    return {
        "instance": outcome.instance.id,
        "state": outcome.instance.state,
        "image": outcome.image_id,
        "private_ip": outcome.instance.private_ip or None,
        "public_ip": outcome.instance.public_ip or None,
        "zone": outcome.instance.zone,
        "was_there": outcome.was_there,
        "sent_bytes": outcome.sent_bytes,
        "steps": [{"name": step.name, "took_seconds": round(step.took_s, 3)} for step in outcome.steps],
        "rto_seconds": round(outcome.rto_s, 3),
        "rpo_seconds": round(outcome.rpo_s, 3),
    }


def cloud_sync(name: str, value: "SyncOutcome") -> Document:
    """A VM's newest point on its way to AWS."""
    return {
        "cloud": name,
        "vm": value.vm,
        "point": value.point,
        "time": instant(value.time),
        "was_there": value.was_there,
        "sent_bytes": value.sent_bytes,
        "snapshots": dict(value.snapshots),
        "removed": list(value.removed),
        "took_seconds": round(value.took_s, 3),
    }


def cloud_status(name: str, value: "PilotStatus") -> Document:
    """How ready a VM is in AWS."""
    return {
        "cloud": name,
        "vm": value.vm,
        "newest": value.newest,
        "held": value.held,
        "lag_seconds": None if value.lag_s is None else round(value.lag_s, 3),
        "points": [
            {
                "point": point.number,
                "whole": point.is_whole,
                "started": instant(point.started_at),
                "snapshots": [
                    {"id": s.id, "disk": s.tags.get("drsync:disk"), "state": s.state} for s in point.snapshots
                ],
            }
            for point in value.points
        ],
    }


def cloud_cleanup(name: str, value: "Cleaned", *, dry_run: bool) -> Document:
    """What was removed in AWS, or would be."""
    return {
        "cloud": name,
        "dry_run": dry_run,
        "removed": [{"kind": one.kind, "id": one.id, "vm": one.vm, "why": one.why} for one in value.removed],
        "kept": [{"kind": one.kind, "id": one.id, "vm": one.vm, "why": one.why} for one in value.kept],
    }


_CAME_HOME = ("passes", "point", "removed", "snapshots", "cost", "took_seconds")


def failback(plan: "FailbackPlan", outcome: "FailbackOutcome | None") -> Document:
    """What came home from EC2, or would come home (`outcome` is None)."""
    done: Document = {**dict.fromkeys(_CAME_HOME), "state": plan.instance.state}
    if outcome is not None:
        done = {
            "passes": [_failback_pass(one) for one in outcome.passes],
            "point": outcome.passes[-1].point,
            "state": outcome.instance.state,
            "removed": list(outcome.removed),
            "snapshots": list(outcome.snapshots),
            "cost": cost(outcome.cost),
            "took_seconds": round(outcome.took_s, 3),
        }
    return {
        "vm": plan.request.vm,
        "region": plan.region,
        "instance": plan.instance.id,
        "made_of": plan.origin.number if plan.origin is not None else None,
        "newest": plan.head.number,
        "disks": [_failback_disk(disk) for disk in plan.disks],
        "notes": [{"effect": n.effect, "subject": n.subject, "text": n.text} for n in plan.notes],
        "errors": [error(err) for err in plan.errors],
        "dry_run": outcome is None,
        **done,
    }


def _failback_disk(disk: "FailbackDisk") -> Document:
    return {
        "name": disk.name,
        "volume": disk.volume_id,
        "size_bytes": disk.size_bytes,
        "compared_with": disk.reference.snapshot.id if disk.reference is not None else None,
        "compared_point": disk.reference.point if disk.reference is not None else None,
        "whole_because": disk.reason or None,
    }


def _failback_pass(one: "Pass") -> Document:
    return {
        "point": one.point,
        "time": instant(one.time),
        "new": one.is_new,
        "resumed": one.was_resumed,
        "epoch": one.epoch,
        "read_bytes": one.read_bytes,
        "changed_bytes": one.changed_bytes,
        "stored_bytes": one.stored_bytes,
        "took_seconds": round(one.took_s, 3),
    }


def cost(value: "Cost") -> Document:
    """Requests and bytes, and what they cost at published prices."""
    return {
        "prices_of": value.prices_of,
        "prices_where": value.prices_where,
        "once_usd": round(value.once_usd, 4),
        "monthly_usd": round(value.monthly_usd, 4),
        "items": [
            {
                "what": item.what,
                "amount": item.amount,
                "unit": item.unit,
                "usd": round(item.usd, 4),
                "monthly": item.monthly,
            }
            for item in value.items
        ],
    }
