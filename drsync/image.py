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
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from drsync.errors import ChainBroken, ObjectDamaged, ObjectMissing
from drsync.format import Malformed, names, seal
from drsync.format.blockmap import PAGE_BLOCKS
from drsync.format.columns import Bytes2D
from drsync.format.frame import HASH_BYTES
from drsync.format.keys import FIRST_GENERATION
from drsync.format.seal import FRAMES_START
from drsync.format.segment import (
    DiskMeta,
    DiskRows,
    PackEntry,
    PointMeta,
    check_bounds,
    check_rows,
    decode_pack,
    position,
)
from drsync.horizon import check_in_force
from drsync.log import Log, Segment
from drsync.model import BLOCK_SIZE, Kind, block_count
from drsync.repository import VmObjects

WINDOW_BLOCKS = PAGE_BLOCKS
"""Blocks of a window: what one L2 table of a restored image and one page of a block map tell of, too."""
NOWHERE = -1
"""The container of a block that no object holds: it reads as zeros."""
UNKNOWN = -2
"""The container of a block of which nobody can tell where it is, because of PointImage.failures[0]; less: [1] ..."""
_CACHED_PACKS = 2048  # of 64 GiB of data, about 14 KiB each
Failure: TypeAlias = ChainBroken | ObjectDamaged | ObjectMissing
"""Why a part of a log can't be read, and never will."""
FAILURES: Final = (ChainBroken, ObjectDamaged, ObjectMissing)
"""The same, for `except`."""
_READERS = 8  # windows that are looked up at once, which is how many packs are opened at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """An object that holds frames."""

    name: str
    object_id: bytes
    seq: int = 0
    """The number of a segment; 0: it is a pack."""
    generation: int = FIRST_GENERATION
    """Of the root key that it is under; of a pack it is known when that has been opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Where the blocks of a part of a disk are; one array element a block."""

    first_block: int
    containers: npt.NDArray[np.int32]
    """Index into PointImage.containers, or NOWHERE; or UNKNOWN and less, which only `known_window` has."""
    offsets: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.uint32]
    hashes: Bytes2D
    """Zeros where the block was told of by a block map, which has no hashes (see PointImage.has_hashes)."""

    @classmethod
    def empty(cls, first_block: int, count: int) -> "Window":
        return cls(
            first_block=first_block,
            containers=np.full(count, NOWHERE, np.int32),
            offsets=np.zeros(count, np.uint32),
            lengths=np.zeros(count, np.uint32),
            hashes=np.zeros((count, HASH_BYTES), np.uint8),
        )

    def forget_from(self, block: int) -> None:
        """Blocks from `block` on do not exist (the disk was smaller then)."""
        self.containers[max(0, block - self.first_block) :] = NOWHERE

    def lay(self, rows: "PlacedRows", container: int) -> None:
        """Lay the rows of an object over this window."""
        first, end = self.first_block, self.first_block + len(self.containers)
        low, high = np.searchsorted(rows.rows.blocks, [first, end])
        at = rows.rows.blocks[low:high] - np.uint32(first)
        self.containers[at] = container
        self.offsets[at] = rows.offsets[low:high]
        self.lengths[at] = rows.rows.lengths[low:high]
        self.hashes[at] = rows.rows.hashes[low:high]
        starts = rows.rows.zero_first.astype(np.int64)
        ends = starts + rows.rows.zero_count
        for run in np.flatnonzero((starts < end) & (ends > first)):
            self.containers[max(0, starts[run] - first) : ends[run] - first] = NOWHERE


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedRows:
    """Rows of a disk in an object, with the offsets of their frames."""

    rows: DiskRows
    offsets: npt.NDArray[np.uint32]


def place(rows: Sequence[DiskRows]) -> dict[str, PlacedRows]:
    """The rows of one object by disk, each with the offsets of its frames."""
    placed: dict[str, PlacedRows] = {}
    at = FRAMES_START
    for row in rows:
        ends = at + np.cumsum(row.lengths, dtype=np.int64)
        offsets = (ends - row.lengths).astype(np.uint32)
        placed[row.disk] = PlacedRows(rows=row, offsets=offsets)
        at = int(ends[-1]) if len(ends) else at
    return placed


def read_pack(objects: VmObjects, entry: PackEntry, disks: Sequence[DiskMeta]) -> list[DiskRows]:
    """The rows of a pack that a segment lists, checked against that entry and against the point's disks.

    Raises:
        ObjectMissing, ObjectDamaged: it is not there, or not the pack that the segment lists.
    """
    return open_pack(objects, entry, disks)[0]


def open_pack(objects: VmObjects, entry: PackEntry, disks: Sequence[DiskMeta]) -> tuple[list[DiskRows], int]:
    """As `read_pack`, and the generation of the root key that the pack is under.

    Raises:
        ObjectMissing, ObjectDamaged: it is not there, or not the pack that the segment lists.
    """
    name = names.pack(objects.vm, entry.object_id)
    opened = objects.read_index(name, "pack")
    return pack_rows(name, opened, entry, disks), opened.header.generation


def pack_rows(name: str, opened: seal.Opened, entry: PackEntry, disks: Sequence[DiskMeta]) -> list[DiskRows]:
    """The rows of a pack whose index was opened (see `read_pack`).

    Raises:
        ObjectDamaged: it is not the pack that the segment lists.
    """
    try:
        if opened.index_sha256 != entry.index_sha256 or opened.length != entry.length:
            raise Malformed("it is not the pack that its segment lists")
        rows = decode_pack(opened.index, opened.frames_end)
        check_rows(rows, disks)
        check_bounds(rows, disks, entry)
    except Malformed as err:
        raise ObjectDamaged(key=name, problem=err) from err
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedPack:
    """What the index of a pack says, and the generation of the root key that it is under."""

    rows: dict[str, PlacedRows]
    generation: int


class PackIndexes:
    """The indexes of packs that were opened last; several images of one VM may share it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], OpenedPack | Failure] = OrderedDict()

    def open(self, objects: VmObjects, segment: Segment, number: int) -> OpenedPack:
        """Pack `number` of a segment.

        Raises:
            ObjectMissing, ObjectDamaged: it can't be had.
        """
        key = (segment.seq, number)
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
        if found is None:
            disks = segment.meta.point.disks if segment.meta.point else []
            try:
                rows, generation = open_pack(objects, segment.packs.entry(number), disks)
                found = OpenedPack(rows=place(rows), generation=generation)
            except (ObjectMissing, ObjectDamaged) as err:
                found = err
            with self._lock:
                self._cache[key] = found
                if len(self._cache) > _CACHED_PACKS:
                    self._cache.popitem(last=False)
        if isinstance(found, Exception):
            raise found.with_traceback(None)
        return found


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
