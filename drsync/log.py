"""A VM's log: numbered, immutable segments; each commits a point, or fences.

The log is the lock. A segment is created, never overwritten: of two writers
that try the same number, one wins and the other learns that it is fenced. No
clock and no lease take part. Each segment carries the hash of the index before
it, so the log is a chain that can be checked from any segment whose hash is known.

Prune takes segments out of the middle. Then the horizon (horizon.py) says what
stands in the holes, and the chain goes on through that: who reads `chain` sees
no holes, just segments that say what several said.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final, TypeVar

import numpy as np

from drsync.errors import (
    ChainBroken,
    IntegrityError,
    KeyMissing,
    ObjectDamaged,
    ObjectMissing,
    PointPruned,
)
from drsync.format import Malformed, names, seal
from drsync.format.keys import FIRST_GENERATION
from drsync.format.segment import (
    DiskRows,
    PackTable,
    SegmentMeta,
    decode_segment,
)
from drsync.horizon import NONE, Horizon, Merged, check_in_force, newest_number, read_horizon
from drsync.repository import VmObjects
from drsync.store import ObjectInfo

FIRST_SEQ = 1
UNDER_AN_OLDER_KEY: Final = "it is under an older key than the segment before it"
_READERS: Final = 16
"""Segments that are read at once: a request takes tens of milliseconds."""
_LOGGER = logging.getLogger(__name__)
T = TypeVar("T")

Unreadable = ObjectMissing | IntegrityError | KeyMissing
"""Why a segment can't be had: it is gone, it is not as it was written, or it is under a key that is not here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A segment as it was read from the repository: authenticated, its rows checked against its disks."""

    name: str
    object_id: bytes
    meta: SegmentMeta
    packs: PackTable
    rows: Sequence[DiskRows]
    index_sha256: bytes
    """Of a merged segment: that of the last one that it stands for, which the next one follows."""
    frames_end: int
    length: int
    generation: int = FIRST_GENERATION
    """Of the root key that it is under."""
    dropped: bool = False
    """What it commits is no point any more: it is there for blocks that later points show."""
    stands_from: int = 0
    """Of a merged segment: the first one that it stands for; 0 if it is one of the log's own."""

    @classmethod
    def unstored(cls, meta: SegmentMeta, packs: PackTable, *, index_sha256: bytes = b"") -> "Segment":
        """A segment that is in no repository, for what looks at the packs that it lists, or goes on behind it."""
        return cls(
            name="",
            object_id=bytes(16),
            meta=meta,
            packs=packs,
            rows=[],
            index_sha256=index_sha256,
            frames_end=0,
            length=0,
        )

    @property
    def seq(self) -> int:
        return self.meta.seq

    @property
    def first(self) -> int:
        """The first segment that it stands for: itself, unless it is a merged one."""
        return self.stands_from or self.seq

    @property
    def stored_bytes(self) -> int:
        """What the point takes in the repository: its segment and its packs."""
        return self.length + int(self.packs.lengths.sum(dtype=np.uint64))


class Log:
    """Reads one VM's log."""

    def __init__(self, objects: VmObjects) -> None:
        self.objects = objects
        self.vm = objects.vm
        self._horizon = NONE

    def horizon(self) -> Horizon:
        """The horizon that is in force now; mostly one request, which finds nothing newer than what is known.

        Raises:
            ChainBroken, ObjectDamaged: it can't be had as it was written.
        """
        known = self._horizon
        number = newest_number(self.objects, known=known.number)
        if number != known.number:
            known = read_horizon(self.objects, number)
            self._horizon = known
        return known

    def listed(self, *, after: int = 0) -> Iterator[tuple[int, ObjectInfo]]:
        """The segments behind `after` as the store lists them, in order; gaps are not checked.

        Raises:
            ObjectDamaged: something in the log is not a segment.
        """
        start = names.segment(self.vm, after) if after else ""
        for info in self.objects.store.list(names.log_prefix(self.vm), after=start):
            try:
                yield names.seq_of_segment(info.key), info
            except Malformed as err:
                raise ObjectDamaged(key=info.key, problem=err) from err

    def numbers(self, *, after: int = 0) -> list[int]:
        """The numbers of the segments behind `after`, in order.

        Raises:
            ChainBroken: a number is missing in between.
        """
        found: list[int] = []
        for expected, (seq, _) in enumerate(self.listed(after=after), after + 1):
            if seq != expected:
                raise ChainBroken(vm=self.vm, seq=expected, problem=f"segment {expected} is missing, {seq} is there")
            found.append(seq)
        return found

    def newest(self, *, after: int = 0) -> int:
        """The number of the newest segment; `after` is one that is known to have existed, or 0. 0 = the log is empty.

        Raises:
            ChainBroken: a segment is missing, which no horizon explains.
        """
        if after:
            try:
                return next(iter(self.numbers(after=after)[-1:]), after)
            except ChainBroken:
                if self.horizon().through <= after:
                    raise
        while True:
            horizon = self.horizon()
            try:
                return self._newest_behind(horizon)
            except ChainBroken:
                if self.horizon().number == horizon.number:
                    raise  # else it was pruned in this very moment

    def _newest_behind(self, horizon: Horizon) -> int:
        """The newest segment, by what lies behind a horizon: the newest point that it knows is always there."""
        numbers = self.numbers(after=max(0, horizon.through - 1))
        if horizon.through and not numbers:
            problem = f"the log ends before {horizon.through}, the newest point when it was pruned"
            raise ChainBroken(vm=self.vm, seq=horizon.through, problem=problem)
        return numbers[-1] if numbers else 0

    def read(self, seq: int) -> Segment:
        """Segment `seq`, authenticated.

        Raises:
            ObjectMissing, ObjectDamaged: there is no such segment, or not as it was written.
        """
        name = names.segment(self.vm, seq)
        return self.decode(name, seq, self.objects.read_index(name, "segment", seq=seq))

    def decode(self, name: str, seq: int, opened: seal.Opened) -> Segment:
        """The segment whose index was opened.

        Raises:
            ObjectDamaged: the index breaks a rule of the format.
        """
        try:
            meta, packs, rows = decode_segment(opened.index, opened.frames_end)
            if meta.seq != seq:
                raise Malformed(f"its index is of segment {meta.seq}")
        except Malformed as err:
            raise ObjectDamaged(key=name, problem=err) from err
        return Segment(
            name=name,
            object_id=bytes.fromhex(opened.header.object),
            meta=meta,
            packs=packs,
            rows=rows,
            index_sha256=opened.index_sha256,
            frames_end=opened.frames_end,
            length=opened.length,
            generation=opened.header.generation,
        )

    def chain(
        self,
        first: int,
        last: int,
        *,
        previous: str = "",
        generation: int = FIRST_GENERATION,
        horizon: Horizon | None = None,
    ) -> Iterator[Segment]:
        """Segments `first` to `last` in order, each checked to follow the one before; merged ones in the holes.

        `previous` is the hash (hex) of the index of segment `first - 1`, `generation` that of its key: a segment
        under an older key than the one before it is nobody's but a thief's. `horizon` is the
        one in force, if it is known already. Several are read at once.

        Raises:
            ChainBroken: a segment does not follow the one before it, or is not the one that the horizon knows.
            PointPruned: `first` or `last` lies in a hole.
            PrunedMeanwhile: prune deleted what was still there when this began.
        """
        horizon = horizon or self.horizon()
        self._check_ends(first, last, horizon)
        for _, segment in _read_ahead(horizon.links(first, last), lambda link: self._read_link(link, horizon)):
            if segment.meta.previous != previous:
                raise ChainBroken(vm=self.vm, seq=segment.first, problem="it does not follow the segment before it")
            if segment.generation < generation:
                raise ChainBroken(vm=self.vm, seq=segment.seq, problem=UNDER_AN_OLDER_KEY)
            previous, generation = segment.index_sha256.hex(), segment.generation
            yield segment

    def _check_ends(self, first: int, last: int, horizon: Horizon) -> None:
        begins, ends = horizon.merged_at(first), horizon.merged_at(last)
        if begins is not None and begins.first != first:
            raise PointPruned(vm=self.vm, point=first, known="points before and after it")
        if ends is not None and ends.last != last:
            raise PointPruned(vm=self.vm, point=last, known="points before and after it")

    def _read_link(self, link: int | Merged, horizon: Horizon) -> Segment:
        try:
            return self._linked(link, horizon)
        except ObjectMissing as err:
            check_in_force(self.objects, horizon.number, err)
            raise

    def _linked(self, link: int | Merged, horizon: Horizon) -> Segment:
        return self.read_merged(link) if isinstance(link, Merged) else self.under(horizon, self.read(link))

    def tried(
        self, links: Iterable[int | Merged], horizon: Horizon
    ) -> Iterator[tuple[int | Merged, Segment | Unreadable]]:
        """Links in order, each with its segment, or why that can't be had; several are read at once.

        Whether one follows the other is not checked: this is for who looks at damage.

        Raises:
            StoreError: it could not be found out.
        """

        def read(link: int | Merged) -> Segment | Unreadable:
            try:
                return self._linked(link, horizon)
            except (ObjectMissing, IntegrityError, KeyMissing) as err:
                return err

        return _read_ahead(links, read)

    def survivor(self, horizon: Horizon, seq: int) -> Segment:
        """The segment of a point that survived a horizon.

        Raises:
            ObjectMissing, ObjectDamaged, ChainBroken: it is not there, or another one than the horizon knows.
            PrunedMeanwhile: it did not survive the next horizon.
        """
        return self._read_link(seq, horizon)

    def under(self, horizon: Horizon, segment: Segment) -> Segment:
        """A segment of the log as a horizon knows it.

        Raises:
            ChainBroken: it is another one than that, or the horizon is under an older key than its newest point.
        """
        known = horizon.hash_of_point(segment.seq) if segment.seq in horizon.survivors else segment.index_sha256
        if segment.index_sha256 != known:
            problem = "it is another segment than the horizon knows"
            raise ChainBroken(vm=self.vm, seq=segment.seq, problem=problem)
        if segment.seq == horizon.through and horizon.generation < segment.generation:
            problem = f"horizon {horizon.number} is under an older key than it: who made that had no right to (F48)"
            raise ChainBroken(vm=self.vm, seq=segment.seq, problem=problem)
        return replace(segment, dropped=True) if horizon.is_dropped(segment.seq) else segment

    def read_merged(self, link: Merged) -> Segment:
        """A merged segment.

        Raises:
            ObjectMissing, ObjectDamaged: it is not there, or not the one that the horizon names.
        """
        name = names.merged(self.vm, link.last, link.object_id)
        opened = self.objects.read_index(name, "merged", seq=link.last)
        if opened.index_sha256 != link.index_sha256:
            raise ObjectDamaged(key=name, problem="it is not the one that the horizon names")
        segment = self.decode(name, link.last, opened)
        if any(len(rows.blocks) for rows in segment.rows):
            raise ObjectDamaged(key=name, problem="it has frames of its own")
        return replace(segment, index_sha256=link.segment_sha256, dropped=True, stands_from=link.first)


def _read_ahead(links: Iterable[int | Merged], read: Callable[[int | Merged], T]) -> Iterator[tuple[int | Merged, T]]:
    """Each link with what was read of it, in order; several are read at once, and few are held."""
    rest = iter(links)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="log") as readers:
        while some := list(islice(rest, _READERS * 4)):
            yield from zip(some, readers.map(read, some), strict=True)


def beside(log: Log) -> Log:
    """A log, for who writes other objects than segments beside its writer, and may have newer keys.

    What is written so is under the key of the log's newest segment, which the writer has.

    Raises:
        ObjectMissing, ObjectDamaged: that one can't be read.
    """
    if log.objects.keys.newest == FIRST_GENERATION:
        return log
    newest = max((seq for seq, _ in log.listed()), default=0)  # whether there are gaps is the caller's business
    return Log(log.objects.under(log.read(newest).generation)) if newest else log
