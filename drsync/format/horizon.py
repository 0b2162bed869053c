"""The horizon of a log: which points survive, and what stands for what was taken out (docs/format.md, "Horizon").

index = u32 length of metadata | metadata (JSON)
        | points:   number u64[p] | index SHA-256 32[p]
        | merged:   first u64[m] | last u64[m] | object id 16[m] | index SHA-256 32[m] | SHA-256 of segment `last` 32[m]
        | packs:    object id 16[c]
        | retired:  object id 16[r]
"""

from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from drsync.format import Malformed
from drsync.format.columns import U64, Bytes2D, Columns, little_endian, with_metadata
from drsync.format.keys import OBJECT_ID_BYTES
from drsync.format.names import MAX_SEQ
from drsync.format.record import decode_record

_SHA256_BYTES: Final = 32


class HorizonMeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Metadata of a horizon."""

    number: int
    previous: str
    """SHA-256 (hex) of the sealed index of horizon number - 1; empty for the first."""
    through: int
    """The segment up to which it speaks: the newest point when it was made; 0: the log had none."""
    segment: str
    """SHA-256 (hex) of the sealed index of segment `through`; empty if that is 0."""
    time: str
    """When it was made by the clock of who made it, RFC 3339; for people only."""
    points: int
    merged: int
    packs: int
    retired: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PointTable:
    """The points that survive, ascending."""

    numbers: U64
    index_sha256: Bytes2D

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedTable:
    """The merged segments, ascending."""

    first: U64
    last: U64
    ids: Bytes2D
    index_sha256: Bytes2D
    segment_sha256: Bytes2D
    """Of the segment `last`, which the segment behind it says to follow."""

    def __len__(self) -> int:
        return len(self.last)


@dataclass(frozen=True, slots=True, kw_only=True)
class HorizonIndex:
    """What the index of a horizon says."""

    meta: HorizonMeta
    points: PointTable
    merged: MergedTable
    packs: Bytes2D
    """Those that segments and merged segments up to `through` list."""
    retired: Bytes2D
    """Packs and merged segments that it took out of use, and those before it that are not deleted yet."""


def encode_horizon(horizon: HorizonIndex) -> bytes:
    """The index of a horizon."""
    points, merged = horizon.points, horizon.merged
    columns = (
        *(points.numbers, points.index_sha256),
        *(merged.first, merged.last, merged.ids, merged.index_sha256, merged.segment_sha256),
        *(horizon.packs, horizon.retired),
    )
    return b"".join([with_metadata(horizon.meta), *(little_endian(column) for column in columns)])


def decode_horizon(index: bytes) -> HorizonIndex:
    """What an index says.

    Raises:
        Malformed: it breaks a rule of docs/format.md.
    """
    columns = Columns(index)
    meta = decode_record(columns.metadata(), HorizonMeta)
    points = PointTable(numbers=columns.u64(meta.points), index_sha256=columns.rows_of(meta.points, _SHA256_BYTES))
    merged = MergedTable(
        first=columns.u64(meta.merged),
        last=columns.u64(meta.merged),
        ids=columns.rows_of(meta.merged, OBJECT_ID_BYTES),
        index_sha256=columns.rows_of(meta.merged, _SHA256_BYTES),
        segment_sha256=columns.rows_of(meta.merged, _SHA256_BYTES),
    )
    packs = columns.rows_of(meta.packs, OBJECT_ID_BYTES)
    retired = columns.rows_of(meta.retired, OBJECT_ID_BYTES)
    columns.end()
    found = HorizonIndex(meta=meta, points=points, merged=merged, packs=packs, retired=retired)
    _check(found)
    return found


def _check(horizon: HorizonIndex) -> None:
    meta, points, merged = horizon.meta, horizon.points.numbers, horizon.merged
    if not 1 <= meta.number <= MAX_SEQ or not 0 <= meta.through <= MAX_SEQ:
        raise Malformed("it has a number that no horizon has")
    if np.any(points[1:] <= points[:-1]) or np.any(points < 1) or np.any(points > meta.through):
        raise Malformed("its points are not in order, or lie behind it")
    if np.any(merged.last < merged.first) or np.any(merged.first[1:] <= merged.last[:-1]):
        raise Malformed("its merged segments are not in order, or overlap")
    if len(merged) and (merged.first[0] < 1 or merged.last[-1] >= meta.through):
        raise Malformed("its merged segments lie outside of what it speaks of")
    if meta.through and (not len(points) or int(points[-1]) != meta.through):
        raise Malformed("the newest point that it knows does not survive")
    at = np.searchsorted(merged.last, points)
    inside = at < len(merged)
    if np.any(points[inside] >= merged.first[at[inside]]):
        raise Malformed("a point survives that a merged segment stands for")
