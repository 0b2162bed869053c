"""The points of a VM, and how far behind the newest one is."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import chain
from typing import Final

import msgspec

from drsync.errors import PointLost, UnknownPoint
from drsync.format.segment import DiskMeta
from drsync.horizon import Horizon
from drsync.journal import SeedProgress
from drsync.log import Log, Segment
from drsync.model import CaptureId, Consistency, Kind
from drsync.retention import Aged

_READERS: Final = 16
_AT_ONCE: Final = 4 * _READERS


class GroupTold(msgspec.Struct, frozen=True, kw_only=True):
    """What a point tells of its group (docs/format.md, "Definition")."""

    name: str
    id: str
    """That of the group's instant: the points of its members have the same."""
    consistent: bool
    reason: str
    """Why it is not; empty if it is."""
    skew_ms: float
    """The members' instants lie this close together, at most."""
    members: dict[str, CaptureId]


class QuiesceTold(msgspec.Struct, frozen=True, kw_only=True):
    """What a point tells of how its guest was held still."""

    asked: Consistency
    reason: str
    """Why the guest's file systems were not frozen although that was asked for; else empty."""
    file_systems: int = 0
    frozen_ms: float | None = None
    paused_ms: float | None = None
    group: GroupTold | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A recovery point, for people and programs."""

    vm: str
    number: int
    time: datetime
    kind: Kind
    consistency: Consistency
    disks: Sequence[DiskMeta]
    changed_bytes: int
    stored_bytes: int
    capture: CaptureId
    parent: int | None
    """The point that this one adds to; None if it holds everything itself."""
    reason: str
    """Why it is not an increment; empty if it is."""
    epoch: int
    quiesce: QuiesceTold | None = None
    """None: nothing was asked for but a crash-consistent point of this VM alone."""


def point_of(segment: Segment, parent: int | None) -> Point | None:
    """The point that a segment commits, or None if it only fences, or was dropped. `parent` is the point before it."""
    meta = segment.meta.point
    if meta is None or segment.dropped:
        return None
    kinds = {d.kind for d in meta.disks}
    kind = next((k for k in (Kind.FULL, Kind.RESYNC) if k in kinds), Kind.INCREMENTAL)
    reasons = {f"{d.name}: {d.reason}" if len(meta.disks) > 1 else d.reason for d in meta.disks if d.reason}
    return Point(
        vm=segment.name.split("/")[1],
        number=segment.seq,
        time=parse_time(meta.time),
        kind=kind,
        consistency=meta.consistency,
        disks=tuple(meta.disks),
        changed_bytes=sum(d.changed_bytes for d in meta.disks),
        stored_bytes=segment.stored_bytes,
        capture=meta.capture,
        parent=None if kinds == {Kind.FULL} else parent,
        reason="; ".join(sorted(reasons)),
        epoch=segment.meta.epoch,
        quiesce=_quiesce_of(meta.definition),
    )


def _quiesce_of(definition: Mapping[str, object]) -> QuiesceTold | None:
    """What a definition tells; None also if a later drsync tells it in another way."""
    try:
        return msgspec.convert(definition["quiesce"], QuiesceTold)
    except (KeyError, msgspec.ValidationError):
        return None


def points_of(segments: Iterable[Segment], *, parent: int | None = None) -> list[Point]:
    """The points among segments, in order; `parent` is the point before them. No segment is held."""
    points: list[Point] = []
    for segment in segments:
        point = point_of(segment, points[-1].number if points else parent)
        if point is not None:
            points.append(point)
    return points


def points(log: Log) -> list[Point]:
    """All points of a VM, in order.

    Raises:
        ChainBroken, ObjectDamaged: the log is not whole.
    """
    horizon = log.horizon()
    newest = log.newest(after=horizon.through)
    behind = log.chain(horizon.through + 1, newest, previous=horizon.segment, horizon=horizon)
    return points_of(chain(_survivors(log, horizon), behind))


def _survivors(log: Log, horizon: Horizon) -> Iterator[Segment]:
    """The points up to a horizon; what lies between them need not be read."""
    survivors = sorted(horizon.survivors)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="points") as readers:
        for start in range(0, len(survivors), _AT_ONCE):
            some = survivors[start : start + _AT_ONCE]
            yield from readers.map(lambda seq: log.survivor(horizon, seq), some)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSummary:
    """A VM's log at a glance: read from its ends alone."""

    vm: str
    segments: int
    """How many there are: the points, and the marks of take-overs since it was pruned."""
    oldest: Point | None
    newest: Point | None
    problem: str = ""
    """Why it can't be told; empty if it can."""


def summary(log: Log, *, known_seq: int = 0) -> LogSummary:
    """A VM's log at a glance: one listing from `known_seq` on, which is known to have existed, and a segment or two.

    Raises:
        ObjectMissing, ObjectDamaged, ChainBroken: an end of the log can't be read.
    """
    horizon = log.horizon()
    last = log.newest(after=max(known_seq, horizon.through))
    behind = range(horizon.through + 1, last + 1)
    oldest = point_of(log.survivor(horizon, min(horizon.survivors)), None) if horizon.survivors else None
    if oldest is None:
        oldest = next(filter(None, (point_of(log.read(seq), None) for seq in behind)), None)
    segments = len(horizon.survivors) + len(behind)
    return LogSummary(vm=log.vm, segments=segments, oldest=oldest, newest=newest_point(log, last))


def newest_point(log: Log, seq: int) -> Point | None:
    """The newest point of a log that ends with segment `seq`; take-overs behind it are passed over.

    Raises:
        ObjectMissing, ObjectDamaged: a segment can't be read.
    """
    for number in range(seq, 0, -1):
        point = point_of(log.read(number), number - 1 or None)
        if point is not None:
            return point
    return None


def aged(log: Log, known: Sequence[Point]) -> list[Aged]:
    """When the store took each of these points: the times that retention reckons with (F43).

    What a host wrote into a point as its time is not asked: its clock may be wrong, or the host in wrong hands.

    Raises:
        PointLost: one of them is not in the log any more.
    """
    taken = {seq: info.modified for seq, info in log.listed()}
    missing = [point.number for point in known if point.number not in taken]
    if missing:
        raise PointLost(vm=log.vm, found=max(taken, default=0), expected=missing[0])
    return [Aged(point.number, taken[point.number]) for point in known]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPoint:
    """One instant of a group: the points of its members that fit together."""

    group: str
    id: str
    time: datetime
    """That of the first member."""
    consistent: bool
    """Whether the members fit together, and all their points are there."""
    reason: str
    """Why not; empty if it is consistent."""
    skew_ms: float
    points: Mapping[str, Point]
    missing: Sequence[str]
    """Members whose point is not in the repository: not shipped yet, or pruned."""


def group_points(group: str, known: Iterable[Point]) -> list[GroupPoint]:
    """The instants of a group, oldest first, from all points of all VMs."""
    instants: dict[str, dict[str, Point]] = {}
    for point in known:
        if point.quiesce and point.quiesce.group and point.quiesce.group.name == group:
            instants.setdefault(point.quiesce.group.id, {})[point.vm] = point
    found = [_group_point(group, instant, points) for instant, points in instants.items()]
    return sorted(found, key=lambda p: p.time)


def _group_point(group: str, instant: str, points: Mapping[str, Point]) -> GroupPoint:
    told = [p.quiesce.group for p in points.values() if p.quiesce and p.quiesce.group]
    missing = sorted({member for t in told for member in t.members} - set(points))
    reasons = dict.fromkeys(t.reason for t in told if t.reason)
    if missing:
        reasons[f"no point of {', '.join(missing)}"] = None
    return GroupPoint(
        group=group,
        id=instant,
        time=min(p.time for p in points.values()),
        consistent=not missing and all(t.consistent for t in told),
        reason="; ".join(reasons),
        skew_ms=max(t.skew_ms for t in told),
        points=dict(sorted(points.items())),
        missing=missing,
    )


def choose(vm: str, known: Sequence[Point], *, number: int | None = None, at: datetime | None = None) -> Point:
    """The point that the user means: by number, the newest not after a time, or the newest.

    A clock may have been set back between points, so of those that are not
    after `at` the one with the highest number counts.

    Raises:
        UnknownPoint: there is no such point; the message says which there are.
    """
    found = [p for p in known if (number is None or p.number == number) and (at is None or p.time <= at)]
    if not found:
        wanted = str(number) if number is not None else f"at or before {at}" if at is not None else "at all"
        raise UnknownPoint(vm=vm, wanted=wanted, known=described(known))
    return found[-1]


def described(known: Sequence[Point]) -> str:
    """Which points there are, for a message."""
    if not known:
        return "none"
    first, last = known[0], known[-1]
    return f"{first.number} ({first.time:%Y-%m-%d %H:%M:%S}Z) to {last.number} ({last.time:%Y-%m-%d %H:%M:%S}Z)"


def parse_time(text: str) -> datetime:
    """The instant of an RFC 3339 text; the beginning of time if it is not one (then it is never preferred)."""
    try:
        parsed = datetime.fromisoformat(text)
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):  # the latter: an hour before the year 1, seen from another zone
        return datetime.min.replace(tzinfo=UTC)


class State(StrEnum):
    """How well a VM is protected now."""

    OK = "ok"
    LATE = "late"
    """The newest point is older than the RPO."""
    FAILING = "failing"
    """Within the RPO still, but the last capture failed."""
    FENCED = "fenced"
    """Another drsync has taken the VM over."""
    SEEDING = "seeding"
    """There is no point yet; the first full is on its way."""
    UNPROTECTED = "unprotected"
    """There is no point at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightTold:
    """What the last check of a VM's points for another place came to."""

    target: str
    point: int
    checked_at: datetime
    verdict: str
    fails: int
    warnings: int
    unknown: int
    reason: str
    """The first of what keeps it from coming up; empty if nothing does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DamageState:
    """What the damage that is known of a VM's points came to when it was last looked at."""

    checked_at: datetime
    points: Sequence[int]
    """Those that do not restore as they were captured; none: all damage is healed."""
    newest_is_hurt: bool
    lost_blocks: int
    """Of the newest point."""
    objects: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyState:
    """How far this host has come with reading a VM's objects again."""

    done: float
    """Part of the present pass, 0 to 1."""
    ended_at: datetime | None
    """When all of it had been read last; None: not yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmStatus:
    """What `drsync status` says of a VM."""

    vm: str
    state: State
    point: int | None
    time: datetime | None
    lag_s: float | None
    """Age of the newest state that could be restored; None if there is none."""
    rpo_s: float | None
    """None: the VM is not configured on this host."""
    spool_bytes: int
    seed: SeedProgress | None
    """How far it is, if this host is seeding the VM."""
    error: str
    error_time: str
    preflight: PreflightTold | None = None
    """None: no point of it was ever checked on this host."""
    damage: DamageState | None = None
    """None: nothing was ever found to be damaged."""
    verified: VerifyState | None = None
    """None: this host does not read them."""


def lag_s(point_time: datetime, checked_at: datetime | None, now: datetime) -> float:
    """How far behind a VM's newest point is.

    A VM that was seen unchanged at `checked_at` could be restored as of then.
    A clock that was set back makes no negative lag.
    """
    newest = max(point_time, checked_at) if checked_at is not None else point_time
    return max(0.0, (now - newest).total_seconds())


def state_of(*, lag: float | None, rpo_s: float | None, error: str, fenced: bool, seeding: bool = False) -> State:
    """How well a VM is protected."""
    if fenced:
        return State.FENCED
    if lag is None:
        return State.SEEDING if seeding else State.UNPROTECTED
    if rpo_s is not None and lag > rpo_s:
        return State.LATE
    return State.FAILING if error else State.OK
