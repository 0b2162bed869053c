"""A VM in memory, protected by the real cycle, and an oracle that knows what every point must hold.

MemoryVm ── Witness(MemorySource) ── run_cycle ── spool of a host ── log ── MemoryStore
               │                                                              │
               └ what the disks held at each capture ══ compared with ══ what every point restores to
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
from figures import compared
from forwarding_source import ForwardingSource

from drsync.capture import CaptureOptions, Outcome, run_cycle
from drsync.catalog import Point, points
from drsync.format.keys import RootKey
from drsync.heads import Heads
from drsync.image import load_image
from drsync.log import Log
from drsync.mapping import USUAL, MapPolicy
from drsync.model import BLOCK_SIZE, CaptureId, NoProgress, Pace, Progress, block_count
from drsync.quiesce import Quiescing
from drsync.repository import Repository, create_repository, open_repository
from drsync.restore import restore_disk
from drsync.seed import USUAL as USUAL_SEED
from drsync.seed import SeedOptions
from drsync.source import NO_PACE, Base, CaptureResult, DiskSurvey, Instant, Source, at_once
from drsync.source.bitmap import Owner
from drsync.source.memory import MemoryDisk, MemorySource, MemoryVm
from drsync.spool import Spool, VmSpool
from drsync.store import ObjectStore
from drsync.store.memory import MemoryStore

KIB = 1024
VM = "web"
Contents = Mapping[str, bytes]


class SteppingClock:
    """A clock that goes on by a second whenever it is asked; its two sides can be moved apart."""

    def __init__(self) -> None:
        self.wall = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        self.monotonic = 1000.0

    def now(self) -> datetime:
        self.wall += timedelta(seconds=1)
        return self.wall

    def monotonic_s(self) -> float:
        self.monotonic += 1
        return self.monotonic


class Witness(ForwardingSource):
    """A Source that notes what the disks held when each capture was taken."""

    def __init__(self, inner: Source, contents: Callable[[], Contents], seen: dict[CaptureId, Contents]) -> None:
        super().__init__(inner)
        self._contents = contents
        self._seen = seen

    def capture(
        self,
        capture: CaptureId,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        layers: Mapping[str, Path],
        *,
        timeout_s: float,
        keep_free_bytes: int = 0,
        progress: Progress | None = None,
        instant: Instant = at_once,
        pace: Pace = NO_PACE,
    ) -> CaptureResult:
        assert capture not in self._seen

        @contextmanager
        def witnessed() -> Iterator[float]:
            with instant() as limit_s:
                self._seen[capture] = self._contents()
                yield limit_s

        return super().capture(
            capture,
            base,
            disks,
            layers,
            timeout_s=timeout_s,
            keep_free_bytes=keep_free_bytes,
            progress=progress,
            instant=witnessed,
            pace=pace,
        )


class MemoryTarget:
    """A restored disk in memory."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._data = bytearray(block_count(size_bytes) * BLOCK_SIZE)
        self._finished = False
        self._abandoned = False

    @property
    def content(self) -> bytes:
        assert self._finished
        assert not any(self._data[self._size_bytes :])
        return bytes(self._data[: self._size_bytes])

    def place(self, window: int, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return blocks * BLOCK_SIZE

    def write(self, at: int, buffers: Sequence[bytes]) -> None:
        for buffer in buffers:
            self._data[at : at + len(buffer)] = buffer
            at += len(buffer)

    def finish(self) -> None:
        self._finished = not self._abandoned

    def abandon(self) -> None:
        self._abandoned = True


def restored(log: Log, point: int) -> Contents:
    """The disks of a point as drsync restores them."""
    image = load_image(log, point)
    targets = {disk.name: MemoryTarget(disk.size_bytes) for disk in image.point.disks}
    for name, target in targets.items():
        restore_disk(log.objects, image, name, target, NoProgress())
    return {name: target.content for name, target in targets.items()}


class RoomySpool(Spool):
    """A spool with a fixed room, whatever other programs write and delete meanwhile."""

    def __init__(self, path: Path, room_bytes: int) -> None:
        super().__init__(path, reserve_bytes=0)
        self._room_bytes = room_bytes

    def free_bytes(self) -> int:
        return self._room_bytes


class ProtectedVm:
    """A VM with a disk `root` (bitmaps persist) and a disk `data` (they don't), a repository, and hosts with spools."""

    def __init__(self, place: Path, *, root_bytes: int = 512 * KIB, reserve_bytes: int = 0) -> None:
        self._place = place
        self.reserve_bytes = reserve_bytes
        self.free_bytes: int | None = None
        """What the spool's file system has free beside the reserve; None: what it really has."""
        self.clock = SteppingClock()
        self.store: ObjectStore = MemoryStore(self.clock)
        self.key = RootKey.generate()
        create_repository(self.store, self.key, self.clock)
        root = MemoryDisk(root_bytes, persistent=True)
        data = MemoryDisk(192 * KIB + 512, persistent=False)
        self.vm = MemoryVm(VM, {"root": root, "data": data})
        root.write(0, b"\1" * (root_bytes - BLOCK_SIZE))
        data.write(BLOCK_SIZE, b"\2" * (len(data.content) - BLOCK_SIZE))
        self.seen: dict[CaptureId, Contents] = {}
        self._writes = 2

    def write(self) -> None:
        """The guest writes to both disks, over a block's end, and zeros a block; never twice the same."""
        self._writes += 1
        root, data = self.vm.disks["root"], self.vm.disks["data"]
        root.write(BLOCK_SIZE - 512, bytes([self._writes]) * 1024)
        root.zero((2 + self._writes % 4) * BLOCK_SIZE, BLOCK_SIZE)
        data.write(len(data.content) - 512, bytes([self._writes]) * 512)

    def contents(self) -> Contents:
        """What the disks hold now."""
        return {name: bytes(disk.content) for name, disk in self.vm.disks.items()}

    def repository(self, store: ObjectStore | None = None) -> Repository:
        """The repository, read through `store`; a new object, as a new process would make it."""
        opened = open_repository(self.store, self.key, "key")
        return Repository(store or self.store, opened.record, self.key)

    def log(self, store: ObjectStore | None = None) -> Log:
        return Log(self.repository(store).vm(VM))

    def spool(self, host: str = "alpha") -> Spool:
        if self.free_bytes is None:
            return Spool(self._place / host, self.reserve_bytes)
        return RoomySpool(self._place / host, self.free_bytes)

    def source(self) -> Source:
        inner = MemorySource(self.vm, self.repository().tag, clock=self.clock)
        return Witness(inner, self.contents, self.seen)

    def cycle(
        self,
        host: str = "alpha",
        *,
        store: ObjectStore | None = None,
        spool: VmSpool | None = None,
        open_source: Callable[[], Source] | None = None,
        full: bool = False,
        take_over: bool = False,
        maps: MapPolicy = USUAL,
        may_seed: bool = True,
        seed: SeedOptions = USUAL_SEED,
        quiesce: Quiescing | None = None,
        heads: Heads | None = None,
    ) -> Outcome:
        """One cycle of `host` with objects of its own, as a new process would run it; `heads`: as a daemon would."""
        return run_cycle(
            self.log(store),
            spool or self.spool(host).vm(VM),
            self.spool(host).writer_id(),
            open_source or self.source,
            self.clock,
            NoProgress(),
            CaptureOptions(full=full, take_over=take_over, maps=maps, may_seed=may_seed, seed=seed, heads=heads),
            quiesce,
        )

    def points(self) -> list[Point]:
        return points(self.log())

    def bitmaps(self) -> set[str]:
        return {name for disk in self.vm.disks.values() for name in disk.bitmaps}

    def spooled(self, host: str = "alpha") -> list[str]:
        """The captures whose directories are in the spool."""
        return sorted(path.name for path in (self.spool(host).path / VM).iterdir() if path.is_dir())

    def check_points(self) -> list[Point]:
        """Every committed point restores to exactly what the disks held when it was captured; the points."""
        found = self.points()
        log = self.log()
        for point in found:
            disks = restored(log, point.number)
            assert disks == self.seen[point.capture], f"point {point.number} is not as captured"
            compared(sum(map(len, disks.values())))
        return found

    def check_settled(self, host: str = "alpha") -> Point:
        """All points are right, the newest is the VM's present state, and nothing is left lying about; the newest."""
        newest = self.check_points()[-1]
        assert self.seen[newest.capture] == self.contents()
        assert self.spooled(host) == []
        owner = Owner(repository=self.repository().tag, vm=VM)
        assert self.bitmaps() == {owner.bitmap(newest.capture, disk) for disk in self.vm.disks}
        return newest
