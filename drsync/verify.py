"""Audits a VM's log: the chain, every object's presence and size and, if asked for, every frame.

Unlike a restore, which stops at the first damage, this finds all of it. A block
map that is damaged hurts no point, but it makes restores slow: it is told, too.
"""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from drsync.errors import ChainBroken, IntegrityError, KeyMissing, ObjectDamaged, ObjectMissing, PointLost
from drsync.format import Malformed, names, seal
from drsync.format.frame import FrameOpener, disk_binding
from drsync.format.segment import DiskMeta, DiskRows
from drsync.horizon import NONE, Horizon, Merged
from drsync.image import PointImage, pack_rows, place
from drsync.log import UNDER_AN_OLDER_KEY, Log, Segment
from drsync.mapped import MapPages, check_same, check_shows, listed_maps, read_map
from drsync.model import Progress, block_length

_WORKERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something in a log that is not as it was written."""

    error: IntegrityError | ObjectMissing | KeyMissing
    point: int
    """The first point that it hurts; later ones are hurt too as far as they still use it."""


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
        self._newest = 0

    def run(self, committed_seq: int, *, read_data: bool) -> VmReport:
        horizon = self._horizon(read_data=read_data)
        segments = self._segments(committed_seq, horizon)
        self._check_points(segments)
        packs = list(self._packs(segments))
        self._check_maps(segments, read_data=read_data)
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
        )

    def _found(self, error: IntegrityError | ObjectMissing | KeyMissing, point: int) -> None:
        self._problems.append(Problem(error=error, point=point))

    def _segments(self, committed_seq: int, horizon: Horizon) -> list[Segment]:
        """The links of the log as far as they can be read: its segments, and what stands in the holes."""
        segments: list[Segment] = []
        expected = 1
        previous: str | None = ""  # None: unknown, the segment before could not be read
        for seq in self._listed():
            if seq <= horizon.through and horizon.merged_at(seq) is not None:
                continue  # not deleted yet
            for link in horizon.links(expected, seq):
                if isinstance(link, int) and link < seq:
                    problem = f"segments {link} to {seq - 1} are missing"
                    self._found(ChainBroken(vm=self._log.vm, seq=link, problem=problem), link)
                    previous = None
                    break
                previous = self._link(link, horizon, previous, segments)
            else:
                expected = seq + 1
                continue
            previous = self._link(seq, horizon, previous, segments)
            expected = seq + 1
        self._newest = expected - 1
        if expected - 1 < max(committed_seq, horizon.through):
            known = max(committed_seq, horizon.through)
            self._found(PointLost(vm=self._log.vm, found=expected - 1, expected=known), expected)
        return segments

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

    def _link(self, link: int | Merged, horizon: Horizon, previous: str | None, segments: list[Segment]) -> str | None:
        """Read a link behind one whose hash is `previous`, and note it; its own hash, None if it can't be read."""
        point = link if isinstance(link, int) else link.last
        try:
            segment = (
                self._log.under(horizon, self._log.read(link)) if isinstance(link, int) else self._log.read_merged(link)
            )
        except (ObjectMissing, IntegrityError, KeyMissing) as err:
            self._found(err, point)
            return None
        if segments and segment.generation < segments[-1].generation:
            self._found(ChainBroken(vm=self._log.vm, seq=segment.first, problem=UNDER_AN_OLDER_KEY), point)
        if previous is not None and segment.meta.previous != previous:
            problem = "it does not follow the segment before it"
            self._found(ChainBroken(vm=self._log.vm, seq=segment.first, problem=problem), point)
        segments.append(segment)
        return segment.index_sha256.hex()

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
                if size is None:
                    self._found(ObjectMissing(key=name, url=self._objects.store.url), segment.seq)
                elif size != entry.length:
                    problem = f"it is {size} bytes long and should be {entry.length}"
                    self._found(ObjectDamaged(key=name, problem=problem), segment.seq)
                else:
                    yield _Object(name=name, segment=segment, pack=number)

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
            return self._read_frames(item)
        except (ObjectMissing, ObjectDamaged, KeyMissing) as err:
            self._found(err, item.segment.seq)
            return 0

    def _read_frames(self, item: _Object) -> int:
        data = self._objects.store.get(item.name, limit_bytes=seal.MAX_OBJECT_BYTES)
        point = item.segment.meta.point
        disks: Sequence[DiskMeta] = point.disks if point is not None else []
        if item.pack is None:
            kind = "merged" if item.segment.stands_from else "segment"
            opened = self._objects.open_whole(item.name, kind, data, seq=item.segment.seq)
            rows = item.segment.rows
        else:
            opened = self._objects.open_whole(item.name, "pack", data)
            rows = pack_rows(item.name, opened, item.segment.packs.entry(item.pack), disks)
        self._check_frames(item.name, data, opened, rows, {d.name: d for d in disks})
        self._progress.advance(len(data))
        return sum(len(r.blocks) for r in rows)

    def _check_frames(
        self, name: str, data: bytes, opened: seal.Opened, rows: Sequence[DiskRows], disks: dict[str, DiskMeta]
    ) -> None:
        opener = FrameOpener(self._objects.object_keys(opened.header))
        view = memoryview(data)
        for disk, placed in place(rows).items():
            binding = disk_binding(self._objects.repository_id, disk)
            size = disks[disk].size_bytes
            columns = zip(
                placed.rows.blocks.tolist(), placed.offsets.tolist(), placed.rows.lengths.tolist(), strict=True
            )
            try:
                for row, (block, offset, length) in enumerate(columns):
                    frame = view[offset : offset + length]
                    plain = opener.open(frame, offset, binding, block, block_length(block, size))
                    if opener.hash_block(plain) != placed.rows.hashes[row].tobytes():
                        raise Malformed(f"block {block} does not match its hash")
            except Malformed as err:
                raise ObjectDamaged(key=name, problem=err) from err
