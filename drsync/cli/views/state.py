"""How a VM is doing."""

from datetime import datetime
from typing import TYPE_CHECKING

from drsync.cli.views.points import locks
from drsync.cli.views.shape import Document, instant

if TYPE_CHECKING:  # values of modules that only some commands need
    from drsync.catalog import DamageState, PreflightTold, VerifyState, VmStatus
    from drsync.journal import SeedProgress
    from drsync.locks import LockStatus
    from drsync.preflight.report import Report


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
