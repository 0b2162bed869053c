"""The upkeep of a repository: which points stay, what is deleted, how long objects stay locked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from drsync import catalog
from drsync.catalog import Point
from drsync.errors import DrsyncError, LocksMissing, NotPinned
from drsync.heartbeat import Seen, read_heartbeats
from drsync.locks import LockKeeper, LockPass, LockStatus, extend_locks, lock_status
from drsync.log import beside
from drsync.model import Progress
from drsync.pins import PinRecord, Pins, pin_point, read_pins, unpin_point
from drsync.prune.planning import FREE, Prices
from drsync.prune.report import Pruned, VmPruned
from drsync.prune.run import PruneOptions, prune_vm
from drsync.retention import Aged, Rules, decide
from drsync.retention import Verdict as Kept
from drsync.session import Session


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


class Upkeep:
    """What is done to a session's repository besides capturing."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def pins(self, vm: str) -> Pins:
        """The pins of a VM.

        Raises:
            PinsBroken, ObjectDamaged: they can't be told.
        """
        return read_pins(self._session.log(vm).objects)

    def retained(self, vm: str) -> Retained:
        """What the rules, the pins and the store's times say of each point of a VM. Nothing is deleted.

        Raises:
            PinsBroken, IntegrityError, StoreError: it can't be told.
        """
        log, rules = self._session.log(vm), self._session.config.retention.of(vm)
        known = catalog.points(log)
        aged = catalog.aged(log, known)
        verdicts = decide(aged, rules, self.pins(vm).for_rules(), self._session.store.now())
        return Retained(vm=vm, rules=rules, points=known, aged=aged, verdicts=verdicts)

    def prune(self, vm: str | None, progress_of: Callable[[str], Progress], *, dry_run: bool = False) -> Pruned:
        """Drop what retention drops, and delete what was taken out of use before; of one VM, or of all there are.

        A VM that can't be pruned keeps no other from it: its error is told with it.

        Raises:
            UnknownVm: there is no such VM.
            StoreError: the store does not tell the time, or what it has.
        """
        repository = self._session.repository
        names = [n for n in self._session.known_vms(vm) if vm is not None or n in set(repository.vm_names())]
        now, beats = self._session.store.now(), read_heartbeats(repository)
        settings = self._session.config.prune
        options = PruneOptions(
            grace=timedelta(seconds=settings.grace_s),
            orphan_grace=timedelta(seconds=settings.orphan_grace_s),
            prices=Prices(transfer_gib=settings.read_price) if self._session.store.url.startswith("s3:") else FREE,
            dry_run=dry_run,
        )
        vms = [self._prune(name, beats.of(name), now, options, progress_of(name)) for name in names]
        uploads = 0 if vm is not None else self._abandon_uploads(now - options.orphan_grace, dry_run=dry_run)
        return Pruned(vms=vms, abandoned_uploads=uploads, dry_run=dry_run)

    def _prune(self, vm: str, seen: Seen | None, now: datetime, options: PruneOptions, progress: Progress) -> VmPruned:
        try:
            return prune_vm(
                beside(self._session.log(vm)),
                self._session.config.retention.of(vm),
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
        found = [upload for upload in self._session.store.unfinished() if upload.began < before]
        for upload in found if not dry_run else ():
            self._session.store.abandon(upload)
        return len(found)

    def pin(self, vm: str, number: int, *, until: datetime | None, note: str, dry_run: bool) -> PinRecord:
        """Keep a point, until then or until it is unpinned.

        Raises:
            UnknownVm, UnknownPoint: there is no such point.
            PinsBroken, StoreError: it can't be pinned.
        """
        self._existing(vm, number)
        now = self._session.clock.now()
        if dry_run:
            return PinRecord(point=number, pinned=True, until=until, time=now, note=note)
        record = pin_point(beside(self._session.log(vm)).objects, number, until=until, note=note, now=now)
        self._existing(vm, number)  # else it was dropped at this moment
        return record

    def unpin(self, vm: str, number: int, *, dry_run: bool) -> PinRecord:
        """Take a point's pin away; what it was.

        Raises:
            UnknownVm: there is no such VM.
            NotPinned: the point has none.
            PinsBroken, StoreError: it can't be taken away.
        """
        self._session.known_vms(vm)
        if not dry_run:
            return unpin_point(beside(self._session.log(vm)).objects, number, now=self._session.clock.now())
        record = self.pins(vm).of(number)
        if record is None:
            raise NotPinned(vm=vm, point=number)
        return record

    def _existing(self, vm: str, number: int) -> None:
        self._session.known_vms(vm)
        catalog.choose(vm, catalog.points(self._session.log(vm)), number=number)

    def lock_keeper(self) -> LockKeeper | None:
        """What extends the locks in the maintenance role; None: the configuration asks for none."""
        policy = self._session.config.repository.lock
        if policy is None:
            return None
        return LockKeeper(self._session.store, self._session.locks, policy, self._session.clock)

    def lock_status(self) -> LockStatus:
        """How long all objects of the repository are locked; needs no key.

        Raises:
            StoreError: the store does not answer.
        """
        return lock_status(self._session.locks, self._session.config.repository.lock, self._session.clock.now())

    def extend_locks(self, *, budget_s: float, resume: LockPass | None = None, dry_run: bool = False) -> LockPass:
        """A part of a pass over all objects; needs no key (see locks.extend_locks).

        Raises:
            LocksMissing: the configuration asks for none.
            StoreError: the objects can't be listed.
        """
        policy = self._session.config.repository.lock
        if policy is None:
            raise LocksMissing(url=self._session.config.repository.url, problem="[repository] has no lock")
        return extend_locks(
            self._session.store,
            self._session.locks,
            policy,
            self._session.clock,
            budget_s=budget_s,
            resume=resume,
            dry_run=dry_run,
        )
