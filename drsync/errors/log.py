"""Bytes that are not what was written, and who may write a VM's log."""

from drsync.errors.base import DrsyncError


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


class LogAdvanced(LogError):
    """Prune went on with the log, so that nobody commits packs that it deletes; nothing was committed."""

    code = 48
    retryable = True
    template = "prune went on with the log of VM {vm} while this was at work: segment {seq} is there already"
    remedy_template = "drsync capture {vm}   (or what else was at work; it begins anew, and nothing is lost)"


class PointUnwritable(LogError):
    """The point is beyond a limit of the repository's format; nothing was committed."""

    code = 46
    template = "the point of VM {vm} can't be written: {problem}"
    remedy_template = "drsync config check   (set `disks` of VM {vm} to fewer ones; docs/format.md lists the limits)"


class EncodingWrong(LogError):
    """What was compressed and encrypted does not come back as it was; nothing was committed."""

    code = 47
    retryable = True
    template = "a block of VM {vm} does not come back as it was encoded: {problem}"
    remedy_template = (
        "drsync capture {vm}   (if it happens again, this host's memory or its zstandard library is faulty: "
        "test the memory, or protect the VM from another host)"
    )
