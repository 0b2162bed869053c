"""The upkeep of a repository: which points stay, and how long objects stay locked; what goes is pruning.py's."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from drsync import catalog
from drsync.catalog import Point
from drsync.errors import LocksMissing, NotPinned
from drsync.locks import LockKeeper, LockPass, LockStatus, extend_locks, lock_status
from drsync.log import beside
from drsync.pins import PinRecord, Pins, pin_point, read_pins, unpin_point
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
