"""VMs that came back, but are not up."""

from drsync.errors.base import DrsyncError


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
