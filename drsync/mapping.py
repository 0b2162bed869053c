"""Writes block maps: now and then, behind a commit, and only the pages that changed.

    newest map + segments behind it ─▶ windows that changed ─▶ pages ─▶ one object
                                       the others            ─▶ named in the older map

A map is a cache: nothing waits for it, and when it can't be written nothing is lost but time.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from drsync.format import Malformed, names, seal
from drsync.format.blockmap import (
    MAX_OLDER_MAPS,
    NO_PAGE,
    THIS_MAP,
    MapDisk,
    MapMeta,
    OlderMaps,
    Page,
    PageContainer,
    PageSealer,
    PageTable,
    encode_map,
    map_index_bound,
    page_binding,
)
from drsync.format.keys import OBJECT_ID_BYTES
from drsync.horizon import Horizon
from drsync.image import PointImage
from drsync.log import Log, Segment
from drsync.mapped import BlockMap, MapPages, PageSource, Stretch, listed_maps, newest_stretch
from drsync.model import Kind
from drsync.window import NOWHERE, Container, Window

MAX_MAP_BYTES: Final = 128 * 1024 * 1024
"""Of the pages of one map, which are made in memory: enough for about 3 TiB of data that all moved at once."""
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MapPolicy:
    """When a map is written."""

    every: int = 64
    """Points between two maps: a reader has so many segments to read behind a map, two rounds of requests; with a
    point a minute a map is made about every hour."""
    step: int = 8
    """It is only looked for at points that are multiples of this: what fails is not tried again at each point."""

    def is_time_to_look(self, seq: int) -> bool:
        """Whether it is worth a request to find out how old the newest map is. Pure."""
        return seq % self.step == 0

    def is_due(self, seq: int, newest_map: int) -> bool:
        """Whether point `seq` gets a map, if the newest one is of point `newest_map` (0: there is none). Pure."""
        return self.is_time_to_look(seq) and seq - newest_map >= self.every


USUAL: Final = MapPolicy()


def keep_mapped(log: Log, newest: Segment, policy: MapPolicy = USUAL) -> str | None:
    """Write a map of the newest point if one is due; its name, or None if none was written.

    Raises:
        DrsyncError, Malformed: it could not be written; nothing but the cache is the worse for it.
    """
    if not policy.is_time_to_look(newest.seq):
        return None
    found = list(listed_maps(log.objects))
    through = log.horizon().through  # older maps are of older horizons, which no reader takes any more
    if not policy.is_due(newest.seq, max((seq for _, seq in found if through <= seq <= newest.seq), default=0)):
        return None
    return write_map(log, newest.seq, present={name for name, _ in found})


def write_map(log: Log, seq: int, *, present: set[str]) -> str:
    """Write a map of point `seq`; its name. `present`: the maps that there are.

    Raises:
        Malformed: the point has more pages than a map takes; nothing was stored.
        ChainBroken, ObjectMissing, ObjectDamaged: the log is not whole up to there.
        StoreError: the map could not be stored.
    """
    stretch = newest_stretch(log, seq)
    making = _Making(log, stretch, seq)
    name = making.run(_usable(log.vm, stretch, present))
    _LOGGER.info("vm=%s wrote a block map of point %d, pages=%d", log.vm, seq, making.written)
    return name


def write_map_alone(log: Log, segment: Segment) -> str:
    """Write a map of a point that holds every disk in full, from its segment alone; the map's name.

    For a log that is broken somewhere before this point: readers then need nothing of what lies before it
    (docs/format.md, F54). Whoever calls this knows that the point is one that this log's writer committed.

    Raises:
        Malformed: not every disk is in full.
        ObjectMissing, ObjectDamaged: the point is not whole itself.
        StoreError: the map could not be stored.
    """
    point = segment.meta.point
    if point is None or any(disk.kind is not Kind.FULL for disk in point.disks):
        raise Malformed(f"segment {segment.seq} does not hold every disk in full")
    before = [seq for seq, _ in log.listed() if seq < segment.seq]
    name = write_map_of(log, [segment], parent=before[-1] if before else None)
    _LOGGER.warning("vm=%s point %d stands by its map alone: the log before it is damaged", log.vm, segment.seq)
    return name


def write_map_of(log: Log, segments: Sequence[Segment], *, parent: int | None) -> str:
    """Write a map of the newest point of `segments` from nothing but these; the map's name.

    They are the log from its beginning, or from a point on that holds every disk in full; `parent` is the point before.

    Raises:
        Malformed: the point has more pages than a map takes; nothing was stored.
        ChainBroken, ObjectMissing, ObjectDamaged: they don't lie over each other, or a pack is not whole.
        StoreError: the map could not be stored.
    """
    stretch = Stretch(log=log, segments=segments, ground=None, parent=parent, horizon=log.horizon())
    return _Making(log, stretch, segments[-1].seq).run(None)


def rewrite_map(log: Log, old: Horizon, seq: int) -> str | None:
    """Bring the newest block map of horizon `old` under the one in force, as a map of point `seq`; its name.

    Only pages that changed since, or that name an object which is not in use any more, are made anew.
    None: there is no map of that horizon.

    Raises:
        DrsyncError, Malformed: see `write_map`.
    """
    present = {name for name, _ in listed_maps(log.objects)}
    before = newest_stretch(log, seq, horizon=old)
    below = _usable(log.vm, before, present)
    if below is None:
        return None
    changed, pages, horizon = before.image(seq), MapPages(log.objects, below), log.horizon()

    def touched(disk: str) -> npt.NDArray[np.bool_]:
        found = changed.touched(disk)
        for number in np.flatnonzero(~found).tolist():
            page = pages.page(disk, number)
            found[number] = page is not None and any(_is_gone(c, horizon) for c in page.containers)
        return found

    return _Making(log, newest_stretch(log, seq), seq, touched=touched).run(below)


def _is_gone(container: PageContainer, horizon: Horizon) -> bool:
    if container.number:
        return container.number <= horizon.through and horizon.merged_at(container.number) is not None
    return container.object_id in horizon.retired_ids


def _usable(vm: str, stretch: Stretch, present: set[str]) -> BlockMap | None:
    """The map whose pages the new one can name; None: all pages are written anew.

    Now and then that is so although there is one, so that a map never leans on very many others.
    """
    below = stretch.ground.block_map if stretch.ground is not None else None
    if below is None or len(below.older) >= MAX_OLDER_MAPS:
        return None
    return below if present.issuperset(below.named_maps(vm)) else None


class _Making:
    """One run of `write_map`."""

    def __init__(
        self,
        log: Log,
        stretch: Stretch,
        seq: int,
        *,
        touched: Callable[[str], npt.NDArray[np.bool_]] | None = None,
    ) -> None:
        """`touched` tells which pages of a disk are to be made anew, if the image itself can't."""
        self._objects = log.objects
        self._stretch = stretch
        self._image: PointImage = stretch.image(seq)
        if self._image.seq != seq:
            raise Malformed(f"segment {seq} is no point")
        self._touched = touched or self._image.touched
        self._header = self._objects.new_header("map", seq)
        self._sealer = PageSealer(self._objects.object_keys(self._header))
        self._sources: dict[bytes, tuple[int, PageSource]] = {}
        """The older maps that are named, with the number as which they are, by object id."""
        self.written = 0

    def run(self, below: BlockMap | None) -> str:
        meta = self._meta()
        bound = map_index_bound(len(msgspec.json.encode(meta)), sum(map(self._pages, meta.disks)))
        if bound > seal.MAX_INDEX_BYTES:
            raise Malformed("the point has more pages than the index of a map holds")
        tables = [self._table(disk.name, below) for disk in meta.disks]
        meta = msgspec.structs.replace(meta, older=len(self._sources))
        index = encode_map(meta, self._older(), tables)
        frames_end = len(self._sealer.buffer)
        self._sealer.buffer.extend(bytes(seal.sealed_bound(len(index))))
        buffer = memoryview(self._sealer.buffer)
        sealed = seal.seal(buffer, frames_end, self._header, index, self._objects.object_keys(self._header))
        name = names.block_map(self._objects.vm, meta.seq, bytes.fromhex(self._header.object))
        self._objects.store.create(name, buffer[: sealed.length], sha256=sealed.sha256)
        return name

    def _meta(self) -> MapMeta:
        known = [s for s in self._stretch.segments if s.meta.point is not None and s.seq <= self._image.seq]
        points = [s for s in known if not s.dropped or s is known[-1]]
        return MapMeta(
            seq=self._image.seq,
            segment=points[-1].index_sha256.hex(),
            parent=points[-2].seq if len(points) > 1 else self._stretch.parent,
            older=MAX_OLDER_MAPS,
            disks=[MapDisk(name=d.name, size_bytes=d.size_bytes) for d in self._image.point.disks],
            horizon=self._stretch.horizon.number,
        )

    def _pages(self, disk: MapDisk) -> int:
        return self._image.window_count(disk.name)

    def _table(self, disk: str, below: BlockMap | None) -> PageTable:
        """Seal the pages of a disk that changed, and find the others in the map below."""
        table = PageTable.empty(self._image.window_count(disk))
        touched = self._touched(disk) if below is not None else np.ones(len(table.sources), np.bool_)
        if below is not None:
            for number in np.flatnonzero(~touched).tolist():
                self._name_older(table, below, disk, number)
        chosen = np.flatnonzero(touched).tolist()
        binding = page_binding(self._objects.repository_id, disk)
        for number, window in zip(chosen, self._image.windows(disk, chosen), strict=True):
            page = _page_of(window, self._image.containers)
            if page.containers:
                table.sources[number] = THIS_MAP
                table.offsets[number], table.lengths[number] = self._sealer.add(page, binding, number)
                self.written += 1
            if len(self._sealer.buffer) > MAX_MAP_BYTES:
                raise Malformed(f"its pages take more than the {MAX_MAP_BYTES} bytes that a map may have")
        return table

    def _name_older(self, table: PageTable, below: BlockMap, disk: str, number: int) -> None:
        old = below.table(disk)
        if old.sources[number] == NO_PAGE:
            return
        lies_in = below.source(self._objects.vm, int(old.sources[number]))
        source, _ = self._sources.setdefault(lies_in.object_id, (THIS_MAP + 1 + len(self._sources), lies_in))
        table.sources[number] = source
        table.offsets[number], table.lengths[number] = old.offsets[number], old.lengths[number]

    def _older(self) -> OlderMaps:
        ids = np.frombuffer(b"".join(self._sources), np.uint8).reshape(-1, OBJECT_ID_BYTES)
        named = [older for _, older in self._sources.values()]
        return OlderMaps(
            numbers=np.array([older.seq for older in named], np.uint64),
            ids=ids,
            generations=np.array([older.generation for older in named], np.uint64),
        )


def _page_of(window: Window, containers: Sequence[Container]) -> Page:
    """A window as a page, which names just the containers that it uses."""
    held = window.containers != NOWHERE
    used, indexes = np.unique(window.containers[held], return_inverse=True)
    held_by = np.full(len(held), NOWHERE, np.int32)
    held_by[held] = indexes
    return Page(
        containers=[
            PageContainer(
                number=containers[n].seq, object_id=containers[n].object_id, generation=containers[n].generation
            )
            for n in used.tolist()
        ],
        held_by=held_by,
        offsets=window.offsets,
        lengths=window.lengths,
    )
