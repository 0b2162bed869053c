"""Reads points by block maps: the newest map that can be trusted, and the segments behind it.

    log    1 ──── 2 ──── … ──── 64 ──── 65 ──── 66 = the point that is wanted
                                 ▲
    map of 64 ───────────────────┘  its chain hash is that of segment 64

A map is a cache, and everything about it may be wrong: it is opened only by
this VM's key, it has to be of this very log, and whatever does not fit is
passed over with a line in the log. Then an older map or the walk over the
whole log answers; the answer is the same.
"""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from drsync.errors import IntegrityError, KeyMissing, ObjectDamaged, ObjectMissing
from drsync.format import Malformed, names
from drsync.format.blockmap import (
    NO_PAGE,
    THIS_MAP,
    MapMeta,
    OlderMaps,
    Page,
    PageContainer,
    PageTable,
    decode_map,
    decode_page,
    open_page,
    page_binding,
    page_blocks,
)
from drsync.format.keys import FIRST_GENERATION
from drsync.horizon import Horizon
from drsync.image import PointImage, load_image
from drsync.log import FIRST_SEQ, Log, Segment
from drsync.repository import VmObjects
from drsync.window import NOWHERE, WINDOW_BLOCKS, Container, Window

MAX_TRIES: Final = 8
"""Maps that are tried for one point: damage, or who writes junk into the bucket, can't make a restore read more."""
_GROUP_BYTES: Final = 1024 * 1024
"""Neighbouring pages that one request brings: a 2 TiB disk's pages are about 70 MB."""
_CACHED_GROUPS: Final = 16
_LOCKS: Final = 16
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMap:
    """A map as it was read from the repository: authenticated, its pages not read yet."""

    name: str
    object_id: bytes
    meta: MapMeta
    older: OlderMaps
    tables: Sequence[PageTable]
    generation: int = FIRST_GENERATION
    """Of the root key that it is under."""

    def table(self, disk: str) -> PageTable:
        """The pages of a disk. KeyError if the map has no such disk."""
        return {d.name: table for d, table in zip(self.meta.disks, self.tables, strict=True)}[disk]

    def size_bytes(self, disk: str) -> int:
        return {d.name: d.size_bytes for d in self.meta.disks}[disk]

    def source(self, vm: str, number: int) -> "PageSource":
        """The map that a page's `source` means."""
        if number == THIS_MAP:
            return PageSource(self.name, self.object_id, self.meta.seq, self.generation)
        older = number - THIS_MAP - 1
        object_id, seq = self.older.ids[older].tobytes(), int(self.older.numbers[older])
        return PageSource(names.block_map(vm, seq, object_id), object_id, seq, int(self.older.generations[older]))

    def named_maps(self, vm: str) -> list[str]:
        """The names of the older maps that pages of this one lie in."""
        return [self.source(vm, THIS_MAP + 1 + n).name for n in range(len(self.older))]


class PageSource(NamedTuple):
    """A map that a page lies in."""

    name: str
    object_id: bytes
    seq: int
    generation: int


def listed_maps(objects: VmObjects) -> Iterator[tuple[str, int]]:
    """Names and numbers of the maps that the store lists, in order; what is no map is passed over."""
    for info in objects.store.list(names.map_prefix(objects.vm)):
        try:
            yield info.key, names.seq_of_map(info.key)
        except Malformed as err:
            _LOGGER.warning("vm=%s passed over %s: %s", objects.vm, info.key, err)


def read_map(objects: VmObjects, name: str) -> BlockMap:
    """The map `name`, authenticated.

    Raises:
        ObjectMissing, ObjectDamaged: there is no such map, or not as it was written.
    """
    try:
        seq = names.seq_of_map(name)
        opened = objects.read_index(name, "map", seq=seq)
        meta, older, tables = decode_map(opened.index, opened.frames_end)
        if meta.seq != seq:
            raise Malformed(f"its index is of point {meta.seq}")
    except (Malformed, KeyMissing) as err:  # for a cache the latter is no other matter
        raise ObjectDamaged(key=name, problem=err) from err
    return BlockMap(
        name=name,
        object_id=bytes.fromhex(opened.header.object),
        meta=meta,
        older=older,
        tables=tables,
        generation=opened.header.generation,
    )


def check_shows(block_map: BlockMap, segment: Segment) -> None:
    """Check that a map is of the log that this segment, of the map's number, is in.

    Raises:
        ObjectDamaged: it is of another log (the log was rolled back and written anew), or does not fit the point.
    """
    disks = [(d.name, d.size_bytes) for d in segment.meta.point.disks] if segment.meta.point is not None else None
    if block_map.meta.segment != segment.index_sha256.hex():
        problem = f"it is of another segment {segment.seq} than the log has"
        raise ObjectDamaged(key=block_map.name, problem=problem)
    if disks != [(d.name, d.size_bytes) for d in block_map.meta.disks]:
        raise ObjectDamaged(key=block_map.name, problem="its disks are not the point's")
    if block_map.generation < segment.generation:
        raise ObjectDamaged(key=block_map.name, problem="it is under an older key than its point")


class MapPages:
    """The pages of one map, read when they are asked for. Safe to call from several threads."""

    def __init__(self, objects: VmObjects, block_map: BlockMap) -> None:
        self._objects = objects
        self._map = block_map
        self._groups = {d.name: _grouped(t) for d, t in zip(block_map.meta.disks, block_map.tables, strict=True)}
        self._cache: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    def window(self, disk: str, index: int) -> tuple[Window, Sequence[Container]]:
        """A page of a disk as a window, whose containers are indexes into the sequence.

        Raises:
            ObjectMissing, ObjectDamaged: the map that it lies in is not there or not whole.
        """
        window = Window.empty(index * WINDOW_BLOCKS, page_blocks(index, self._map.size_bytes(disk)))
        page = self.page(disk, index)
        if page is None:
            return window, []
        window.containers[:] = page.held_by
        window.offsets[:] = page.offsets
        window.lengths[:] = page.lengths
        return window, [_container(self._objects.vm, c) for c in page.containers]

    def page(self, disk: str, number: int) -> Page | None:
        """A page of a disk; None if all of it reads as zeros.

        Raises:
            ObjectMissing, ObjectDamaged: the map that it lies in is not there or not whole.
        """
        table, blocks = self._map.table(disk), page_blocks(number, self._map.size_bytes(disk))
        if table.sources[number] == NO_PAGE:
            return None
        name, object_id, seq, generation = self._map.source(self._objects.vm, int(table.sources[number]))
        offset, length = int(table.offsets[number]), int(table.lengths[number])
        start, data = self._group_of(name, disk, number)
        stored = data[offset - start : offset - start + length]
        try:
            keys = self._objects.keys_of(object_id, generation)
            binding = page_binding(self._objects.repository_id, disk)
            return decode_page(open_page(keys, stored, offset, binding, number), blocks, seq)
        except (Malformed, KeyMissing) as err:
            raise ObjectDamaged(key=name, problem=err) from err

    def _group_of(self, name: str, disk: str, number: int) -> tuple[int, bytes]:
        """The stored bytes of a page and its neighbours, and the offset of the first one; each is read once."""
        groups = self._groups[disk]
        group = int(groups.numbers[number])
        start, end = int(groups.starts[group]), int(groups.ends[group])
        key = (disk, group)
        with self._locks[group % _LOCKS]:
            with self._cache_lock:
                data = self._cache.get(key)
            if data is None:
                data = self._objects.store.get_range(name, start, end - start)
                with self._cache_lock:
                    self._cache[key] = data
                    if len(self._cache) > _CACHED_GROUPS:
                        self._cache.popitem(last=False)
        return start, data


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """Which pages one request brings: neighbours in one map."""

    numbers: npt.NDArray[np.int64]
    """The group of each page."""
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


def _grouped(table: PageTable) -> _Groups:
    at = np.flatnonzero(table.sources != NO_PAGE)
    sources, starts = table.sources[at], table.offsets[at].astype(np.int64)
    ends = starts + table.lengths[at]
    apart = (sources[1:] != sources[:-1]) | (starts[1:] != ends[:-1])
    apart |= starts[1:] // _GROUP_BYTES != starts[:-1] // _GROUP_BYTES
    first = np.concatenate([np.zeros(min(1, len(at)), np.int64), np.flatnonzero(apart) + 1])
    last = np.concatenate([first[1:], np.full(min(1, len(at)), len(at))]) - 1
    numbers = np.zeros(len(table.sources), np.int64)
    numbers[at] = np.searchsorted(first, np.arange(len(at)), side="right") - 1
    return _Groups(numbers=numbers, starts=starts[first], ends=ends[last])


class MapGround:
    """What a map says of its point (image.Ground); where the map fails, the walk over the log answers."""

    def __init__(self, log: Log, block_map: BlockMap) -> None:
        self._log = log
        self._seq = block_map.meta.seq
        self._map = block_map
        self._pages = MapPages(log.objects, block_map)
        self._lock = threading.Lock()
        self._walked: PointImage | None = None

    @property
    def block_map(self) -> BlockMap | None:
        """The map; None since something in it was found not to be as it was written."""
        return self._map if self._walked is None else None

    def window(self, disk: str, index: int) -> tuple[Window, Sequence[Container]]:
        """Where the blocks of a part of a disk are (image.Ground).

        Raises:
            ChainBroken, ObjectMissing, ObjectDamaged: the map is not whole, and the log isn't either.
        """
        if self._walked is None:
            try:
                return self._pages.window(disk, index)
            except (ObjectMissing, ObjectDamaged) as err:
                _LOGGER.warning("vm=%s reads the whole log instead of a block map: %s", self._log.vm, err)
        image = self._walk()
        return image.window(disk, index), image.containers

    def _walk(self) -> PointImage:
        with self._lock:
            if self._walked is None:
                self._walked = load_image(self._log, self._seq)
            return self._walked


def _container(vm: str, held_in: PageContainer) -> Container:
    number, object_id = held_in.number, held_in.object_id
    name = names.segment(vm, number) if number else names.pack(vm, object_id)
    return Container(name=name, object_id=object_id, seq=number, generation=held_in.generation)


def check_same(image: PointImage, pages: MapPages, name: str) -> None:
    """Check that the pages of the map `name` say of each block what the log says, whose `image` this is.

    Raises:
        ObjectMissing, ObjectDamaged: they don't, or can't be read.
    """
    for disk in image.point.disks:
        for index, window in enumerate(image.windows(disk.name)):
            said, containers = pages.window(disk.name, index)
            if _places(said, containers) != _places(window, image.containers):
                problem = f"its page {index} of disk {disk.name} does not say what the log says"
                raise ObjectDamaged(key=name, problem=problem)


def _places(window: Window, containers: Sequence[Container]) -> list[tuple[int, Container, int, int]]:
    """Block, container, offset and length of what a window holds."""
    at = np.flatnonzero(window.containers != NOWHERE)
    columns = (column[at].tolist() for column in (window.containers, window.offsets, window.lengths))
    held = zip(at.tolist(), *columns, strict=True)
    return [(block, containers[number], offset, length) for block, number, offset, length in held]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The end of a log that is enough to read its newest points: from the one on that a map shows, or all of it."""

    log: Log
    segments: Sequence[Segment]
    ground: MapGround | None
    parent: int | None
    """The point before the first segment; None if there is none. It may have been pruned."""
    horizon: Horizon
    """The one that was in force when this was read."""

    def image(self, seq: int) -> PointImage:
        """The disks of point `seq` of this stretch.

        Raises:
            ChainBroken: the segments don't lie over each other.
        """
        segments = [s for s in self.segments if s.seq <= seq]
        return PointImage(self.log.objects, segments, self.ground, horizon=self.horizon.number)


def newest_stretch(log: Log, last: int, *, horizon: Horizon | None = None) -> Stretch:
    """The log up to segment `last`, from the newest map on that can be trusted; the whole log if there is none.

    It is read under the `horizon` that is in force, unless another one is given.

    Raises:
        ChainBroken, ObjectMissing, ObjectDamaged: the log is not whole up to there.
    """
    horizon = horizon or log.horizon()
    candidates = deque((name for name, seq in listed_maps(log.objects) if seq <= last), maxlen=MAX_TRIES)
    for name in reversed(candidates):
        try:
            found = read_map(log.objects, name)
            if found.meta.horizon == horizon.number:
                return _stretch_from(log, found, last, horizon)
        except (IntegrityError, ObjectMissing) as err:
            _LOGGER.warning("vm=%s passed over a block map: %s", log.vm, err)
    segments = list(log.chain(FIRST_SEQ, last, horizon=horizon))
    return Stretch(log=log, segments=segments, ground=None, parent=None, horizon=horizon)


def _stretch_from(log: Log, block_map: BlockMap, last: int, horizon: Horizon) -> Stretch:
    seq = block_map.meta.seq
    shown = log.under(horizon, log.read(seq))
    check_shows(block_map, shown)
    behind = log.chain(seq + 1, last, previous=shown.index_sha256.hex(), generation=shown.generation, horizon=horizon)
    return Stretch(
        log=log,
        segments=[shown, *behind],
        ground=MapGround(log, block_map),
        parent=block_map.meta.parent,
        horizon=horizon,
    )


def load_mapped_image(log: Log, seq: int) -> PointImage:
    """The disks of point `seq`, by a block map if there is one; it has no hashes (see image.load_image).

    Raises:
        ChainBroken, ObjectMissing, ObjectDamaged: the log is not whole up to there.
    """
    return newest_stretch(log, seq).image(seq)
