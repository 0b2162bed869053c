"""Wires a configuration to the parts: what the command line and the daemon call.

A session opens what it needs when it needs it, and holds nothing that a
concurrent thread could not use: the daemon runs several VMs in one session.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Final

import msgspec

from drsync import catalog
from drsync.capture import CaptureOptions, Outcome, Result, base_of, newest_point, run_cycle
from drsync.catalog import Point, PreflightTold, VmStatus
from drsync.config import Config, LibvirtSource, VmSettings, captured_together
from drsync.errors import (
    CaptureRunning,
    DrsyncError,
    IntegrityError,
    LibraryMissing,
    LiveUnavailable,
    ObjectMissing,
    PointLost,
    RepositoryExists,
    SourceError,
    SpoolError,
    TargetExists,
    UnknownDisk,
    UnknownPoint,
    UnknownVm,
)
from drsync.format.keys import RecoveryKey, RootKey
from drsync.group import Assembly, run_together
from drsync.guests import Guests
from drsync.heartbeat import Heartbeats, Seen, read_heartbeats, write_heartbeat
from drsync.image import PointImage
from drsync.journal import Journal, seed_progress
from drsync.keyfile import read_key_file, write_key_file
from drsync.log import Log, Segment
from drsync.mapped import newest_stretch
from drsync.model import Clock, Progress
from drsync.pace import TokenBucket
from drsync.preflight.findings import Verdict
from drsync.preflight.report import KEPT_NAME, Report
from drsync.preflight.run import preflight
from drsync.protection import Protection, libvirt_needed
from drsync.quiesce import Company
from drsync.repository import Repository, create_repository, find_record, open_repository, recover_root_key
from drsync.restore import restore_disk
from drsync.seed import SeedOptions, is_to_be_streamed
from drsync.source import DiskSurvey, Source
from drsync.spool import Spool
from drsync.store import ObjectStore
from drsync.target.image import ImageDisk, ImageFormat, check_room, write_text_file
from drsync.verify import VmReport, verify

_LOGGER = logging.getLogger(__name__)
_LEAST_GATHER_S: Final = 30.0
"""A member of a group gets this long to be ready, however short the RPO is."""
_NO_REPOSITORY: Final = "00000000"
"""The tag of sessions that only resume a guest: it must not stay paused because a store is down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreRequest:
    """What to restore, and where to."""

    vm: str
    output: Path
    number: int | None = None
    at: datetime | None = None
    image_format: ImageFormat = ImageFormat.QCOW2
    disks: Sequence[str] = ()
    """Just these disks; empty = all."""
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredDisk:
    """A disk that was, or would be, restored."""

    name: str
    path: Path
    size_bytes: int
    live_bytes: int
    """Bytes of blocks that hold data: what the file takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """What a restore does."""

    point: Point
    image: PointImage
    disks: Sequence[RestoredDisk]
    definition_path: Path


class Session:
    """One configuration, open for work."""

    def __init__(self, config: Config, clock: Clock, *, upload: TokenBucket | None = None) -> None:
        """`upload` holds what is sent to `[limits] upload`; given where several sessions share it."""
        self.config = config
        self.clock = clock
        self._upload = upload or TokenBucket(config.limits.upload, clock)
        self.protection = Protection(config)

    @cached_property
    def raw_store(self) -> ObjectStore:
        """The store without retries: for finding out what it really does."""
        from drsync.store.open import open_store  # noqa: PLC0415 - a store's library is large, and not always needed

        settings = self.config.repository
        return open_store(settings.url, endpoint_url=settings.endpoint_url, region=settings.region, pace=self._upload)

    @cached_property
    def store(self) -> ObjectStore:
        """The store of the repository; passing failures are tried again."""
        from drsync.store.retry import RetryingStore  # noqa: PLC0415 - as above

        return RetryingStore(self.raw_store, clock=self.clock)

    @cached_property
    def repository(self) -> Repository:
        """The repository, its key checked."""
        key_file = self.config.repository.key_file
        return open_repository(self.store, read_key_file(key_file), key_file)

    @cached_property
    def spool(self) -> Spool:
        """The spool of this host."""
        return Spool(self.config.spool.path, self.config.spool.reserve_bytes)

    @cached_property
    def guests(self) -> Guests:
        """What is done to the guests around a capture, and undone."""
        return Guests(self.spool, self.protection, lambda vm: self._open_source(vm, _NO_REPOSITORY), self.clock)

    def init(self) -> RecoveryKey:
        """Create repository and key file; the recovery key, which is nowhere else.

        The key file comes first: a crash in between leaves a key without a
        repository, never the other way round.

        Raises:
            RepositoryExists, KeyFileExists: one of them is there already; nothing was changed.
        """
        if find_record(self.store) is not None:
            raise RepositoryExists(url=self.store.url)
        root = RootKey.generate()
        path = self.config.repository.key_file
        write_key_file(path, root)
        try:
            return create_repository(self.store, root, self.clock, bare_store=self.raw_store)
        except DrsyncError as err:
            if not err.retryable:  # else the repository may be there, and this key the only one that opens it
                path.unlink(missing_ok=True)
            raise

    def recover_key(self, recovery: RecoveryKey) -> Path:
        """Write the key file from the recovery key; its path.

        Raises:
            WrongRecoveryKey: it is not this repository's.
            KeyFileExists: there is a key file already.
        """
        path = self.config.repository.key_file
        write_key_file(path, recover_root_key(self.store, recovery))
        return path

    def log(self, vm: str) -> Log:
        """The log of a VM; it may be empty."""
        return Log(self.repository.vm(vm))

    def known_vms(self, vm: str | None = None) -> list[str]:
        """The VMs that are configured or in the repository, in order; or just `vm`, if it is one of them.

        Raises:
            UnknownVm: `vm` is neither.
        """
        known = sorted({v.name for v in self.protection.vms} | set(self.repository.vm_names()))
        if vm is None:
            return known
        if vm not in known:
            raise UnknownVm(vm=vm, known=", ".join(known) or "none")
        return [vm]

    def open_source(self, vm: VmSettings) -> Source:
        """A session with the VM's QEMU."""
        return self._open_source(vm, self.repository.tag)

    def _open_source(self, vm: VmSettings, repository_tag: str) -> Source:
        if isinstance(vm.source, LibvirtSource):
            return self._open_domain(vm, vm.source, repository_tag)
        from drsync.source.qmp import QmpOptions, QmpSource  # noqa: PLC0415 - reading needs no QEMU

        return QmpSource(
            QmpOptions(
                vm=vm.name,
                socket=vm.source.socket,
                repository_tag=repository_tag,
                disks=vm.source.disks,
                live_directory=self.spool.vm(vm.name).live_directory,
            )
        )

    def _open_domain(self, vm: VmSettings, source: LibvirtSource, repository_tag: str) -> Source:
        with libvirt_needed(vm.name):
            from drsync.source.libvirt_pull import PullOptions  # noqa: PLC0415 - as libvirt_needed
            from drsync.source.libvirt_scratch import ScratchLimits  # noqa: PLC0415 - as libvirt_needed
            from drsync.source.libvirt_source import LibvirtOptions, open_source  # noqa: PLC0415 - as libvirt_needed

        spool = self.spool.vm(vm.name)
        limits = ScratchLimits(keep_free_bytes=spool.keep_free_bytes)
        options = LibvirtOptions(
            vm=vm.name,
            domain=source.domain or vm.name,
            uri=source.uri,
            repository_tag=repository_tag,
            layers=spool.path,
            exclude=source.exclude,
            pull=PullOptions(directory=spool.live_directory, scratch=limits),
        )
        return open_source(options, clock=self.clock)

    def end_dead_reading(self) -> None:
        """End what a dead process left that read a domain live; what does not work now is logged, and tried again."""
        left = list(self.spool.path.glob("*/.live"))
        if left:
            with suppress(SourceError):  # it may be of a VM that a pattern finds
                self.protection.look()
        for vm in self.protection.vms if left else ():
            directory = self.spool.vm(vm.name).live_directory
            if isinstance(vm.source, LibvirtSource) and directory.exists():
                self._end_dead_reading(vm.name, vm.source, directory)

    def _end_dead_reading(self, vm_name: str, source: LibvirtSource, directory: Path) -> None:
        try:
            with libvirt_needed(vm_name), self.spool.vm(vm_name).locked():
                from drsync.source.libvirt_guard import end_dead_job  # noqa: PLC0415 - as libvirt_needed

                end_dead_job(vm_name, source.uri, source.domain or vm_name, directory)
        except CaptureRunning:
            pass  # a live process reads it
        except DrsyncError as err:
            _LOGGER.warning("vm=%s a backup in pull mode may still run: %s", vm_name, err)

    def check_access(self, vm: VmSettings) -> Sequence[str]:
        """Check that the VM's QEMU can write layers; what else there is to know of it, for people.

        Raises:
            SpoolClosed: its user can't pass through to the spool.
        """
        if not isinstance(vm.source, LibvirtSource):
            return []
        with libvirt_needed(vm.name):
            from drsync.source.libvirt_access import qemu_access  # noqa: PLC0415 - as libvirt_needed
        access = qemu_access(vm.source.uri)
        self.spool.vm(vm.name).check_passable(access.uid, access.gid)
        if "apparmor" in access.confined_by:
            return [f"AppArmor confines QEMU; if it denies {self.spool.path}, docs/libvirt.md has the rule"]
        return []

    def vms(self) -> Sequence[VmSettings]:
        """The VMs that this host protects now; libvirt is asked if there are patterns.

        Raises:
            LibvirtMissing, LibvirtUnreachable: it can't be asked.
        """
        return self.protection.look()

    def survey(self, vm: VmSettings) -> Sequence[DiskSurvey]:
        """What a capture of the VM would do now. Nothing in QEMU is changed: a capture may wait to be shipped."""
        log = self.log(vm.name)
        newest = log.newest()
        head = log.read(newest) if newest else None
        with self.spool.vm(vm.name).locked(), self.open_source(vm) as source:
            return source.survey(base_of(newest_point(log, head)), tidy=False)

    def way(self, vm: VmSettings, disks: Sequence[DiskSurvey]) -> tuple[bool, Sequence[str]]:
        """Whether a capture of these disks would be read live, not copied to the spool; what there is to know of it.

        Raises:
            SpoolFull: it would, and the spool has no room to end that.
            LibraryMissing: it would, and what that needs is not installed.
            NoWayToCopy: it would have to, and can't be.
        """
        spool = self.spool.vm(vm.name)
        wanted = is_to_be_streamed(disks, spool, self._seed_options())
        if wanted:
            spool.check_room(0)
        with spool.locked(), self.open_source(vm) as source:
            try:
                source.check_live(disks)
            except LibraryMissing:
                if wanted:
                    raise
                return False, []
            except LiveUnavailable as err:
                copy_bytes = sum(disk.copy_bytes for disk in disks)
                if wanted and not spool.has_room(copy_bytes):
                    raise spool.no_way(copy_bytes, err) from err
                problem = f"can't be read live: {err.fields['problem']}"
                told = wanted or source.is_running()
                return False, [f"{problem}; so a full needs room in the spool"] if told else []
        return wanted, []

    def _seed_options(self, stop: Callable[[], bool] = lambda: False) -> SeedOptions:
        return SeedOptions(
            stream_above_bytes=self.config.spool.stream_above_bytes,
            read_pace=TokenBucket(self.config.limits.seed_read, self.clock),
            stop=stop,
        )

    def capture(
        self,
        vm_name: str,
        progress: Progress,
        *,
        full: bool = False,
        take_over: bool = False,
        may_seed: bool = True,
        stop: Callable[[], bool] = lambda: False,
        company: Company | None = None,
    ) -> Outcome:
        """One capture cycle of a configured VM, by itself or as one of a `company`; a seed ends when `stop` says so.

        Raises:
            DrsyncError: see capture.run_cycle; the error is also remembered for `status`.
        """
        vm = self.protection.vm(vm_name)
        self.guests.let_go_of(vm)  # before the repository is looked for, which may be away
        options = CaptureOptions(
            full=full,
            take_over=take_over,
            timeout_s=vm.capture_timeout_s,
            may_seed=may_seed,
            seed=self._seed_options(stop),
        )
        return run_cycle(
            self.log(vm.name),
            self.spool.vm(vm.name),
            self.spool.writer_id(),
            lambda: self.open_source(vm),
            self.clock,
            progress,
            options,
            self.guests.quiesce(vm, company),
        )

    def together(self, vm_name: str) -> Sequence[VmSettings]:
        """The VMs that are captured together with this one, itself among them.

        Raises:
            UnknownVm: there is no such VM.
        """
        vm = self.protection.vm(vm_name)
        return next(vms for vms in captured_together(self.protection.vms) if vm in vms)

    def capture_together(
        self,
        names: Sequence[str],
        progress_of: Callable[[str], Progress],
        *,
        full: bool = False,
        take_over: bool = False,
        may_seed: bool = True,
    ) -> Mapping[str, Outcome | Exception]:
        """One cycle of each of these VMs of one group, at one instant; how each one ended.

        Members of the group that are not named are left out, which the points tell.
        So are those that have to be seeded: the others do not wait for that. With
        `may_seed` they are seeded when the others have their points, else it is told.

        Raises:
            CaptureRunning: another process on this host captures the group.
        """
        vms = [self.protection.vm(name) for name in names]
        group = vms[0].group
        if group is None:
            raise ValueError(names)
        absent = {vm.name: self._why_absent(vm.name) for vm in self.together(names[0]) if vm.name not in names}
        assembly = Assembly(
            group,
            names,
            pauses=vms[0].group_pause,
            gather_s=max(_LEAST_GATHER_S, min(vms[0].rpo_s, *(vm.capture_timeout_s for vm in vms))),
            copy_s=max(vm.capture_timeout_s for vm in vms),
            absent=absent,
        )
        progresses = {name: progress_of(name) for name in names}

        def cycle(name: str, company: Company | None) -> Outcome:
            return self.capture(
                name, progresses[name], full=full, take_over=take_over, may_seed=company is None, company=company
            )

        with self.spool.group_locked(group):
            results = run_together(assembly, {name: partial(cycle, name) for name in names}, self.guests.are_held)
        if not may_seed:
            return results
        return {name: _seeded(result, partial(cycle, name, None)) for name, result in results.items()}

    def _why_absent(self, vm_name: str) -> str:
        return "is being seeded" if self.spool.vm(vm_name).journal_path.exists() else "was left out"

    def beat(self) -> None:
        """Write this host's heartbeat: what its spool knows of each configured VM."""
        seen: dict[str, Seen] = {}
        for vm in self.protection.vms:
            state = self.spool.vm(vm.name).state()
            if state.wrote_seq and state.checked_at and not state.fenced_by:
                seen[vm.name] = Seen(seq=state.wrote_seq, checked_at=catalog.parse_time(state.checked_at))
        write_heartbeat(self.repository, self.config.daemon.host, seen)

    def points(self, vm: str) -> list[Point]:
        """All points of a VM, in order."""
        return catalog.points(self.log(vm))

    def status(self) -> list[VmStatus]:
        """How well each VM is protected: those configured here, and those that others keep in the repository."""
        beats = read_heartbeats(self.repository)
        with suppress(SourceError):  # what patterns would find is no reason to show nothing
            self.protection.look()
        return [self._status(vm, beats) for vm in self.known_vms()]

    def _status(self, vm: str, beats: Heartbeats) -> VmStatus:
        spool = self.spool.vm(vm)
        state, seen = spool.state(), beats.of(vm)
        settings = next((v for v in self.protection.vms if v.name == vm), None)
        error, error_time = state.error, state.error_at
        point: Point | None = None
        try:
            point = self._newest_point(vm, max(state.wrote_seq, seen.seq if seen else 0))
        except (IntegrityError, ObjectMissing) as err:
            error, error_time = str(err), self.clock.now().isoformat()
        checked_at = seen.checked_at if seen and point and seen.seq >= point.number else None
        lag = catalog.lag_s(point.time, checked_at, self.clock.now()) if point else None
        rpo_s = settings.rpo_s if settings else None
        journal = Journal.load(spool.journal_path)
        over = point.capture if point else None
        seed = seed_progress(journal) if journal is not None and journal.begin.over == over else None
        return VmStatus(
            vm=vm,
            state=catalog.state_of(
                lag=lag, rpo_s=rpo_s, error=error, fenced=bool(state.fenced_by), seeding=seed is not None and not error
            ),
            point=point.number if point else None,
            time=point.time if point else None,
            lag_s=lag,
            rpo_s=rpo_s,
            spool_bytes=spool.used_bytes() if spool.path.exists() else 0,
            seed=seed,
            error=error,
            error_time=error_time,
            preflight=_told(spool.noted(KEPT_NAME, Report)),
        )

    def _newest_point(self, vm: str, known_seq: int) -> Point | None:
        log = self.log(vm)
        seq = log.newest(after=known_seq)
        while seq:
            segment = log.read(seq)
            point = catalog.point_of(segment, seq - 1 or None)
            if point is not None:
                return point
            seq -= 1
        return None

    def point_of(self, vm: str, segment: Segment) -> Point | None:
        """The point that a segment of a VM's log commits, with the point before it; None if it only fences.

        Raises:
            StoreError, IntegrityError: the log can't be read.
        """
        log = self.log(vm)
        before = newest_point(log, log.read(segment.seq - 1)) if segment.seq > 1 else None
        return catalog.point_of(segment, before.seq if before else None)

    def plan_restore(self, request: RestoreRequest) -> RestorePlan:
        """What a restore would write; everything that can refuse it has been checked.

        Raises:
            UnknownVm, UnknownPoint, UnknownDisk: there is nothing like that.
            PointLost: no number was given, and newer points than the log has are known to have been committed.
            TargetExists, TargetFull: the output can't take it.
        """
        point, image = self.find_point(request.vm, number=request.number, at=request.at)
        disks = [self._planned(image, name, request) for name in _chosen(point, request.disks)]
        definition = request.output / f"{request.vm}.json"
        for path in [definition, *(d.path for d in disks)]:
            if os.path.lexists(path) and not request.overwrite:
                raise TargetExists(path=path, vm=request.vm)
        check_room(request.output, sum(d.live_bytes for d in disks))
        return RestorePlan(point=point, image=image, disks=disks, definition_path=definition)

    def find_point(self, vm: str, *, number: int | None = None, at: datetime | None = None) -> tuple[Point, PointImage]:
        """The point that was asked for, else the newest, from as little of the log as block maps allow.

        Raises:
            UnknownVm, UnknownPoint: there is nothing like that.
            PointLost: no number was given, and newer points than the log has are known to have been committed.
        """
        self.known_vms(vm)
        log = self.log(vm)
        last = self._last_needed(log, number)
        while True:
            stretch = newest_stretch(log, last)
            known = catalog.points_of(stretch.segments, parent=stretch.parent)
            try:
                point = catalog.choose(vm, known, number=number, at=at)
            except UnknownPoint as err:
                if stretch.ground is None or stretch.parent is None:
                    raise UnknownPoint(**err.fields | {"known": catalog.described(catalog.points(log))}) from err
                last = stretch.parent  # what is older than this map is looked for in front of it
            else:
                return point, stretch.image(point.number)

    def _last_needed(self, log: Log, number: int | None) -> int:
        """The last segment that a restore reads; damage behind the point that was asked for does not matter."""
        if number is not None and number >= 1 and any(seq == number for seq, _ in log.listed(after=number - 1)):
            return number
        newest, committed = log.newest(), self._committed(log.vm)
        if number is None and newest < committed:  # not an older point instead, without a word
            raise PointLost(vm=log.vm, found=newest, expected=committed)
        return newest

    def _committed(self, vm: str) -> int:
        """The newest segment that the heartbeats, or this host's spool, know to have been committed."""
        seen = read_heartbeats(self.repository).of(vm)
        return max(self.spool.vm(vm).state().wrote_seq, seen.seq if seen else 0)

    def _planned(self, image: PointImage, name: str, request: RestoreRequest) -> RestoredDisk:
        return RestoredDisk(
            name=name,
            path=request.output / f"{name}.{request.image_format}",
            size_bytes=image.disk(name).size_bytes,
            live_bytes=image.live_bytes(name),
        )

    def preflight(self, vm: str, *, number: int | None = None, at: datetime | None = None, reader: str = "") -> Report:
        """Whether a point, else the newest, would come up in EC2; the result is kept in this host's spool.

        Raises:
            UnknownVm, UnknownPoint, PointLost: see find_point.
            ObjectMissing, ObjectDamaged, StoreError: the disks can't be read.
        """
        point, image = self.find_point(vm, number=number, at=at)
        report = preflight(self.log(vm).objects, point, image, self.clock, reader=reader)
        try:
            self.spool.vm(vm).note(KEPT_NAME, report)
        except SpoolError as err:  # a machine that only recovers need not have a spool
            _LOGGER.warning("vm=%s the result is not kept: %s", vm, err)
        return report

    def preflighted(self, point: Point) -> Report:
        """The report of a point: the one that is kept if it is of this point, else a new one.

        Raises:
            UnknownVm, UnknownPoint, ObjectMissing, ObjectDamaged, StoreError: see `preflight`.
        """
        kept = self.spool.vm(point.vm).noted(KEPT_NAME, Report)
        if kept is not None and (kept.vm, kept.point, kept.point_time) == (point.vm, point.number, point.time):
            return kept
        return self.preflight(point.vm, number=point.number)

    def restore(self, request: RestoreRequest, plan: RestorePlan, progress: Progress) -> None:
        """Write the disks and the definition of a planned restore.

        Raises:
            ObjectMissing, ObjectDamaged: the point can't be had as it was captured; nothing finished-looking is left.
            TargetError: the output can't be written.
        """
        objects = self.log(request.vm).objects
        progress.start(f"restore {request.vm}", sum(d.size_bytes for d in plan.disks))
        for disk in plan.disks:
            target = ImageDisk(
                disk.path, disk.size_bytes, request.image_format, vm=request.vm, overwrite=request.overwrite
            )
            restore_disk(objects, plan.image, disk.name, target, progress)
        text = msgspec.json.format(msgspec.json.encode(_definition(plan, request)), indent=2).decode()
        write_text_file(plan.definition_path, text + "\n", vm=request.vm, overwrite=request.overwrite)

    def verify(self, vm: str, progress: Progress, *, read_data: bool = False) -> VmReport:
        """Audit a VM's log, also against what the heartbeats and this spool know to have been committed."""
        return verify(self.log(vm), committed_seq=self._committed(vm), read_data=read_data, progress=progress)


def _told(report: Report | None) -> PreflightTold | None:
    if report is None:
        return None
    counts = report.counts
    return PreflightTold(
        target=report.target,
        point=report.point,
        checked_at=report.checked_at,
        verdict=report.verdict,
        fails=counts[Verdict.FAILS],
        warnings=counts[Verdict.WARNING],
        unknown=counts[Verdict.UNKNOWN],
        reason=next((f.reason for f in report.findings if f.verdict is Verdict.FAILS), ""),
    )


def _seeded(result: Outcome | Exception, seed: Callable[[], Outcome]) -> Outcome | Exception:
    """What became of a member of a group: if it was left to be seeded, what `seed` comes to."""
    if isinstance(result, Exception) or result.result is not Result.SEED_DUE:
        return result
    try:
        outcome = seed()
    except Exception as err:  # noqa: BLE001 - kept for the caller, as the cycles of the others are
        return err
    return replace(outcome, shipped_before=outcome.shipped_before or result.shipped_before)


def _chosen(point: Point, wanted: Sequence[str]) -> list[str]:
    known = [d.name for d in point.disks]
    for name in wanted:
        if name not in known:
            raise UnknownDisk(point=point.number, vm=point.vm, disk=name, known=", ".join(known))
    return [name for name in known if not wanted or name in wanted]


def _definition(plan: RestorePlan, request: RestoreRequest) -> dict[str, object]:
    """What is written beside the disks: all that is needed to start the VM again."""
    return {
        "vm": request.vm,
        "point": plan.point.number,
        "time": plan.point.time.isoformat().replace("+00:00", "Z"),
        "consistency": plan.point.consistency,
        "disks": [
            {"name": d.name, "file": d.path.name, "format": request.image_format, "size_bytes": d.size_bytes}
            for d in plan.disks
        ],
        "definition": plan.image.point.definition,
    }
