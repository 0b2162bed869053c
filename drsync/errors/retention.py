"""Which points stay, and the locks that keep their objects."""

from drsync.errors.base import DrsyncError


class RetentionError(DrsyncError):
    """Which points stay, and the locks that keep their objects."""


class LocksMissing(RetentionError):
    """The store can't lock objects, although the configuration demands it; nothing was written."""

    code = 88
    template = "store {url} can't lock objects: {problem}"
    remedy_template = (
        "aws s3api create-bucket --object-lock-enabled-for-bucket ...   "
        "(then drsync init there; or take `lock` out of [repository]; docs/security.md)"
    )


class LocksLapsing(RetentionError):
    """The locks of the repository's objects end soon, or have ended; the objects themselves are there."""

    code = 89
    template = "the locks in {url} {problem}"
    remedy_template = "drsync lock extend   (and see why the maintenance does not do it; docs/security.md)"


class NotPinned(RetentionError):
    """The point has no pin; nothing was changed."""

    code = 92
    template = "point {point} of VM {vm} is not pinned"
    remedy_template = "drsync points {vm}   (shows what is)"


class PinsBroken(RetentionError):
    """Pin records of a VM are missing, or are more than people write; none of its points may be dropped."""

    code = 93
    template = "the pins of VM {vm} can't be told: {problem}"
    remedy_template = "drsync verify {vm}   (then bring the record back from the bucket's versions; docs/security.md)"


class PinForged(PinsBroken):
    """A pin record is under an older key than the one before it; no point of the VM may be dropped meanwhile."""

    code = 98
    template = "pin record {key} is under an older key than the one before it: whoever made it had no right to"
    remedy_template = (
        "aws s3api delete-object --key PREFIX/{key} ...   "
        "(as an administrator, with every record behind it, the newest first; docs/security.md)"
    )
