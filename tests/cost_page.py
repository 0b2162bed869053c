"""docs/cost.md: what is in its tables, from measured counts and published prices. Pure.

measured counts ─▶ table of counts ─┐
prices ─────────────────────────────┴▶ dollars a month, by RPO and by how much a VM changes
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from request_counts import OBJECT_MIB, Counts

from drsync.heads import FRESH_S

PUT_USD: Final = 0.005 / 1000
"""PUT, COPY, POST and LIST of S3 Standard, us-east-1."""
GET_USD: Final = 0.0004 / 1000
GIB_MONTH_USD: Final = 0.023
"""The first 50 TB of S3 Standard; AWS's GB here is 2^30 bytes."""
OUT_GIB_USD: Final = 0.09
"""From S3 to the internet, the first 10 TB of a month; to EC2 in the same region nothing."""
MONTH_S: Final = 730 * 3600
HEARTBEAT_S: Final = 30
VMS_OF_HOST: Final = 20
PACE: Final = 0.95
"""A point is taken a twentieth of the RPO early, if getting it into the repository takes no longer (cadence.py)."""
STORED: Final = 0.5
"""Of what a VM changes, as much as is stored of it: zstd on files of servers."""
RPOS: Final = {"10 s": 10, "1 min": 60, "5 min": 300, "1 h": 3600}
CHANGES_GIB: Final = (1, 5, 50)
"""What a VM changes a day, evenly, so that every interval has its point."""
WHAT: Final = {
    "first": f"the first point, of 64 MiB: an object for each {OBJECT_MIB} MiB of disk",
    "point": f"a later point of up to {OBJECT_MIB} MiB of changed disk, block maps included (average of 64)",
    "idle": "a cycle that finds nothing changed",
    "look": f"the look whether another drsync has taken a VM over, every {FRESH_S / 60:.0f} min at most",
    "heartbeat": f"a heartbeat of a host, every {HEARTBEAT_S} s at most, for all its VMs",
    "status": "`drsync status`, with one VM and no other host (each VM more: 1 GET and 1 LIST)",
    "points": "`drsync points`, with one VM (each VM more: 3 GET and 1 LIST)",
    "verify": "`drsync verify`, for each point (with `--data`: 1 GET more for each object)",
    "restore": "a restore, until its first block",
    "restored GiB": "a restore, for each GiB of data (of 64 MiB, spread over 17 objects)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What a VM costs in requests in a month."""

    usd: float
    points: float


def usd(counts: Counts, times: float = 1) -> float:
    """What requests cost."""
    return times * ((counts.put + counts.list) * PUT_USD + counts.get * GET_USD)


def bill(counts: Mapping[str, Counts], rpo_s: float, gib_a_day: float) -> Bill:
    """A VM's requests in a month; its share of the host's heartbeats is among them."""
    shared = usd(counts["heartbeat"], MONTH_S / max(HEARTBEAT_S, rpo_s / VMS_OF_HOST)) / VMS_OF_HOST
    if not gib_a_day:
        looks = MONTH_S / max(FRESH_S, rpo_s * PACE)
        return Bill(usd=shared + usd(counts["look"], looks), points=0)
    points = MONTH_S / (rpo_s * PACE)
    changed_mib = gib_a_day * 1024 / 86400 * rpo_s * PACE
    more = max(0, math.ceil(changed_mib / OBJECT_MIB) - 1)
    looks = points if rpo_s * PACE > FRESH_S else 0
    each = usd(counts["point"]) + more * PUT_USD
    return Bill(usd=shared + points * each + usd(counts["look"], looks), points=points)


def count_table(counts: Mapping[str, Counts]) -> str:
    """The measured counts."""
    rows = [
        [what, *(_number(n) for n in (c.put, c.get, c.list))] for name, what in WHAT.items() for c in [counts[name]]
    ]
    return _table(["what", "PUT", "GET", "LIST"], rows)


def month_table(counts: Mapping[str, Counts]) -> str:
    """Dollars a month and VM for requests, by RPO."""
    heads = ["RPO", "idle", *(f"{gib} GiB a day" for gib in CHANGES_GIB)]
    rows = [
        [name, *(f"{bill(counts, rpo_s, gib).usd:.3f}" for gib in (0, *CHANGES_GIB))] for name, rpo_s in RPOS.items()
    ]
    return _table(heads, rows)


def storage_table() -> str:
    """Dollars a month and VM for what is stored, with so many days of points kept."""
    heads = ["kept", *(f"{gib} GiB a day" for gib in CHANGES_GIB)]
    rows = [
        [f"{days} days", *(f"{gib * days * STORED * GIB_MONTH_USD:.2f}" for gib in CHANGES_GIB)] for days in (7, 30, 90)
    ]
    return _table(heads, rows)


def page_with(page: str, counts: Mapping[str, Counts]) -> str:
    """The page with its tables made anew."""
    tables = {"counts": count_table(counts), "month": month_table(counts), "storage": storage_table()}
    for name, table in tables.items():
        block = f"<!-- {name} -->\n{table}<!-- end -->"
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        old, end, after = rest.partition("<!-- end -->")
        if not begin or not end or "<!--" in old:
            raise ValueError(f"the page has no place for {name}")
        page = before + block + after
    return page


def counts_of(page: str) -> Mapping[str, Counts]:
    """The counts that the page has."""
    found: dict[str, Counts] = {}
    for name, what in WHAT.items():
        match = re.search(rf"^\| {re.escape(what)} \| (\S+) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
        if match is None:
            raise ValueError(f"the page has no counts of: {what}")
        put, get, list_ = map(float, match.groups())
        found[name] = Counts(put=put, get=get, list=list_)
    return found


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *(["--:"] * (len(heads) - 1))], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
