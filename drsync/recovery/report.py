"""What a plan's run came to: which VMs are up, since when, and how much of their work was lost."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from drsync.errors import DrsyncError


class Came(StrEnum):
    """What became of a VM."""

    UP = "up"
    FAILED = "failed"
    SKIPPED = "skipped"
    """It was not begun: another one failed, and the plan says to stop then."""
    CHECKED = "checked"
    """A dry run found nothing that would keep it from coming up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmOutcome:
    """One VM of a plan."""

    vm: str
    wave: int
    came: Came
    domain: str = ""
    point: int | None = None
    point_time: datetime | None = None
    was_there: bool = False
    """An earlier run had brought it back already."""
    up_at: datetime | None = None
    rto_s: float | None = None
    """From the start of the run until it was up."""
    rpo_s: float | None = None
    """How much older what it has is than what it had when the site was lost."""
    live_bytes: int = 0
    notes: Sequence[str] = ()
    errors: Sequence[DrsyncError] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """A run, or a dry run, of a plan."""

    site: str
    uri: str
    started_at: datetime
    lost_at: datetime
    """When the site was lost: as it was given, else when the run began."""
    took_s: float
    dry_run: bool
    vms: Sequence[VmOutcome]

    @property
    def failed(self) -> Sequence[VmOutcome]:
        """Those that are not up, or would not come up."""
        return [outcome for outcome in self.vms if outcome.came in (Came.FAILED, Came.SKIPPED)]
