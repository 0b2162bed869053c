"""What the indexes of packs say, checked against the segment that lists them."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from drsync.errors import ChainBroken, ObjectDamaged, ObjectMissing
from drsync.format import Malformed, names, seal
from drsync.format.segment import DiskMeta, DiskRows, PackEntry, check_bounds, check_rows, decode_pack
from drsync.log import Segment
from drsync.repository import VmObjects
from drsync.window import PlacedRows, place

_CACHED_PACKS = 2048  # of 64 GiB of data, about 14 KiB each
Failure: TypeAlias = ChainBroken | ObjectDamaged | ObjectMissing
"""Why a part of a log can't be read, and never will."""
FAILURES: Final = (ChainBroken, ObjectDamaged, ObjectMissing)
"""The same, for `except`."""


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
