"""QEMU and libvirt, where bytes come from."""

from drsync.errors.base import DrsyncError


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
