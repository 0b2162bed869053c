"""What shall come up in AWS, the plan of it, and what became of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from drsync.catalog import Point
from drsync.errors import DrsyncError
from drsync.recovery.cloud.cost import Cost
from drsync.recovery.cloud.disks import PlannedDisk
from drsync.recovery.cloud.guest import Guest
from drsync.target.domain.values import Note
from drsync.target.ec2.instances import Instance
from drsync.target.ec2.sizing import FAMILIES, InstanceType
from drsync.target.ec2.snapshot import BLOCK_BYTES
from drsync.target.ec2.tags import PointTags


class Via(StrEnum):
    """How the disks get into AWS."""

    EBS = "ebs"
    """Block by block, by EBS direct."""
    VM_IMPORT = "vm-import"
    """As a whole image in a bucket, which AWS reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudRequest:
    """Which VM comes up in AWS, and as what."""

    vm: str
    number: int | None = None
    at: datetime | None = None
    via: Via = Via.EBS
    import_bucket: str | None = None
    """Where images lie while AWS imports them."""
    import_role: str = "vmimport"
    convert_guest: bool = False
    """Let AWS change the guest's drivers, network and boot loader (ImportImage)."""
    fix_guest: bool = False
    """Prepare the guest for EC2 on the way: initramfs, fstab, network (preflight/fix)."""
    work_dir: Path | None = None
    """Where its disks are files meanwhile; None: /var/tmp."""
    skip_preflight: bool = False
    """Bring it up whatever can be seen of it beforehand."""
    name: str | None = None
    """Of the instance, and what tells one instance of a point from another; None: the VM's."""
    subnet: str | None = None
    """None: as `networks` says, else the default VPC's."""
    networks: Mapping[str, str] = field(default_factory=dict)
    """Old network → subnet; the VM's first interface decides."""
    security_groups: Sequence[str] = ()
    instance_type: str | None = None
    families: Sequence[str] = FAMILIES
    boot_mode: str | None = None
    """None: as the point tells."""
    private_ip: str | None = None
    keep_ip: bool = False
    """The address that its definition gave it."""
    tags: Mapping[str, str] = field(default_factory=dict)
    start: bool = True
    """EC2 has no launch without a start: one that is not to run is stopped as soon as it runs."""
    wait: bool = False
    """Until EC2's own checks of the instance have passed."""
    timeout_s: float = 900.0
    keep_on_error: bool = False
    lost_at: datetime | None = None

    @property
    def instance_name(self) -> str:
        return self.name or self.vm


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudPlan:
    """All that a recovery does, and all that keeps it from being done."""

    request: CloudRequest
    region: str
    point: Point
    of: PointTags
    guest: Guest
    boot_mode: str
    tpm: bool
    uefi_data: str | None
    """The NVRAM, as RegisterImage takes it."""
    disks: Sequence[PlannedDisk]
    """The one that it boots from first."""
    instance_type: InstanceType | None
    zone: str | None
    subnet: str | None
    private_ip: str | None
    existing: Instance | None
    """An instance of this point and name that is there already."""
    notes: Sequence[Note]
    errors: Sequence[DrsyncError]
    cost: Cost

    @property
    def volume_gib(self) -> int:
        return sum(disk.volume_gib for disk in self.disks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step that was done, and how long it took."""

    name: str
    took_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudOutcome:
    """What became of a recovery."""

    plan: CloudPlan
    instance: Instance
    image_id: str
    snapshots: Mapping[str, str]
    """Disk → snapshot."""
    was_there: bool
    steps: Sequence[Step]
    sent_blocks: int
    cost: Cost
    rto_s: float
    """From the start of the run until it was up: running, or checked if that was asked for."""
    rpo_s: float
    """How much older what it has is than what the VM had when its site was lost."""

    @property
    def sent_bytes(self) -> int:
        return self.sent_blocks * BLOCK_BYTES
