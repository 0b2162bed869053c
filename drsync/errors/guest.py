"""The guest, held still for a capture."""

from drsync.errors.base import DrsyncError


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
