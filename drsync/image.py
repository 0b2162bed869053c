"""The disks of one point: which object holds each block, and where.

A point is read by laying the segments of the log over each other, oldest first:

    segment 3            ▓▓▓▓          last writer of a block wins; a zero run
    segment 2     ░░░         ░░       takes it out again; a disk whose capture
    segment 1  ███████████████████     was a full starts from nothing
    ─────────────────────────────────▶ block

That is done one window of 8192 blocks (512 MiB of disk) at a time, and of the
packs only those are opened whose rows can lie in it: memory does not grow with
the disk. Every point is a full, in this sense.

Where a block map shows what the first segment comes to (`Ground`), the log
before it is not needed: the segments behind it are laid over what the map says.

What can't be read leaves the blocks unknown that it may tell of. What lies over them
makes them known again; only what is unknown at the end can't be restored:

    segment 3            ▓▓▓▓
    pack of 2        ????????????       its index is lost: known is just between which blocks it lies
    segment 1  ███████████████████
               ██████????▓▓▓▓????█      the point: `window` raises, `known_window` tells
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from drsync.errors import ChainBroken, ObjectDamaged, ObjectMissing
from drsync.format import names
from drsync.format.segment import (
    DiskMeta,
    PointMeta,
    position,
)
from drsync.horizon import check_in_force
from drsync.log import Log, Segment
from drsync.model import BLOCK_SIZE, Kind, block_count
from drsync.packs import FAILURES, Failure, PackIndexes
from drsync.repository import VmObjects
from drsync.window import NOWHERE, UNKNOWN, WINDOW_BLOCKS, Container, PlacedRows, Window, place

_READERS = 8  # windows that are looked up at once, which is how many packs are opened at once


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What one segment does to one disk."""

    segment: Segment
    disk_number: int
    blocks: int
    container: int
    """The container number of the segment itself; pack n of it has container + 1 + n."""
    own: PlacedRows | None
    hole: Failure | None = None
    """Segments right before this one can't be read: nobody knows what they did to the disk."""


class Ground(Protocol):
    """What the disks of one point come to, known without the log before it."""

    def window(self, disk: str, index: int) -> tuple[Window, Sequence[Container]]:
        """Where the blocks of a part of a disk are; the window's containers are indexes into the sequence."""
        ...


class PointImage:
    """The disks of one point. Windows can be asked for from several threads."""

    def __init__(
        self,
        objects: VmObjects,
        segments: Sequence[Segment],
        ground: Ground | None = None,
        *,
        horizon: int | None = None,
        holes: Mapping[int, Failure] | None = None,
        indexes: PackIndexes | None = None,
    ) -> None:
        """`segments` is the log up to the point, in order, from one that holds every disk in full on.

        With a `ground`, from the one on whose point that ground shows. `horizon` is the number of the one under
        which the log was read, if it matters. `holes` tells before which segments others are missing, and why: for
        looking at a damaged log only.
        """
        self._objects = objects
        self._horizon = horizon
        self._holes = holes or {}
        self._indexes = indexes or PackIndexes()
        self.failures: list[Failure] = []
        """What keeps blocks unknown (see UNKNOWN)."""
        self._ground = ground
        self._grounded: dict[str, DiskMeta] = {}
        self._numbers: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self.containers: list[Container] = []
        self._steps: dict[str, list[_Step]] = {}
        self._before: PointMeta | None = None
        self._seen = 0
        self.point, self.seq = _newest_point(objects.vm, segments)
        if ground is not None:
            self._stand_on(segments[0])
        for segment in segments if ground is None else segments[1:]:
            self._add(segment)
        wanted = {d.name for d in self.point.disks}
        self._steps = {name: steps for name, steps in self._steps.items() if name in wanted}

    def check_in_force(self, cause: ObjectMissing) -> None:
        """Return if nothing was pruned since the log was read: then what is missing is lost.

        Raises:
            PrunedMeanwhile: it may have been deleted on purpose; reading again finds what stands for it.
        """
        if self._horizon is not None:
            check_in_force(self._objects, self._horizon, cause)

    @property
    def has_hashes(self) -> bool:
        """Whether windows have the hashes of their blocks: a block map does not know them."""
        return self._ground is None

    def _stand_on(self, segment: Segment) -> None:
        if segment.meta.point is None:
            raise ChainBroken(vm=self._objects.vm, seq=segment.seq, problem="a block map shows it, and it is no point")
        self._before = segment.meta.point
        self._grounded = {d.name: d for d in segment.meta.point.disks}
        self._steps = {d.name: [] for d in segment.meta.point.disks}

    def _add(self, segment: Segment) -> None:
        container = len(self.containers)
        self.containers.append(
            Container(name=segment.name, object_id=segment.object_id, seq=segment.seq, generation=segment.generation)
        )
        for number in range(len(segment.packs)):
            object_id = segment.packs.ids[number].tobytes()
            self.containers.append(Container(name=names.pack(self._objects.vm, object_id), object_id=object_id))
        if segment.meta.point is None:
            return
        own = place(segment.rows)
        hole = self._hole_before(segment)
        steps: dict[str, list[_Step]] = {}
        for number, disk in enumerate(segment.meta.point.disks):
            problem = self._discontinuity(segment.meta.point, disk)
            if problem and hole is None:
                raise ChainBroken(vm=self._objects.vm, seq=segment.seq, problem=f"disk {disk.name} {problem}")
            step = _Step(
                segment=segment,
                disk_number=number,
                blocks=block_count(disk.size_bytes),
                container=container,
                own=own.get(disk.name),
                hole=hole if disk.kind is not Kind.FULL else None,
            )
            steps[disk.name] = [] if disk.kind is Kind.FULL else self._steps.get(disk.name, [])
            steps[disk.name].append(step)
        whole = {d.name for d in segment.meta.point.disks if d.kind is Kind.FULL}
        self._grounded = {n: d for n, d in self._grounded.items() if n in steps and n not in whole}
        self._steps = steps  # a disk that this point lacks starts anew when it comes back
        self._before = segment.meta.point

    def _hole_before(self, segment: Segment) -> Failure | None:
        """Why what lies between this point and the one before it is not known; None if it is."""
        between = [n for n in self._holes if self._seen < n <= segment.seq]
        self._seen = segment.seq
        return self._holes[between[0]] if between else None

    def _discontinuity(self, point: PointMeta, disk: DiskMeta) -> str:
        """What keeps a disk of `point` from being laid over the point before; empty if nothing does."""
        if disk.kind is Kind.FULL:
            return ""
        known = {d.name: d for d in self._before.disks} if self._before is not None else {}
        if self._before is None or disk.name not in known:
            return "is no full, and the point before does not have it"
        if disk.kind is Kind.INCREMENTAL and point.base != self._before.capture:
            return "is an increment, but not of the point before"
        if disk.kind is Kind.INCREMENTAL and disk.size_bytes != known[disk.name].size_bytes:
            return "is an increment of another size than the point before has"
        return ""

    def disk(self, name: str) -> DiskMeta:
        """The disk's metadata. KeyError if the point has no such disk."""
        return {d.name: d for d in self.point.disks}[name]

    def window_count(self, disk: str) -> int:
        return -(-block_count(self.disk(disk).size_bytes) // WINDOW_BLOCKS)

    def window(self, disk: str, index: int) -> Window:
        """Where blocks `index * 8192` on of a disk are.

        Raises:
            ChainBroken, ObjectMissing, ObjectDamaged: what tells of some of them is not there or not whole.
        """
        window = self.known_window(disk, index)
        unknown = window.containers[window.containers <= UNKNOWN]
        if len(unknown):
            raise self.failures[UNKNOWN - int(unknown[0])]
        return window

    def known_window(self, disk: str, index: int) -> Window:
        """As `window`, but blocks of which nobody can tell have UNKNOWN or less as their container."""
        first = index * WINDOW_BLOCKS
        window = Window.empty(first, min(WINDOW_BLOCKS, block_count(self.disk(disk).size_bytes) - first))
        self._lay_ground(window, disk, index)
        for step in self._steps[disk]:
            if step.hole is not None:
                window.containers[: max(0, step.blocks - first)] = self._unknown(step.hole)
            window.forget_from(step.blocks)
            for number in _packs_within(step, window):
                self._lay_pack(window, step, number, disk)
            if step.own is not None:
                window.lay(step.own, step.container)
        return window

    def _lay_pack(self, window: Window, step: _Step, number: int, disk: str) -> None:
        try:
            pack = self._indexes.open(self._objects, step.segment, number)
        except (ObjectMissing, ObjectDamaged) as err:
            if isinstance(err, ObjectMissing):
                self.check_in_force(err)
            low = position(step.disk_number, window.first_block)
            first, last = int(step.segment.packs.first[number]) - low, int(step.segment.packs.last[number]) - low
            end = max(0, min(last + 1, step.blocks - window.first_block))
            window.containers[max(0, first) : end] = self._unknown(err)
        else:
            if disk in pack.rows:
                at = step.container + 1 + number
                with self._lock:
                    self.containers[at] = replace(self.containers[at], generation=pack.generation)
                window.lay(pack.rows[disk], at)

    def _unknown(self, failure: Failure) -> int:
        """The container of blocks that are unknown because of a failure."""
        with self._lock:
            if failure not in self.failures:
                self.failures.append(failure)
            return UNKNOWN - self.failures.index(failure)

    def _lay_ground(self, window: Window, disk: str, index: int) -> None:
        """Begin a window with what the ground says of it, if this disk stands on it."""
        grounded = self._grounded.get(disk)
        if self._ground is None or grounded is None or window.first_block >= block_count(grounded.size_bytes):
            return
        try:
            below, containers = self._ground.window(disk, index)
        except FAILURES as err:
            window.containers[: block_count(grounded.size_bytes) - window.first_block] = self._unknown(err)
            return
        count = min(len(below.containers), len(window.containers))
        held_by = below.containers[:count]
        numbers = np.full(len(containers) + 1, NOWHERE, np.int32)  # its last element is where NOWHERE (-1) leads
        used = np.unique(held_by[held_by != NOWHERE]).tolist()
        numbers[used] = [self._number_of(containers[number]) for number in used]
        window.containers[:count] = numbers[held_by]
        window.offsets[:count] = below.offsets[:count]
        window.lengths[:count] = below.lengths[:count]

    def _number_of(self, container: Container) -> int:
        """The index of a container that only the ground tells of."""
        with self._lock:
            number = self._numbers.setdefault(container.object_id, len(self.containers))
            if number == len(self.containers):
                self.containers.append(container)
            return number

    def windows(self, disk: str, chosen: Sequence[int] | None = None, *, tolerant: bool = False) -> Iterator[Window]:
        """All windows of a disk, or the chosen ones, in order; the packs of the next ones are opened ahead.

        `tolerant`: as `known_window` gives them.
        """
        indexes = range(self.window_count(disk)) if chosen is None else chosen
        find = self.known_window if tolerant else self.window
        with ThreadPoolExecutor(_READERS, thread_name_prefix="image") as readers:
            ahead = deque(readers.submit(find, disk, i) for i in indexes[:_READERS])
            try:
                for place in range(len(indexes)):
                    window = ahead.popleft().result()
                    if place + _READERS < len(indexes):
                        ahead.append(readers.submit(find, disk, indexes[place + _READERS]))
                    yield window
            finally:
                for future in ahead:
                    future.cancel()

    def touched(self, disk: str) -> npt.NDArray[np.bool_]:
        """The windows of a disk that may differ from the ground's, as far as it can be told without reading packs."""
        grounded = self._grounded.get(disk)
        blocks = block_count(self.disk(disk).size_bytes)
        count = self.window_count(disk)
        if grounded is None:
            return np.ones(count, np.bool_)
        sizes = [block_count(grounded.size_bytes), *(step.blocks for step in self._steps[disk]), blocks]
        touched = np.zeros(-(-max(sizes) // WINDOW_BLOCKS), np.bool_)
        for step in self._steps[disk]:
            _touch(touched, step)
        if len(set(sizes)) > 1:
            touched[min(sizes) // WINDOW_BLOCKS :] = True
        return touched[:count]

    def live_bytes(self, disk: str, *, tolerant: bool = False) -> int:
        """Bytes of the blocks that hold data: what a restored disk takes. `tolerant`: unknown ones count, too."""
        windows = self.windows(disk, tolerant=tolerant)
        return sum(int(np.count_nonzero(w.containers != NOWHERE)) for w in windows) * BLOCK_SIZE


def load_image(log: Log, seq: int) -> PointImage:
    """The disks of point `seq`.

    Raises:
        ChainBroken, ObjectMissing, ObjectDamaged: the log is not whole up to there.
        PointPruned: it was dropped, and its segment is gone.
    """
    horizon = log.horizon()
    return PointImage(log.objects, list(log.chain(1, seq, horizon=horizon)), horizon=horizon.number)


def _newest_point(vm: str, segments: Sequence[Segment]) -> tuple[PointMeta, int]:
    for segment in reversed(segments):
        if segment.meta.point is not None:
            return segment.meta.point, segment.seq
    raise ChainBroken(vm=vm, seq=segments[-1].seq if segments else 0, problem="there is no point in it")


def _touch(touched: npt.NDArray[np.bool_], step: _Step) -> None:
    """Mark the windows that a step says anything of."""
    packs, low = step.segment.packs, position(step.disk_number, 0)
    within = (packs.last >= low) & (packs.first < low + 2**32)
    end = len(touched) * WINDOW_BLOCKS - 1
    first = np.clip(packs.first[within].astype(np.int64) - low, 0, end)
    last = np.clip(packs.last[within].astype(np.int64) - low, 0, end)
    if step.own is not None:
        rows = step.own.rows
        touched[rows.blocks // WINDOW_BLOCKS] = True
        starts = rows.zero_first.astype(np.int64)
        first, last = np.concatenate([first, starts]), np.concatenate([last, starts + rows.zero_count - 1])
    edges = np.zeros(len(touched) + 1, np.int64)
    np.add.at(edges, first // WINDOW_BLOCKS, 1)
    np.add.at(edges, last // WINDOW_BLOCKS + 1, -1)
    touched |= np.cumsum(edges)[:-1] > 0


def _packs_within(step: _Step, window: Window) -> Iterator[int]:
    """The numbers of the step's packs whose rows can lie in the window, in the order in which they are laid."""
    start = position(step.disk_number, window.first_block)
    end = start + len(window.containers) - 1
    packs = step.segment.packs
    for first, behind in step.segment.meta.round_bounds:
        low = np.searchsorted(packs.last[first:behind], np.uint64(start), side="left")
        high = np.searchsorted(packs.first[first:behind], np.uint64(end), side="right")
        yield from range(first + int(low), first + int(high))
