"""What a guest feels: how long its writes to a disk take, as QEMU counts them for the device.

QEMU keeps a histogram of a device's requests (block-latency-histogram-set), which includes
whatever a capture makes a write wait for. It is asked through libvirt.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from libvirt_site import LibvirtSite

_BOUNDS_NS: Final = [int(125_000 * 2 ** (n / 2)) for n in range(31)]
"""125 µs to 4 s, two steps to each doubling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """The writes of one period. A percentile is the upper bound of its bin, so it never flatters."""

    writes: int
    p50_ms: float
    p99_ms: float
    longest_ms: float

    def __str__(self) -> str:
        return (
            f"{self.writes:6} writes, p50 {self.p50_ms:.2f} ms, p99 {self.p99_ms:.1f} ms, "
            f"longest {self.longest_ms:.0f} ms"
        )


class WriteLatency:
    """Counts the writes of one disk of a domain from its making on."""

    def __init__(self, site: LibvirtSite, domain: str, device: str) -> None:
        """`device` is the disk's alias in QEMU, such as virtio-disk1."""
        self._site = site
        self._domain = domain
        self._path = f"/machine/peripheral/{device}/virtio-backend"
        self._ask("block-latency-histogram-set", id=self._path, boundaries=_BOUNDS_NS)

    def read(self) -> Latency:
        """The writes since then."""
        (stats,) = [s["stats"] for s in self._ask("query-blockstats") if s.get("qdev") == self._path]
        return latency(stats["wr_latency_histogram"]["bins"], _BOUNDS_NS)

    def _ask(self, command: str, **arguments: object) -> Any:
        text = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(self._site.virsh("qemu-monitor-command", self._domain, text))["return"]


def latency(bins: Sequence[int], bounds_ns: Sequence[int]) -> Latency:
    """Percentiles of a histogram: bin n counts what took less than bound n, the last one all above."""
    uppers_ms = [bound / 1e6 for bound in bounds_ns] + [float("inf")]
    sums = list(accumulate(bins))
    total = sums[-1]

    def at(share: float) -> float:
        return next(upper for upper, count in zip(uppers_ms, sums, strict=True) if count >= share * total)

    return Latency(writes=total, p50_ms=at(0.5), p99_ms=at(0.99), longest_ms=at(1.0)) if total else _NONE


_NONE: Final = Latency(writes=0, p50_ms=0.0, p99_ms=0.0, longest_ms=0.0)
