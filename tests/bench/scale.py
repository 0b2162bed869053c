"""Measures what people ask of a large repository: time, requests and memory, with so many VMs and points.

    PYTHONPATH=tests .venv/bin/python tests/bench/scale.py [--vms 1000] [--points 1000] [--latency-ms 30] [--json FILE]

The points are real: sealed, chained and authenticated; they hold a block each. They are in memory, and each request
takes as long as one to S3 may take. Made at about 7000 a second: a million takes two and a half minutes, and 3 GiB.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from counting_store import PAGE_KEYS, CountingStore
from many_points import beat, crowd, open_session

from drsync.auditing import Auditing
from drsync.cli import render, views
from drsync.finding import Finding
from drsync.model import NoProgress
from drsync.overview import Overview
from drsync.pruning import Pruning
from drsync.store import Bytes, ObjectInfo, ObjectStore, Tail, Unfinished
from drsync.store.retry import RetryingStore

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What one step took."""

    step: str
    seconds: float
    cpu_seconds: float
    put: int
    get: int
    list: int
    read_mib: float
    peak_mib: float
    """How much the process grew by it, beyond all that it had needed before."""

    def __str__(self) -> str:
        requests = f"{self.get:8} GET {self.list:6} LIST {self.read_mib:8.1f} MiB read"
        return (
            f"{self.step:34} {self.seconds:7.2f} s {self.cpu_seconds:7.2f} s CPU {requests}   +{self.peak_mib:.0f} MiB"
        )


class FarStore:
    """An ObjectStore around `inner` that is some milliseconds away: each request waits, each page of a listing too."""

    def __init__(self, inner: ObjectStore, latency_s: float) -> None:
        self._inner = inner
        self._latency_s = latency_s

    @property
    def url(self) -> str:
        return self._inner.url

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        self._wait()
        self._inner.create(key, body, sha256=sha256)

    def replace(self, key: str, body: Bytes) -> None:
        self._wait()
        self._inner.replace(key, body)

    def get(self, key: str, *, limit_bytes: int) -> bytes:
        self._wait()
        return self._inner.get(key, limit_bytes=limit_bytes)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        self._wait()
        return self._inner.get_range(key, offset, length)

    def get_tail(self, key: str, length: int) -> Tail:
        self._wait()
        return self._inner.get_tail(key, length)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        for number, info in enumerate(self._inner.list(prefix, after=after)):
            if number % PAGE_KEYS == 0:
                self._wait()
            yield info

    def folders(self, prefix: str) -> Iterator[str]:
        for number, name in enumerate(self._inner.folders(prefix)):
            if number % PAGE_KEYS == 0:
                self._wait()
            yield name

    def now(self) -> datetime:
        self._wait()
        return self._inner.now()

    def delete(self, key: str) -> None:
        self._wait()
        self._inner.delete(key)

    def unfinished(self) -> Iterator[Unfinished]:
        yield from self._inner.unfinished()

    def abandon(self, unfinished: Unfinished) -> None:
        self._inner.abandon(unfinished)

    def _wait(self) -> None:
        time.sleep(self._latency_s)


def peak_mib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(step: str, store: CountingStore, work: Callable[[], object], found: list[Figure]) -> None:
    """Do one step, print and note what it took."""
    before_mib, began_s, began_cpu_s = peak_mib(), time.monotonic(), time.process_time()
    with store.counted() as requests:
        work()
    figure = Figure(
        step=step,
        seconds=time.monotonic() - began_s,
        cpu_seconds=time.process_time() - began_cpu_s,
        put=requests.put,
        get=requests.get,
        list=requests.list,
        read_mib=requests.read_bytes / MIB,
        peak_mib=peak_mib() - before_mib,
    )
    print(figure, flush=True)
    found.append(figure)


def main() -> None:
    """Make the repository, measure, print, and keep the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vms", type=int, default=1000)
    parser.add_argument("--points", type=int, default=1000, help="of each VM")
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--latency-ms", type=float, default=30)
    parser.add_argument("--json", type=Path, default=None, help="write every figure to this file")
    parser.add_argument("--every-point", action="store_true", help="read each point of each VM, too (minutes)")
    options = parser.parse_args()
    began_s = time.monotonic()
    crowded, repository, root = crowd(options.vms, options.points)
    beat(repository, options.hosts, options.vms, options.points)
    took_s, size_mib = time.monotonic() - began_s, crowded.stored_bytes / MIB
    print(f"made {options.vms} VMs with {options.points} points each in {took_s:.0f} s, {size_mib:.0f} MiB of objects")
    store = CountingStore(FarStore(crowded, options.latency_ms / 1000))
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        session = open_session(Path(name), root, RetryingStore(store))
        vm = f"vm-{options.vms // 2:04}"
        measure("open the repository", store, lambda: session.repository, found)
        measure("status", store, Overview(session).status, found)
        measure("points", store, Overview(session).summaries, found)
        measure("points VM", store, lambda: Overview(session).points(vm), found)
        measure("verify VM", store, lambda: Auditing(session).verify(vm, NoProgress()), found)
        measure(
            "prune VM --dry-run", store, lambda: Pruning(session).prune(vm, lambda _: NoProgress(), dry_run=True), found
        )
        measure("restore VM, until the first block", store, lambda: Finding(session).find_point(vm), found)
        if options.every_point:
            every = (views.point(point) for name in session.known_vms() for point in Overview(session).points(name))
            measure("points --json", store, lambda: render.documents(every), found)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(figure) for figure in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
