"""What a prune did, or would do."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from drsync.errors import DrsyncError
from drsync.retention import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class VmPruned:
    """What became of one VM."""

    vm: str
    kept: int
    """Points that stay."""
    dropped: Sequence[Verdict]
    """Points that this run dropped, with the reasons; the newest first."""
    horizon: int
    """The number of the one in force; 0: nothing was ever pruned."""
    deleted_objects: int = 0
    deleted_bytes: int = 0
    denied_objects: int = 0
    """That could not be deleted yet: they are locked, or the credentials may not."""
    waiting_objects: int = 0
    """Out of use, and deleted when the grace time is over."""
    waiting_bytes: int = 0
    waiting_until: datetime | None = None
    orphans: int = 0
    """Objects that no point lists, which this run took out of use."""
    copied_bytes: int = 0
    """Copied forward, out of objects that are mostly dead."""
    new_objects: int = 0
    freed_bytes: int = 0
    """What the repository takes less when all that this run took out of use is deleted."""
    cost_dollars: float = 0.0
    """Of the copying, once."""
    saved_dollars_month: float = 0.0
    error: DrsyncError | None = None
    """Why this VM was not pruned; nothing is the worse for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What a run did."""

    vms: Sequence[VmPruned]
    abandoned_uploads: int
    dry_run: bool
