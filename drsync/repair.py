"""Makes a VM's block maps anew where they are missing, stale or damaged, and says exactly what its points have lost.

    each map ─▶ readable? of this log? its pages as the log says? ─▶ no: the same map, made from the log
    none of the newest points ─▶ a map of the newest one
    a point with all disks in full behind a broken piece of log ─▶ a map of it, from its segment alone (F54)
    what then still does not restore ─▶ hurt points: disk, ranges, objects

Nothing is deleted or changed: a map that is no good stays where it is, and every reader passes it over.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from drsync.damage import Damaged, read_records
from drsync.errors import DrsyncError, IntegrityError, MapUnwritable, ObjectDamaged, ObjectMissing
from drsync.format import Malformed
from drsync.hurt import HurtPoint, Standing, find_hurt, is_point, newest_point_of, standing_of
from drsync.image import PointImage
from drsync.log import Log, Segment
from drsync.mapped import MapPages, check_same, check_shows, listed_maps, read_map
from drsync.mapping import USUAL, MapPolicy, write_map, write_map_alone, write_map_of
from drsync.model import Kind
from drsync.packs import FAILURES

_OUTDATED: Final = "it is of an older horizon"
"""Nothing is wrong with such a map: prune has made another one where one is of use."""
_UNREADABLE: Final = (IntegrityError, ObjectMissing)


@dataclass(frozen=True, slots=True, kw_only=True)
class MapRepair:
    """A map that is, or would be, made."""

    point: int
    reason: str
    name: str | None
    """None: it was not written, in a dry run or because of `error`."""
    error: DrsyncError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What a repair of one VM's log came to."""

    vm: str
    points: int
    maps: int
    """Maps that are as they should be, those that were made among them."""
    repairs: Sequence[MapRepair]
    useless: Sequence[str]
    """Names of maps that nobody reads any more: they can be deleted."""
    hurt: Sequence[HurtPoint]
    """What does not restore, whatever is done to the maps."""
    checked_at: datetime


def repair(
    log: Log, now: datetime, *, dry_run: bool, found: Sequence[Damaged] = (), policy: MapPolicy = USUAL
) -> RepairReport:
    """Make maps anew, and say what is lost: by the records, and by what was `found` just now.

    Raises:
        StoreError: the repository can't be read.
    """
    return _Repairing(log, dry_run=dry_run, policy=policy).run(now, found)


class _Repairing:
    """One run of `repair`."""

    def __init__(self, log: Log, *, dry_run: bool, policy: MapPolicy) -> None:
        self._log = log
        self._dry_run = dry_run
        self._policy = policy
        self._standing: Standing = standing_of(log)
        self._by_seq = {s.seq: s for s in self._standing.segments if not s.dropped}
        self._good: dict[int, str] = {}
        """A map of each point that has one."""

    def run(self, now: datetime, found: Sequence[Damaged]) -> RepairReport:
        useless = list(self._judge())
        repairs = [self._made(point, reason) for point, reason in self._wanted(useless)]
        known = [*found, *(record.damaged for record in read_records(self._log.objects))]
        return RepairReport(
            vm=self._log.vm,
            points=sum(map(is_point, self._standing.segments)),
            maps=len(self._good) + sum(r.name is not None for r in repairs),
            repairs=repairs,
            useless=[name for name, _, _ in useless],
            hurt=find_hurt(self._standing, known),
            checked_at=now,
        )

    def _judge(self) -> Iterator[tuple[str, int, str]]:
        """Name and point of each map that is no good, and why; the others are kept in mind."""
        listed = dict(listed_maps(self._log.objects))
        for name, seq in listed.items():
            try:
                self._check(name, seq, listed)
            except _UNREADABLE as err:
                problem = err.fields.get("problem", "it is missing")
                yield name, seq, str(problem)
            else:
                self._good.setdefault(seq, name)

    def _check(self, name: str, seq: int, listed: dict[str, int]) -> None:
        """Check that a map is of this log, and says of each block what the log says.

        Raises:
            IntegrityError, ObjectMissing: it isn't, or does not.
        """
        if seq not in self._by_seq:
            raise ObjectDamaged(key=name, problem=f"the log has no segment {seq}")
        block_map = read_map(self._log.objects, name)
        if block_map.meta.horizon != self._standing.horizon.number:
            raise ObjectDamaged(key=name, problem=_OUTDATED)
        check_shows(block_map, self._by_seq[seq])
        missing = next((older for older in block_map.named_maps(self._log.vm) if older not in listed), None)
        if missing is not None:
            raise ObjectDamaged(key=name, problem=f"it needs {missing}, which is not there")
        pages = MapPages(self._log.objects, block_map)
        image = self._walked(self._by_seq[seq])
        if image is not None:
            check_same(image, pages, name)
        else:
            for disk in block_map.meta.disks:  # the log can't vouch for it: it is all there is, if it is whole
                for number in range(len(block_map.table(disk.name).sources)):
                    pages.page(disk.name, number)

    def _walked(self, segment: Segment) -> PointImage | None:
        """A point as the log alone tells of it; None if the log is not whole up to there, nor needed."""
        if any(number <= segment.seq for number in self._standing.holes):
            return PointImage(self._log.objects, [segment]) if _is_full(segment) else None
        try:
            image = PointImage(self._log.objects, [s for s in self._standing.segments if s.seq <= segment.seq])
            for disk in image.point.disks:
                for _ in image.windows(disk.name):
                    pass
        except FAILURES:
            return None
        return image

    def _wanted(self, useless: Sequence[tuple[str, int, str]]) -> Iterator[tuple[int, str]]:
        """The points that a map is to be made of, and why; each once, in order."""
        reasons: dict[int, str] = {}
        for name, seq, problem in useless:
            if seq in self._by_seq and seq not in self._good and problem != _OUTDATED:
                reasons.setdefault(seq, f"{name.rsplit('/', 1)[1]}: {problem}")
        reasons |= self._islands()
        newest = newest_point_of(self._standing)
        if newest - max([*self._good, *reasons, 0]) >= self._policy.every:
            reasons[newest] = "there is none of the newest points"
        yield from sorted(reasons.items())

    def _islands(self) -> dict[int, str]:
        """Points that could be read, and with them those behind, if a map spared what lies before them."""
        found: dict[int, str] = {}
        start = 0
        for hole in sorted(self._standing.holes):
            behind = [s for s in self._standing.segments if s.seq >= hole and s.seq > start and _is_full(s)]
            if behind and not any(hole <= seq <= behind[0].seq for seq in self._good):
                found[behind[0].seq] = f"segment {hole} is lost, and this point needs nothing before it"
                start = behind[0].seq
        return found

    def _made(self, point: int, reason: str) -> MapRepair:
        if self._dry_run:
            return MapRepair(point=point, reason=reason, name=None)
        try:
            name = self._write(point)
        except (DrsyncError, Malformed) as err:
            error = MapUnwritable(point=point, vm=self._log.vm, problem=err)
            return MapRepair(point=point, reason=reason, name=None, error=error)
        return MapRepair(point=point, reason=reason, name=name)

    def _write(self, point: int) -> str:
        """From the log, not from another map: what is wrong with that must not live on."""
        if not any(hole <= point for hole in self._standing.holes):
            segments = [s for s in self._standing.segments if s.seq <= point]
            return write_map_of(self._log, segments, parent=None)
        if _is_full(self._by_seq[point]):
            return write_map_alone(self._log, self._by_seq[point])
        return write_map(self._log, point, present=set(self._good.values()))


def _is_full(segment: Segment) -> bool:
    point = segment.meta.point
    return point is not None and not segment.dropped and all(disk.kind is Kind.FULL for disk in point.disks)
