"""Points that were dropped on purpose, and prune itself."""

from drsync.errors.base import DrsyncError


class PruneError(DrsyncError):
    """Points that were dropped on purpose, and prune itself."""


class PointPruned(PruneError):
    """The point was there, and retention dropped it."""

    code = 84
    template = "point {point} of VM {vm} was pruned; there are {known}"
    remedy_template = "drsync points {vm}"


class PrunedMeanwhile(PruneError):
    """Prune deleted what a reader had found before; what survives is there, at another place."""

    code = 85
    retryable = True
    template = "VM {vm} was pruned while it was read: {problem}"
    remedy_template = "run the same command again   (what survives is listed by: drsync points {vm})"


class PruneRefused(PruneError):
    """What the store lists does not fit what is known of the log; nothing was deleted."""

    code = 86
    template = "VM {vm} is not pruned, and nothing was deleted: {problem}"
    remedy_template = "drsync verify {vm}"


class PruneRaced(PruneError):
    """Another prune was faster; nothing of this one's work is in force."""

    code = 87
    retryable = True
    template = "VM {vm} is being pruned by somebody else: horizon {number} is there already"
    remedy_template = "drsync prune {vm}   (when the other one is done)"
