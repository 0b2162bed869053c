"""What a recovery in AWS costs, as far as drsync makes it: requests and bytes times published prices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

PRICES_OF: Final = "2026-11"
"""When the prices were looked up."""
PRICES_WHERE: Final = "us-east-1"
"""Other regions differ by some ten percent."""
PUT_BLOCK_USD: Final = 0.006 / 1000
"""PutSnapshotBlock (the pricing example of EBS direct)."""
GET_BLOCK_USD: Final = 0.003 / 1000
"""GetSnapshotBlock (the same)."""
LIST_REQUEST_USD: Final = 0.0006 / 1000
"""ListChangedBlocks, ListSnapshotBlocks (the same)."""
SNAPSHOT_GIB_MONTH_USD: Final = 0.05
"""Snapshot storage, per GiB of blocks that no other snapshot of the chain has."""
VOLUME_GIB_MONTH_USD: Final = 0.08
"""gp3 volumes, per GiB of their size, without extra IOPS or throughput."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostItem:
    """One line of a bill."""

    what: str
    amount: float
    unit: str
    usd: float
    monthly: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What was, or would be, caused."""

    items: Sequence[CostItem]
    prices_of: str = PRICES_OF
    prices_where: str = PRICES_WHERE

    @property
    def once_usd(self) -> float:
        return sum(item.usd for item in self.items if not item.monthly)

    @property
    def monthly_usd(self) -> float:
        return sum(item.usd for item in self.items if item.monthly)


def cost_of(*, put_blocks: int, block_bytes: int, volume_gib: int) -> Cost:
    """The cost of that many blocks that are written, and of the volumes. Not in it: the instance itself, traffic."""
    return Cost(
        items=(
            CostItem(what="PutSnapshotBlock", amount=put_blocks, unit="requests", usd=put_blocks * PUT_BLOCK_USD),
            _snapshots(put_blocks * block_bytes),
            CostItem(
                what="gp3 volumes", amount=volume_gib, unit="GiB", usd=volume_gib * VOLUME_GIB_MONTH_USD, monthly=True
            ),
        )
    )


def failback_cost(*, get_blocks: int, list_requests: int, changed_bytes: int) -> Cost:
    """The cost of bringing so many blocks home. Not in it: traffic out of AWS, which is most of it if that is left."""
    return Cost(
        items=(
            CostItem(what="GetSnapshotBlock", amount=get_blocks, unit="requests", usd=get_blocks * GET_BLOCK_USD),
            CostItem(
                what="lists of blocks", amount=list_requests, unit="requests", usd=list_requests * LIST_REQUEST_USD
            ),
            _snapshots(changed_bytes),
        )
    )


def _snapshots(stored_bytes: int) -> CostItem:
    stored_gib = stored_bytes / 1024**3
    return CostItem(
        what="snapshots",
        amount=round(stored_gib, 3),
        unit="GiB",
        usd=stored_gib * SNAPSHOT_GIB_MONTH_USD,
        monthly=True,
    )
