"""A part of a disk: which object holds each of its blocks, and where. Rows of segments and packs are laid over it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from drsync.format.blockmap import PAGE_BLOCKS
from drsync.format.columns import Bytes2D
from drsync.format.frame import HASH_BYTES
from drsync.format.keys import FIRST_GENERATION
from drsync.format.seal import FRAMES_START
from drsync.format.segment import DiskRows

WINDOW_BLOCKS = PAGE_BLOCKS
"""Blocks of a window: what one L2 table of a restored image and one page of a block map tell of, too."""
NOWHERE = -1
"""The container of a block that no object holds: it reads as zeros."""
UNKNOWN = -2
"""The container of a block of which nobody can tell where it is, because of PointImage.failures[0]; less: [1] ..."""


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
