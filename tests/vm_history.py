"""What happens to a VM of two disks, on a real QEMU, and the oracle that knows what the disks hold.

A history is a list of steps; each changes the VM and the oracle alike. Lab runs
drsync's real cycle on it: QMP, spool, directory store, restore.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import pytest
from crashing import Bomb, Mined
from figures import compared, count
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from protected_vm import VM, Contents, Witness
from qmp_socket import QmpRefused
from soak import SOAK
from storage_daemon import DaemonDisk, StorageDaemon

from drsync.capture import CaptureOptions, Outcome, run_cycle
from drsync.catalog import points
from drsync.format.keys import RootKey
from drsync.image import load_image
from drsync.log import Log
from drsync.model import CaptureId, Kind, NoProgress, SystemClock
from drsync.repository import Repository, create_repository, open_repository
from drsync.restore import restore_disk
from drsync.source import Source
from drsync.source.bitmap import Owner
from drsync.source.qmp import QmpOptions, QmpSource
from drsync.spool import Spool, VmSpool
from drsync.store import ObjectStore
from drsync.store.directory import DirectoryStore
from drsync.target.image import ImageDisk, ImageFormat

Step = TypeVar("Step")

MIB: Final = 1024 * 1024
SECTOR: Final = 512
SIZES: Final = {"root": 4 * MIB + 3 * SECTOR, "data": 2 * MIB + 5 * SECTOR}
MOST_BYTES: Final = 8 * MIB


class Lab:
    """A VM of a qcow2 disk `root` and a raw disk `data`, its oracle, its spool and its repository."""

    def __init__(self, place: Path, *, free_nbd: bool = False) -> None:
        """`free_nbd`: disks can be read live."""
        disks = [
            DaemonDisk(name="root", size_bytes=SIZES["root"]),
            DaemonDisk(name="data", size_bytes=SIZES["data"], format="raw"),
        ]
        self._open(place, StorageDaemon(place, disks, free_nbd=free_nbd))

    def _open(self, place: Path, daemon: StorageDaemon) -> None:
        """`daemon` has the disks, and a way to write to them; it may be another thing that does the same."""
        self.place = place
        self.daemon = daemon
        self.oracle = {name: bytearray(size) for name, size in SIZES.items()}
        self.seen: dict[CaptureId, Contents] = {}
        self.store = DirectoryStore(place / "repository")
        self.clock = SystemClock()
        self.spool = Spool(place / "spool", 0)
        self._key = RootKey.generate()
        create_repository(self.store, self._key, self.clock)

    def repository(self, store: ObjectStore | None = None) -> Repository:
        """The repository, used through `store`; a new object, as a new process would make it."""
        opened = open_repository(self.store, self._key, "key")
        return Repository(store or self.store, opened.record, self._key)

    def contents(self) -> Contents:
        return {name: bytes(content) for name, content in self.oracle.items()}

    def source(self) -> Source:
        disks = {name: self.daemon.node(name) for name in SIZES}
        options = QmpOptions(
            vm=VM,
            socket=self.daemon.qmp_socket,
            repository_tag=self.repository().tag,
            disks=disks,
            live_directory=self.spool.vm(VM).live_directory,
        )
        return Witness(QmpSource(options), self.contents, self.seen)

    def cycle(self, *, store: ObjectStore | None = None, bomb: Bomb | None = None, **options: Any) -> Outcome:
        """One cycle of a new process, which may have a bomb in it."""
        bomb = bomb or Bomb(0, "before")  # step 0 never comes
        return run_cycle(
            Log(self.repository(cast(ObjectStore, Mined(store or self.store, bomb))).vm(VM)),
            cast(VmSpool, Mined(self.spool.vm(VM), bomb)),
            self.spool.writer_id(),
            lambda: cast(Source, Mined(self.source(), bomb)),
            self.clock,
            NoProgress(),
            CaptureOptions(**options),
        )

    def check(self) -> set[Kind]:
        """Capture what is left; then every point, QEMU and the spool must be as they should; the kinds of points."""
        for name in SIZES:
            assert self.daemon.read(name) == self.oracle[name], f"the oracle does not know what {name} holds"
        self.cycle()
        log = Log(self.repository().vm(VM))
        found = points(log)
        for point in found:
            disks = self.restored(log, point.number)
            assert disks == self.seen[point.capture], f"point {point.number} is wrong"
            compared(sum(map(len, disks.values())))
        newest = found[-1].capture
        assert self.seen[newest] == self.contents()
        self._check_nothing_is_left(newest)
        return {disk.kind for point in found for disk in point.disks}

    def restored(self, log: Log, point: int) -> Contents:
        image = load_image(log, point)
        contents = {}
        for disk in image.point.disks:
            path = self.place / f"restored-{point}-{disk.name}.raw"
            target = ImageDisk(path, disk.size_bytes, ImageFormat.RAW, vm=VM, overwrite=False)
            restore_disk(log.objects, image, disk.name, target, NoProgress())
            contents[disk.name] = path.read_bytes()
        return contents

    def _check_nothing_is_left(self, newest: CaptureId) -> None:
        owner = Owner(repository=self.repository().tag, vm=VM)
        nodes = self.daemon.execute("query-named-block-nodes", flat=True)
        bitmaps = {bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", [])}
        assert bitmaps == {owner.bitmap(newest, name) for name in SIZES}
        assert not [node["node-name"] for node in nodes if owner.owns_node(node["node-name"])]
        assert self.daemon.execute("query-jobs") == []
        assert not [path for path in (self.spool.path / VM).iterdir() if path.is_dir()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The guest changes a part of a disk."""

    disk: str
    start: int
    """As a share of the disk, in 1/1000."""
    sectors: int

    def place(self, lab: Lab) -> tuple[int, int]:
        """Offset and length in bytes, on the disk as it is now."""
        total = len(lab.oracle[self.disk]) // SECTOR
        first = total * self.start // 1000
        return first * SECTOR, min(self.sectors, total - first) * SECTOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Write(Change):
    pattern: int

    def run(self, lab: Lab) -> None:
        offset, length = self.place(lab)
        lab.daemon.io(self.disk, f"write -P {self.pattern} {offset} {length}")
        lab.oracle[self.disk][offset : offset + length] = bytes([self.pattern]) * length


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero(Change):
    unmap: bool

    def run(self, lab: Lab) -> None:
        offset, length = self.place(lab)
        lab.daemon.io(self.disk, f"write -z {'-u ' if self.unmap else ''}{offset} {length}")
        lab.oracle[self.disk][offset : offset + length] = bytes(length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard(Change):
    """What is discarded may read as before or as zeros; everything else reads as before."""

    def run(self, lab: Lab) -> None:
        offset, length = self.place(lab)
        lab.daemon.io(self.disk, f"discard {offset} {length}")
        now, before = bytearray(lab.daemon.read(self.disk)), lab.oracle[self.disk]
        end = offset + length
        assert now[:offset] == before[:offset]
        assert now[end:] == before[end:]
        for at in range(offset, end, SECTOR):
            assert now[at : at + SECTOR] in (before[at : at + SECTOR], bytes(SECTOR))
        lab.oracle[self.disk] = now


@dataclass(frozen=True, slots=True, kw_only=True)
class Grow:
    disk: str
    sectors: int

    def run(self, lab: Lab) -> None:
        content = lab.oracle[self.disk]
        grown = min(MOST_BYTES, len(content) + self.sectors * SECTOR)
        nodes = lab.daemon.execute("query-named-block-nodes", flat=True)
        bitmaps = [b for n in nodes if n["node-name"] == lab.daemon.node(self.disk) for b in n.get("dirty-bitmaps", [])]
        exports = [e for e in lab.daemon.execute("query-block-exports") if "-live-" in e["id"]]  # of a dead drsync
        if exports or any(bitmap.get("inconsistent") for bitmap in bitmaps):  # or a power cut: until the next capture
            with pytest.raises(QmpRefused):
                lab.daemon.resize(self.disk, grown)
        else:
            lab.daemon.resize(self.disk, grown)
            content.extend(bytes(grown - len(content)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """QEMU ends in good order and starts again."""

    def run(self, lab: Lab) -> None:
        lab.daemon.stop()
        lab.daemon.start()


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerCut:
    """QEMU is killed; what it had not flushed may be lost, so the disks say what is true now."""

    def run(self, lab: Lab) -> None:
        lab.daemon.kill()
        count("crashes")
        lab.daemon.start()
        lab.oracle = {name: bytearray(lab.daemon.read(name)) for name in SIZES}


DISKS: Final = st.sampled_from(sorted(SIZES))
STARTS: Final = st.sampled_from([0, 0, 30, 31, 500, 990, 999])  # few, so that changes meet each other
SECTORS: Final = st.one_of(st.integers(1, 8), st.integers(1, 1024), st.sampled_from([128, 256, 2048, 16384]))
WRITES: Final = st.builds(Write, disk=DISKS, start=STARTS, sectors=SECTORS, pattern=st.integers(1, 255))
CHANGES: Final = st.one_of(
    WRITES,
    WRITES,
    st.builds(Zero, disk=DISKS, start=STARTS, sectors=SECTORS, unmap=st.booleans()),
    st.builds(Discard, disk=DISKS, start=STARTS, sectors=SECTORS),
    st.builds(Grow, disk=DISKS, sectors=st.integers(1, 600)),
)


@dataclass(slots=True)
class Budget:
    """The time that new histories may take. A failing one is always played again, so that it is reported."""

    budget_s: float
    began_s: float = field(default_factory=time.monotonic)
    failed: bool = False

    @property
    def is_spent(self) -> bool:
        return not self.failed and time.monotonic() - self.began_s > self.budget_s


def play_any(
    histories: st.SearchStrategy[list[Step]], play: Callable[[list[Step]], object], *, budget_s: float
) -> None:
    """Play histories that hypothesis makes up, 30 at most, and no new one when the budget is spent; in a soak 300."""
    budget = Budget(budget_s * 10 if SOAK else budget_s)

    @settings(
        max_examples=300 if SOAK else 30,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.generate],  # shrinking would take minutes of real QEMU
        suppress_health_check=list(HealthCheck),
    )
    @given(history=histories)
    def any_history(history: list[Step]) -> None:
        if budget.is_spent:
            return
        try:
            play(history)
        except BaseException:
            budget.failed = True
            raise

    any_history()
