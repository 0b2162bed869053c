"""The JSON contract: what each value is in a document (docs/cli.md). Fields may be added, never taken away."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from drsync.errors import DrsyncError

if TYPE_CHECKING:  # values of modules that only some commands need
    from drsync.catalog import GroupPoint, GroupTold, Point, PreflightTold, VmStatus
    from drsync.journal import SeedProgress
    from drsync.preflight.report import Report
    from drsync.recovery.cloud.cost import Cost
    from drsync.recovery.cloud.pilot import Cleaned, PilotStatus, SyncOutcome
    from drsync.recovery.cloud.request import CloudOutcome, CloudPlan
    from drsync.recovery.failback.request import FailbackDisk, FailbackOutcome, FailbackPlan, Pass
    from drsync.recovery.report import PlanReport, VmOutcome
    from drsync.recovery.request import RecoveryPlan
    from drsync.session import RestorePlan, RestoreRequest
    from drsync.source import DiskSurvey
    from drsync.verify import VmReport

Document = Mapping[str, object]


def instant(time: datetime | None) -> str | None:
    """RFC 3339, in UTC."""
    return None if time is None else time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def error(err: DrsyncError) -> Document:
    """What an error is to a program."""
    return {
        "code": err.code,
        "class": type(err).__name__,
        "message": str(err),
        "remedy": err.remedy,
        "retryable": err.retryable,
    }


def point(value: "Point") -> Document:
    """A recovery point."""
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


def status(value: "VmStatus") -> Document:
    """How well a VM is protected."""
    return {
        "vm": value.vm,
        "state": value.state,
        "point": value.point,
        "time": instant(value.time),
        "lag_seconds": None if value.lag_s is None else round(value.lag_s, 3),
        "rpo_seconds": value.rpo_s,
        "spool_bytes": value.spool_bytes,
        "seed": None if value.seed is None else _seed(value.seed),
        "error": value.error or None,
        "error_time": instant(datetime.fromisoformat(value.error_time)) if value.error_time else None,
        "preflight": None if value.preflight is None else _preflight_told(value.preflight),
    }


def _preflight_told(value: "PreflightTold") -> Document:
    return {
        "to": value.target,
        "point": value.point,
        "checked": instant(value.checked_at),
        "verdict": value.verdict,
        "fails": value.fails,
        "warnings": value.warnings,
        "unknown": value.unknown,
        "reason": value.reason or None,
    }


def preflight(value: "Report") -> Document:
    """Whether a point would come up elsewhere."""
    return {
        "vm": value.vm,
        "to": value.target,
        "point": value.point,
        "time": instant(value.point_time),
        "checked": instant(value.checked_at),
        "verdict": value.verdict,
        "reader": value.reader or None,
        "findings": [
            {"check": f.check, "verdict": f.verdict, "reason": f.reason, "action": f.action or None}
            for f in value.findings
        ],
        "read_bytes": value.read_bytes,
        "took_seconds": value.took_s,
    }


def _seed(value: "SeedProgress") -> Document:
    return {
        "begun": instant(datetime.fromisoformat(value.begun_at)),
        "round": value.round_number,
        "read_bytes": value.read_bytes,
        "total_bytes": value.total_bytes,
        "stored_bytes": value.stored_bytes,
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


def restore(request: "RestoreRequest", plan: "RestorePlan", *, took_s: float | None) -> Document:
    """What a restore wrote, or would write (`took_s` is None)."""
    return {
        "vm": request.vm,
        "point": plan.point.number,
        "time": instant(plan.point.time),
        "consistency": plan.point.consistency,
        "disks": [
            {
                "name": disk.name,
                "path": str(disk.path),
                "format": request.image_format,
                "size_bytes": disk.size_bytes,
                "live_bytes": disk.live_bytes,
            }
            for disk in plan.disks
        ],
        "definition": str(plan.definition_path),
        "dry_run": took_s is None,
        "took_seconds": None if took_s is None else round(took_s, 3),
    }


def report(value: "VmReport") -> Document:
    """What an audit of a VM's log found."""
    return {
        "vm": value.vm,
        "points": value.points,
        "objects": value.objects,
        "stored_bytes": value.stored_bytes,
        "frames": value.frames,
        "problems": [{**error(problem.error), "point": problem.point} for problem in value.problems],
    }


def recovery(plan: "RecoveryPlan", uri: str, *, took_s: float | None) -> Document:
    """What came back as a domain, or would come back (`took_s` is None)."""
    return {
        "vm": plan.request.vm,
        "point": plan.point.number,
        "time": instant(plan.point.time),
        "consistency": plan.point.consistency,
        "uri": uri,
        "domain": plan.domain,
        "uuid": plan.uuid,
        "place": plan.place.description if plan.place is not None else None,
        "disks": [
            {
                "name": disk.name,
                "target": disk.target,
                "path": disk.path,
                "format": disk.image_format,
                "size_bytes": disk.size_bytes,
                "live_bytes": disk.live_bytes,
            }
            for disk in plan.disks
        ],
        "nvram": plan.nvram.path if plan.nvram is not None else None,
        "tpm_state": plan.tpm is not None,
        "autostart": plan.autostart,
        "start": plan.request.start,
        "replaces": sorted(plan.replaced.disks.values()) if plan.replaced is not None else None,
        "notes": [{"effect": n.effect, "subject": n.subject, "text": n.text} for n in plan.notes],
        "errors": [error(err) for err in plan.errors],
        "xml": plan.rewritten.xml,
        "dry_run": took_s is None,
        "took_seconds": None if took_s is None else round(took_s, 3),
    }


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


def plan_report(report: "PlanReport") -> Document:
    """What a recovery plan came to, or would come to."""
    return {
        "site": report.site,
        "uri": report.uri,
        "started": instant(report.started_at),
        "lost": instant(report.lost_at),
        "took_seconds": round(report.took_s, 3),
        "dry_run": report.dry_run,
        "ok": not report.failed,
        "vms": [_outcome(outcome) for outcome in report.vms],
    }


def _outcome(outcome: "VmOutcome") -> Document:
    return {
        "vm": outcome.vm,
        "wave": outcome.wave,
        "state": outcome.came,
        "domain": outcome.domain or None,
        "point": outcome.point,
        "time": instant(outcome.point_time),
        "was_there": outcome.was_there,
        "up": instant(outcome.up_at),
        "rto_seconds": None if outcome.rto_s is None else round(outcome.rto_s, 3),
        "rpo_seconds": None if outcome.rpo_s is None else round(outcome.rpo_s, 3),
        "live_bytes": outcome.live_bytes,
        "notes": list(outcome.notes),
        "errors": [error(err) for err in outcome.errors],
    }
