"""What drsync asks of a store, counted around real captures: QEMU's block layer, drsync's own session."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from counting_store import CountingStore, Requests
from storage_daemon import DaemonDisk, StorageDaemon

from drsync.auditing import Auditing
from drsync.beating import Beating
from drsync.capture import Result
from drsync.capturing import Capturing
from drsync.config import parse_config
from drsync.heads import FRESH_S
from drsync.mapping import USUAL as MAPS
from drsync.model import NoProgress, SystemClock
from drsync.overview import Overview
from drsync.restoring import RestorePlan, RestoreRequest, Restoring
from drsync.session import Session
from drsync.store.memory import MemoryStore
from drsync.store.retry import RetryingStore

MIB = 1024 * 1024
OBJECT_MIB = 32
"""What one object holds of a disk, at most (ShipLimits)."""
SEED_MIB = 64
VM, DISK = "web", "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What one thing costs in requests."""

    put: float
    get: float
    list: float

    @classmethod
    def of(cls, requests: Requests, *, each: float = 1) -> "Counts":
        """An average over `each` of them."""
        return cls(put=requests.put / each, get=requests.get / each, list=requests.list / each)


class MovableClock(SystemClock):
    """The host's clock, of which a test can let time pass."""

    ahead_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


class Measuring:
    """A VM of a storage daemon, and a session on a store that counts."""

    def __init__(self, directory: Path, daemon: StorageDaemon) -> None:
        self.daemon = daemon
        self.directory = directory
        self.clock = MovableClock()
        self.store = CountingStore(MemoryStore(self.clock))
        text = f"""
            [repository]
            url = "file://{directory}/none"
            key_file = "{directory}/key"
            [spool]
            path = "{directory}/spool"
            reserve = "1MiB"
            [[vm]]
            name = "{VM}"
            socket = "{daemon.qmp_socket}"
        """
        self.session = Session(parse_config(text.encode(), directory / "drsync.toml"), self.clock)
        self.session.raw_store = self.store
        self.session.store = RetryingStore(self.store, clock=self.clock)
        self.capturing = Capturing(self.session)
        self.session.init()
        self.session.repository  # noqa: B018 - read once, when a process starts

    def counted(self, work: Callable[[], object], *, each: float = 1) -> Counts:
        with self.store.counted() as requests:
            work()
        return Counts.of(requests, each=each)

    def capture(self, expected: Result = Result.COMMITTED) -> None:
        outcome = self.capturing.capture(VM, NoProgress())
        assert outcome.result is expected, outcome

    def points(self, numbers: range) -> None:
        """The guest changes a block, and it is captured; again and again."""
        for number in numbers:
            self.daemon.io(DISK, f"write -P {number % 255 + 1} {number % 16 * 64}k 64k")
            self.capture()

    def idle(self, cycles: int) -> None:
        """Cycles that find nothing changed."""
        for _ in range(cycles):
            self.capture(Result.UNCHANGED)

    def restored(self) -> tuple[Counts, Counts]:
        """What a restore asks before its first block, and then for a GiB of blocks."""
        request = RestoreRequest(vm=VM, output=self.directory / "restored")
        request.output.mkdir()
        plans: list[RestorePlan] = []
        planned = self.counted(lambda: plans.append(Restoring(self.session).plan_restore(request)))
        return planned, self.counted(
            lambda: Restoring(self.session).restore(request, plans[0], NoProgress()), each=SEED_MIB / 1024
        )


def measure(directory: Path) -> Mapping[str, Counts]:
    """What each thing costs in requests; needs QEMU, and some ten seconds."""
    random = directory / "random"
    random.write_bytes(secrets.token_bytes(SEED_MIB * MIB))
    with StorageDaemon(directory, [DaemonDisk(name=DISK, size_bytes=256 * MIB)]) as daemon:
        daemon.io(DISK, f"write -s {random} 0 {SEED_MIB}M")
        measuring = Measuring(directory, daemon)
        first = measuring.counted(measuring.capture)
        points = range(2, 2 + MAPS.every)
        counts = {
            "first": first,
            "point": measuring.counted(lambda: measuring.points(points), each=len(points)),
            "idle": measuring.counted(lambda: measuring.idle(20), each=20),
        }
        measuring.clock.ahead_s += FRESH_S + 1
        counts["look"] = measuring.counted(lambda: measuring.capture(Result.UNCHANGED))
        beating = Beating(measuring.session)
        beating.beat()  # the first one, and one an hour, look whether the key was rotated
        counts["heartbeat"] = measuring.counted(beating.beat)
        counts["verify"] = measuring.counted(
            lambda: Auditing(measuring.session).verify(VM, NoProgress()), each=1 + len(points)
        )
        counts["restore"], counts["restored GiB"] = measuring.restored()
        counts["status"] = measuring.counted(Overview(measuring.session).status)
        counts["points"] = measuring.counted(Overview(measuring.session).summaries)
    return counts
