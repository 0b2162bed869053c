"""`[prune]`: how what retention drops is deleted."""

from dataclasses import dataclass
from typing import Annotated

from drsync.config.key import Key, read_at_least_1s, read_duration, shown


def read_grace(value: object) -> float:
    """Seconds, an hour or more: less would take objects from under restores that run."""
    seconds = read_duration(value)
    if seconds < 3600:
        raise ValueError(f"{shown(value)} is too short; 1h is the least")
    return seconds


def read_price(value: object) -> float:
    """Dollars."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1000:
        raise ValueError(f"{shown(value)} is not a price in dollars, such as 0.09")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSettings:
    """`[prune]`: how what retention drops is deleted."""

    every_s: Annotated[
        float,
        Key(
            name="every",
            parse=read_at_least_1s,
            default="6h",
            meaning="How often `drsync daemon --role maintenance` prunes.",
            why="Points are dropped by the hour at the soonest, and deleted a grace time later.",
        ),
    ]
    grace_s: Annotated[
        float,
        Key(
            name="grace",
            parse=read_grace,
            default="1d",
            meaning="How long what was taken out of use stays before it is deleted, at least 1h.",
            why="A restore that began before has this long to end; a longer one is told to begin again.",
        ),
    ]
    orphan_grace_s: Annotated[
        float,
        Key(
            name="orphan_grace",
            parse=read_grace,
            default="14d",
            meaning="How long objects that no point lists, and unfinished uploads, are left alone.",
            why="A seed may pause so long. While it sends, its packs stay, however old they are.",
        ),
    ]
    read_price: Annotated[
        float,
        Key(
            name="read_price",
            parse=read_price,
            default=0.0,
            meaning="Dollars for a GiB that is read from the bucket, to reckon whether copying forward pays.",
            why="Nothing within the bucket's region; outside of AWS it is 0.09.",
        ),
    ]
