"""The local directory in between, and what is read live past it."""

from drsync.errors.base import DrsyncError


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


class NoWayToCopy(SpoolError):
    """A copy of the disks does not fit the spool, and they can't be read live, either."""

    code = 64
    retryable = True
    template = (
        "VM {vm}: a copy may need {needed} in {path}, where {free} are free beside the reserve; "
        "and its disks can't be read live: {problem}"
    )
    remedy_template = "df -h {path}   (make room there, or set [spool] path to a larger disk; or see docs/libvirt.md)"


class LiveUnavailable(SpoolError):
    """The disks can't be read live now."""

    code = 68
    retryable = True
    template = "VM {vm}: its disks can't be read live: {problem}"
    remedy_template = "drsync capture {vm}   (when that is no more so, or with more room in the spool: [spool] path)"


class LibraryMissing(SpoolError):
    """A library is not installed that this needs."""

    code = 69
    template = "VM {vm}: {what} needs {library}, which can't be loaded: {problem}"
    remedy_template = "apt install {package}   (and make drsync's virtual environment with --system-site-packages)"
