"""Which instance goes home, the plan of it, and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from drsync.catalog import Point
from drsync.errors import DrsyncError
from drsync.image import PointImage
from drsync.recovery.cloud.cost import Cost
from drsync.target.domain.values import Note
from drsync.target.ec2.instances import Instance
from drsync.target.ec2.snapshot import BLOCK_BYTES, FoundSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class FailbackRequest:
    """What is asked for."""

    vm: str
    instance: str | None = None
    """None: the only one that the VM has in the region."""
    whole: bool = False
    """Read everything, whatever AWS says has changed."""
    take_over: bool = False
    """Although the log went on without the instance."""
    stop: bool = False
    """Stop the instance after a first pass, and bring home what was written until then."""
    timeout_s: float = 900.0
    """For stopping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A snapshot whose content the log knows: what changed since is all that has to be read."""

    snapshot: FoundSnapshot
    point: int
    """The point that it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailbackDisk:
    """A disk on its way home."""

    name: str
    volume_id: str
    size_bytes: int
    """The volume's. The disk may have been smaller: EBS has whole GiB, and a guest that grows into them uses all."""
    before_bytes: int | None
    """Its size in the newest point; None if that does not have it."""
    reference: Reference | None
    reason: str
    """Why it is read as a whole; empty if it isn't."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailbackPlan:
    """All that a failback does, and all that keeps it from being done."""

    request: FailbackRequest
    region: str
    instance: Instance
    origin: Point | None
    """The point that the instance was made from; None if the log does not have it any more."""
    origin_image: PointImage | None
    head: Point
    """The newest point, which the new one comes behind."""
    head_image: PointImage
    disks: Sequence[FailbackDisk]
    notes: Sequence[Note]
    errors: Sequence[DrsyncError]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one pass brought home."""

    point: int
    """The point that shows the instance now."""
    time: datetime
    """When the snapshots were taken."""
    is_new: bool
    """False: the instance had nothing else than the newest point."""
    was_resumed: bool
    epoch: int
    read_blocks: int
    """Blocks of 512 KiB that were read from EBS by this run."""
    list_requests: int
    changed_bytes: int
    """What the point has otherwise than the one before."""
    stored_bytes: int
    took_s: float

    @property
    def read_bytes(self) -> int:
        return self.read_blocks * BLOCK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class FailbackOutcome:
    """What became of a failback."""

    plan: FailbackPlan
    """That of the last pass."""
    instance: Instance
    passes: Sequence[Pass]
    removed: Sequence[str]
    """Snapshots of earlier passes."""
    snapshots: Sequence[str]
    """Those of the last pass: they stay, since the next failback compares with them."""
    cost: Cost
    took_s: float
