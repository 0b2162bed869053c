"""Every error that drsync raises on purpose: one tree.

    DrsyncError
    ├── ConfigError        10-19  what the user wrote
    ├── RepositoryError    20-29  the repository as a whole, its key
    ├── StoreError         30-39  where objects live
    ├── IntegrityError     40-44  bytes that are not what was written
    ├── LogError           45-49  who may write a VM's log
    ├── SourceError        50-59  QEMU, where bytes come from
    ├── SpoolError         60-69  the local directory in between
    ├── TargetError        70-79  where a VM comes back
    ├── RecoveryError      80-83  VMs that came back, but are not up
    ├── PruneError         84-87  points that were dropped on purpose, and prune itself
    ├── RetentionError     88-93  which points stay, and locks (88, 89, 92, 93)
    ├── GuestError         90-91  the guest, held still for a capture
    └── CloudError       100-125  AWS, where a VM comes back as an instance

Each class has a `code` (also the exit code of the command line; click uses 1
and 2), says whether a retry helps (`retryable`), and has a `remedy`: the exact
command to run next. The command line prints both lines, the daemon logs them.
A message is lower case, names the object and the values, and has no full stop.
"""

from drsync.errors.base import DrsyncError
from drsync.errors.cloud import (
    CantRunInCloud,
    CloudDenied,
    CloudError,
    CloudLeftovers,
    CloudLimit,
    CloudMisconfigured,
    CloudNotFound,
    CloudRefused,
    CloudUnavailable,
    FixFailed,
    FixUnavailable,
    GuestNotImportable,
    ImageUnfit,
    ImportCancelled,
    ImportFailed,
    ImportNotSetUp,
    ImportTimeout,
    InstanceNotUp,
    SnapshotFailed,
    WontBoot,
)
from drsync.errors.config import (
    ConfigError,
    ConfigInvalid,
    ConfigMissing,
    PlanInvalid,
    UnknownDisk,
    UnknownPoint,
    UnknownVm,
)
from drsync.errors.guest import FreezeFailed, GuestError, GuestHeld
from drsync.errors.log import (
    ChainBroken,
    EncodingWrong,
    Fenced,
    IntegrityError,
    LayerDamaged,
    LogError,
    ObjectDamaged,
    PointLost,
    PointUnwritable,
)
from drsync.errors.prune import PointPruned, PrunedMeanwhile, PruneError, PruneRaced, PruneRefused
from drsync.errors.recovery import NotStarted, NotUp, PlanFailed, RecoveryError, ReplaceUndone
from drsync.errors.repository import (
    KeyFileExists,
    KeyFileExposed,
    KeyFileMissing,
    RepositoryError,
    RepositoryExists,
    RepositoryMissing,
    RepositoryTooNew,
    WrongKey,
    WrongRecoveryKey,
)
from drsync.errors.retention import LocksLapsing, LocksMissing, NotPinned, PinsBroken, RetentionError
from drsync.errors.source import (
    CaptureFailed,
    CaptureTimeout,
    DiskMissing,
    DomainMissing,
    LibvirtMissing,
    LibvirtUnreachable,
    NotQmp,
    SourceBusy,
    SourceError,
    SourceLost,
    SourceUnreachable,
)
from drsync.errors.spool import (
    CaptureRunning,
    LibraryMissing,
    LiveUnavailable,
    NoWayToCopy,
    SpoolClosed,
    SpoolError,
    SpoolFull,
    SpoolUnusable,
)
from drsync.errors.store import (
    DirectoryDenied,
    KeyUnusable,
    ObjectExists,
    ObjectMissing,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreMisconfigured,
    StoreUnavailable,
    StoreUnsafe,
)
from drsync.errors.target import (
    BindingMissing,
    CantComeUp,
    DomainExists,
    HostRefused,
    HostUnreachable,
    PoolUnusable,
    TargetError,
    TargetExists,
    TargetFull,
    TargetUnusable,
    VolumeExists,
)

__all__ = [
    "BindingMissing",
    "CantComeUp",
    "CantRunInCloud",
    "CaptureFailed",
    "CaptureRunning",
    "CaptureTimeout",
    "ChainBroken",
    "CloudDenied",
    "CloudError",
    "CloudLeftovers",
    "CloudLimit",
    "CloudMisconfigured",
    "CloudNotFound",
    "CloudRefused",
    "CloudUnavailable",
    "ConfigError",
    "ConfigInvalid",
    "ConfigMissing",
    "DirectoryDenied",
    "DiskMissing",
    "DomainExists",
    "DomainMissing",
    "DrsyncError",
    "EncodingWrong",
    "Fenced",
    "FixFailed",
    "FixUnavailable",
    "FreezeFailed",
    "GuestError",
    "GuestHeld",
    "GuestNotImportable",
    "HostRefused",
    "HostUnreachable",
    "ImageUnfit",
    "ImportCancelled",
    "ImportFailed",
    "ImportNotSetUp",
    "ImportTimeout",
    "InstanceNotUp",
    "IntegrityError",
    "KeyFileExists",
    "KeyFileExposed",
    "KeyFileMissing",
    "KeyUnusable",
    "LayerDamaged",
    "LibraryMissing",
    "LibvirtMissing",
    "LibvirtUnreachable",
    "LiveUnavailable",
    "LocksLapsing",
    "LocksMissing",
    "LogError",
    "NoWayToCopy",
    "NotPinned",
    "NotQmp",
    "NotStarted",
    "NotUp",
    "ObjectDamaged",
    "ObjectExists",
    "ObjectMissing",
    "PinsBroken",
    "PlanFailed",
    "PlanInvalid",
    "PointLost",
    "PointPruned",
    "PointUnwritable",
    "PoolUnusable",
    "PruneError",
    "PruneRaced",
    "PruneRefused",
    "PrunedMeanwhile",
    "RecoveryError",
    "ReplaceUndone",
    "RepositoryError",
    "RepositoryExists",
    "RepositoryMissing",
    "RepositoryTooNew",
    "RetentionError",
    "SnapshotFailed",
    "SourceBusy",
    "SourceError",
    "SourceLost",
    "SourceUnreachable",
    "SpoolClosed",
    "SpoolError",
    "SpoolFull",
    "SpoolUnusable",
    "StoreDenied",
    "StoreError",
    "StoreFull",
    "StoreMisconfigured",
    "StoreUnavailable",
    "StoreUnsafe",
    "TargetError",
    "TargetExists",
    "TargetFull",
    "TargetUnusable",
    "UnknownDisk",
    "UnknownPoint",
    "UnknownVm",
    "VolumeExists",
    "WontBoot",
    "WrongKey",
    "WrongRecoveryKey",
]
