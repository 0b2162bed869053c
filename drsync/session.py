"""Wires a configuration to the parts: what the command line and the daemon call.

A session opens what it needs when it needs it, and holds nothing that a
concurrent thread could not use: the daemon runs several VMs in one session.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Final

import msgspec

from drsync import catalog
from drsync.capture import CaptureOptions, Outcome, Result, base_of, newest_point, run_cycle
from drsync.catalog import LogSummary, Point, PreflightTold, VmStatus
from drsync.config import Config, LibvirtSource, VmSettings, captured_together
from drsync.damage import beside_damaged, read_records, record
from drsync.errors import (
    CaptureRunning,
    DrsyncError,
    IntegrityError,
    KeyMissing,
    LibraryMissing,
    LiveUnavailable,
    LocksMissing,
    NotPinned,
    ObjectMissing,
    PointDamaged,
    PointLost,
    PointPruned,
    RepositoryExists,
    SourceError,
    SpoolError,
    StoreError,
    TargetExists,
    UnknownDisk,
    UnknownPoint,
    UnknownVm,
)
from drsync.format.keys import RecoveryKey, RootKey
from drsync.group import Assembly, run_together
from drsync.guests import Guests
from drsync.heartbeat import Heartbeats, Seen, read_heartbeats, write_heartbeat
from drsync.hostkeys import HostKeyFile
from drsync.hurt import TOLD_NAME, DamageTold, HurtPoint, find_hurt, image_of, standing_of, told_of
from drsync.image import PointImage
from drsync.journal import Journal, seed_progress
from drsync.keyfile import read_key_file, write_key_file
from drsync.limits import Limits
from drsync.locks import LockKeeper, LockPass, LockStatus, LockWatch, extend_locks, lock_status
from drsync.log import Heads, Log, Segment, beside
from drsync.mapped import Stretch, newest_stretch
from drsync.model import Clock, Pace, Progress
from drsync.pins import PinRecord, Pins, pin_point, read_pins, unpin_point
from drsync.preflight.findings import Verdict
from drsync.preflight.report import KEPT_NAME, Report
from drsync.preflight.run import preflight
from drsync.protection import Protection, libvirt_needed
from drsync.prune.planning import FREE, Prices
from drsync.prune.report import Pruned, VmPruned
from drsync.prune.run import PruneOptions, prune_vm
from drsync.quiesce import Company
from drsync.repair import RepairReport, repair
from drsync.repository import Repository, create_repository, find_record, open_repository
from drsync.restore import Salvage, restore_disk
from drsync.retention import Aged, Rules, decide
from drsync.retention import Verdict as Kept
from drsync.salvage import lost_document, refuse_damaged
from drsync.scrub import STATE_NAME, ScrubState, Slice, read_slice
from drsync.seed import SeedOptions, is_to_be_streamed
from drsync.source import DiskSurvey, Source
from drsync.spool import Spool, VmState
from drsync.store import ObjectStore
from drsync.store.lock import ObjectLocks
from drsync.target.image import ImageDisk, ImageFormat, check_room, write_text_file
from drsync.verify import VmReport, verify

_LOGGER = logging.getLogger(__name__)
_LEAST_GATHER_S: Final = 30.0
"""A member of a group gets this long to be ready, however short the RPO is."""
_LOOK_AT_KEYS_S: Final = 3600.0
_READERS: Final = 16
"""VMs that are looked at at once: a request takes tens of milliseconds, and each VM needs two."""
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
    allow_damaged: bool = False
    """Restore also a point that has lost something: the rest, with a list of what is missing."""


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
    hurt: HurtPoint | None = None
    """What is known to be lost of the point, if it is restored all the same."""
    lost_path: Path | None = None
    """Where the list of what is lost goes; None if all of it has to be there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """What becomes of the points of a VM."""

    vm: str
    rules: Rules
    points: Sequence[Point]
    """In order; `aged` too."""
    aged: Sequence[Aged]
    verdicts: Sequence[Kept]
    """The newest first."""

    @property
    def dropped(self) -> int:
        return sum(not verdict.keep for verdict in self.verdicts)


class Session:
    """One configuration, open for work."""

    def __init__(self, config: Config, clock: Clock, *, limits: Limits | None = None) -> None:
        """`limits` holds what is moved to `[limits]`; given where several sessions share it."""
        self.config = config
        self.clock = clock
        self.limits = limits or Limits(config.limits, clock)
        self._heads = Heads(clock)
        self.protection = Protection(config)
        self._looked_at_keys_s: float | None = None
        self._told_of_closed = False

    @cached_property
    def raw_store(self) -> ObjectStore:
        """The store without retries: for finding out what it really does."""
        return self._open_store(self.limits.increments)

    @cached_property
    def store(self) -> ObjectStore:
        """The store of the repository; passing failures are tried again."""
        from drsync.store.retry import RetryingStore  # noqa: PLC0415 - as above

        return RetryingStore(self.raw_store, clock=self.clock)

    @cached_property
    def seed_store(self) -> ObjectStore:
        """The same store, with the limits of seeds on what is sent."""
        from drsync.store.retry import RetryingStore  # noqa: PLC0415 - as above

        return RetryingStore(self._open_store(self.limits.seeds), clock=self.clock)

    def _open_store(self, pace: Pace) -> ObjectStore:
        from drsync.store.open import open_store  # noqa: PLC0415 - a store's library is large, and not always needed

        settings = self.config.repository
        return open_store(
            settings.url,
            endpoint_url=settings.endpoint_url,
            region=settings.region,
            pace=pace,
            read_pace=self.limits.restores,
            lock=settings.lock,
        )

    @cached_property
    def repository(self) -> Repository:
        """The repository, its key checked."""
        key_file = self.config.repository.key_file
        return open_repository(self.store, read_key_file(key_file), key_file)

    @cached_property
    def host_keys(self) -> HostKeyFile:
        """This host's key file, and the repository's key ring, which changes with it."""
        return HostKeyFile(self.config.repository.key_file, self.store, self.clock)

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
            LocksMissing: objects shall be locked, and can't; nothing was changed.
        """
        if find_record(self.store) is not None:
            raise RepositoryExists(url=self.store.url)
        self._check_locks()
        root = RootKey.generate()
        path = self.config.repository.key_file
        write_key_file(path, root)
        try:
            return create_repository(self.store, root, self.clock, bare_store=self.raw_store)
        except DrsyncError as err:
            if not err.retryable:  # else the repository may be there, and this key the only one that opens it
                path.unlink(missing_ok=True)
            raise

    def _check_locks(self) -> None:
        """Find out, before there is a repository, whether what it is to be locked with is there.

        The first write is no proof: there are stores that take a lock, and set none.

        Raises:
            LocksMissing: it is not.
        """
        policy = self.config.repository.lock
        if policy is not None and not self.locks.lock_support().enabled:
            raise LocksMissing(url=self.store.url, problem="the bucket has no Object Lock")

    @cached_property
    def lock_keeper(self) -> LockKeeper | None:
        """What extends the locks in the maintenance role; None: the configuration asks for none."""
        policy = self.config.repository.lock
        return None if policy is None else LockKeeper(self.store, self.locks, policy, self.clock)

    @cached_property
    def _lock_watch(self) -> LockWatch:
        return LockWatch(self.locks, self.config.repository.lock, self.clock)

    def log(self, vm: str) -> Log:
        """The log of a VM; it may be empty."""
        return Log(self.repository.vm(vm))

    def known_vms(self, vm: str | None = None) -> list[str]:
        """The VMs that are configured or in the repository, in order; or just `vm`, if it is one of them.

        VMs that only the repository has, and this host has no key of, are left out; the log names them.

        Raises:
            UnknownVm: `vm` is neither.
        """
        configured = {v.name for v in self.protection.vms}
        known = sorted(configured | set(self.repository.vm_names()))
        if vm is None:
            closed = [name for name in known if name not in configured and not self.repository.holds(name)]
            if closed and not self._told_of_closed:
                self._told_of_closed = True
                _LOGGER.warning("left out, since this host has no key of them: %s", ", ".join(closed))
            return [name for name in known if name not in closed]
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
        wanted = is_to_be_streamed(disks, spool, self._seed_options(vm.name))
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

    def _seed_options(self, vm_name: str, stop: Callable[[], bool] = lambda: False) -> SeedOptions:
        return SeedOptions(
            stream_above_bytes=self.config.spool.stream_above_bytes,
            read_pace=self.limits.seed_reads(vm_name),
            store=self.seed_store,
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
            heads=self._heads,
            read_pace=self.limits.reads(vm.name),
            seed=self._seed_options(vm.name, stop),
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
            is_ours = bool(state.wrote_seq and state.checked_at) and not state.fenced_by
            if is_ours and self.repository.holds(vm.name):
                seen[vm.name] = Seen(seq=state.wrote_seq, checked_at=catalog.parse_time(state.checked_at))
        write_heartbeat(self.repository, self.config.daemon.host, seen)
        self._lock_watch.look()
        self._look_for_rotation()

    def warn_if_rotated(self) -> None:
        """Say in the log that the repository has a newer key than this host, if it does."""
        newest, held = self.host_keys.newest_generation(self.repository.record), self.repository.generation
        if newest > held:
            _LOGGER.warning(
                "the repository's key was rotated: it is of generation %d, %s has %d. New points still go under the "
                "old one. Put a new key file there (drsync key recover, or drsync key export where the root key is), "
                "then: systemctl reload drsync",
                newest,
                self.config.repository.key_file,
                held,
            )

    def _look_for_rotation(self) -> None:
        """`warn_if_rotated`, at the first heartbeat and once an hour: a request more each time would cost."""
        now_s = self.clock.monotonic_s()
        if self._looked_at_keys_s is not None and now_s - self._looked_at_keys_s < _LOOK_AT_KEYS_S:
            return
        self._looked_at_keys_s = now_s
        self.warn_if_rotated()

    def points(self, vm: str) -> list[Point]:
        """All points of a VM, in order."""
        return catalog.points(self.log(vm))

    def summaries(self) -> list[LogSummary]:
        """The log of each VM at a glance."""
        beats = read_heartbeats(self.repository)

        def look(vm: str) -> LogSummary:
            seen = beats.of(vm)
            try:
                return catalog.summary(self.log(vm), known_seq=seen.seq if seen else 0)
            except (IntegrityError, ObjectMissing) as err:  # of one VM; the others are told
                return LogSummary(vm=vm, segments=0, oldest=None, newest=None, problem=str(err))

        with ThreadPoolExecutor(_READERS, thread_name_prefix="points") as readers:
            return list(readers.map(look, self.known_vms()))

    def pins(self, vm: str) -> Pins:
        """The pins of a VM.

        Raises:
            PinsBroken, ObjectDamaged: they can't be told.
        """
        return read_pins(self.log(vm).objects)

    def retained(self, vm: str) -> Retained:
        """What the rules, the pins and the store's times say of each point of a VM. Nothing is deleted.

        Raises:
            PinsBroken, IntegrityError, StoreError: it can't be told.
        """
        log, rules = self.log(vm), self.config.retention.of(vm)
        known = catalog.points(log)
        aged = catalog.aged(log, known)
        verdicts = decide(aged, rules, self.pins(vm).for_rules(), self.store.now())
        return Retained(vm=vm, rules=rules, points=known, aged=aged, verdicts=verdicts)

    def prune(self, vm: str | None, progress_of: Callable[[str], Progress], *, dry_run: bool = False) -> Pruned:
        """Drop what retention drops, and delete what was taken out of use before; of one VM, or of all there are.

        A VM that can't be pruned keeps no other from it: its error is told with it.

        Raises:
            UnknownVm: there is no such VM.
            StoreError: the store does not tell the time, or what it has.
        """
        names = [n for n in self.known_vms(vm) if vm is not None or n in set(self.repository.vm_names())]
        now, beats = self.store.now(), read_heartbeats(self.repository)
        settings = self.config.prune
        options = PruneOptions(
            grace=timedelta(seconds=settings.grace_s),
            orphan_grace=timedelta(seconds=settings.orphan_grace_s),
            prices=Prices(transfer_gib=settings.read_price) if self.store.url.startswith("s3:") else FREE,
            dry_run=dry_run,
        )
        vms = [self._prune(name, beats.of(name), now, options, progress_of(name)) for name in names]
        uploads = 0 if vm is not None else self._abandon_uploads(now - options.orphan_grace, dry_run=dry_run)
        return Pruned(vms=vms, abandoned_uploads=uploads, dry_run=dry_run)

    def _prune(self, vm: str, seen: Seen | None, now: datetime, options: PruneOptions, progress: Progress) -> VmPruned:
        try:
            return prune_vm(
                beside(self.log(vm)),
                self.config.retention.of(vm),
                self.pins(vm).for_rules(),
                committed=seen.seq if seen else 0,
                now=now,
                options=options,
                progress=progress,
            )
        except DrsyncError as err:
            return VmPruned(vm=vm, kept=0, dropped=[], horizon=0, error=err)

    def _abandon_uploads(self, before: datetime, *, dry_run: bool) -> int:
        """Free what uploads take that were begun before then and never ended; how many there were."""
        found = [upload for upload in self.store.unfinished() if upload.began < before]
        for upload in found if not dry_run else ():
            self.store.abandon(upload)
        return len(found)

    def pin(self, vm: str, number: int, *, until: datetime | None, note: str, dry_run: bool) -> PinRecord:
        """Keep a point, until then or until it is unpinned.

        Raises:
            UnknownVm, UnknownPoint: there is no such point.
            PinsBroken, StoreError: it can't be pinned.
        """
        self._existing(vm, number)
        now = self.clock.now()
        if dry_run:
            return PinRecord(point=number, pinned=True, until=until, time=now, note=note)
        record = pin_point(beside(self.log(vm)).objects, number, until=until, note=note, now=now)
        self._existing(vm, number)  # else it was dropped at this moment
        return record

    def unpin(self, vm: str, number: int, *, dry_run: bool) -> PinRecord:
        """Take a point's pin away; what it was.

        Raises:
            UnknownVm: there is no such VM.
            NotPinned: the point has none.
            PinsBroken, StoreError: it can't be taken away.
        """
        self.known_vms(vm)
        if not dry_run:
            return unpin_point(beside(self.log(vm)).objects, number, now=self.clock.now())
        record = self.pins(vm).of(number)
        if record is None:
            raise NotPinned(vm=vm, point=number)
        return record

    def _existing(self, vm: str, number: int) -> None:
        self.known_vms(vm)
        catalog.choose(vm, self.points(vm), number=number)

    @cached_property
    def locks(self) -> ObjectLocks:
        """The locks of the store; of one that has none, it says so."""
        if not isinstance(self.store, ObjectLocks):
            raise LocksMissing(url=self.store.url, problem="only S3 buckets can")
        return self.store

    def lock_status(self) -> LockStatus:
        """How long all objects of the repository are locked; needs no key.

        Raises:
            StoreError: the store does not answer.
        """
        return lock_status(self.locks, self.config.repository.lock, self.clock.now())

    def extend_locks(self, *, budget_s: float, resume: LockPass | None = None, dry_run: bool = False) -> LockPass:
        """A part of a pass over all objects; needs no key (see locks.extend_locks).

        Raises:
            LocksMissing: the configuration asks for none.
            StoreError: the objects can't be listed.
        """
        policy = self.config.repository.lock
        if policy is None:
            raise LocksMissing(url=self.config.repository.url, problem="[repository] has no lock")
        return extend_locks(
            self.store, self.locks, policy, self.clock, budget_s=budget_s, resume=resume, dry_run=dry_run
        )

    def status(self) -> list[VmStatus]:
        """How well each VM is protected: those configured here, and those that others keep in the repository."""
        self.warn_if_rotated()
        beats = read_heartbeats(self.repository)
        with suppress(SourceError):  # what patterns would find is no reason to show nothing
            self.protection.look()
        settings = {vm.name: vm for vm in self.protection.vms}
        with ThreadPoolExecutor(_READERS, thread_name_prefix="status") as readers:
            return list(readers.map(lambda vm: self._status(vm, settings.get(vm), beats), self.known_vms()))

    def _status(self, vm: str, settings: VmSettings | None, beats: Heartbeats) -> VmStatus:
        spool = self.spool.vm(vm)
        state, seen = spool.state(), beats.of(vm)
        error, error_time = state.error, state.error_at
        point: Point | None = None
        try:
            point = self._newest_point(vm, max(state.wrote_seq, seen.seq if seen else 0))
        except (IntegrityError, ObjectMissing, KeyMissing) as err:
            error, error_time = str(err), self.clock.now().isoformat()
        checked_at = _checked_at(state, seen, point.number) if point else None
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
            damage=_damage_told(spool.noted(TOLD_NAME, DamageTold)),
            verified=_verified(spool.noted(STATE_NAME, ScrubState)),
        )

    def _newest_point(self, vm: str, known_seq: int) -> Point | None:
        log = self.log(vm)
        return catalog.newest_point(log, log.newest(after=known_seq))

    def point_of(self, vm: str, segment: Segment) -> Point | None:
        """The point that a segment of a VM's log commits, with the point before it; None if it only fences.

        Raises:
            StoreError, IntegrityError: the log can't be read.
        """
        log = self.log(vm)
        try:
            before = newest_point(log, log.read(segment.seq - 1)) if segment.seq > 1 else None
        except ObjectMissing:  # pruned in this very moment
            before = None
        return catalog.point_of(segment, before.seq if before else None)

    def plan_restore(self, request: RestoreRequest) -> RestorePlan:
        """What a restore would write; everything that can refuse it has been checked.

        Raises:
            UnknownVm, UnknownPoint, UnknownDisk: there is nothing like that.
            PointLost: no number was given, and newer points than the log has are known to have been committed.
            PointDamaged: the point is known to have lost something, and that was not said to be done without.
            TargetExists, TargetFull: the output can't take it.
        """
        if request.allow_damaged:
            return self._plan_salvage(request)
        point, image = self.find_point(request.vm, number=request.number, at=request.at)
        disks = [self._planned(image, name, request) for name in _chosen(point, request.disks)]
        definition = request.output / f"{request.vm}.json"
        _check_free(request, [definition, *(d.path for d in disks)])
        check_room(request.output, sum(d.live_bytes for d in disks))
        return RestorePlan(point=point, image=image, disks=disks, definition_path=definition)

    def find_point(self, vm: str, *, number: int | None = None, at: datetime | None = None) -> tuple[Point, PointImage]:
        """The point that was asked for, else the newest, from as little of the log as block maps allow.

        Raises:
            UnknownVm, UnknownPoint: there is nothing like that.
            PointPruned: there was.
            PointLost: no number was given, and newer points than the log has are known to have been committed.
            PointDamaged: there are damage records, and the point has really lost something.
        """
        point, image = self._find_point(vm, number=number, at=at)
        refuse_damaged(self.log(vm), point.number)
        return point, image

    def _plan_salvage(self, request: RestoreRequest) -> RestorePlan:
        """What a restore would write that does without what is lost."""
        self.known_vms(request.vm)
        log = self.log(request.vm)
        standing = standing_of(log)
        known = catalog.points_of(standing.segments)
        point = catalog.choose(request.vm, known, number=request.number, at=request.at)
        image, broken = image_of(standing, point.number)
        if image is None:
            raise PointDamaged(point=point.number, vm=log.vm, what=broken, whole="N")
        disks = [self._planned(image, name, request) for name in _chosen(point, request.disks)]
        definition = request.output / f"{request.vm}.json"
        lost = request.output / f"{request.vm}.lost.json"
        _check_free(request, [definition, lost, *(d.path for d in disks)])
        check_room(request.output, sum(d.live_bytes for d in disks))
        damaged = [found.damaged for found in read_records(log.objects)]
        hurt = next(iter(find_hurt(standing, damaged, [point.number])), None)
        return RestorePlan(point=point, image=image, disks=disks, definition_path=definition, hurt=hurt, lost_path=lost)

    def _find_point(self, vm: str, *, number: int | None, at: datetime | None) -> tuple[Point, PointImage]:
        self.known_vms(vm)
        log = self.log(vm)
        last = self._last_needed(log, number)
        while True:
            stretch = newest_stretch(log, last)
            known = catalog.points_of(stretch.segments, parent=stretch.parent)
            try:
                point = catalog.choose(vm, known, number=number, at=at)
            except UnknownPoint as err:
                parent = _surviving(stretch)
                if stretch.ground is None or parent is None:
                    raise UnknownPoint(**err.fields | {"known": catalog.described(catalog.points(log))}) from err
                last = parent  # what is older than this map is looked for in front of it
            else:
                return point, stretch.image(point.number)

    def _last_needed(self, log: Log, number: int | None) -> int:
        """The last segment that a restore reads; damage behind the point that was asked for does not matter."""
        if number is not None and 1 <= number <= log.horizon().through:
            if number not in log.horizon().survivors:
                raise PointPruned(vm=log.vm, point=number, known=catalog.described(catalog.points(log)))
            return number
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
            path=request.output / f"{name}{'.damaged' if request.allow_damaged else ''}.{request.image_format}",
            size_bytes=image.disk(name).size_bytes,
            live_bytes=image.live_bytes(name, tolerant=request.allow_damaged),
        )

    def preflight(self, vm: str, *, number: int | None = None, at: datetime | None = None, reader: str = "") -> Report:
        """Whether a point, else the newest, would come up in EC2; the result is kept in this host's spool.

        Raises:
            UnknownVm, UnknownPoint, PointLost: see find_point.
            ObjectMissing, ObjectDamaged, StoreError: the disks can't be read.
        """
        point, image = self._find_point(vm, number=number, at=at)  # it reads little: what it can't read, it says
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

    def restore(self, request: RestoreRequest, plan: RestorePlan, progress: Progress) -> Salvage:
        """Write the disks and the definition of a planned restore; what it had to do without.

        With `allow_damaged` that is also listed in a file beside the disks; else it is nothing.

        Raises:
            ObjectMissing, ObjectDamaged: the point can't be had as it was captured; nothing finished-looking is left.
            TargetError: the output can't be written.
        """
        objects = self.log(request.vm).objects
        salvage = Salvage()
        progress.start(f"restore {request.vm}", sum(d.size_bytes for d in plan.disks))
        for disk in plan.disks:
            target = ImageDisk(
                disk.path, disk.size_bytes, request.image_format, vm=request.vm, overwrite=request.overwrite
            )
            chosen = salvage if request.allow_damaged else None
            restore_disk(objects, plan.image, disk.name, target, progress, chosen)
        if plan.lost_path is not None:
            files = {d.name: (d.path.name, d.size_bytes) for d in plan.disks}
            _write_json(plan.lost_path, lost_document(request.vm, plan.point.number, files, salvage), request)
        _write_json(plan.definition_path, _definition(plan, request, salvage), request)
        return salvage

    def verify(self, vm: str, progress: Progress, *, read_data: bool = False) -> VmReport:
        """Audit a VM's log, also against what the heartbeats and this spool know to have been committed.

        What is damaged is recorded in the repository, for the host that can heal it, and kept for `status`.
        """
        log = self.log(vm)
        report = verify(log, committed_seq=self._committed(vm), read_data=read_data, progress=progress)
        self._record(log, report)
        return report

    def _record(self, log: Log, report: VmReport) -> None:
        """Tell of what an audit found. The user is told anyway: a repository that can't be written is no error."""
        try:
            for damaged in report.damaged:
                record(log, damaged, self.clock.now())
            if report.damaged or self.spool.vm(log.vm).noted(TOLD_NAME, DamageTold) is not None:
                self._note_damage(log.vm, told_of(standing_of(log), report.hurt, self.clock.now()))
        except StoreError as err:
            _LOGGER.warning("vm=%s the damage is not recorded: %s", log.vm, err)

    def _note_damage(self, vm: str, told: DamageTold) -> None:
        try:
            self.spool.vm(vm).note(TOLD_NAME, told)
        except SpoolError as err:  # a machine that only recovers need not have a spool
            _LOGGER.warning("vm=%s what is damaged is not kept: %s", vm, err)

    def scrub(self, vm: str, *, stop: Callable[[], bool] = lambda: False) -> Slice | None:
        """Read what is due of a VM's objects (scrub.read_slice); None if that is switched off.

        Raises:
            StoreError, SpoolError: the next slice goes on.
        """
        within_s = self.config.verify.within_s
        if within_s is None:
            return None
        spool = self.spool.vm(vm)
        found = read_slice(
            self.log(vm),
            spool.noted(STATE_NAME, ScrubState),
            within_s=within_s,
            clock=self.clock,
            save=lambda state: spool.note(STATE_NAME, state),
            stop=stop,
        )
        if found.assessed is not None:
            self._note_damage(vm, found.assessed)
        return found

    def repair(self, vm: str, progress: Progress, *, dry_run: bool, read_data: bool = False) -> RepairReport:
        """Make a VM's block maps anew where they are no good, and say what its points have lost.

        `read_data`: by reading all objects, not just by what is known.

        Raises:
            StoreError: the repository can't be read.
        """
        log = self.log(vm)
        audit = verify(log, committed_seq=self._committed(vm), read_data=read_data, progress=progress)
        if not dry_run:
            self._record(log, audit)
        report = repair(beside_damaged(log), self.clock.now(), dry_run=dry_run, found=audit.damaged)
        if not dry_run and (report.hurt or self.spool.vm(vm).noted(TOLD_NAME, DamageTold) is not None):
            self._note_damage(vm, told_of(standing_of(log), report.hurt, self.clock.now()))
        return report


def _check_free(request: RestoreRequest, paths: Sequence[Path]) -> None:
    """Raise TargetExists if one of the files that are to be written is there, and must not be overwritten."""
    for path in paths:
        if os.path.lexists(path) and not request.overwrite:
            raise TargetExists(path=path, vm=request.vm)


def _write_json(path: Path, document: dict[str, object], request: RestoreRequest) -> None:
    text = msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    write_text_file(path, text + "\n", vm=request.vm, overwrite=request.overwrite)


def _damage_told(told: DamageTold | None) -> catalog.DamageState | None:
    if told is None:
        return None
    return catalog.DamageState(
        checked_at=catalog.parse_time(told.checked_at),
        points=tuple(told.hurt),
        newest_is_hurt=told.newest_is_hurt,
        lost_blocks=told.lost_blocks,
        objects=tuple(told.objects),
    )


def _verified(state: ScrubState | None) -> catalog.VerifyState | None:
    if state is None:
        return None
    done = 1.0 if state.ended_at else min(1.0, state.done_bytes / state.total_bytes) if state.total_bytes else 0.0
    ended = state.ended_at or state.last_ended_at
    return catalog.VerifyState(done=done, ended_at=catalog.parse_time(ended) if ended else None)


def _checked_at(state: VmState, seen: Seen | None, point: int) -> datetime | None:
    """When the VM was last seen to be what its newest point shows, by a heartbeat or by this host's spool."""
    known = [seen.checked_at] if seen is not None and seen.seq >= point else []
    if state.checked_at and state.wrote_seq >= point and not state.fenced_by:
        known.append(catalog.parse_time(state.checked_at))
    return max(known, default=None)


def _surviving(stretch: Stretch) -> int | None:
    """The newest point before a stretch that was not pruned; None if there is none."""
    parent, horizon = stretch.parent, stretch.horizon
    if parent is None or not horizon.is_dropped(parent):
        return parent
    return max((seq for seq in horizon.survivors if seq < parent), default=None)


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


def _definition(plan: RestorePlan, request: RestoreRequest, salvage: Salvage) -> dict[str, object]:
    """What is written beside the disks: all that is needed to start the VM again."""
    lost = sum(map(len, salvage.lost.values()))
    damaged = {"damaged": {"lost_blocks": lost, "list": plan.lost_path.name}} if lost and plan.lost_path else {}
    return {
        **damaged,
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
