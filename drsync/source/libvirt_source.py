"""Captures a running domain through libvirt, which owns the monitor of its QEMUs.

One call of virDomainBackupBegin takes all disks at one instant and starts the
new bitmaps, as a checkpoint; libvirt lets QEMU copy (push mode) into layers
that are there already:

    checkpoint of C  ──▶ backup, incremental ──▶ layer 1, layer 2
    checkpoint of P  begins at the same instant

The old checkpoint stays until `release`. Its record in libvirt and its bitmaps
in the images can part; what counts is the bitmap (see libvirt_checkpoints.py).

libvirt's transaction adds the new bitmap, then merges the old one for the copy,
then starts the copy, disk by disk (qemuBackupBegin). With iothreads the guest
writes on in between: such a write would be in the new bitmap and not in the
layer, and the point would be torn. So a guest with iothreads is paused for the
milliseconds of that call.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import libvirt

from drsync.errors import CaptureFailed, CaptureTimeout, LibraryMissing, LiveUnavailable, SourceLost
from drsync.model import CaptureId, Clock, Consistency, Kind, Pace, Progress, SystemClock
from drsync.source import NO_PACE, Base, CaptureResult, DiskSurvey, Instant, LiveView, Source, at_once
from drsync.source.backup import boot_of_host, make_layer
from drsync.source.bitmap import Owner
from drsync.source.libvirt_checkpoints import Checkpoints
from drsync.source.libvirt_connection import LibvirtDomain, LibvirtRefused
from drsync.source.libvirt_copy import pulled_copy
from drsync.source.libvirt_definition import describe, describe_disks
from drsync.source.libvirt_jobs import BackupFailed, BackupJobs, CopySpeeds, wait_until_closed
from drsync.source.libvirt_offline import OfflineSource
from drsync.source.libvirt_pausing import Pausing
from drsync.source.libvirt_pull import check_pull
from drsync.source.libvirt_scratch import remove_scratch
from drsync.source.libvirt_slices import open_view
from drsync.source.libvirt_survey import LibvirtOptions, domain_xml, surveyed, why_not_incremental
from drsync.source.libvirt_xml import DiskCopy, DomainDisk, DomainXml, backup_xml, checkpoint_xml
from drsync.source.watch import Watch

log = logging.getLogger(__name__)

_CANCEL_TIMEOUT_S: Final = 60.0
"""A cancelled job ends when its requests in flight are done; longer means that a disk hangs."""
_COPYING: Final = "copying"
"""A file beside the layers while libvirt copies: if libvirtd ends meanwhile, it may forget a bitmap of its own."""
_UNSERVED: Final = "unserved"
"""A file beside the layers: this QEMU could not serve its disks to drsync, so captures are left to it."""


class LibvirtSource:
    """A Source over libvirt, of a domain that runs. Not thread-safe."""

    def __init__(self, options: LibvirtOptions, domain: LibvirtDomain, *, clock: Clock | None = None) -> None:
        """`domain` is open and runs; it belongs to this session from now on."""
        self._options = options
        self._clock = clock or SystemClock()
        self._owner = Owner(repository=options.repository_tag, vm=options.vm)
        self._domain = domain
        self._jobs = BackupJobs(domain, self._clock)
        self._pausing = Pausing(domain, options.layers)

    def survey(
        self, base: Base | None, *, full: bool = False, tidy: bool = True, keep: Collection[CaptureId] = ()
    ) -> Sequence[DiskSurvey]:
        with self._translated():
            self._domain.check_run("survey")
            if tidy:
                self._pausing.let_go()
                self._end_dead_jobs()
                self._remove_forgotten()
            self._refuse_while_busy()
            xml = domain_xml(self._domain, self._options)
            checkpoints = self._checkpoints(xml)
            if tidy:
                self._remove_dead(checkpoints, xml, {*keep, *([base.capture] if base is not None else [])})
            sizes = {disk.target: self._size(disk) for disk in xml.disks}
            reasons = {
                disk.target: why_not_incremental(disk, sizes[disk.target], base, full=full) for disk in xml.disks
            }
            dirty: dict[str, int] = {}
            wanted = [target for target, reason in reasons.items() if not reason]
            if base is not None and wanted:
                dirty = checkpoints.dirty_bytes(base.capture, wanted)
        return [surveyed(disk, sizes[disk.target], reasons[disk.target], dirty) for disk in xml.disks]

    def capture(
        self,
        capture: CaptureId,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        layers: Mapping[str, Path],
        *,
        timeout_s: float,
        keep_free_bytes: int = 0,
        progress: Progress | None = None,
        instant: Instant = at_once,
        pace: Pace = NO_PACE,
    ) -> CaptureResult:
        deadline_s = self._clock.monotonic_s() + timeout_s
        watch = Watch(self._options.vm, layers, keep_free_bytes=keep_free_bytes, progress=progress)
        try:
            with self._translated():
                return self._capture(capture, base, disks, layers, instant, watch, deadline_s, pace)
        except TimeoutError as err:
            raise CaptureTimeout(vm=self._options.vm, timeout_s=timeout_s) from err

    def check_live(self, disks: Sequence[DiskSurvey]) -> None:
        with self._translated():
            check_pull(self._domain, domain_xml(self._domain, self._options), disks, self._options.pull)

    def begin_recording(self, capture: CaptureId, disks: Sequence[DiskSurvey]) -> Mapping[str, object]:
        with self._translated():
            self._domain.check_run("begin_recording")
            self._refuse_while_busy()
            xml = domain_xml(self._domain, self._options)
            check_pull(self._domain, xml, disks, self._options.pull)
            self._check_as_surveyed(disks, xml)
            names = {disk.name for disk in disks}
            others = [t for t in (*(disk.target for disk in xml.disks), *xml.excluded) if t not in names]
            text = checkpoint_xml(self._owner.checkpoint(capture), [disk.name for disk in disks], others)
            self._domain.call("virDomainCheckpointCreateXML", lambda: self._domain.handle.checkpointCreateXML(text, 0))
        return {"source": "libvirt", "disks": describe_disks(xml)}

    def open_live(self, base: Base | None, disks: Sequence[DiskSurvey], *, pace: Pace) -> LiveView:
        with self._translated():
            self._domain.check_run("open_live")
            self._refuse_while_busy()
            xml = domain_xml(self._domain, self._options)
            check_pull(self._domain, xml, disks, self._options.pull)
            self._check_as_surveyed(disks, xml)
            if self._options.pull is None:
                raise self._failed("open_live", "there is no place for it")
        return open_view(
            self._domain, self._owner, base, disks, pace, self._options.pull, self._options.exclude, self._clock
        )

    def incarnation(self) -> str:
        return f"{boot_of_host()} {self._domain.uuid} {self._domain.run_id}"

    def is_running(self) -> bool:
        self._domain.check_run("is_running")
        with self._translated():
            return bool(self._pausing.state()[0] == libvirt.VIR_DOMAIN_RUNNING)

    def pause(self, *, timeout_s: float) -> bool:
        """libvirt bounds its calls itself: by its keepalive, and by how long it waits for a domain's job."""
        if not self.is_running():
            return False
        with self._translated():
            self._domain.call("virDomainSuspend", self._domain.handle.suspend)
        return True

    def resume(self, *, timeout_s: float) -> None:
        self._domain.check_run("resume")
        with self._translated():
            self._pausing.resume()

    def release(self, keep: CaptureId) -> None:
        with self._translated():
            self._domain.check_run("release")
            checkpoints = self._checkpoints(domain_xml(self._domain, self._options))
            for capture in checkpoints.captures():
                if capture != keep:
                    checkpoints.remove(capture)

    def close(self) -> None:
        self._domain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What libvirt has

    def _checkpoints(self, xml: DomainXml) -> Checkpoints:
        return Checkpoints(self._domain, self._owner, [*(disk.target for disk in xml.disks), *xml.excluded])

    def _size(self, disk: DomainDisk) -> int:
        """The disk's size, which QEMU tells."""
        info = self._domain.call("virDomainGetBlockInfo", lambda: self._domain.handle.blockInfo(disk.target))
        return int(info[0])

    def _refuse_while_busy(self) -> None:
        """A domain has one job at a time; one that arrives by a migration must not have its disks held, either."""
        if self._pausing.state() == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION):
            raise self._failed("virDomainGetState", "the VM is being migrated")
        blocker = self._jobs.blocker(self._is_layer)
        if blocker:
            raise self._failed("virDomainGetJobStats", blocker)

    # Taking a capture

    def _capture(
        self,
        capture: CaptureId,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        layers: Mapping[str, Path],
        instant: Instant,
        watch: Watch,
        deadline_s: float,
        pace: Pace,
    ) -> CaptureResult:
        self._domain.check_run("capture")
        self._refuse_while_busy()
        xml = domain_xml(self._domain, self._options)
        self._check_as_surveyed(disks, xml)
        definition = describe(self._domain, xml)
        copy = self._pull if self._can_pull(xml, disks) else self._push
        found = [path for path in layers.values() if path.exists()]
        try:
            self._copying.touch()
            time = copy(capture, base, disks, layers, xml, instant, watch, deadline_s, pace)
            self._copying.unlink(missing_ok=True)
        except BaseException as err:
            self._abandon(capture, [path for path in layers.values() if path not in found], err)
            raise
        return CaptureResult(time=time, consistency=Consistency.CRASH, definition=definition)

    def _can_pull(self, xml: DomainXml, disks: Sequence[DiskSurvey]) -> bool:
        """Whether drsync can copy by itself, which the guest feels less than QEMU's own copy."""
        if self._unserved.exists() and self._unserved.read_text() == self.incarnation():
            return False
        self._unserved.unlink(missing_ok=True)
        try:
            check_pull(self._domain, xml, disks, self._options.pull)
        except (LiveUnavailable, LibraryMissing) as err:
            log.debug("vm=%s QEMU copies by itself, which the guest may feel: %s", self._options.vm, err)
            return False
        return True

    @property
    def _unserved(self) -> Path:
        return self._options.layers / _UNSERVED

    def _pull(
        self,
        capture: CaptureId,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        layers: Mapping[str, Path],
        xml: DomainXml,
        instant: Instant,
        watch: Watch,
        deadline_s: float,
        pace: Pace,
    ) -> datetime:
        if self._options.pull is None:
            raise self._failed("virDomainBackupBegin", "there is no place for scratch files")
        checkpoint = self._checkpoint(capture, xml, [disk.name for disk in disks])
        with pulled_copy(self._domain, self._owner, base, disks, self._options.pull, self._clock) as copy:
            copy.prepare(xml, layers)
            with instant(), self._pausing.paused() if xml.has_iothreads else _going_on():
                time = self._clock.now().astimezone(UTC)
                try:
                    copy.begin(checkpoint)
                except LiveUnavailable as err:  # the instant is over: the next capture is QEMU's own
                    self._unserved.write_text(self.incarnation())
                    raise self._failed("virDomainBackupBegin", str(err)) from err
            try:
                copy.write(layers, watch, deadline_s=deadline_s, pace=pace)
            except SourceLost as err:  # QEMU hangs up, too, when it can't read a disk
                self._domain.check_run("reading")
                raise self._failed("reading", f"a disk can't be read, it seems: {err.fields['problem']}") from err
        return time

    def _push(
        self,
        capture: CaptureId,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        layers: Mapping[str, Path],
        xml: DomainXml,
        instant: Instant,
        watch: Watch,
        deadline_s: float,
        pace: Pace,
    ) -> datetime:
        for disk in disks:
            make_layer(layers[disk.name], disk.size_bytes, xml.qemu_user)
        with self._jobs.watched() as ended:
            time = self._begin(capture, self._plan(base, disks, layers, xml), xml, instant)
            speeds = CopySpeeds(self._domain, [disk.name for disk in disks], pace)

            def on_progress(done_bytes: int, total_bytes: int) -> None:
                speeds.look()
                watch.tick(done_bytes, total_bytes)

            self._jobs.wait(ended, deadline_s=deadline_s, on_progress=on_progress)
        wait_until_closed([layers[disk.name] for disk in disks], self._clock)
        return time

    def _plan(
        self, base: Base | None, disks: Sequence[DiskSurvey], layers: Mapping[str, Path], xml: DomainXml
    ) -> list[DiskCopy]:
        present = {disk.target: disk for disk in xml.disks}
        copies = []
        for disk in disks:
            incremental = disk.kind is Kind.INCREMENTAL and base is not None
            copy = DiskCopy(
                target=disk.name,
                layer=layers[disk.name],
                incremental=self._owner.checkpoint(base.capture) if incremental and base is not None else "",
                checkpoint=present[disk.name].keeps_bitmaps,
            )
            copies.append(copy)
        return copies

    def _check_as_surveyed(self, disks: Sequence[DiskSurvey], xml: DomainXml) -> Mapping[str, DomainDisk]:
        """The disks as the domain has them now.

        Raises:
            CaptureFailed: one is gone, or has another size.
        """
        present = {disk.target: disk for disk in xml.disks}
        for disk in disks:
            now = present.get(disk.name)
            if now is None or self._size(now) != disk.size_bytes:
                raise self._failed("virDomainGetBlockInfo", f"disk {disk.name} is not as it was surveyed")
        return present

    def _begin(self, capture: CaptureId, copies: Sequence[DiskCopy], xml: DomainXml, instant: Instant) -> datetime:
        """Start all bitmaps and all copies at one instant; returns the time that the disks show.

        The clock is read before, not after: the point then surely holds all that the
        guest had written by that time, so the loss reckoned from it is never understated.
        """
        targets = [*(disk.target for disk in xml.disks), *xml.excluded]
        backup = backup_xml(copies, [t for t in targets if t not in {copy.target for copy in copies}])
        checkpoint = self._checkpoint(capture, xml, [copy.target for copy in copies if copy.checkpoint])
        with instant(), self._pausing.paused() if xml.has_iothreads else _going_on():
            time = self._clock.now().astimezone(UTC)
            self._fix_instant(backup, checkpoint)
        return time

    def _checkpoint(self, capture: CaptureId, xml: DomainXml, kept: Sequence[str]) -> str | None:
        """The XML of a capture's checkpoint: bitmaps of the disks `kept` begin with it; None without any."""
        targets = [*(disk.target for disk in xml.disks), *xml.excluded]
        others = [target for target in targets if target not in kept]
        return checkpoint_xml(self._owner.checkpoint(capture), kept, others) if kept else None

    def _fix_instant(self, backup: str, checkpoint: str | None) -> None:
        """The one call that takes all disks as they are now."""
        flags = libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL
        self._domain.call("virDomainBackupBegin", lambda: self._domain.handle.backupBegin(backup, checkpoint, flags))

    # Clearing away

    def _abandon(self, capture: CaptureId, made: Sequence[Path], cause: BaseException) -> None:
        """Undo a capture as far as libvirt still answers; what is left, the next survey clears away."""
        if not isinstance(cause, SourceLost):
            try:
                self._end_dead_jobs()
                checkpoints = self._checkpoints(domain_xml(self._domain, self._options))
                if capture in checkpoints.captures():
                    checkpoints.remove(capture)
            except (SourceLost, CaptureFailed, LibvirtRefused) as err:
                log.warning("vm=%s capture=%s is not cleared away yet: %s", self._options.vm, capture, err)
        for path in made:
            path.unlink(missing_ok=True)

    def _end_dead_jobs(self) -> None:
        try:
            self._jobs.end_ours(self._is_layer, timeout_s=_CANCEL_TIMEOUT_S)
        except TimeoutError as err:
            raise self._failed("virDomainAbortJob", f"a backup did not end in {_CANCEL_TIMEOUT_S:g} s") from err
        if self._options.pull is not None:
            remove_scratch(self._options.pull.directory)

    def _remove_forgotten(self) -> None:
        """Remove the bitmaps that libvirt makes for the time of a copy, if it may have forgotten them.

        libvirtd (9.0) does when it ends while a backup begins; another one of that name can't be made, so
        there would be no increment any more, and it may even crash over it.
        """
        if not self._copying.exists() or self._jobs.present() is not None:
            return
        xml = domain_xml(self._domain, self._options)
        for disk in xml.disks:
            self._checkpoints(xml).remove_bitmap(f"backup-{disk.target}", disk.target)
        self._copying.unlink(missing_ok=True)

    @property
    def _copying(self) -> Path:
        return self._options.layers / _COPYING

    def _is_layer(self, path: Path) -> bool:
        return path.is_relative_to(self._options.layers)

    def _remove_dead(self, checkpoints: Checkpoints, xml: DomainXml, keep: Collection[CaptureId]) -> None:
        """Remove our checkpoints of other captures than those in `keep`, and bitmaps that nobody has a record of.

        One that can't be removed now harms nobody, and is tried again.
        """
        dead = [capture for capture in checkpoints.captures() if capture not in keep]
        known = {*dead, *keep}
        for capture in dead:
            try:
                checkpoints.remove(capture)
            except LibvirtRefused as err:
                log.warning("vm=%s checkpoint of %s stays for now: %s", self._options.vm, capture, err.text)
        for capture, target in checkpoints.stored(xml.disks):
            if capture not in known:
                checkpoints.remove_bitmap(self._owner.checkpoint(capture), target)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except LibvirtRefused as err:
            raise self._failed(err.operation, err.text) from err
        except BackupFailed as err:
            raise self._failed("virDomainBackupBegin", str(err)) from err

    def _failed(self, operation: str, problem: str) -> CaptureFailed:
        return CaptureFailed(vm=self._options.vm, operation=operation, problem=problem)


def open_source(options: LibvirtOptions, *, clock: Clock | None = None) -> Source:
    """A session with a domain, whether it runs or is off.

    Raises:
        LibvirtUnreachable, DomainMissing: as LibvirtDomain.
    """
    domain = LibvirtDomain(options.vm, options.uri, options.domain)
    return LibvirtSource(options, domain, clock=clock) if domain.active else OfflineSource(options, domain, clock=clock)


@contextmanager
def _going_on() -> Iterator[None]:
    yield
