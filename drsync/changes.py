"""What a capture brings: which blocks to send, in the order of the point (disk, block).

For an increment that is what its layer holds. For a resync the layer holds the
whole disk, and each block is compared, by its keyed hash, with the point
before: only what differs is sent, and what is gone becomes a zero run.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from drsync.direct import aligned_buffer
from drsync.format.frame import HASH_BYTES, FrameSealer
from drsync.image import PointImage
from drsync.model import BLOCK_SIZE, block_count, block_length
from drsync.qcow2 import TABLE_BLOCKS, Table
from drsync.source.layer import Layer
from drsync.window import NOWHERE, Window

PIECE_BLOCKS = 16
"""Blocks that are read at once: 1 MiB, which stays in the processor's cache until it is compressed."""

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Blocks of one disk to send, in order; and runs of blocks that now read as zeros."""

    blocks: Numbers
    offsets: Numbers
    """Where each block's bytes lie in the layer."""
    zero_first: Numbers
    zero_count: Numbers


def nonzero_rows(raw: memoryview, count: int) -> Flags:
    """Which of the first `count` blocks in `raw` hold anything but zeros."""
    words = np.frombuffer(raw, np.uint64, count * BLOCK_SIZE // 8).reshape(count, -1)
    found: Flags = np.bitwise_or.reduce(words, axis=1) != 0
    return found


def zero_runs(zeros: Flags, first_block: int) -> tuple[Numbers, Numbers]:
    """The runs of True in `zeros`: first block and number of blocks of each."""
    edges = np.flatnonzero(np.diff(zeros, prepend=False, append=False))
    return edges[::2] + first_block, edges[1::2] - edges[::2]


def changes_of(layer: Layer, *, full: bool) -> Iterator[Change]:
    """All that a layer holds. `full`: the disk starts from nothing, so zeros need not be told."""
    for table in layer.tables():
        at = np.flatnonzero(table.offsets)
        first, count = zero_runs(np.zeros(0, np.bool_) if full else table.zeros, table.first_block)
        if len(at) or len(first):
            yield Change(blocks=at + table.first_block, offsets=table.offsets[at], zero_first=first, zero_count=count)


def differences(layer: Layer, disk: str, size_bytes: int, before: PointImage, sealer: FrameSealer) -> Iterator[Change]:
    """Where a layer that holds the whole disk differs from the point before.

    `sealer` hashes as the point before was hashed (one key for all of a VM).

    Raises:
        ValueError: `before` was read by a block map, which does not know what the blocks hashed to.
    """
    if not before.has_hashes:
        raise ValueError("a point that was read by a block map has no hashes to compare with")
    tables = layer.tables()
    upcoming = next(tables, None)
    comparer = _Comparer(layer, sealer, size_bytes)
    known_windows = before.window_count(disk)
    for index in range(-(-block_count(size_bytes) // TABLE_BLOCKS)):
        table = None
        if upcoming is not None and upcoming.first_block == index * TABLE_BLOCKS:
            table, upcoming = upcoming, next(tables, None)
        known = before.window(disk, index) if index < known_windows else None
        change = comparer.compare(index * TABLE_BLOCKS, table, known)
        if len(change.blocks) or len(change.zero_first):
            yield change


class _Comparer:
    """Compares a layer with a point, one window at a time."""

    def __init__(self, layer: Layer, sealer: FrameSealer, size_bytes: int) -> None:
        self._layer = layer
        self._sealer = sealer
        self._size_bytes = size_bytes
        self._raw = aligned_buffer(PIECE_BLOCKS * BLOCK_SIZE)

    def compare(self, first_block: int, table: Table | None, known: Window | None) -> Change:
        """The blocks of a window that differ; `table` None = the layer holds nothing there."""
        count = min(TABLE_BLOCKS, block_count(self._size_bytes) - first_block)
        had = np.zeros(count, np.bool_)
        hashes = np.zeros((count, HASH_BYTES), np.uint8)
        if known is not None:
            have = min(count, len(known.containers))
            had[:have] = known.containers[:have] != NOWHERE
            hashes[:have] = known.hashes[:have]
        offsets = np.zeros(count, np.int64) if table is None else table.offsets
        changed, holds = self._changed(first_block, offsets, had, hashes)
        runs = zero_runs(had & ~holds, first_block)
        at = np.flatnonzero(changed)
        return Change(blocks=at + first_block, offsets=offsets[at], zero_first=runs[0], zero_count=runs[1])

    def _changed(
        self, first_block: int, offsets: Numbers, had: Flags, hashes: npt.NDArray[np.uint8]
    ) -> tuple[Flags, Flags]:
        """Which blocks differ from their known hash, and which hold anything at all."""
        changed = np.zeros(len(offsets), np.bool_)
        holds = np.zeros(len(offsets), np.bool_)
        present = np.flatnonzero(offsets)
        for start in range(0, len(present), PIECE_BLOCKS):
            piece = present[start : start + PIECE_BLOCKS]
            self._layer.read_blocks(offsets[piece], self._raw[: len(piece) * BLOCK_SIZE])
            rows = nonzero_rows(self._raw, len(piece))
            holds[piece] = rows
            for row in np.flatnonzero(rows).tolist():
                block = int(piece[row])
                length = block_length(first_block + block, self._size_bytes)
                digest = self._sealer.hash_block(self._raw[row * BLOCK_SIZE : row * BLOCK_SIZE + length])
                changed[block] = not had[block] or digest != hashes[block].tobytes()
        return changed, holds
