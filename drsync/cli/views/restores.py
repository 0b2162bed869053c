"""What a restore does, to images, hosts, and by a plan."""

from typing import TYPE_CHECKING

from drsync.cli.views.shape import Document, error, instant

if TYPE_CHECKING:  # values of modules that only some commands need
    from drsync.recovery.report import PlanReport, VmOutcome
    from drsync.recovery.request import RecoveryPlan
    from drsync.restoring import RestorePlan, RestoreRequest


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
