"""The JSON contract: what each value is in a document (docs/cli.md). Fields may be added, never taken away."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from drsync.errors import DrsyncError
from drsync.model import BLOCK_SIZE

if TYPE_CHECKING:  # values of modules that only some commands need
    from drsync.catalog import DamageState, GroupPoint, GroupTold, Point, PreflightTold, VerifyState, VmStatus
    from drsync.format.keys import Keys
    from drsync.format.ring import Slot
    from drsync.hurt import HurtPoint
    from drsync.journal import SeedProgress
    from drsync.locks import LockPass, LockStatus
    from drsync.pins import PinRecord
    from drsync.preflight.report import Report
    from drsync.prune.report import Pruned, VmPruned
    from drsync.recovery.cloud.cost import Cost
    from drsync.recovery.cloud.pilot import Cleaned, PilotStatus, SyncOutcome
    from drsync.recovery.cloud.request import CloudOutcome, CloudPlan
    from drsync.recovery.failback.request import FailbackDisk, FailbackOutcome, FailbackPlan, Pass
    from drsync.recovery.report import PlanReport, VmOutcome
    from drsync.recovery.request import RecoveryPlan
    from drsync.repair import RepairReport
    from drsync.restore import Salvage
    from drsync.restoring import RestorePlan, RestoreRequest
    from drsync.source import DiskSurvey
    from drsync.upkeep import Retained
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
        "waiting_until": instant(one.waiting_until) if one.waiting_until is not None else None,
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


def status(value: "VmStatus", locked: "LockStatus | None" = None) -> Document:
    """How well a VM is protected, and how long its objects are locked."""
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
        "damage": None if value.damage is None else _damage(value.damage),
        "verified": None if value.verified is None else _verified(value.verified),
        "locks": None if locked is None else locks(locked),
    }


def _damage(value: "DamageState") -> Document:
    return {
        "checked": instant(value.checked_at),
        "points": list(value.points),
        "newest_is_hurt": value.newest_is_hurt,
        "lost_blocks": value.lost_blocks,
        "objects": list(value.objects),
    }


def _verified(value: "VerifyState") -> Document:
    return {"done": round(value.done, 4), "ended": instant(value.ended_at)}


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
        "hurt": [hurt(point) for point in value.hurt],
    }


def _byte_range(first: int, count: int, size_bytes: int) -> Document:
    offset = first * BLOCK_SIZE
    size = min((first + count) * BLOCK_SIZE, size_bytes) - offset
    return {"first_block": first, "blocks": count, "offset_bytes": offset, "size_bytes": size}


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
                "lost": [_byte_range(first, count, disk.size_bytes) for first, count in disk.runs],
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
