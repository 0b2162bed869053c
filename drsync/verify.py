"""Audits a VM's log: the chain, every object's presence and size and, if asked for, every frame.

Unlike a restore, which stops at the first damage, this finds all of it, and names the points that
it hurts, and where (hurt.py). A block map that is damaged hurts no point, but it makes restores slow: it is told, too.
"""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from drsync.damage import Checked, Damaged, check_pack, check_segment, lost_pack, lost_segment
from drsync.errors import ChainBroken, IntegrityError, KeyMissing, ObjectDamaged, ObjectMissing, PinsBroken, PointLost
from drsync.format import Malformed, names, seal
from drsync.horizon import NONE, Horizon, Merged
from drsync.hurt import HurtPoint, find_hurt, standing_of
from drsync.image import PointImage
from drsync.log import UNDER_AN_OLDER_KEY, Log, Segment, Unreadable
from drsync.mapped import MapPages, check_same, check_shows, listed_maps, read_map
from drsync.model import Progress
from drsync.pins import read_pins

_WORKERS = 4
_MOST_MISSING = 100
"""Missing segments that are recorded one by one, of a gap: what lies behind it is hurt anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something in a log that is not as it was written."""

    error: IntegrityError | ObjectMissing | KeyMissing | PinsBroken
    point: int
    """The first point that it hurts; later ones are hurt too as far as they still use it. 0: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmReport:
    """What an audit of one VM found."""

    vm: str
    points: int
    objects: int
    stored_bytes: int
    frames: int
    """Frames that were read and compared with their hashes; 0 without `read_data`."""
    problems: Sequence[Problem]
    damaged: Sequence[Damaged]
    """The objects that are not as they were written; without `read_data`, as far as it can be told from a listing."""
    hurt: Sequence[HurtPoint]
    """The points that do not restore as they were captured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Object:
    """An object of a log, with what its segment says of it."""

    name: str
    segment: Segment
    pack: int | None


def verify(log: Log, *, committed_seq: int, read_data: bool, progress: Progress) -> VmReport:
    """Audit one VM's log. `committed_seq`: a segment that is known to have been committed, or 0."""
    return _Audit(log, progress).run(committed_seq, read_data=read_data)


def _problem_of(error: ObjectDamaged | ObjectMissing) -> object:
    return error.fields["problem"] if isinstance(error, ObjectDamaged) else "it is missing"


def _intact(segments: Sequence[Segment]) -> list[Segment]:
    """The segments up to the first gap."""
    found: list[Segment] = []
    for segment in segments:
        if segment.first != (found[-1].seq + 1 if found else 1):
            break
        found.append(segment)
    return found


class _Audit:
    """One run of `verify`."""

    def __init__(self, log: Log, progress: Progress) -> None:
        self._log = log
        self._objects = log.objects
        self._progress = progress
        self._problems: list[Problem] = []
        self._damaged: list[Damaged] = []
        self._newest = 0
        self._links: dict[int, Merged] = {}
        """The merged segments, by the last segment that they stand for."""

    def run(self, committed_seq: int, *, read_data: bool) -> VmReport:
        horizon = self._horizon(read_data=read_data)
        segments = self._segments(committed_seq, horizon)
        self._check_points(segments)
        packs = list(self._packs(segments))
        self._check_maps(segments, read_data=read_data)
        self._check_pins()
        stored = sum(s.stored_bytes for s in segments)
        frames = 0
        if read_data:
            self._progress.start(f"verify {self._log.vm}", stored)
            own = [_Object(name=s.name, segment=s, pack=None) for s in segments]
            with ThreadPoolExecutor(_WORKERS, thread_name_prefix="verify") as workers:
                frames = sum(workers.map(self._read, [*own, *packs]))
        return VmReport(
            vm=self._log.vm,
            points=sum(s.meta.point is not None and not s.dropped for s in segments),
            objects=len(segments) + len(packs) + (horizon.number > 0),
            stored_bytes=stored,
            frames=frames,
            problems=sorted(self._problems, key=lambda p: p.point),
            damaged=self._damaged,
            hurt=self._hurt(),
        )

    def _hurt(self) -> Sequence[HurtPoint]:
        """The points that are hurt; the log is read once more if anything is wrong with it at all.

        A host whose keys are too old for parts of the log can't tell.
        """
        if not self._problems or any(isinstance(found.error, KeyMissing) for found in self._problems):
            return []
        return find_hurt(standing_of(self._log), self._damaged)

    def _check_pins(self) -> None:
        """Pins that can't be told keep prune from dropping anything; no point is hurt by it."""
        try:
            read_pins(self._objects)
        except (PinsBroken, ObjectDamaged, ObjectMissing, KeyMissing) as err:
            self._found(err, 0)

    def _found(self, error: Unreadable | PinsBroken, point: int) -> None:
        self._problems.append(Problem(error=error, point=point))

    def _segments(self, committed_seq: int, horizon: Horizon) -> list[Segment]:
        """The links of the log as far as they can be read: its segments, and what stands in the holes."""
        segments: list[Segment] = []
        previous: str | None = ""  # None: unknown, the segment before could not be read
        behind = 0
        for link, found in self._log.tried(self._links_listed(horizon), horizon):
            first, last = (link, link) if isinstance(link, int) else (link.first, link.last)
            if first != behind + 1:
                previous = None
            behind = last
            previous = self._link(link, found, previous, segments)
        known = max(committed_seq, horizon.through)
        if self._newest < known:
            self._found(PointLost(vm=self._log.vm, found=self._newest, expected=known), self._newest + 1)
        return segments

    def _links_listed(self, horizon: Horizon) -> Iterator[int | Merged]:
        """The links that there are by the listing, in order; gaps are noted."""
        for seq in self._listed():
            if seq <= horizon.through and horizon.merged_at(seq) is not None:
                continue  # not deleted yet
            for link in horizon.links(self._newest + 1, seq):
                if isinstance(link, int) and link < seq:
                    self._missing(link, seq - 1)
                    yield seq
                    break
                yield link
            self._newest = seq

    def _horizon(self, *, read_data: bool) -> Horizon:
        """The horizon in force; with `read_data`, all its bytes are looked at."""
        try:
            horizon = self._log.horizon()
            if read_data and horizon.number:
                name = names.horizon(self._log.vm, horizon.number)
                data = self._objects.store.get(name, limit_bytes=seal.MAX_OBJECT_BYTES)
                self._objects.open_whole(name, "horizon", data, seq=horizon.number)
        except (IntegrityError, ObjectMissing) as err:
            self._found(err, 1)
            return NONE
        return horizon

    def _link(
        self,
        link: int | Merged,
        segment: Segment | Unreadable,
        previous: str | None,
        segments: list[Segment],
    ) -> str | None:
        """Note a link behind one whose hash is `previous`; its own hash, None if it could not be read."""
        point = link if isinstance(link, int) else link.last
        if isinstance(segment, Exception):
            self._found(segment, point)
            if not isinstance(segment, KeyMissing):  # not damage: others can read it
                self._damaged.append(lost_segment(self._log.vm, point, segment))
            return None
        if segments and segment.generation < segments[-1].generation:
            self._found(ChainBroken(vm=self._log.vm, seq=segment.first, problem=UNDER_AN_OLDER_KEY), point)
        if isinstance(link, Merged):
            self._links[link.last] = link
        if previous is not None and segment.meta.previous != previous:
            problem = "it does not follow the segment before it"
            self._found(ChainBroken(vm=self._log.vm, seq=segment.first, problem=problem), point)
        segments.append(segment)
        return segment.index_sha256.hex()

    def _missing(self, first: int, last: int) -> None:
        problem = f"segments {first} to {last} are missing"
        self._found(ChainBroken(vm=self._log.vm, seq=first, problem=problem), first)
        for number in range(first, min(last, first + _MOST_MISSING - 1) + 1):
            missing = ObjectMissing(key=names.segment(self._log.vm, number), url=self._objects.store.url)
            self._damaged.append(lost_segment(self._log.vm, number, missing))

    def _listed(self) -> Iterator[int]:
        """The numbers of the segments that are there; what else lies between them is a problem of its own."""
        seq = 0
        for info in self._objects.store.list(names.log_prefix(self._log.vm)):
            try:
                seq = names.seq_of_segment(info.key)
            except Malformed as err:
                self._found(ObjectDamaged(key=info.key, problem=err), seq + 1)
            else:
                yield seq

    def _check_points(self, segments: Sequence[Segment]) -> None:
        """The points up to the first gap must lie over each other as a restore lays them."""
        intact = _intact(segments)
        if not any(s.meta.point is not None for s in intact):
            return
        try:
            PointImage(self._objects, intact)
        except ChainBroken as err:
            self._problems.append(Problem(error=err, point=int(str(err.fields["seq"]))))

    def _packs(self, segments: Sequence[Segment]) -> Iterator[_Object]:
        """The packs that the segments list and that are there in the right size."""
        sizes = {i.key: i.size_bytes for i in self._objects.store.list(names.pack_prefix(self._log.vm))}
        for segment in segments:
            for number in range(len(segment.packs)):
                entry = segment.packs.entry(number)
                name = names.pack(self._log.vm, entry.object_id)
                size = sizes.get(name)
                if size == entry.length:
                    yield _Object(name=name, segment=segment, pack=number)
                    continue
                problem = f"it is {size} bytes long and should be {entry.length}"
                missing = ObjectMissing(key=name, url=self._objects.store.url)
                error = missing if size is None else ObjectDamaged(key=name, problem=problem)
                self._found(error, segment.seq)
                self._damaged.append(lost_pack(self._log.vm, segment, number, error))

    def _check_maps(self, segments: Sequence[Segment], *, read_data: bool) -> None:
        """Every block map must be of this log, and the maps that it names must be there.

        With `read_data`, the newest one that is whole must also say the same of each block as the log does.
        """
        intact = _intact(segments)
        listed = dict(listed_maps(self._objects))
        compare = read_data
        for name, seq in reversed(listed.items()):
            try:
                if seq > self._newest:
                    raise ObjectDamaged(key=name, problem=f"the log has no segment {seq}")
                shown = [s for s in intact if s.seq <= seq]
                if shown and shown[-1].seq == seq:  # else the log is damaged or pruned there, which is told already
                    compare = not self._check_map(name, shown, listed.keys(), compare=compare) and compare
            except (ObjectDamaged, ObjectMissing) as err:
                key = str(err.fields["key"])
                if key.startswith(names.map_prefix(self._log.vm)):  # else the log is damaged, which is told already
                    problem = f"{_problem_of(err)} (just a cache: restores do without it, and it can be deleted)"
                    self._found(ObjectDamaged(key=key, problem=problem), seq)
            except ChainBroken:
                pass  # told by _check_points

    def _check_map(self, name: str, shown: Sequence[Segment], listed: Collection[str], *, compare: bool) -> bool:
        """Check a map against the log; False if it is of an older horizon, and so of no use to anybody."""
        block_map = read_map(self._objects, name)
        if block_map.meta.horizon != self._log.horizon().number:
            return False
        check_shows(block_map, shown[-1])
        missing = next((older for older in block_map.named_maps(self._objects.vm) if older not in listed), None)
        if missing is not None:
            raise ObjectDamaged(key=name, problem=f"it needs {missing}, which is not there")
        if compare:
            check_same(PointImage(self._objects, shown), MapPages(self._objects, block_map), name)
        return True

    def _read(self, item: _Object) -> int:
        """Read an object as a whole and open its frames; how many there are."""
        try:
            return self._check(item)
        except KeyMissing as err:
            self._found(err, item.segment.seq)
            return 0

    def _check(self, item: _Object) -> int:
        if item.pack is None:
            link = self._links.get(item.segment.seq, item.segment.seq)
            checked: Checked = check_segment(self._log, link)
        else:
            checked = check_pack(self._objects, item.segment, item.pack)
        if checked.damaged is not None:
            self._found(checked.damaged.error, item.segment.seq)
            self._damaged.append(checked.damaged)
        self._progress.advance(checked.read_bytes)
        return checked.frames
