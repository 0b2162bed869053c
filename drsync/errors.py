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
    ├── RecoveryError      80-89  VMs that came back, but are not up
    └── GuestError         90-99  the guest, held still for a capture

Each class has a `code` (also the exit code of the command line; click uses 1
and 2), says whether a retry helps (`retryable`), and has a `remedy`: the exact
command to run next. The command line prints both lines, the daemon logs them.
A message is lower case, names the object and the values, and has no full stop.
"""

from string import Formatter
from typing import ClassVar


class DrsyncError(Exception):
    """The root: carries its fields, so that a program need not parse the message."""

    code: ClassVar[int] = 9
    retryable: ClassVar[bool] = False
    template: ClassVar[str] = ""
    remedy_template: ClassVar[str] = ""

    def __init__(self, **fields: object) -> None:
        wanted = {name for _, name, _, _ in Formatter().parse(self.template + self.remedy_template) if name}
        missing = wanted - fields.keys()
        if missing:
            raise TypeError(f"{type(self).__name__} lacks {', '.join(sorted(missing))}")
        self.fields = fields
        super().__init__(self.template.format_map(fields))

    @property
    def remedy(self) -> str:
        """The exact command that a person should run next."""
        return self.remedy_template.format_map(self.fields)


class ConfigError(DrsyncError):
    """What the user wrote can't be used."""


class ConfigMissing(ConfigError):
    """There is no configuration file at the path."""

    code = 10
    template = "no configuration file at {path}"
    remedy_template = "drsync --config FILE config check   (examples/drsync.toml shows every key)"


class ConfigInvalid(ConfigError):
    """The configuration file has a key or value that can't be used."""

    code = 11
    template = "{path}: {problem}"
    remedy_template = "edit {path}, then: drsync --config {path} config check"


class UnknownVm(ConfigError):
    """A command names a VM that is not configured (or, for reading, not in the repository)."""

    code = 12
    template = "no VM named {vm}; there are: {known}"
    remedy_template = "drsync config check"


class UnknownPoint(ConfigError):
    """A command asks for a point that the VM's log does not have."""

    code = 13
    template = "VM {vm} has no point {wanted}; it has {known}"
    remedy_template = "drsync points {vm}"


class UnknownDisk(ConfigError):
    """A command asks for a disk that the point does not have."""

    code = 14
    template = "point {point} of VM {vm} has no disk {disk}; it has {known}"
    remedy_template = "drsync points {vm} --json"


class PlanInvalid(ConfigError):
    """The recovery plan has a key or value that can't be used."""

    code = 18
    template = "{path}: {problem}"
    remedy_template = "edit {path}, then: drsync restore --plan {path} --dry-run   (docs/plan.md has every key)"


class RepositoryError(DrsyncError):
    """The repository as a whole, or its key."""


class RepositoryMissing(RepositoryError):
    """There is no repository at the URL."""

    code = 20
    template = "no repository at {url}"
    remedy_template = "drsync init   (or set [repository] url to the one that exists)"


class RepositoryExists(RepositoryError):
    """A repository is there already; it was left as it is."""

    code = 21
    template = "a repository exists at {url} already"
    remedy_template = (
        "drsync key recover   (to use it here; or set [repository] url to an empty place, then: drsync init)"
    )


class RepositoryTooNew(RepositoryError):
    """The repository needs a newer drsync; nothing was read or written."""

    code = 22
    template = "repository at {url} needs {needed}, which this drsync does not know"
    remedy_template = "pip install --upgrade drsync"


class WrongKey(RepositoryError):
    """The key is not this repository's; nothing was read or written."""

    code = 23
    template = "the key in {path} does not open the repository at {url}"
    remedy_template = "drsync key recover   (writes the right key file from the recovery key)"


class KeyFileMissing(RepositoryError):
    """There is no key file at the path, or it can't be read."""

    code = 24
    template = "no usable key file at {path}: {problem}"
    remedy_template = "drsync key recover   (writes it from the recovery key)"


class KeyFileExists(RepositoryError):
    """A key file is there already; it was left as it is, since it may be the only copy."""

    code = 25
    template = "a key file exists at {path} already"
    remedy_template = "mv {path} {path}.old   (then run the command again)"


class KeyFileExposed(RepositoryError):
    """Others than its owner may read the key file."""

    code = 26
    template = "key file {path} has mode {mode}: others can read it"
    remedy_template = "chmod 600 {path}"


class WrongRecoveryKey(RepositoryError):
    """What was given is not the recovery key of this repository."""

    code = 27
    template = "the recovery key does not open the repository at {url}: {problem}"
    remedy_template = "drsync key recover   (type the key as `drsync init` printed it)"


class StoreError(DrsyncError):
    """Where objects live."""


class StoreUnavailable(StoreError):
    """The store did not answer, or answered that it can't now; a write may or may not have happened."""

    code = 30
    retryable = True
    template = "store {url} does not work now: {problem}"
    remedy_template = "drsync config check   (what waits in the spool is shipped when the store answers again)"


class StoreDenied(StoreError):
    """The store refuses these credentials (none, wrong, expired, or not allowed this)."""

    code = 31
    template = "store {url} refuses {operation}: {problem}"
    remedy_template = "aws sts get-caller-identity   (then check the credentials and the bucket's policy)"


class ObjectMissing(StoreError):
    """The object is not there."""

    code = 32
    template = "object {key} is missing from {url}"
    remedy_template = "drsync verify"


class ObjectExists(StoreError):
    """An object with this key is there already; it was left as it is."""

    code = 33
    template = "object {key} exists in {url} already"
    remedy_template = "drsync verify"


class StoreUnsafe(StoreError):
    """The store overwrote an object that it was told only to create: points could be lost on it."""

    code = 34
    template = "store {url} does not honour create-only writes (If-None-Match): two writers could overwrite each other"
    remedy_template = "use a store that does (docs/stores.md lists them), then: drsync config check"


class StoreFull(StoreError):
    """No room is left where objects live."""

    code = 35
    retryable = True
    template = "store {url} is full: {problem}"
    remedy_template = "df -h {path}"


class StoreMisconfigured(StoreError):
    """The URL, bucket or region is not one that can be used."""

    code = 36
    template = "store {url}: {problem}"
    remedy_template = "drsync config check"


class KeyUnusable(StoreError):
    """No object can have this key; it may come from a damaged or hostile repository."""

    code = 37
    template = "{key} can't name an object in {url}"
    remedy_template = "drsync verify"


class DirectoryDenied(StoreDenied):
    """The file system refuses drsync access to the directory where objects live."""

    code = 38
    template = "store {url} refuses {operation}: {problem}"
    remedy_template = "ls -ld {path}   (drsync's user must own it, and its file system must be writable)"


class IntegrityError(DrsyncError):
    """Bytes are not what drsync wrote."""


class ObjectDamaged(IntegrityError):
    """An object is cut, changed, or another object under this name."""

    code = 40
    template = "object {key} is damaged: {problem}"
    remedy_template = "drsync verify --read-data   (lists every damaged object)"


class ChainBroken(IntegrityError):
    """The segments of a log do not follow each other."""

    code = 41
    template = "log of VM {vm} is broken at {seq}: {problem}"
    remedy_template = "drsync verify {vm}"


class PointLost(IntegrityError):
    """The log ends before a point that is known to have been committed."""

    code = 42
    template = "log of VM {vm} ends at {found}, but point {expected} was committed: newest points are missing"
    remedy_template = (
        "drsync verify {vm}   (then look for a rolled-back or partly copied repository; "
        "what is there comes back with: drsync restore {vm} --point {found})"
    )


class LayerDamaged(IntegrityError):
    """A layer in the spool is not the image that QEMU wrote; it is never shipped."""

    code = 43
    template = "layer {path} is damaged: {problem}"
    remedy_template = "drsync capture VM   (it drops the layer and captures anew)"


class LogError(DrsyncError):
    """Who may write a VM's log."""


class Fenced(LogError):
    """Another drsync has taken this VM over; this one stops for it and deletes nothing."""

    code = 45
    template = "VM {vm} is protected by another drsync ({writer}, epoch {epoch}); this one stops"
    remedy_template = "drsync capture {vm} --take-over   (only if the other one shall stop)"


class PointUnwritable(LogError):
    """The point is beyond a limit of the repository's format; nothing was committed."""

    code = 46
    template = "the point of VM {vm} can't be written: {problem}"
    remedy_template = "drsync config check   (set `disks` of VM {vm} to fewer ones; docs/format.md lists the limits)"


class SourceError(DrsyncError):
    """QEMU, where bytes come from."""


class SourceUnreachable(SourceError):
    """Nobody answers at the socket; the VM may be off."""

    code = 50
    retryable = True
    template = "VM {vm}: can't connect to {socket}: {problem}"
    remedy_template = "ls -l {socket}   (is the VM running with -qmp unix:{socket},server=on,wait=off ?)"


class NotQmp(SourceError):
    """Something answers at the socket, but it does not speak QMP."""

    code = 51
    template = "VM {vm}: {socket} is not a QMP socket: {problem}"
    remedy_template = "set `socket` of VM {vm} to the one given to QEMU with -qmp, then: drsync config check"


class SourceBusy(SourceError):
    """QEMU serves one client at a time on a QMP socket, and another one is connected."""

    code = 52
    retryable = True
    template = "VM {vm}: {socket} gave no greeting in {timeout_s:g} s; another program may be connected to it"
    remedy_template = "fuser -v {socket}   (give drsync a QMP socket of its own)"


class SourceLost(SourceError):
    """QEMU went away in the middle; nothing was committed, so a retry is safe."""

    code = 53
    retryable = True
    template = "VM {vm}: QEMU went away during {operation}: {problem}"
    remedy_template = "drsync capture {vm}"


class DiskMissing(SourceError):
    """A configured block node is not there, or can't be captured."""

    code = 54
    template = "VM {vm}: no writable block node {node}; there are: {known}"
    remedy_template = "set `disks` of VM {vm} to nodes that exist, then: drsync config check"


class CaptureFailed(SourceError):
    """QEMU refused or failed the capture; the guest runs on, nothing is lost, the bitmaps are as before."""

    code = 55
    retryable = True
    template = "VM {vm}: capture failed at {operation}: {problem}"
    remedy_template = "drsync capture {vm}"


class CaptureTimeout(SourceError):
    """The capture took longer than allowed and was cancelled; the bitmaps are as before."""

    code = 56
    retryable = True
    template = "VM {vm}: capture was not done in {timeout_s:g} s and was cancelled"
    remedy_template = "drsync capture {vm}   (is the spool's disk too slow? raise capture_timeout)"


class LibvirtMissing(SourceError):
    """A VM is reached through libvirt, but Python has no binding of it here."""

    code = 57
    template = "VM {vm}: Python can't load libvirt: {problem}"
    remedy_template = "apt install python3-libvirt   (or: pip install 'drsync[libvirt]')"


class LibvirtUnreachable(SourceError):
    """libvirt's daemon does not answer at the URI, or does not let drsync in."""

    code = 58
    retryable = True
    template = "VM {vm}: can't connect to libvirt at {uri}: {problem}"
    remedy_template = "virsh -c '{uri}' list --all"


class DomainMissing(SourceError):
    """libvirt has no such domain now: it was undefined, renamed, or lives on another host."""

    code = 59
    template = "VM {vm}: libvirt at {uri} has no domain {domain} to capture: {problem}"
    remedy_template = "virsh -c '{uri}' list --all   (then set `domain` of VM {vm} to one of them)"


class SpoolError(DrsyncError):
    """The local directory in between."""


class SpoolFull(SpoolError):
    """The spool has not the room for this capture; QEMU was not touched."""

    code = 60
    retryable = True
    template = (
        "VM {vm}: the capture may need {needed} in {path}, but only {free} are free beside the reserve of {reserve}"
    )
    remedy_template = "df -h {path}   (free room there, or set [spool] path to a larger disk)"


class SpoolUnusable(SpoolError):
    """The spool's directory can't be used."""

    code = 61
    template = "spool {path} can't be used: {problem}"
    remedy_template = "install -d -m 0711 {path}"


class CaptureRunning(SpoolError):
    """Another process on this host captures this VM at this moment."""

    code = 62
    retryable = True
    template = "VM {vm} is being captured by process {pid}"
    remedy_template = "drsync status"


class SpoolClosed(SpoolError):
    """QEMU runs as a user who can't reach the layers in the spool."""

    code = 63
    template = "VM {vm}: QEMU's user {user} can't pass through {directory} to the spool"
    remedy_template = "chmod o+x {directory}"


class LiveUnavailable(SpoolError):
    """The disks can't be read live, which a capture needs that does not fit the spool."""

    code = 68
    retryable = True
    template = "VM {vm}: its disks can't be read live: {problem}"
    remedy_template = "drsync capture {vm}   (when that is no more so, or with more room in the spool: [spool] path)"


class LibraryMissing(SpoolError):
    """A library is not installed that this needs."""

    code = 69
    template = "VM {vm}: {what} needs {library}, which can't be loaded: {problem}"
    remedy_template = "apt install {package}   (and make drsync's virtual environment with --system-site-packages)"


class TargetError(DrsyncError):
    """Where a VM comes back."""


class TargetExists(TargetError):
    """A file is there already; it was left as it is."""

    code = 70
    template = "{path} exists already"
    remedy_template = "drsync restore {vm} --to image --output OTHER-DIRECTORY   (or add --overwrite)"


class TargetFull(TargetError):
    """The target has not the room; nothing that looks finished was left there."""

    code = 71
    template = "{path} needs {needed}, but only {free} are free"
    remedy_template = "df -h {path}"


class TargetUnusable(TargetError):
    """The target can't be written; nothing that looks finished was left there."""

    code = 72
    template = "can't write {path}: {problem}"
    remedy_template = "ls -ld {path}"


class BindingMissing(TargetError):
    """Python's binding of libvirt is not installed."""

    code = 73
    template = "the libvirt binding of this Python can't be loaded: {problem}"
    remedy_template = "apt install python3-libvirt   (in a virtual environment: pip install 'drsync[libvirt]')"


class HostUnreachable(TargetError):
    """No libvirt answers at the URI."""

    code = 74
    retryable = True
    template = "can't reach libvirt at {uri}: {problem}"
    remedy_template = "virsh -c '{uri}' version"


class DomainExists(TargetError):
    """A domain is in the way; it was left as it is."""

    code = 75
    template = "VM {vm} can't come back at {uri}: {problem}"
    remedy_template = "{command}"


class CantComeUp(TargetError):
    """The target lacks what the domain needs; nothing was written."""

    code = 76
    template = "VM {vm} can't come up at {uri}: {problem}"
    remedy_template = (
        "drsync restore {vm} --to libvirt --uri '{uri}' --dry-run   (lists all; docs/recovery.md explains)"
    )


class HostRefused(TargetError):
    """libvirt refused an operation; what was made for it was removed again."""

    code = 77
    template = "libvirt at {uri} refuses {operation}: {problem}"
    remedy_template = "virsh -c '{uri}' list --all   (libvirt's own log has more)"


class PoolUnusable(TargetError):
    """The disks can't go into this storage pool, or none was chosen; nothing was written."""

    code = 78
    template = "{problem}; pools at {uri}: {known}"
    remedy_template = "virsh -c '{uri}' pool-list --all --details   (then choose with --pool, or --disk-dir)"


class VolumeExists(TargetError):
    """A disk of that name is there already; it was left as it is."""

    code = 79
    template = "{path} exists already"
    remedy_template = "drsync restore {vm} --to libvirt --name OTHER-NAME   (or another --pool; or remove the old one)"


class RecoveryError(DrsyncError):
    """VMs came back, but are not up."""


class PlanFailed(RecoveryError):
    """Some VMs of a recovery plan are not up; the others are."""

    code = 80
    template = "{failed} of {total} VMs are not up: {names}"
    remedy_template = "drsync restore --plan {path}   (goes on with those that are not up)"


class NotStarted(RecoveryError):
    """The domain was restored and defined, but does not start; it stays defined, with its disks."""

    code = 81
    template = "domain {domain} is restored, but does not start: {problem}"
    remedy_template = "virsh -c '{uri}' start {domain}"


class NotUp(RecoveryError):
    """The domain runs, but its guest is not up in time."""

    code = 82
    template = "domain {domain} runs, but after {timeout_s:g} s {problem}"
    remedy_template = "virsh -c '{uri}' console {domain}"


class ReplaceUndone(RecoveryError):
    """The domain that replaced another one does not start; the old one is defined again, on its old disks."""

    code = 83
    template = "restored domain {domain} does not start: {problem}; the old one is back, on its old disks"
    remedy_template = "drsync restore {vm} --to libvirt --uri '{uri}' --name {domain}-restored   (to look at it beside)"


class GuestError(DrsyncError):
    """The guest, held still for a capture."""


class FreezeFailed(GuestError):
    """The guest's file systems could not be held frozen, and the VM's points have to be filesystem-consistent."""

    code = 90
    retryable = True
    template = "VM {vm}: no filesystem-consistent point: {problem}"
    remedy_template = 'drsync config check   (does the guest run qemu-ga? or set on_freeze_failure = "crash")'


class GuestHeld(GuestError):
    """The guest was frozen or paused for a capture, and it is not known that it was let go; points are not affected."""

    code = 91
    retryable = True
    template = "VM {vm}: its guest may still be {what}: {problem}"
    remedy_template = "drsync capture {vm}   (lets it go first; else restart qemu-ga in the guest, or the guest)"
