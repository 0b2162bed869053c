"""The JSON contract: what each value is in a document (docs/cli.md). Fields may be added, never taken away."""

from drsync.cli.views.checking import hurt, repair, report, salvage
from drsync.cli.views.cloud import cloud_cleanup, cloud_recovery, cloud_status, cloud_sync, cost, failback
from drsync.cli.views.points import group_point, key_slots, lock_pass, locks, point, pruned, retained, survey
from drsync.cli.views.restores import plan_report, recovery, restore
from drsync.cli.views.shape import Document, error, instant
from drsync.cli.views.state import preflight, status

__all__ = [
    "Document",
    "cloud_cleanup",
    "cloud_recovery",
    "cloud_status",
    "cloud_sync",
    "cost",
    "error",
    "failback",
    "group_point",
    "hurt",
    "instant",
    "key_slots",
    "lock_pass",
    "locks",
    "plan_report",
    "point",
    "preflight",
    "pruned",
    "recovery",
    "repair",
    "report",
    "restore",
    "retained",
    "salvage",
    "status",
    "survey",
]
