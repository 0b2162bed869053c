"""One capture cycle of one VM: settle what is left, survey, capture, ship, release.

    lock ─▶ open the log ─▶ ship what waits in the spool ─▶ survey ─▶ room? ─▶ capture ─▶ ship ─▶ release (─▶ map)
      │       │ fenced? stop          │                        │         │         ▲
      │       ▼                       ▼                        │         └ seed ───┘ what is too much is read live first
      └ let a guest go that a dead                             └ nothing changed: note it, done
        process held (quiesce.py)
    Each step leaves a state from which the next cycle goes on; docs/architecture.md lists them.
    opening.py opens the log, and keeps what this host knows of it; sending.py ships what is in the spool.

The old bitmap is dropped only after the commit, the layers only after that: a
crash between any two steps costs at most one capture, never a point.

What the repository has lost of the newest point is read again before the capture,
and lies below it in the next point (heal.py).
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

import msgspec

from drsync.errors import (
    DrsyncError,
    Fenced,
    LibraryMissing,
    LiveUnavailable,
    LogAdvanced,
    SpoolError,
)
from drsync.format.segment import PointMeta
from drsync.heads import Heads
from drsync.heal import Healed, Healer, HealPlan, read_again
from drsync.log import Log, Segment
from drsync.mapping import USUAL, MapPolicy, keep_mapped, write_map_alone
from drsync.model import CaptureId, Clock, Kind, NoPace, Pace, Progress, new_capture_id
from drsync.opening import LogOpening
from drsync.quiesce import NoQuiesce, Quiescing
from drsync.seed import USUAL as USUAL_SEED
from drsync.seed import Seed, SeedOptions, begin_journal, is_to_be_streamed, open_journal
from drsync.sending import Sending
from drsync.source import Base, BaseDisk, CaptureResult, DiskSurvey, Source
from drsync.spool import VmSpool, boot_id
from drsync.spooled import SpooledCapture, SpooledDisk
from drsync.writer import LogWriter

_LOGGER = logging.getLogger(__name__)


class Result(StrEnum):
    """How a cycle ended."""

    COMMITTED = "committed"
    UNCHANGED = "unchanged"
    SEEDING = "seeding"
    """The VM is being seeded, and this cycle was asked to stop before the seed's end; the next one goes on."""
    SEED_DUE = "seed due"
    """The VM has to be seeded, which this cycle was told to leave to another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a cycle did."""

    vm: str
    result: Result
    segment: Segment | None
    """The newest segment that holds a point: the one committed, or the one that still is the VM's state."""
    shipped_before: Segment | None
    """A point that an earlier cycle had captured and this one shipped first."""
    checked_at: datetime
    """The instant that the newest point shows, or was seen to be still the VM's state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """How a cycle is done."""

    full: bool = False
    """Send every disk whole, whatever the bitmaps say."""
    take_over: bool = False
    """Write the log although another drsync took it over."""
    timeout_s: float = 600.0
    """How long QEMU may take to write the layers."""
    read_pace: Pace = field(default_factory=NoPace)
    """How fast the disks are read for a layer."""
    may_seed: bool = True
    """Read disks live if that is due, which may take days; else leave it, and say so."""
    seed: SeedOptions = USUAL_SEED
    maps: MapPolicy = USUAL
    """When a block map is written."""
    heads: Heads | None = None
    """What this process knows of the logs; None: it looks each time."""


def run_cycle(
    log: Log,
    spool: VmSpool,
    writer_id: str,
    open_source: Callable[[], Source],
    clock: Clock,
    progress: Progress,
    options: CaptureOptions,
    quiesce: Quiescing | None = None,
) -> Outcome:
    """Bring the newest state of one VM into its log; `quiesce` is what is done to the guest around the instant.

    Raises:
        GuestHeld: the point is committed, but the guest may still be frozen or paused.
        Fenced: another drsync took the VM over; it is remembered, and nothing was written.
        LogAdvanced: prune went on with the log, twice; the next cycle sends what this one captured.
        CaptureRunning: another process on this host is at it.
        SourceError, SpoolError, StoreError: nothing was lost; the next cycle goes on from there.
    """
    with spool.locked():
        cycle = _Cycle(log, spool, writer_id, open_source, clock, progress, options, quiesce or NoQuiesce())
        try:
            return _run_twice(cycle)
        except BaseException as err:
            cycle.opening.forget_head()
            if isinstance(err, DrsyncError):
                with suppress(SpoolError):  # what can't be noted is still raised
                    cycle.opening.remember(error=str(err), error_at=clock.now().isoformat())
            raise


def _run_twice(cycle: "_Cycle") -> Outcome:
    """Run a cycle; once more if prune went on with the log meanwhile: what was captured is sent anew."""
    try:
        return cycle.run()
    except LogAdvanced as err:
        _LOGGER.info("%s; the cycle begins anew", err)
        cycle.opening.forget_head()
        return cycle.run()


class _Cycle:
    """One run of `run_cycle`, under the VM's lock."""

    def __init__(
        self,
        log: Log,
        spool: VmSpool,
        writer_id: str,
        open_source: Callable[[], Source],
        clock: Clock,
        progress: Progress,
        options: CaptureOptions,
        quiesce: Quiescing,
    ) -> None:
        self._log = log
        self._spool = spool
        self._open_source = open_source
        self._clock = clock
        self._progress = progress
        self._options = options
        self._quiesce = quiesce
        self.opening = LogOpening(log, spool, writer_id, options.heads, take_over=options.take_over)
        self._sending = Sending(log, spool, self.opening, clock, progress, options.seed)
        self._healer = Healer(log, spool)
        self._full = options.full

    def run(self) -> Outcome:
        self._quiesce.recover()
        writer = self.opening.open()
        try:
            shipped = self._sending.ship_waiting(writer)
            with self._open_source() as source:
                outcome = self._capture(writer, source, shipped)
        except Fenced as fenced:
            self.opening.remember(fenced_by=str(fenced.fields["writer"]))
            raise
        self._quiesce.settle()
        return outcome

    def _capture(self, writer: LogWriter, source: Source, shipped: Segment | None) -> Outcome:
        head = self._sending.newest_point(writer)
        base = base_of(head)
        over = base.capture if base is not None else None
        unchanged = Outcome(
            vm=self._log.vm,
            result=Result.UNCHANGED,
            segment=head,
            shipped_before=shipped,
            checked_at=self._clock.now(),  # before the survey: what is written during it may not be in it
        )
        plan = self._heal_plan(head)
        self._full = self._options.full or (plan is not None and plan.broken)
        journal = open_journal(self._spool, over, send_all=self._full)
        if journal is None:
            disks = source.survey(base, full=self._full)
            if not is_to_be_streamed(disks, self._spool, self._options.seed):
                return self._push_if_changed(writer, source, base, disks, unchanged, plan)
        if not self._options.may_seed:
            return replace(unchanged, result=Result.SEED_DUE)
        if journal is None:
            journal = begin_journal(self._spool, over, send_all=self._full, clock=self._clock)
        seed = self._sending.seed(journal, head)
        try:
            closing = seed.run(source)
        except (LiveUnavailable, LibraryMissing) as err:
            return self._push_instead(writer, source, base, shipped, err)
        if closing is None:
            return replace(unchanged, result=Result.SEEDING)
        return self._push(
            writer, source, closing.base, closing.disks, shipped, seed=seed, over=over, broken=_is_broken(plan)
        )

    def _heal_plan(self, head: Segment | None) -> HealPlan | None:
        """What the repository has lost of the newest point: all of it, if nobody can tell what that was."""
        if self.opening.head_is_lost:
            return HealPlan(blocks={}, broken=True, records=())
        return self._healer.plan(head.seq, self._clock.now()) if head is not None else None

    def _push_if_changed(
        self,
        writer: LogWriter,
        source: Source,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        unchanged: Outcome,
        plan: HealPlan | None,
    ) -> Outcome:
        """Capture what was surveyed, unless neither this VM nor one of its group has changed, and nothing is lost."""
        healed = self._read_again(source, disks, plan)
        changed = base is None or healed is not None or not _is_unchanged(base, disks)
        if self._quiesce.agree(changed=changed):
            return self._push(
                writer, source, base, disks, unchanged.shipped_before, healed=healed, broken=_is_broken(plan)
            )
        self.opening.remember(checked_at=unchanged.checked_at.isoformat(), error="", error_at="")
        return unchanged

    def _read_again(self, source: Source, disks: Sequence[DiskSurvey], plan: HealPlan | None) -> Healed | None:
        """Read live what the newest point has lost; None if nothing is lost, or it can't be read so."""
        if plan is None or plan.broken or any(d.kind is not Kind.INCREMENTAL for d in disks):
            return None  # what is sent whole brings it anyway; a resync is followed by an increment
        known = {d.name for d in disks}
        plan = replace(plan, blocks={name: runs for name, runs in plan.blocks.items() if name in known})
        if not plan.block_count:
            return None
        seed = self._options.seed
        try:
            return read_again(
                self._log.objects,
                source,
                disks,
                plan,
                pace=seed.read_pace,
                progress=self._progress,
                limits=seed.limits,
            )
        except (LiveUnavailable, LibraryMissing) as err:
            message = "vm=%s %d lost blocks can't be read again: %s; remedy: drsync capture %s --full"
            _LOGGER.warning(message, self._log.vm, plan.block_count, err, self._log.vm)
            self._healer.put_off(self._clock.now())
            return None

    def _push_instead(
        self, writer: LogWriter, source: Source, base: Base | None, shipped: Segment | None, cause: DrsyncError
    ) -> Outcome:
        """What can't be read live goes through the spool after all, if there is room for it."""
        disks = source.survey(base, full=self._full, tidy=False)  # the seed's bitmaps stay: it may go on
        copy_bytes = sum(d.copy_bytes for d in disks)
        if not self._spool.has_room(copy_bytes):
            if isinstance(cause, LiveUnavailable):
                raise self._spool.no_way(copy_bytes, cause) from cause
            raise cause
        _LOGGER.warning("vm=%s reads through the spool: %s; remedy: %s", self._log.vm, cause, cause.remedy)
        return self._push(writer, source, base, disks, shipped)

    def _push(
        self,
        writer: LogWriter,
        source: Source,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        shipped: Segment | None,
        *,
        seed: Seed | None = None,
        over: CaptureId | None = None,
        healed: Healed | None = None,
        broken: bool = False,
    ) -> Outcome:
        """Capture into the spool, ship, release. With a `seed`, which goes on from the point of `over`: close that.

        What was `healed` lies below the capture. `broken`: the log before this point is, so it gets a map at once.
        """
        self._spool.check_room(sum(d.copy_bytes for d in disks))
        spooled = self._take(source, base, disks, seed=seed, over=over)
        segment = self._sending.ship(spooled, writer, seed, healed)
        source.release(spooled.capture)
        taken_at = datetime.fromisoformat(spooled.time)
        self.opening.remember(checked_at=spooled.time, error="", error_at="")
        self._keep_mapped(segment, alone=broken)
        if healed is not None or broken:
            self._look_again()
        return Outcome(
            vm=self._log.vm, result=Result.COMMITTED, segment=segment, shipped_before=shipped, checked_at=taken_at
        )

    def _look_again(self) -> None:
        """See what the point has healed. It is committed: what fails here is told, and is done by the next cycle."""
        try:
            told = self._healer.healed(self._clock.now())
        except DrsyncError as err:
            _LOGGER.warning("vm=%s what was healed could not be looked at: %s", self._log.vm, err)
            return
        state = "is still hurt" if told.newest_is_hurt else "is whole again"
        _LOGGER.warning("vm=%s point %d %s; hurt points: %d", self._log.vm, told.newest, state, len(told.hurt))

    def _keep_mapped(self, newest: Segment, *, alone: bool) -> None:
        """Write a block map if one is due. The point is committed: what fails here is told and is no error."""
        try:
            if alone:
                write_map_alone(self._log, newest)
            else:
                keep_mapped(self._log, newest, self._options.maps)
        except Exception as err:  # noqa: BLE001 - not even a mistake in here must make a committed point a failure
            _LOGGER.warning("vm=%s wrote no block map of point %d: %r", self._log.vm, newest.seq, err)

    def _take(
        self,
        source: Source,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        *,
        seed: Seed | None,
        over: CaptureId | None,
    ) -> SpooledCapture:
        """Capture into the spool; when this returns, the capture survives this process."""
        capture = new_capture_id()
        layers = self._spool.begin(capture, [d.name for d in disks])
        try:
            result = source.capture(
                capture,
                base,
                disks,
                layers,
                timeout_s=self._options.timeout_s,
                keep_free_bytes=self._spool.keep_free_bytes,
                progress=self._progress,
                instant=self._quiesce.instant(capture, source),
                pace=self._options.read_pace,
            )
            result = self._quiesce.described(result)
            spooled = _spooled(capture, base, disks, result, send_all=self._full)
            if seed is not None and base is not None:
                told = [msgspec.structs.replace(d, reason=seed.reason(d.name)) for d in spooled.disks]
                spooled = msgspec.structs.replace(spooled, base=over, seed=base.capture, disks=told, send_all=False)
            self._spool.complete(spooled)
        except BaseException:
            self._spool.remove(capture)
            raise
        return spooled


def _is_broken(plan: HealPlan | None) -> bool:
    return plan is not None and plan.broken


def base_of(head: Segment | None) -> Base | None:
    """What an increment would be relative to: the point in `head`."""
    if head is None or head.meta.point is None:
        return None
    point: PointMeta = head.meta.point
    disks = [BaseDisk(name=d.name, size_bytes=d.size_bytes) for d in point.disks]
    return Base(capture=point.capture, disks=disks, definition=point.definition)


def _is_unchanged(base: Base, disks: Sequence[DiskSurvey]) -> bool:
    same_disks = {(d.name, d.size_bytes) for d in base.disks} == {(d.name, d.size_bytes) for d in disks}
    return same_disks and all(d.kind is Kind.INCREMENTAL and d.copy_bytes == 0 for d in disks)


def _spooled(
    capture: CaptureId, base: Base | None, disks: Sequence[DiskSurvey], result: CaptureResult, *, send_all: bool
) -> SpooledCapture:
    return SpooledCapture(
        capture=capture,
        base=base.capture if base is not None else None,
        boot_id=boot_id(),
        time=result.time.isoformat(),
        consistency=result.consistency,
        send_all=send_all,
        disks=[
            SpooledDisk(
                name=d.name,
                size_bytes=d.size_bytes,
                full=d.kind is not Kind.INCREMENTAL,
                reason=d.reason,
                persistent_bitmap=d.persistent,
            )
            for d in disks
        ],
        definition=dict(result.definition),
    )
