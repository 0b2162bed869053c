"""Reads a running domain live through libvirt's own way: a backup in pull mode, one short job after the other.

    checkpoint of T ─▶ its bitmaps record from now on
    job 1 ├─ NBD, scratch files ─┤ job 2 ├─────────┤ job 3 …      each shows the disks as they were when it began

A job shows the disks at its own beginning, which is later than the checkpoint's: a
block that was not written since the checkpoint is read as it is, any other one is
in the checkpoint's bitmaps (C9). So it does not matter which job has shown a block,
and jobs can be ended and renewed at any moment (libvirt_slices.py says when).

QEMU before 9.0 ends when an NBD client leaves a disk that an iothread serves
(blockdev-nbd.c, nbd_blockdev_client_closed: "qemu_in_main_thread() && nbd_server"; seen
with 7.2.22 at the first client that leaves, however politely). A client leaves by
dying, too, so such a domain is not read in pull mode.
"""

import logging
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import libvirt

from drsync.errors import CaptureFailed, DrsyncError, LiveUnavailable
from drsync.model import Clock, Kind
from drsync.source import Base, DiskSurvey
from drsync.source.bitmap import Owner
from drsync.source.libvirt_connection import LibvirtDomain, LibvirtRefused
from drsync.source.libvirt_jobs import BackupJobs
from drsync.source.libvirt_scratch import Scratch, ScratchLimits
from drsync.source.libvirt_xml import DomainXml, PulledDisk, parse, pull_xml
from drsync.source.nbd import load

log = logging.getLogger(__name__)

SAFE_VERSION: Final = 9_000_000
"""From this QEMU on, as libvirt writes versions, an NBD client may leave a disk that an iothread serves."""
_NO_SERVER: Final = ("nbd-server-start", "Permission denied")
"""What libvirt's refusals say when QEMU has an NBD server of somebody else's, or may not write below the spool."""
_BITMAP: Final = "changed"
_CANCEL_TIMEOUT_S: Final = 60.0
_PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """How a domain is read live."""

    directory: Path
    """Below it each view has a directory of its own, with a socket and scratch files: in the VM's part of the spool."""
    scratch: ScratchLimits
    copy_scratch_bytes: int = 2**63
    """How much the guest may overwrite during a capture's copy, which can't be renewed; half the room at most."""
    slice_s: float = 20.0
    """How long one job lasts, at most: libvirt lets whoever wants a snapshot or a migration wait 30 s for its end."""


def check_pull(domain: LibvirtDomain, xml: DomainXml, disks: Sequence[DiskSurvey], options: PullOptions | None) -> None:
    """Check that `disks` can be read live.

    Raises:
        LiveUnavailable, LibraryMissing: they can't be.
        LibvirtRefused, SourceLost: as LibvirtDomain.call.
    """
    load(domain.vm)
    problem = _raw(xml, disks) or (_iothread_danger(domain, xml) if xml.has_iothreads else "")
    if options is None:
        problem = "no directory for a socket was given"
    if problem or options is None:
        raise LiveUnavailable(vm=domain.vm, problem=problem)
    Scratch(domain.vm, view_directory(options), options.scratch).check()


def view_directory(options: PullOptions) -> Path:
    """A directory for a new view: what guards a dead one must not take a newer one's jobs for its own."""
    return options.directory / secrets.token_hex(4)


def _raw(xml: DomainXml, disks: Sequence[DiskSurvey]) -> str:
    wanted = {disk.name for disk in disks}
    raw = [f"{d.target} ({d.top.format})" for d in xml.disks if d.target in wanted and not d.keeps_bitmaps]
    return f"libvirt keeps bitmaps of qcow2 images alone, and these disks are others: {', '.join(raw)}" if raw else ""


def _iothread_danger(domain: LibvirtDomain, xml: DomainXml) -> str:
    """Why a client that leaves could end this domain's QEMU; empty if it could not."""
    version = _version(domain, xml)
    if version is not None and version >= SAFE_VERSION:
        return ""
    said = f"{version // 1000000}.{version // 1000 % 1000}.{version % 1000}" if version else "of this version"
    if version is None and domain.call("virConnectGetVersion", domain.connection.getVersion) >= SAFE_VERSION:
        said = "that was started before the present one was installed"
    return f"it has iothreads, and a QEMU {said} may end when an NBD client leaves (9.0 and newer do not)"


def _version(domain: LibvirtDomain, xml: DomainXml) -> int | None:
    """The version of the QEMU that runs the domain; None if it can't be told for sure.

    libvirt tells that of the program that is installed now; the domain's may be older. Asking QEMU itself
    would mark the domain as tainted for ever.
    """
    offered = domain.call("virConnectGetDomainCapabilities", domain.connection.getDomainCapabilities)
    if parse(offered).findtext("./path", "") != xml.emulator or not _runs(domain.uuid, Path(xml.emulator)):
        return None
    return int(domain.call("virConnectGetVersion", domain.connection.getVersion))


def _runs(uuid: str, program: Path) -> bool:
    """Whether all processes that say they are this domain are of the program as it lies on the disk now."""
    argument = b"\0-uuid\0" + uuid.encode() + b"\0"
    found = []
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if argument in (process / "cmdline").read_bytes():
                found.append((process / "exe").stat())
    try:
        now = program.stat()
    except OSError:
        return False
    return bool(found) and all((s.st_dev, s.st_ino) == (now.st_dev, now.st_ino) for s in found)


class PullJob:
    """The jobs that read one domain live, one at a time. Not thread-safe: one thread at a time uses it."""

    def __init__(
        self,
        domain: LibvirtDomain,
        owner: Owner,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        scratch: Scratch,
        clock: Clock,
    ) -> None:
        """`domain` is open, and belongs to this from now on."""
        self.scratch = scratch
        self._domain = domain
        self._jobs = BackupJobs(domain, clock)
        self._disks = disks
        self._base = owner.checkpoint(base.capture) if base is not None else ""
        self._owner = owner

    @property
    def vm(self) -> str:
        return self._domain.vm

    @property
    def exports(self) -> Mapping[str, tuple[str, str]]:
        """Of each disk, the name of its export, and of the bitmap that tells what belongs to the view, if one does."""
        return {
            disk.name: (self._owner.export(number), _BITMAP if self._is_dirty(disk) else "")
            for number, disk in enumerate(self._disks)
        }

    def _is_dirty(self, disk: DiskSurvey) -> bool:
        return disk.kind is Kind.INCREMENTAL and bool(self._base)

    def prepare(self, xml: DomainXml) -> str:
        """Make what a job needs, in advance; the job's XML, for `begin`.

        Raises:
            LiveUnavailable, SpoolUnusable: there is no room for its scratch files.
        """
        files = self.scratch.make(self._disks, xml.qemu_user)
        pulled = [
            PulledDisk(
                target=disk.name,
                scratch=path,
                export=self.exports[disk.name][0],
                incremental=self._base if self._is_dirty(disk) else "",
                bitmap=_BITMAP,
            )
            for disk, path in zip(self._disks, files, strict=True)
        ]
        names = {disk.name for disk in self._disks}
        others = [t for t in (*(d.target for d in xml.disks), *xml.excluded) if t not in names]
        return pull_xml(pulled, others, self.scratch.socket)

    def begin(self, text: str, checkpoint: str | None = None) -> None:
        """Begin the job that was prepared, and a checkpoint (its XML) at the same instant.

        Raises:
            LiveUnavailable: QEMU can't serve at the socket.
            CaptureFailed: libvirt refused it for another reason.
            SourceLost: the domain or libvirt went away.
        """
        flags = libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL
        try:
            self._domain.call("virDomainBackupBegin", lambda: self._domain.handle.backupBegin(text, checkpoint, flags))
        except LibvirtRefused as err:
            self.scratch.remove()
            if any(sign in err.text for sign in _NO_SERVER):
                raise LiveUnavailable(vm=self.vm, problem=err.text) from err
            raise self.failed(err) from err

    def end(self) -> None:
        """End the job, if it runs still.

        Raises:
            CaptureFailed: it does not end.
            SourceLost: as `begin`.
        """
        try:
            self._jobs.end_ours(self._is_ours, timeout_s=_CANCEL_TIMEOUT_S)
        except (LibvirtRefused, TimeoutError) as err:
            raise self.failed(err) from err
        self.scratch.remove()

    def blocker(self) -> str:
        """What keeps a job from beginning; empty if nothing does.

        Raises:
            CaptureFailed, SourceLost: as `begin`.
        """
        try:
            return self._jobs.blocker(self._is_ours)
        except LibvirtRefused as err:
            raise self.failed(err) from err

    def close(self) -> None:
        self._domain.close()

    def _is_ours(self, path: Path) -> bool:
        return path.is_relative_to(self.scratch.directory)

    def failed(self, err: Exception) -> DrsyncError:
        operation = err.operation if isinstance(err, LibvirtRefused) else "virDomainAbortJob"
        text = err.text if isinstance(err, LibvirtRefused) else str(err) or "a backup does not end"
        return CaptureFailed(vm=self.vm, operation=operation, problem=text)
