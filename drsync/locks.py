"""The locks of a whole repository: extended while objects are there, and watched (F44).

The maintenance extends what the listing still shows; what prune has deleted is not
listed any more, and its versions' locks run out. It needs no keys: it reads no object.

repo.json's lock is the witness: it is created first, and a pass extends it last, to
the earliest end that the pass has left behind. So every object is locked at least as
long as repo.json, and one request tells everybody, each host too, how long all of
them are safe: when the maintenance has died, the alarm comes from those that live.

    period        ├───────────────────────────────┤
    created       now                             until
    a pass extends what ends before ┤ half is left
    a pass is due                       ┤ two fifths are left, by the witness
    the alarm begins                          ┤ a quarter is left
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import islice
from typing import Final

from drsync.errors import DrsyncError, LocksLapsing, ObjectMissing, StoreDenied
from drsync.format import names
from drsync.model import Clock
from drsync.store import ObjectStore
from drsync.store.lock import Lock, LockMode, LockPolicy, ObjectLocks
from drsync.units import format_duration

_LOGGER = logging.getLogger(__name__)

_WORKERS: Final = 16
BATCH_OBJECTS: Final = 256
"""Objects between two looks at the clock: a second or two of requests."""
WATCH_EVERY_S: Final = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LockPass:
    """A pass over all objects, as far as it has come; what it returns may be given to the next call to go on."""

    started: datetime
    after: str = ""
    """The last key that was seen to; the next call begins behind it."""
    done: bool = False
    seen: int = 0
    extended: int = 0
    unlocked: int = 0
    """Of those extended: had no lock at all. A host without `lock` in its configuration, or a copied bucket."""
    earliest: datetime | None = None
    """The first end of a lock that the pass has left behind it."""
    failed: int = 0
    problem: DrsyncError | None = None
    """The first failure; while there is one, repo.json is not extended."""


def extend_locks(
    store: ObjectStore,
    locks: ObjectLocks,
    policy: LockPolicy,
    clock: Clock,
    *,
    budget_s: float,
    resume: LockPass | None = None,
    dry_run: bool = False,
    batch_objects: int = BATCH_OBJECTS,
) -> LockPass:
    """Extend the locks that end within half a period, as many as the time allows.

    `resume` is a pass that was not done. A pass is worth nothing before it is done: only then repo.json is extended,
    and the alarm goes on to be true. Whatever is created meanwhile is locked for a whole period by its creator.

    An object that can't be extended is counted, and does not keep the others from it.

    Raises:
        StoreError: the objects can't be listed; `resume` with the pass before is safe.
    """
    end_s = clock.monotonic_s() + budget_s
    found = resume if resume is not None and not resume.done else LockPass(started=store.now())
    each = _Extending(locks, policy, found.started, dry_run=dry_run)
    listing = (i.key for i in store.list("", after=found.after) if not i.key.startswith(names.HEARTBEAT_PREFIX))
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="lock") as workers:
        for batch in _batches(listing, batch_objects):
            if clock.monotonic_s() >= end_s:
                return found
            wanted = [key for key in batch if key != names.REPOSITORY]
            found = _added(replace(found, after=batch[-1]), workers.map(each.extend, wanted))
    return _finish(found, locks, policy, dry_run=dry_run)


def _batches(keys: Iterator[str], size: int) -> Iterator[Sequence[str]]:
    while batch := list(islice(keys, size)):
        yield batch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extended:
    """What became of one object's lock."""

    until: datetime | None = None
    extended: bool = False
    unlocked: bool = False
    problem: DrsyncError | None = None


class _Extending:
    """Sees to one object after the other, from several threads."""

    def __init__(self, locks: ObjectLocks, policy: LockPolicy, started: datetime, *, dry_run: bool) -> None:
        self._locks = locks
        self._policy = policy
        self._started = started
        self._dry_run = dry_run

    def extend(self, key: str) -> _Extended | None:
        """None: it was deleted meanwhile."""
        try:
            before = self._locks.lock_of(key)
            if before is not None and before.until >= self._started + self._policy.period / 2:
                return _Extended(until=before.until)
            wanted = Lock(mode=_stronger(before, self._policy.mode), until=self._started + self._policy.period)
            if not self._dry_run:
                self._locks.extend_lock(key, wanted)
        except ObjectMissing:
            return None
        except DrsyncError as err:
            return _Extended(problem=err)
        return _Extended(until=wanted.until, extended=True, unlocked=before is None)


def _stronger(before: Lock | None, mode: LockMode) -> LockMode:
    """A lock is never made weaker; S3 would refuse it."""
    return LockMode.COMPLIANCE if before is not None and before.mode is LockMode.COMPLIANCE else mode


def _added(found: LockPass, results: Iterable[_Extended | None]) -> LockPass:
    for one in results:
        if one is None:
            continue
        ends = [end for end in (found.earliest, one.until) if end is not None]
        found = replace(
            found,
            seen=found.seen + 1,
            extended=found.extended + one.extended,
            unlocked=found.unlocked + one.unlocked,
            earliest=min(ends, default=None),
            failed=found.failed + (one.problem is not None),
            problem=found.problem or one.problem,
        )
    return found


def _finish(found: LockPass, locks: ObjectLocks, policy: LockPolicy, *, dry_run: bool) -> LockPass:
    """Extend the witness to what is true of all others, unless something failed."""
    if found.problem is None and not dry_run:
        end = min(found.earliest or datetime.max.replace(tzinfo=found.started.tzinfo), found.started + policy.period)
        before = locks.lock_of(names.REPOSITORY)
        if before is None or before.until < end:
            locks.extend_lock(names.REPOSITORY, Lock(mode=_stronger(before, policy.mode), until=end))
    return replace(found, done=True)


class LockKeeper:
    """Extends the locks when it is time to, a slice of a pass at a time; for the maintenance role."""

    def __init__(self, store: ObjectStore, locks: ObjectLocks, policy: LockPolicy, clock: Clock) -> None:
        self._store = store
        self._locks = locks
        self._policy = policy
        self._clock = clock
        self._pass: LockPass | None = None
        self._not_before_s = 0.0

    def is_due(self) -> bool:
        """Whether there is something to do: a pass was begun, or the witness has less than two fifths left.

        The witness knows of every pass, whoever made it, so nothing is to be remembered over a restart. A pass that
        failed is not begun again before an hour is over.

        Raises:
            StoreError: the witness can't be asked.
        """
        if not self.is_between_passes():
            return True
        if self._clock.monotonic_s() < self._not_before_s:
            return False
        witness = self._locks.lock_of(names.REPOSITORY)
        return witness is None or witness.until - self._store.now() < self._policy.period * 2 / 5

    def is_between_passes(self) -> bool:
        """Whether no pass waits to be gone on with."""
        return self._pass is None

    def work(self, budget_s: float) -> LockPass | None:
        """Do a part of a pass, if one is due; what has come of the pass so far.

        Raises:
            StoreError: objects can't be listed; the next call goes on.
        """
        if not self.is_due():
            return None
        found = extend_locks(self._store, self._locks, self._policy, self._clock, budget_s=budget_s, resume=self._pass)
        self._pass = None if found.done else found
        if found.done:
            self._tell(found)
        return found

    def _tell(self, found: LockPass) -> None:
        if found.problem is not None:
            self._not_before_s = self._clock.monotonic_s() + WATCH_EVERY_S
            message = "%d of %d locks could not be extended: %s; remedy: %s"
            _LOGGER.error(message, found.failed, found.seen, found.problem, found.problem.remedy)
        else:
            _LOGGER.info("%d objects seen, %d locks extended", found.seen, found.extended)
        if found.unlocked:
            _LOGGER.warning("%d objects had no lock: is `lock` set on every host?", found.unlocked)


class LockState(StrEnum):
    """How safe the repository's objects are from being destroyed."""

    OFF = "off"
    """The configuration asks for no locks."""
    LOCKED = "locked"
    LAPSING = "lapsing"
    """Less than a quarter of the period is left: the maintenance does not do its work."""
    LAPSED = "lapsed"
    """Some objects are not locked any more."""
    UNKNOWN = "unknown"
    """These credentials may not ask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockStatus:
    """How long all objects of the repository are locked."""

    state: LockState
    until: datetime | None = None
    error: DrsyncError | None = None
    """What to tell people, if something is wrong."""


def lock_status(locks: ObjectLocks, policy: LockPolicy | None, now: datetime) -> LockStatus:
    """How long all objects are locked, by one request for repo.json's lock.

    Raises:
        StoreError: the store does not answer.
    """
    if policy is None:
        return LockStatus(state=LockState.OFF)
    try:
        lock = locks.lock_of(names.REPOSITORY)
    except StoreDenied as err:
        return LockStatus(state=LockState.UNKNOWN, error=err)
    if lock is None:
        problem = "are not there: repo.json has none, although the configuration asks for them"
        return LockStatus(state=LockState.LAPSED, error=LocksLapsing(url=locks.url, problem=problem))
    left = lock.until - now
    if left >= policy.period / 4:
        return LockStatus(state=LockState.LOCKED, until=lock.until)
    when = f"{lock.until:%Y-%m-%d %H:%M}Z"
    if left <= timedelta(0):
        error = LocksLapsing(
            url=locks.url, problem=f"have ended {when}: what the bucket's rights allow can be destroyed"
        )
        return LockStatus(state=LockState.LAPSED, until=lock.until, error=error)
    problem = f"end {when}, in {format_duration(left.total_seconds())}, and nothing has extended them"
    error = LocksLapsing(url=locks.url, problem=problem)
    return LockStatus(state=LockState.LAPSING, until=lock.until, error=error)


class LockWatch:
    """Says in the log, once in an hour, when the locks lapse; for daemons, whatever their role."""

    def __init__(self, locks: ObjectLocks, policy: LockPolicy | None, clock: Clock) -> None:
        self._locks = locks
        self._policy = policy
        self._clock = clock
        self._looked_s: float | None = None

    def look(self) -> None:
        """Look, if it is time to.

        Raises:
            StoreError: the store does not answer; the next call tries again.
        """
        now_s = self._clock.monotonic_s()
        if self._policy is None or (self._looked_s is not None and now_s < self._looked_s + WATCH_EVERY_S):
            return
        status = lock_status(self._locks, self._policy, self._clock.now())
        self._looked_s = now_s
        if status.error is not None:
            level = logging.WARNING if status.state is LockState.UNKNOWN else logging.ERROR
            _LOGGER.log(level, "%s; remedy: %s", status.error, status.error.remedy)
