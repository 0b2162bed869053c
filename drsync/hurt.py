"""Which points damage hurts, and where: asked of the very code that a restore reads them by.

    Damaged objects ─▶ windows that they can have to do with ─▶ each point's image there ─▶ blocks that lie in one
                                                                 (by the map that a restore takes)      │
    HurtPoint: disk, runs of blocks  ◀── those that can't be had, not even from a copy ◀── read them ◀──┘

A point is whole if each block can be had: damage to what newer segments have overwritten, or to what is
there twice (copies.py), hurts nothing.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from drsync.damage import Damaged, Runs, read_records, runs_of
from drsync.errors import ChainBroken, IntegrityError, ObjectMissing
from drsync.format import Malformed, names
from drsync.format.segment import DiskMeta
from drsync.horizon import NONE, Horizon, Merged
from drsync.image import PointImage
from drsync.log import FIRST_SEQ, Log, Segment
from drsync.mapped import BlockMap, MapGround, check_shows, listed_maps, read_map
from drsync.packs import FAILURES, Failure, PackIndexes
from drsync.restore import BlockReader, plan_fetches
from drsync.window import NOWHERE, UNKNOWN, WINDOW_BLOCKS, Window


@dataclass(frozen=True, slots=True, kw_only=True)
class HurtDisk:
    """What a point has lost of a disk."""

    name: str
    size_bytes: int
    runs: Runs
    objects: Sequence[str]
    """The damaged objects that it is lost with."""

    @property
    def blocks(self) -> int:
        return sum(count for _, count in self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class HurtPoint:
    """A point that does not restore as it was captured."""

    point: int
    broken: Failure | None
    """What keeps all of it from being restored: its log is not whole, so nobody vouches for what it is made of."""
    disks: Sequence[HurtDisk]
    """What is lost even if that is put up with; nothing is known of the disks of a point whose segment is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A log as far as it can be read."""

    log: Log
    horizon: Horizon
    segments: Sequence[Segment]
    """Those that can be read, in order, and what stands for those that were pruned."""
    holes: Mapping[int, Failure]
    """Those that can't be, or don't follow the one before: number and reason."""


def standing_of(log: Log) -> Standing:
    """Read all of a log that can be read.

    Raises:
        StoreError: it could not be read, which says nothing of what it is like.
    """
    listed = list(_listed(log))
    try:
        horizon = log.horizon()
    except FAILURES as err:  # nobody can tell what is a point, so none can be restored
        return Standing(log=log, horizon=NONE, segments=[], holes=dict.fromkeys(listed, err))
    segments: list[Segment] = []
    holes: dict[int, Failure] = {}
    previous: str | None = ""
    for link, found in log.tried(horizon.links(FIRST_SEQ, max([*listed, horizon.through], default=0)), horizon):
        seq = link.last if isinstance(link, Merged) else link
        if isinstance(found, FAILURES):
            holes[seq], previous = found, None
            continue
        if isinstance(found, Exception):
            raise found
        if previous is not None and found.meta.previous != previous:
            holes[seq] = ChainBroken(vm=log.vm, seq=seq, problem="it does not follow the segment before it")
        segments.append(found)
        previous = found.index_sha256.hex()
    return Standing(log=log, horizon=horizon, segments=segments, holes=holes)


def _listed(log: Log) -> Iterator[int]:
    for info in log.objects.store.list(names.log_prefix(log.vm)):
        try:
            yield names.seq_of_segment(info.key)
        except Malformed:
            continue


def find_hurt(
    standing: Standing,
    damaged: Sequence[Damaged],
    points: Collection[int] | None = None,
    *,
    copies: bool = True,
) -> list[HurtPoint]:
    """The points, of those chosen or of all, that do not restore; in order.

    Without `copies`, a block counts as lost although it could be read from another frame.

    Raises:
        StoreError: it could not be found out.
    """
    if not damaged and not standing.holes:
        return []
    return list(_Finding(standing, damaged, copies=copies).run(points))


def image_of(standing: Standing, seq: int) -> tuple[PointImage | None, Failure | None]:
    """A point's image, as far as there is one; and why a restore would not take it, if so.

    Raises:
        StoreError: it could not be found out.
    """
    return _Finding(standing, []).image(seq)


def newest_point_of(standing: Standing) -> int:
    """The number of the newest point that can be read; 0 if there is none."""
    return next((s.seq for s in reversed(standing.segments) if is_point(s)), 0)


def is_point(segment: Segment) -> bool:
    """Whether a segment commits a point, which was not dropped since."""
    return segment.meta.point is not None and not segment.dropped


TOLD_NAME: Final = "damage.json"
"""The file in a VM's spool that says what known damage comes to."""


class DamageTold(msgspec.Struct, frozen=True, kw_only=True):
    """What the damage that is known of a VM's log came to when it was last looked at."""

    checked_at: str
    """RFC 3339."""
    objects: list[str]
    """The damaged objects."""
    hurt: list[int]
    """The points that do not restore as they were captured."""
    newest: int
    """The newest point then."""
    lost_blocks: int
    """Of the newest point."""

    @property
    def newest_is_hurt(self) -> bool:
        return self.newest in self.hurt


def assess(log: Log, now: datetime) -> DamageTold:
    """What all damage that is recorded, or shows in the log itself, comes to.

    Raises:
        StoreError: it could not be found out.
    """
    damaged = [record.damaged for record in read_records(log.objects)]
    standing = standing_of(log)
    return told_of(standing, find_hurt(standing, damaged), now)


def told_of(standing: Standing, hurt: Sequence[HurtPoint], now: datetime) -> DamageTold:
    """The short form of which points are hurt."""
    newest = newest_point_of(standing)
    objects = dict.fromkeys(name for point in hurt for disk in point.disks for name in disk.objects)
    objects |= dict.fromkeys(_named(point.broken) for point in hurt if point.broken is not None)
    lost = sum(disk.blocks for point in hurt if point.point == newest for disk in point.disks)
    return DamageTold(
        checked_at=now.isoformat(),
        objects=list(objects),
        hurt=[point.point for point in hurt],
        newest=newest,
        lost_blocks=lost,
    )


class _Finding:
    """One run of `find_hurt`."""

    def __init__(self, standing: Standing, damaged: Sequence[Damaged], *, copies: bool = True) -> None:
        self._standing = standing
        self._copies = copies
        self._log = standing.log
        self._damaged = damaged
        self._held_in = {d.object_id for d in damaged if d.object_id}
        self._indexes = PackIndexes()
        self._by_seq = {s.seq: s for s in standing.segments}
        self._readers: dict[tuple[str, int], BlockReader] = {}
        self._lost: dict[tuple[bytes, str, int, int], Failure | None] = {}
        """What reading a frame came to, by object, disk, block and the disk's size."""
        self._maps = list(self._usable_maps())
        self._grounds: dict[str, MapGround] = {}

    def run(self, points: Collection[int] | None) -> Iterator[HurtPoint]:
        holes = self._standing.holes
        first = min([*(d.seq for d in self._damaged), *holes])
        for seq in sorted({*self._by_seq, *holes}):
            if seq < first or (points is not None and seq not in points):
                continue
            segment = self._by_seq.get(seq)
            if segment is None:
                if not self._standing.horizon.is_dropped(seq):
                    yield HurtPoint(point=seq, broken=holes[seq], disks=[])
            elif is_point(segment) and (hurt := self._examined(segment)) is not None:
                yield hurt

    def _usable_maps(self) -> Iterator[BlockMap]:
        """Maps that a restore would take, newest first."""
        for name, seq in sorted(listed_maps(self._log.objects), reverse=True):
            try:
                if seq in self._by_seq:
                    block_map = read_map(self._log.objects, name)
                    if block_map.meta.horizon != self._standing.horizon.number:
                        continue
                    check_shows(block_map, self._by_seq[seq])
                    yield block_map
            except (IntegrityError, ObjectMissing):
                continue

    def _examined(self, segment: Segment) -> HurtPoint | None:
        image, broken = self.image(segment.seq)
        if image is None:
            return HurtPoint(point=segment.seq, broken=broken, disks=[])
        disks = [hurt for disk in image.point.disks if (hurt := self._examined_disk(image, disk)) is not None]
        if broken is None and not disks:
            return None
        return HurtPoint(point=segment.seq, broken=broken, disks=disks)

    def image(self, seq: int) -> tuple[PointImage | None, Failure | None]:
        """The image of a point, from where a restore would read it; and why a restore would not, if so."""
        broken: Failure | None = None
        holes = self._standing.holes
        below = next((m for m in self._maps if m.meta.seq <= seq), None)
        start = below.meta.seq if below is not None else 0
        gaps = [n for n in holes if start < n <= seq]
        if gaps:
            broken = holes[gaps[0]]
        segments = [s for s in self._standing.segments if max(start, FIRST_SEQ) <= s.seq <= seq]
        ground = self._ground(below) if below is not None else None
        gap_reasons = {n: holes[n] for n in gaps}
        try:
            image = PointImage(
                self._log.objects,
                segments,
                ground,
                horizon=self._standing.horizon.number,
                holes=gap_reasons,
                indexes=self._indexes,
            )
        except ChainBroken as err:
            return None, err
        return image, broken

    def _ground(self, block_map: BlockMap) -> MapGround:
        return self._grounds.setdefault(block_map.name, MapGround(self._log, block_map))

    def _examined_disk(self, image: PointImage, disk: DiskMeta) -> HurtDisk | None:
        lost: list[int] = []
        objects: dict[str, None] = {}
        for window in image.windows(disk.name, self._windows(image, disk), tolerant=True):
            for block, failure in self._lost_in(image, disk, window):
                lost.append(block)
                objects[_named(failure)] = None
        if not lost:
            return None
        return HurtDisk(
            name=disk.name, size_bytes=disk.size_bytes, runs=runs_of(np.array(lost, np.int64)), objects=list(objects)
        )

    def _windows(self, image: PointImage, disk: DiskMeta) -> list[int]:
        """The windows of a disk that damage can have to do with."""
        count = image.window_count(disk.name)
        if self._standing.holes:
            return list(range(count))
        chosen: set[int] = set()
        for damaged in self._damaged:
            for first, number in damaged.blocks.get(disk.name, ()):
                last = min((first + number - 1) // WINDOW_BLOCKS, count - 1)
                chosen.update(range(first // WINDOW_BLOCKS, last + 1))
        return sorted(chosen)

    def _lost_in(self, image: PointImage, disk: DiskMeta, window: Window) -> list[tuple[int, Failure]]:
        found: dict[int, Failure] = {}
        for at in np.flatnonzero(window.containers <= UNKNOWN).tolist():
            found[window.first_block + at] = image.failures[UNKNOWN - int(window.containers[at])]
        suspects = self._suspects(image, disk, window)
        if len(suspects):
            self._read(image, disk, window, suspects)
            for block in suspects.tolist():
                container = image.containers[int(window.containers[block - window.first_block])]
                failure = self._lost[(container.object_id, disk.name, block, disk.size_bytes)]
                if failure is not None:
                    found[block] = failure
        return sorted(found.items())

    def _suspects(self, image: PointImage, disk: DiskMeta, window: Window) -> npt.NDArray[np.int64]:
        """The blocks of a window whose frames are, or may be, lost."""
        suspect = np.zeros(len(window.containers), np.bool_)
        for number in np.unique(window.containers[window.containers > NOWHERE]).tolist():
            container = image.containers[number]
            if container.object_id in self._held_in or container.seq in self._standing.holes:
                suspect |= (window.containers == number) & self._may_be_lost(container.object_id, disk, window)
        return np.flatnonzero(suspect) + window.first_block

    def _may_be_lost(self, object_id: bytes, disk: DiskMeta, window: Window) -> npt.NDArray[np.bool_]:
        told = [d for d in self._damaged if d.object_id == object_id]
        if not told or any(d.whole for d in told):
            return np.ones(len(window.containers), np.bool_)
        flags = np.zeros(len(window.containers), np.bool_)
        for first, count in (run for d in told for run in d.blocks.get(disk.name, ())):
            flags[max(0, first - window.first_block) : max(0, first + count - window.first_block)] = True
        return flags

    def _read(self, image: PointImage, disk: DiskMeta, window: Window, suspects: npt.NDArray[np.int64]) -> None:
        """Read those blocks of which it is not known yet whether they can be."""

        def key(block: int) -> tuple[bytes, str, int, int]:
            container = image.containers[int(window.containers[block - window.first_block])]
            return container.object_id, disk.name, block, disk.size_bytes

        new = np.array([block for block in suspects.tolist() if key(block) not in self._lost], np.int64)
        reader = self._reader(disk)
        for fetch in plan_fetches(window, new, new, image.containers) if len(new) else ():
            for block, found in reader.try_read(fetch):
                self._lost[key(block)] = found if isinstance(found, Exception) else None

    def _reader(self, disk: DiskMeta) -> BlockReader:
        key = (disk.name, disk.size_bytes)
        return self._readers.setdefault(key, BlockReader(self._log.objects, disk, copies=self._copies))


def _named(failure: Failure) -> str:
    """The object that a failure is about."""
    return str(failure.fields["key"]) if "key" in failure.fields else f"segment {failure.fields['seq']}"
