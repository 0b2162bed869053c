"""The horizon in force: which points of a log survive, and what stands in its holes.

    log      1 ─ 2 ─ 3 ─ 4 ─ 5 ─ 6 ─ 7 ─ 8 ─ 9
    stored   1   ·   ·   ·   5   6   ·   8   9        2 to 4 and 7 were taken out
             └───┴ merged 2…4 ┘   └ merged 7           and these say what they said
                                      ▲
    horizon  points 1, 5, 8 survive ──┘ through: behind it the log is what it lists

Horizons are numbered from 1 without gaps and never deleted: who knows number n
asks for n + 1 by name, and a 404 tells that nothing was pruned since.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import numpy as np

from drsync.errors import ChainBroken, ObjectDamaged, ObjectMissing, PrunedMeanwhile
from drsync.format import Malformed, names, seal
from drsync.format.horizon import HorizonIndex, HorizonMeta, MergedTable, PointTable, decode_horizon
from drsync.format.keys import FIRST_GENERATION, OBJECT_ID_BYTES
from drsync.repository import VmObjects

_NO_ROWS: Final = np.zeros((0, 32), np.uint8)
_NO_IDS: Final = np.zeros((0, OBJECT_ID_BYTES), np.uint8)
_NO_NUMBERS: Final = np.zeros(0, np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A merged segment, as the horizon names it."""

    first: int
    last: int
    object_id: bytes
    index_sha256: bytes
    segment_sha256: bytes
    """Of the index of segment `last`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Horizon:
    """The newest horizon of a VM; number 0: nothing was pruned yet."""

    index: HorizonIndex
    index_sha256: bytes
    """Of itself: what the next one says to follow."""
    survivors: frozenset[int] = field(repr=False)
    retired_ids: frozenset[bytes] = field(repr=False)
    """The ids of packs and merged segments that are to be deleted, or are already."""
    generation: int = FIRST_GENERATION
    """Of the root key that it is under."""

    @property
    def number(self) -> int:
        return self.index.meta.number

    @property
    def through(self) -> int:
        """The segment up to which it speaks; 0 if nothing was pruned yet."""
        return self.index.meta.through

    @property
    def segment(self) -> str:
        """The hash (hex) of the index of segment `through`."""
        return self.index.meta.segment

    def is_dropped(self, seq: int) -> bool:
        """Whether what the segment commits is no point any more (a fence was none before)."""
        return seq <= self.through and seq not in self.survivors

    def merged(self) -> Iterator[Merged]:
        """The merged segments, in order."""
        return (self._merged(n) for n in range(len(self.index.merged)))

    def merged_at(self, seq: int) -> Merged | None:
        """The merged segment that stands for segment `seq`; None if that one is in the log itself."""
        table = self.index.merged
        at = int(np.searchsorted(table.last, np.uint64(seq)))
        return self._merged(at) if at < len(table) and int(table.first[at]) <= seq else None

    def _merged(self, number: int) -> Merged:
        table = self.index.merged
        return Merged(
            first=int(table.first[number]),
            last=int(table.last[number]),
            object_id=table.ids[number].tobytes(),
            index_sha256=table.index_sha256[number].tobytes(),
            segment_sha256=table.segment_sha256[number].tobytes(),
        )

    def links(self, first: int, last: int) -> Iterator[int | Merged]:
        """What there is to read of segments `first` to `last`, in order: numbers, and merged segments in the holes."""
        seq = first
        while seq <= last:
            stands = self.merged_at(seq) if seq <= self.through else None
            yield seq if stands is None else stands
            seq = seq + 1 if stands is None else stands.last + 1

    def hash_of_point(self, seq: int) -> bytes:
        """The hash of the index of a point that survives. KeyError if none does under that number."""
        points = self.index.points
        at = int(np.searchsorted(points.numbers, np.uint64(seq)))
        if at >= len(points) or int(points.numbers[at]) != seq:
            raise KeyError(seq)
        found: bytes = points.index_sha256[at].tobytes()
        return found


def _none() -> Horizon:
    meta = HorizonMeta(number=0, previous="", through=0, segment="", time="", points=0, merged=0, packs=0, retired=0)
    merged = MergedTable(
        first=_NO_NUMBERS, last=_NO_NUMBERS, ids=_NO_IDS, index_sha256=_NO_ROWS, segment_sha256=_NO_ROWS
    )
    points = PointTable(numbers=_NO_NUMBERS, index_sha256=_NO_ROWS)
    index = HorizonIndex(meta=meta, points=points, merged=merged, packs=_NO_IDS, retired=_NO_IDS)
    return Horizon(index=index, index_sha256=b"", survivors=frozenset(), retired_ids=frozenset())


NONE: Final = _none()
"""Nothing was pruned yet."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A horizon as the store lists it."""

    number: int
    modified: datetime | None
    """When the store took it; None: there is none yet."""


def listed_newest(objects: VmObjects, *, after: int = 0) -> Listed:
    """The newest horizon behind number `after`, which is known to exist or 0, by one listing.

    Raises:
        ChainBroken: a number is missing in between: somebody deleted what nobody may.
        ObjectDamaged: something among them is no horizon.
    """
    newest = Listed(after, None)
    start = names.horizon(objects.vm, after) if after else ""
    for info in objects.store.list(names.horizon_prefix(objects.vm), after=start):
        try:
            number = names.number_of_horizon(info.key)
        except Malformed as err:
            raise ObjectDamaged(key=info.key, problem=err) from err
        if number != newest.number + 1:
            problem = f"horizon {newest.number + 1} is missing, {number} is there"
            raise ChainBroken(vm=objects.vm, seq=number, problem=problem)
        newest = Listed(number, info.modified)
    return newest


def newest_number(objects: VmObjects, *, known: int = 0) -> int:
    """The number of the newest horizon, if `known` is one that exists, or 0: mostly one GET that finds nothing.

    A listing only makes it fast: the number behind the newest is asked for by name.

    Raises:
        ChainBroken, ObjectDamaged: see `listed_newest`.
    """
    number = known
    while _exists(objects, number + 1):
        number = max(number + 1, listed_newest(objects, after=number).number)
    return number


def _exists(objects: VmObjects, number: int) -> bool:
    try:
        objects.store.get_tail(names.horizon(objects.vm, number), 1)
    except ObjectMissing:
        return False
    return True


def read_horizon(objects: VmObjects, number: int) -> Horizon:
    """Horizon `number`, authenticated; 0 is that of a log that was never pruned.

    Raises:
        ObjectMissing, ObjectDamaged: there is none, or not as it was written.
    """
    if number == 0:
        return NONE
    name = names.horizon(objects.vm, number)
    opened: seal.Opened = objects.read_index(name, "horizon", seq=number)
    try:
        index = decode_horizon(opened.index)
        if index.meta.number != number:
            raise Malformed(f"its index is of horizon {index.meta.number}")
    except Malformed as err:
        raise ObjectDamaged(key=name, problem=err) from err
    survivors = frozenset(int(n) for n in index.points.numbers)
    retired = frozenset(row.tobytes() for row in index.retired)
    return Horizon(
        index=index,
        index_sha256=opened.index_sha256,
        survivors=survivors,
        retired_ids=retired,
        generation=opened.header.generation,
    )


def check_in_force(objects: VmObjects, number: int, cause: ObjectMissing) -> None:
    """Tell a loss from a deletion: return if horizon `number` is still the one in force.

    Raises:
        PrunedMeanwhile: a newer one is; what is missing may have been deleted by prune.
    """
    if newest_number(objects, known=number) != number:
        raise PrunedMeanwhile(vm=objects.vm, problem=cause) from cause
