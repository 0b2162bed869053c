"""Which rows of dropped points the next point that stays still shows. Pure, but for reading the indexes of packs.

    stays ──▶ 5    ░░▓▓░░      read newest first: a row is alive if nothing newer,
              4    ▓▓▓░        up to and with the point that stays, says anything
              3       ░▓▓▓     of its block; then the block is settled
    stays ──▶ 2

What only dropped points show is dead, and so is what a disk lost that shrank,
went away or was sent in full. Each interval between two points that stay is
looked at by itself: older points don't show it, later ones see what its end sees.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from drsync.format.segment import PackEntry
from drsync.log import Segment
from drsync.model import Kind, block_count
from drsync.window import PlacedRows, place

Placed: TypeAlias = Mapping[str, PlacedRows]
ReadPacks: TypeAlias = Callable[[Segment, Sequence[int]], Iterator[Placed]]
"""The rows of packs of a segment, by their numbers in its table, in that order."""

_COPIED_BLOCKS: Final = 500_000
"""Of packs, in one interval at a time: bounds the memory. Other packs stay, until a point is dropped there again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRows:
    """What is alive of one disk's rows in one object."""

    blocks: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.uint32]
    hashes: npt.NDArray[np.uint8]
    zero_first: Sequence[int]
    zero_count: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """How much of an object is alive."""

    size_bytes: int
    """Of the object as it is stored."""
    live_bytes: int
    """Of the frames that are alive."""
    live_blocks: int
    zero_runs: int
    entry: PackEntry | None
    """None: it is the segment itself."""
    rows: Mapping[str, LiveRows]
    """By disk; empty if it is not to be copied."""
    may_copy: bool
    """Whether less than half of it is alive, and it is not more than one run of prune copies."""

    @property
    def is_dead(self) -> bool:
        return not self.live_blocks and not self.zero_runs

    @property
    def goes(self) -> bool:
        """Whether it is not needed any more, once what is alive of it is copied."""
        return self.is_dead or self.may_copy


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLife:
    """How much of a dropped link of a log is alive: of its segment, and of each pack that it lists."""

    link: Segment
    own: Life
    packs: Sequence[Life]
    """In the order of its table."""


def lives_of(links: Sequence[Segment], read_packs: ReadPacks, *, copy_below: float = 0.5) -> list[LinkLife]:
    """What is alive of dropped `links`, which lie before the point that stays, the last of them; in their order.

    A pack of whose bytes not more than the part `copy_below` is alive may be copied out of.
    """
    *dropped, stays = links
    settled = _Settled(stays, copy_below)
    settled.lay(stays, read_packs, keep=False)
    newest_first = [settled.lay(link, read_packs, keep=True) for link in reversed(dropped)]
    return newest_first[::-1]


class _Settled:
    """The blocks of which something newer has told, by disk; disks of which all has been told are not in it."""

    def __init__(self, stays: Segment, copy_below: float) -> None:
        self._copy_below = copy_below
        disks = stays.meta.point.disks if stays.meta.point is not None else []
        self._room = _COPIED_BLOCKS
        self._blocks = {d.name: np.zeros(block_count(d.size_bytes), np.bool_) for d in disks}

    def lay(self, link: Segment, read_packs: ReadPacks, *, keep: bool) -> LinkLife:
        """Settle what a link tells of; what of it was not settled yet. Without `keep`, only the first counts."""
        point = link.meta.point
        disks = [d.name for d in point.disks] if point is not None else []
        fulls = {d.name for d in point.disks if d.kind is Kind.FULL} if point is not None else set()
        if point is not None:
            self._blocks = {name: at for name, at in self._blocks.items() if name in disks}
        wanted = set(self._blocks) - (set() if keep else fulls)
        own = self._life(place(link.rows), link.length, None, wanted)
        packs = self._packs(link, disks, wanted, read_packs)
        for disk in point.disks if point is not None else []:
            if disk.name in self._blocks:  # of what is older, only what lies below counts
                self._blocks[disk.name] = self._blocks[disk.name][: block_count(disk.size_bytes)]
        self._blocks = {name: at for name, at in self._blocks.items() if name not in fulls}
        return LinkLife(link=link, own=own, packs=packs)

    def _packs(self, link: Segment, disks: Sequence[str], wanted: set[str], read_packs: ReadPacks) -> list[Life]:
        """The newest round first, which is also the order in which they are listed from the end."""
        numbers = list(reversed(range(len(link.packs))))
        needed = [n for n in numbers if wanted & _disks_of(link.packs.entry(n), disks)]
        rows = read_packs(link, needed)
        read = set(needed)
        lives = [
            self._life(next(rows) if n in read else {}, link.packs.entry(n).length, link.packs.entry(n), wanted)
            for n in numbers
        ]
        return lives[::-1]

    def _life(self, placed: Placed, size_bytes: int, entry: PackEntry | None, wanted: set[str]) -> Life:
        rows = {disk: self._live(disk, placed[disk]) for disk in placed if disk in wanted}
        rows = {disk: live for disk, live in rows.items() if len(live.blocks) or live.zero_first}
        live_bytes = sum(int(live.lengths.sum(dtype=np.uint64)) for live in rows.values())
        frame_bytes = sum(int(held.rows.lengths.sum(dtype=np.uint64)) for held in placed.values())
        live_blocks = sum(len(live.blocks) for live in rows.values())
        may_copy = entry is None or (live_bytes <= frame_bytes * self._copy_below and live_blocks <= self._room)
        if may_copy and entry is not None:
            self._room -= live_blocks
        return Life(
            size_bytes=size_bytes,
            live_bytes=live_bytes,
            live_blocks=live_blocks,
            zero_runs=sum(len(live.zero_first) for live in rows.values()),
            entry=entry,
            rows=rows if may_copy else {},
            may_copy=may_copy,
        )

    def _live(self, disk: str, placed: PlacedRows) -> LiveRows:
        settled, rows = self._blocks[disk], placed.rows
        inside = int(np.searchsorted(rows.blocks, len(settled)))
        alive = np.flatnonzero(~settled[rows.blocks[:inside]])
        settled[rows.blocks[:inside]] = True
        first, count = _live_runs(settled, rows.zero_first.tolist(), rows.zero_count.tolist())
        return LiveRows(
            blocks=rows.blocks[alive],
            offsets=placed.offsets[alive],
            lengths=rows.lengths[alive],
            hashes=rows.hashes[alive],
            zero_first=first,
            zero_count=count,
        )


def _live_runs(settled: npt.NDArray[np.bool_], first: list[int], count: list[int]) -> tuple[list[int], list[int]]:
    """The parts of zero runs that are not settled yet; they are from now on."""
    starts: list[int] = []
    counts: list[int] = []
    for block, blocks in zip(first, count, strict=True):
        part = settled[block : block + blocks]
        edges = np.flatnonzero(np.diff(np.concatenate([[True], part, [True]])))
        starts += (edges[::2] + block).tolist()
        counts += (edges[1::2] - edges[::2]).tolist()
        part[:] = True
    return starts, counts


def _disks_of(entry: PackEntry, disks: Sequence[str]) -> set[str]:
    """The disks of which a pack can hold anything."""
    return set(disks[entry.first >> 32 : (entry.last >> 32) + 1])
