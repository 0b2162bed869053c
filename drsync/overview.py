"""What there is of each VM, and how well it is protected."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import Final

from drsync import catalog
from drsync.beating import warn_if_rotated
from drsync.catalog import LogSummary, Point, PreflightTold, VmStatus
from drsync.config import VmSettings
from drsync.errors import IntegrityError, KeyMissing, ObjectDamaged, ObjectMissing, SourceError
from drsync.heads import newest_point
from drsync.heartbeat import Heartbeats, Seen, read_heartbeats
from drsync.hurt import TOLD_NAME, DamageTold, standing_of
from drsync.journal import Journal, seed_progress
from drsync.log import Segment
from drsync.preflight.findings import Verdict
from drsync.preflight.report import KEPT_NAME, Report
from drsync.scrub import STATE_NAME, ScrubState
from drsync.session import Session
from drsync.spooled import VmState

_READERS: Final = 16
"""VMs that are looked at at once: a request takes tens of milliseconds, and each VM needs two."""


class Overview:
    """Looks at a session's VMs; changes nothing."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def points(self, vm: str) -> list[Point]:
        """All points of a VM, in order.

        Raises:
            ChainBroken, ObjectDamaged, ObjectMissing: the log is not whole; `readable_points` lists what there is.
        """
        return catalog.points(self._session.log(vm))

    def readable_points(self, vm: str) -> list[Point]:
        """The points of a damaged log whose segments can be read. Whether they restore, `verify` tells.

        Raises:
            StoreError: the log could not be read, which says nothing of what it is like.
        """
        return catalog.points_of(standing_of(self._session.log(vm)).segments)

    def summaries(self) -> list[LogSummary]:
        """The log of each VM at a glance."""
        beats = read_heartbeats(self._session.repository)

        def look(vm: str) -> LogSummary:
            seen = beats.of(vm)
            try:
                return catalog.summary(self._session.log(vm), known_seq=seen.seq if seen else 0)
            except (IntegrityError, ObjectMissing) as err:  # of one VM; the others are told
                return LogSummary(vm=vm, segments=0, oldest=None, newest=None, problem=str(err))

        with ThreadPoolExecutor(_READERS, thread_name_prefix="points") as readers:
            return list(readers.map(look, self._session.known_vms()))

    def status(self) -> list[VmStatus]:
        """How well each VM is protected: those configured here, and those that others keep in the repository."""
        warn_if_rotated(self._session)
        beats = read_heartbeats(self._session.repository)
        with suppress(SourceError):  # what patterns would find is no reason to show nothing
            self._session.protection.look()
        settings = {vm.name: vm for vm in self._session.protection.vms}
        with ThreadPoolExecutor(_READERS, thread_name_prefix="status") as readers:
            return list(readers.map(lambda vm: self._status(vm, settings.get(vm), beats), self._session.known_vms()))

    def _status(self, vm: str, settings: VmSettings | None, beats: Heartbeats) -> VmStatus:
        spool = self._session.spool.vm(vm)
        state, seen = spool.state(), beats.of(vm)
        error, error_time = state.error, state.error_at
        point: Point | None = None
        try:
            point = self._newest_point(vm, max(state.wrote_seq, seen.seq if seen else 0))
        except (IntegrityError, ObjectMissing, KeyMissing) as err:
            error, error_time = str(err), self._session.clock.now().isoformat()
        checked_at = _checked_at(state, seen, point.number) if point else None
        lag = catalog.lag_s(point.time, checked_at, self._session.clock.now()) if point else None
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
        log = self._session.log(vm)
        return catalog.newest_point(log, log.newest(after=known_seq))

    def point_of(self, vm: str, segment: Segment) -> Point | None:
        """The point that a segment of a VM's log commits, with the point before it; None if it only fences.

        Raises:
            StoreError, IntegrityError: the log can't be read.
        """
        log = self._session.log(vm)
        try:
            before = newest_point(log, log.read(segment.seq - 1)) if segment.seq > 1 else None
        except (ObjectMissing, ObjectDamaged):  # pruned in this very moment; or lost, and this one needs nothing of it
            before = None
        return catalog.point_of(segment, before.seq if before else None)


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
