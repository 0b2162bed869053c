"""Brings an instance's state home, or leaves nothing that costs.

    fence ▶ snapshots ▶ journal ▶ read, compare, send ▶ new point ▶ older snapshots go
                          └─ from here on the next run goes on, whatever ended this one

With `stop` this is done twice: while the instance runs, which takes long, and again when it is off, which doesn't.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from drsync.errors import CloudRefused, DrsyncError, StillProtected
from drsync.format.segment import DiskMeta, PointMeta
from drsync.heads import newest_point
from drsync.image import load_image
from drsync.journal import Begin, Journal, Round, RoundDisk, RoundState, changed_bytes
from drsync.log import Log, Segment
from drsync.model import Consistency, Kind, NoPace, Pace, Progress, block_count, new_capture_id
from drsync.recovery.cloud.cost import Cost, failback_cost
from drsync.recovery.cloud.made import Kind as Thing
from drsync.recovery.cloud.made import Made
from drsync.recovery.failback.planning import MARK, FailbackPlanning
from drsync.recovery.failback.reading import Chosen, Reading
from drsync.recovery.failback.request import FailbackDisk, FailbackOutcome, FailbackPlan, FailbackRequest, Pass
from drsync.recovery.failback.view import PER_BLOCK, SnapshotView
from drsync.seed import drop_missing_packs, rounds_of
from drsync.session import Session
from drsync.ship import USUAL, ShipLimits, commit_rounds
from drsync.spool import translated
from drsync.stream import COMPARED_WINDOWS, Streaming
from drsync.target.ec2 import tags
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.instances import Instances
from drsync.target.ec2.snapshot import BLOCK_BYTES, FoundSnapshot, Keeper, Snapshots
from drsync.target.ec2.volumes import Volumes
from drsync.window import WINDOW_BLOCKS
from drsync.writer import LogWriter, open_writer

log = logging.getLogger(__name__)

JOURNAL: Final = "failback.journal"
COMPLETED_WITHIN_S: Final = 24 * 3600.0
"""A first snapshot of large volumes that were written a lot takes hours."""
_ROUNDS: Final = 3
"""So often packs may be found to be gone just before they are listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Left:
    """What a run that was killed has left: its journal, and the snapshots that it names."""

    journal: Journal
    state: RoundState
    snapshots: Mapping[str, str]
    """Disk → snapshot."""


class Failback:
    """Brings instances home from one region."""

    def __init__(
        self,
        session: Session,
        aws: Aws,
        snapshots: Snapshots,
        *,
        pace: Pace | None = None,
        say: Callable[[str], None] = lambda _line: None,
        sleep: Callable[[float], None] = time.sleep,
        limits: ShipLimits = USUAL,
    ) -> None:
        """`pace` holds what is read from EBS; `say` is told what happens."""
        self._session = session
        self._aws = aws
        self._snapshots = snapshots
        self._instances = Instances(aws, session.clock, sleep=sleep)
        self._pace = pace or NoPace()
        self._say = say
        self._sleep = sleep
        self._limits = limits

    def plan(self, request: FailbackRequest) -> FailbackPlan:
        """What `run` would do; nothing is made. What would refuse it is in the plan's errors.

        Raises:
            CantFailBack: there is no instance, or several and none was chosen.
            UnknownVm, PointLost, IntegrityError, StoreError: there is no log to bring it home to.
            CloudError: AWS can't be asked.
        """
        return FailbackPlanning(self._session, self._aws, self._snapshots, self._instances, request).plan()

    def run(self, plan: FailbackPlan, progress: Progress) -> FailbackOutcome:
        """Append what the instance has to the VM's log.

        Raises:
            DrsyncError: the first of the plan's errors; nothing was made.
            Fenced: another drsync took the VM over meanwhile.
            CloudError, StoreError, SpoolError: if a retry helps, what is there stays, and the next run goes on with it.
            CaptureRunning: another process on this host is at this VM.
        """
        if plan.errors:
            raise plan.errors[0]
        began_s = self._session.clock.monotonic_s()
        passes: list[Pass] = []
        with self._session.spool.vm(plan.request.vm).locked():
            left = self._left(plan)
            if left is not None:
                self._say("going on where an earlier run ended; then what has changed since")
                passes.append(self._guarded(plan, left, progress))
                plan = self._planned_again(plan.request)
            if plan.request.stop and plan.instance.state == "running":
                passes.append(self._guarded(plan, None, progress))
                self._say(f"stopping instance {plan.instance.id}")
                self._instances.stop(plan.instance.id, timeout_s=plan.request.timeout_s)
                plan = self._planned_again(plan.request)
            passes.append(self._guarded(plan, None, progress))
            removed = self._remove_superseded(plan)
        return self._outcome(plan, passes, removed, began_s)

    def _planned_again(self, request: FailbackRequest) -> FailbackPlan:
        """What is to be done now that a pass has brought a point home."""
        plan = self.plan(request)
        if plan.errors:
            raise plan.errors[0]
        return plan

    def _outcome(
        self, plan: FailbackPlan, passes: Sequence[Pass], removed: Sequence[str], began_s: float
    ) -> FailbackOutcome:
        return FailbackOutcome(
            plan=plan,
            instance=self._instances.get(plan.instance.id),
            passes=tuple(passes),
            removed=tuple(removed),
            snapshots=tuple(s.id for s in self._own(plan)),
            cost=self._cost(passes),
            took_s=self._session.clock.monotonic_s() - began_s,
        )

    @staticmethod
    def _cost(passes: Sequence[Pass]) -> Cost:
        return failback_cost(
            get_blocks=sum(one.read_blocks for one in passes),
            list_requests=sum(one.list_requests for one in passes),
            changed_bytes=sum(one.changed_bytes for one in passes),
        )

    # What an earlier run has left

    def _journal_path(self, plan: FailbackPlan) -> Path:
        return self._session.spool.vm(plan.request.vm).path / JOURNAL

    def _own(self, plan: FailbackPlan) -> list[FoundSnapshot]:
        """The snapshots that failbacks made of this instance."""
        return self._snapshots.find({**self._tags(plan), tags.KEEPER: Keeper.FAILBACK.value})

    def _tags(self, plan: FailbackPlan) -> dict[str, str]:
        return {
            tags.REPOSITORY: self._session.repository.id.hex(),
            tags.VM: plan.request.vm,
            tags.INSTANCE: plan.instance.id,
        }

    def _left(self, plan: FailbackPlan) -> _Left | None:
        """What can be gone on with; the rest of what earlier runs left is removed."""
        journal = Journal.load(self._journal_path(plan), repair=True)
        state = journal.present if journal is not None else None
        left: _Left | None = None
        if journal is not None and state is not None and self._is_of(plan, journal, state):
            named = state.begun.definition.get("snapshots")
            snapshots = {str(k): str(v) for k, v in named.items()} if isinstance(named, dict) else {}
            left = _Left(journal=journal, state=state, snapshots=snapshots)
        there = {s.id: s for s in self._own(plan)}
        if left is not None and not set(left.snapshots.values()) <= there.keys():
            left = None
        for snapshot in there.values():
            is_committed = bool(tags.number(snapshot.tags, tags.POINT))
            if not is_committed and (left is None or snapshot.id not in left.snapshots.values()):
                self._say(f"removing snapshot {snapshot.id}, which an earlier run left")
                self._snapshots.delete(snapshot.id)
        return left

    @staticmethod
    def _is_of(plan: FailbackPlan, journal: Journal, state: RoundState) -> bool:
        """Whether a journal can be gone on with: of this instance and volumes, over the newest point or that itself."""
        sizes = {disk.name: disk.size_bytes for disk in plan.disks}
        return (
            state.begun.incarnation == plan.instance.id
            and {disk.name: disk.size_bytes for disk in state.begun.disks} == sizes
            and plan.head.capture in (journal.begin.over, state.begun.capture)
        )

    def _remove_superseded(self, plan: FailbackPlan) -> list[str]:
        """Remove the snapshots of earlier passes: the next failback compares with the newest."""
        own = self._own(plan)
        newest = max((tags.number(s.tags, tags.POINT) for s in own), default=0)
        removed: list[str] = []
        for snapshot in own:
            if tags.number(snapshot.tags, tags.POINT) == newest:
                continue
            try:
                self._snapshots.delete(snapshot.id)
            except CloudRefused as err:  # in use by an image, or locked
                log.info("snapshot %s stays: %s", snapshot.id, err)
            else:
                removed.append(snapshot.id)
        return removed

    # One pass

    def _guarded(self, plan: FailbackPlan, left: _Left | None, progress: Progress) -> Pass:
        """A pass; if it fails for good, what it made is removed."""
        made = Made(self._aws, self._snapshots, self._instances, sleep=self._sleep)
        try:
            return self._pass(plan, left, made, progress)
        except DrsyncError as err:
            if err.retryable:
                self._say("what was read so far stays: the same command goes on with it")
            else:
                self._forget_journal(plan)
                made.remove(err)
            raise

    def _pass(self, plan: FailbackPlan, left: _Left | None, made: Made, progress: Progress) -> Pass:
        began_s = self._session.clock.monotonic_s()
        vm_log = self._session.log(plan.request.vm)
        if left is not None and left.state.begun.capture == plan.head.capture:
            segment = vm_log.read(plan.head.number)  # committed; the crash came before that was noted
            self._settle(plan, left.snapshots, segment)
            return self._passed(plan, left, segment, None, began_s, was_resumed=True)
        writer = open_writer(vm_log, _writer_of(plan))
        head = newest_point(vm_log, writer.head)
        if head is None or head.seq != plan.head.number:
            problem = "another point was added at this moment"
            raise StillProtected(vm=plan.request.vm, instance=plan.instance.id, problem=problem)
        current = left or self._begun(plan, made)
        for snapshot_id in left.snapshots.values() if left else ():
            made.add(Thing.SNAPSHOT, snapshot_id)
        return self._read_and_commit(plan, current, writer, progress, began_s, was_resumed=left is not None)

    def _begun(self, plan: FailbackPlan, made: Made) -> _Left:
        """Take fresh snapshots, and note them."""
        capture = new_capture_id()
        snapshots = self._take(plan, capture, made)
        for snapshot_id in snapshots.values():
            self._say(f"{plan.request.vm}: waiting for snapshot {snapshot_id}")
            self._snapshots.wait_completed(snapshot_id, within_s=COMPLETED_WITHIN_S)
        taken_at = max(s.started_at for s in self._snapshots.described(snapshots.values()))
        journal = Journal.create(
            self._journal_path(plan),
            Begin(over=plan.head.capture, send_all=False, time=self._session.clock.now().isoformat()),
        )
        journal.append(
            Round(
                capture=capture,
                base=None,
                incarnation=plan.instance.id,
                time=taken_at.isoformat(),
                disks=[
                    RoundDisk(
                        name=disk.name,
                        size_bytes=disk.size_bytes,
                        whole=True,  # what is read is compared with the newest point
                        reason=f"failed back from instance {plan.instance.id}",
                        copy_bytes=disk.size_bytes,
                        persistent_bitmap=False,
                    )
                    for disk in plan.disks
                ],
                definition={"snapshots": snapshots},
            )
        )
        return _Left(journal=journal, state=journal.rounds[-1], snapshots=snapshots)

    def _take(self, plan: FailbackPlan, capture: str, made: Made) -> dict[str, str]:
        """Begin the snapshots of all disks; disk → snapshot."""
        vm = plan.request.vm
        mine = {tags.CAPTURE: capture, tags.KEEPER: Keeper.FAILBACK.value, tags.DISKS: str(len(plan.disks))}
        by_volume = Volumes(self._aws, sleep=self._sleep).snapshot(
            plan.instance.id,
            [disk.volume_id for disk in plan.disks],
            {tags.NAME: f"{vm} failback of {plan.instance.id}", **self._tags(plan), **mine},
            f"drsync: {vm} on its way home from {plan.instance.id}",
        )
        for snapshot_id in by_volume.values():
            made.add(Thing.SNAPSHOT, snapshot_id)
        snapshots = {disk.name: by_volume[disk.volume_id] for disk in plan.disks}
        for name, snapshot_id in snapshots.items():
            self._snapshots.tag(snapshot_id, {tags.DISK: name})
        return snapshots

    def _read_and_commit(
        self,
        plan: FailbackPlan,
        current: _Left,
        writer: LogWriter,
        progress: Progress,
        began_s: float,
        *,
        was_resumed: bool,
    ) -> Pass:
        reading = Reading(self._session, self._aws, plan, self._pace)
        chosen = {disk.name: reading.choose(disk, current.snapshots[disk.name]) for disk in plan.disks}
        for disk in plan.disks:
            _pass_over(current.state, current.journal, disk, chosen[disk.name])
        self._stream(plan, current, chosen, writer.log, progress)
        rounds = rounds_of(current.journal, [disk.name for disk in plan.disks])
        segment: Segment | None = None
        if any(rounds) or _is_other(plan):
            segment = commit_rounds(writer, _point(plan, current), rounds)
            self._settle(plan, current.snapshots, segment)
        else:
            self._nothing_new(plan, current)
        return self._passed(plan, current, segment, chosen, began_s, was_resumed=was_resumed)

    def _stream(
        self, plan: FailbackPlan, current: _Left, chosen: Mapping[str, Chosen], vm_log: Log, progress: Progress
    ) -> None:
        """Send what differs; once more what was lost of it meanwhile."""
        state, journal = current.state, current.journal
        to_read = sum(len(one.disk.chosen) for one in chosen.values()) * BLOCK_BYTES
        self._say(f"{plan.request.vm}: {to_read // BLOCK_BYTES} blocks of 512 KiB are to be read")
        known = load_image(vm_log, plan.head.number)
        view = SnapshotView({name: one.disk for name, one in chosen.items()})
        try:
            for _ in range(_ROUNDS):
                Streaming(
                    vm_log.objects,
                    journal,
                    view,
                    known,
                    progress=_Sized(progress, max(0, to_read - state.read_bytes)),
                    stop=lambda: False,
                    limits=self._limits,
                    step=f"{plan.request.vm} from {plan.instance.id}",
                ).run(state)
                if not drop_missing_packs(journal, vm_log):
                    break
        finally:
            view.close()

    def _settle(self, plan: FailbackPlan, snapshots: Mapping[str, str], segment: Segment) -> None:
        """The point is committed: from now on the snapshots are known to hold it."""
        for name, snapshot_id in snapshots.items():
            told = {tags.POINT: str(segment.seq), tags.NAME: f"{plan.request.vm} {name} point {segment.seq}"}
            self._snapshots.tag(snapshot_id, told)
        self._forget_journal(plan)

    def _nothing_new(self, plan: FailbackPlan, current: _Left) -> None:
        """The instance is as the newest point has it: no point is needed, and no snapshots."""
        self._forget_journal(plan)
        for snapshot_id in current.snapshots.values():
            self._snapshots.delete(snapshot_id)

    def _forget_journal(self, plan: FailbackPlan) -> None:
        path = self._journal_path(plan)
        with translated(path):
            path.unlink(missing_ok=True)

    def _passed(
        self,
        plan: FailbackPlan,
        current: _Left,
        segment: Segment | None,
        chosen: Mapping[str, Chosen] | None,
        began_s: float,
        *,
        was_resumed: bool,
    ) -> Pass:
        blocks = [one.blocks for one in (chosen or {}).values()]
        return Pass(
            point=plan.head.number if segment is None else segment.seq,
            time=datetime.fromisoformat(current.state.begun.time),
            is_new=segment is not None,
            was_resumed=was_resumed,
            epoch=plan.head.epoch if segment is None else segment.meta.epoch,
            read_blocks=sum(one.get_requests for one in blocks),
            list_requests=sum(one.list_requests for one in (chosen or {}).values()),
            changed_bytes=sum(changed_bytes(current.journal).values()),
            stored_bytes=0 if segment is None else segment.stored_bytes,
            took_s=self._session.clock.monotonic_s() - began_s,
        )


class _Sized:
    """A Progress that is told how much there really is to read."""

    def __init__(self, inner: Progress, total_bytes: int) -> None:
        self._inner = inner
        self._total_bytes = total_bytes

    def start(self, step: str, total_bytes: int) -> None:
        del total_bytes
        self._inner.start(step, self._total_bytes)

    def advance(self, done_bytes: int) -> None:
        self._inner.advance(done_bytes)


def _writer_of(plan: FailbackPlan) -> str:
    """Who writes what comes home from an instance: not this host, whose daemon must stop for it as well."""
    return hashlib.sha256(f"failback {plan.request.vm} {plan.instance.id}".encode()).hexdigest()[:16]


def _is_other(plan: FailbackPlan) -> bool:
    """Whether the point that comes home differs from the newest by more than blocks."""
    names = {disk.name for disk in plan.head.disks}
    return names != {disk.name for disk in plan.disks} or any(d.size_bytes != d.before_bytes for d in plan.disks)


def _pass_over(state: RoundState, journal: Journal, disk: FailbackDisk, chosen: Chosen) -> None:
    """Count what need not be looked at as read, in steps of what one pack is made of."""
    if chosen.disk.is_whole:
        return
    span = COMPARED_WINDOWS * WINDOW_BLOCKS
    wanted = {int(at) for at in (chosen.disk.chosen.astype("int64") * PER_BLOCK // span)}
    end = block_count(disk.size_bytes)
    there = sorted((s.first, s.end) for s in state.stretches.get(disk.name, []))
    for number in range(-(-end // span)):
        first, behind = number * span, min((number + 1) * span, end)
        is_begun = any(low < behind and high > first for low, high in there)
        if number not in wanted and not is_begun:
            journal.pass_over(disk.name, first, behind)


def _point(plan: FailbackPlan, current: _Left) -> PointMeta:
    """The point of what was read."""
    there = {disk.name for disk in plan.head.disks}
    changed = changed_bytes(current.journal)
    image = plan.origin_image or plan.head_image
    told = {key: value for key, value in image.point.definition.items() if key != "quiesce"}
    told[MARK] = {
        "from": "ec2",
        "region": plan.region,
        "instance": plan.instance.id,
        "snapshots": dict(current.snapshots),
    }
    return PointMeta(
        capture=current.state.begun.capture,
        base=None,
        time=current.state.begun.time,
        consistency=Consistency.CRASH,
        disks=[
            DiskMeta(
                name=disk.name,
                size_bytes=disk.size_bytes,
                kind=Kind.RESYNC if disk.name in there else Kind.FULL,
                reason=f"failed back from instance {plan.instance.id}",
                changed_bytes=changed.get(disk.name, 0),
                persistent_bitmap=False,
            )
            for disk in plan.disks
        ],
        definition=told,
    )
