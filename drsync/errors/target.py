"""Where a VM comes back."""

from drsync.errors.base import DrsyncError


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
