"""What is worth to be taken out of a log. Pure.

    lives of dropped links ─▶ candidates (less to copy than is freed) ─▶ runs of neighbours ─▶ those that pay

A run becomes one merged segment. It ends where disks come, go, change their size
or are sent in full, so that the bounds of the packs that stay keep their meaning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from drsync.format.segment import PackEntry
from drsync.model import Kind
from drsync.prune.liveness import Life, LinkLife
from drsync.units import GiB

PACK_BLOCKS: Final = 512
"""Copied blocks go into packs of so many (docs/decisions/0001-object-size.md)."""
_MERGED_BYTES: Final = 700
"""What a merged segment takes without anything in it."""
_ENTRY_BYTES: Final = 80
"""What it takes more for each pack that it lists."""
_ROW_BYTES: Final = 28
"""What the index of a pack has for each block."""
_RUN_BYTES: Final = 8
_MAX_LINKS: Final = 1000
_MAX_PACKS: Final = 100_000
_MAX_ZERO_RUNS: Final = 500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What a store charges, in dollars. The defaults are AWS S3's of us-east-1 (aws.amazon.com/s3/pricing)."""

    storage_gib_month: float = 0.023
    put: float = 0.005 / 1000
    get: float = 0.0004 / 1000
    transfer_gib: float = 0.0
    """For a GiB that is read: nothing within the bucket's region, 0.09 outside of AWS."""


FREE: Final = Prices(storage_gib_month=0.0, put=0.0, get=0.0, transfer_gib=0.0)
"""A directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring links that one merged segment takes the place of."""

    links: Sequence[LinkLife]

    @property
    def first(self) -> int:
        return self.links[0].link.first

    @property
    def last(self) -> int:
        return self.links[-1].link.seq

    @property
    def changes(self) -> bool:
        """Whether it is more than a merged segment that is written once again."""
        return len(self.links) > 1 or not self.links[0].link.stands_from or bool(self.retired)

    @property
    def copied(self) -> list[tuple[LinkLife, Life]]:
        """What is copied out of, with the link that it belongs to."""
        return [(link, life) for link in self.links for life in _copied(link)]

    @property
    def retired(self) -> list[PackEntry]:
        """The packs that are not needed any more."""
        return [life.entry for link in self.links for life in _gone(link) if life.entry is not None]

    @property
    def copied_bytes(self) -> int:
        return sum(life.live_bytes for _, life in self.copied)

    @property
    def copied_blocks(self) -> int:
        return sum(life.live_blocks for _, life in self.copied)

    @property
    def freed_bytes(self) -> int:
        """What the repository takes less when all is deleted that this takes out."""
        return sum(map(_freed_bytes, self.links)) - _MERGED_BYTES

    @property
    def puts(self) -> int:
        return 1 + -(-self.copied_blocks // PACK_BLOCKS)

    @property
    def gets(self) -> int:
        """To read what is copied, and to read back what was written."""
        return sum(life.live_blocks > 0 for _, life in self.copied) + self.puts

    def saved(self, prices: Prices) -> float:
        """Dollars a month."""
        return self.freed_bytes / GiB * prices.storage_gib_month

    def cost(self, prices: Prices) -> float:
        """Dollars, once."""
        read = 2 * self.copied_bytes / GiB * prices.transfer_gib
        return self.puts * prices.put + self.gets * prices.get + read


def plan_runs(lives: Sequence[LinkLife], prices: Prices, *, copy_below: float = 0.5) -> list[Run]:
    """What to take out of one interval between two points that stay; `copy_below` as in `lives_of`."""
    runs = (Run(links=links) for links in _neighbours(lives, copy_below))
    return [run for run in runs if run.changes and run.freed_bytes >= 0 and run.saved(prices) >= run.cost(prices)]


def _neighbours(lives: Sequence[LinkLife], copy_below: float) -> Iterator[Sequence[LinkLife]]:
    run = _Growing()
    for life in lives:
        candidate = _is_candidate(life, copy_below)
        if run.links and not (candidate and run.takes(life)):
            yield run.links
            run = _Growing()
        if candidate:
            run.add(life)
    if run.links:
        yield run.links


class _Growing:
    """A run that is being put together."""

    def __init__(self) -> None:
        self.links: list[LinkLife] = []
        self._packs = 0
        self._zero_runs = 0
        self._geometry: list[tuple[str, int]] | None = None
        """Names and sizes of the disks; None as long as there is no point in it."""

    def takes(self, life: LinkLife) -> bool:
        """Whether a link may follow those that are in it."""
        point = life.link.meta.point
        fits = len(self.links) < _MAX_LINKS and self._packs < _MAX_PACKS and self._zero_runs < _MAX_ZERO_RUNS
        if point is None or not fits:
            return fits
        same = self._geometry is None or self._geometry == [(d.name, d.size_bytes) for d in point.disks]
        return same and not any(d.kind is Kind.FULL for d in point.disks)

    def add(self, life: LinkLife) -> None:
        point = life.link.meta.point
        self.links.append(life)
        self._packs += len(life.packs)
        self._zero_runs += sum(copied.zero_runs for copied in _copied(life))
        if point is not None:
            self._geometry = [(d.name, d.size_bytes) for d in point.disks]


def _copied(link: LinkLife) -> list[Life]:
    packs = [life for life in link.packs if life.may_copy and not life.is_dead]
    return [link.own, *packs] if not link.own.is_dead else packs


def _gone(link: LinkLife) -> list[Life]:
    return [link.own, *(life for life in link.packs if life.goes)]


def kept_packs(link: LinkLife) -> list[int]:
    """The numbers of the packs that the merged segment goes on listing."""
    return [n for n, life in enumerate(link.packs) if not life.goes]


def _freed_bytes(link: LinkLife) -> int:
    gone = sum(life.size_bytes - life.live_bytes for life in _gone(link))
    zero_runs = sum(life.zero_runs for life in _copied(link))
    rows = sum(life.live_blocks for life in _copied(link))
    return gone - _ENTRY_BYTES * len(kept_packs(link)) - _RUN_BYTES * zero_runs - _ROW_BYTES * rows


def _is_candidate(link: LinkLife, copy_below: float) -> bool:
    """Whether of what it takes, not more than the part `copy_below` has to be copied."""
    copied = sum(life.live_bytes for life in _copied(link))
    return copied <= copy_below * (copied + max(0, _freed_bytes(link)))
