"""Any history of a VM, captured in any split, restores at every point to what an oracle says.

Hypothesis makes up the histories; they happen on a real qemu-storage-daemon with
a qcow2 and a raw disk, and go through the real cycle: QMP, spool, directory
store, restore. The oracle is a bytearray a disk that each step changes, too.

A failure prints the history, and the line that makes it happen again.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import pytest
from crashing import WHENS, Bomb, Crash, Mined, When
from faulty import Effect, Fault, FaultyStore
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from protected_vm import VM, Contents, Witness
from qmp_socket import QmpRefused
from storage_daemon import DaemonDisk, StorageDaemon

from drsync.capture import CaptureOptions, Outcome, run_cycle
from drsync.catalog import points
from drsync.errors import CaptureTimeout, StoreUnavailable
from drsync.format import names
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

MIB: Final = 1024 * 1024
SECTOR: Final = 512
SIZES: Final = {"root": 4 * MIB + 3 * SECTOR, "data": 2 * MIB + 5 * SECTOR}
MOST_BYTES: Final = 8 * MIB
BUDGET_S: Final = 30.0
"""No history is begun later than this after the first one: a loaded machine tries fewer."""

pytestmark = pytest.mark.qemu


class Lab:
    """A VM of a qcow2 disk `root` and a raw disk `data`, its oracle, its spool and its repository."""

    def __init__(self, place: Path) -> None:
        self.place = place
        disks = [
            DaemonDisk(name="root", size_bytes=SIZES["root"]),
            DaemonDisk(name="data", size_bytes=SIZES["data"], format="raw"),
        ]
        self.daemon = StorageDaemon(place, disks)
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
        options = QmpOptions(vm=VM, socket=self.daemon.qmp_socket, repository_tag=self.repository().tag, disks=disks)
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
            assert self.restored(log, point.number) == self.seen[point.capture], f"point {point.number} is wrong"
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
        if any(bitmap.get("inconsistent") for bitmap in bitmaps):  # as after a power cut, until the next capture
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
        lab.daemon.start()
        lab.oracle = {name: bytearray(lab.daemon.read(name)) for name in SIZES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    full: bool = False

    def run(self, lab: Lab) -> None:
        outcome = lab.cycle(full=self.full)
        assert outcome.segment is not None
        assert outcome.segment.meta.point is not None
        assert lab.seen[outcome.segment.meta.point.capture] == lab.contents()


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedCapture:
    """The store is down before the segment is stored, or its reply is lost; an idle VM's cycle stores none."""

    effect: Effect

    def run(self, lab: Lab) -> None:
        faulty = FaultyStore(lab.store, Fault("create", key=names.log_prefix(VM), effect=self.effect))
        failed = False
        try:
            lab.cycle(store=faulty)
        except StoreUnavailable:
            failed = True
        assert failed == (faulty.not_fired == [])


@dataclass(frozen=True, slots=True, kw_only=True)
class HurriedCapture:
    """QEMU has no time at all for it: it is cancelled, unless it was done already."""

    def run(self, lab: Lab) -> None:
        with suppress(CaptureTimeout):
            lab.cycle(timeout_s=0.0, full=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashedCapture:
    """drsync dies at one of its steps; a cycle that has fewer ends well."""

    step: int
    when: When

    def run(self, lab: Lab) -> None:
        bomb = Bomb(self.step, self.when)
        crashed = False
        try:
            lab.cycle(bomb=bomb)
        except Crash:
            crashed = True
        assert crashed == bool(bomb.fired_at)


Step = Write | Zero | Discard | Grow | Restart | PowerCut | Capture | FailedCapture | HurriedCapture | CrashedCapture

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
ORDERLY_CAPTURES: Final = st.builds(Capture, full=st.sampled_from([False, False, False, True]))
CAPTURES: Final = st.one_of(
    ORDERLY_CAPTURES,
    ORDERLY_CAPTURES,
    st.builds(FailedCapture, effect=st.sampled_from([Effect.REFUSED, Effect.REPLY_LOST])),
    st.builds(CrashedCapture, step=st.integers(1, 30), when=st.sampled_from(WHENS)),
    st.just(HurriedCapture()),
)
RESTARTS: Final = st.sampled_from([Restart(), PowerCut()])
STEPS: Final = st.one_of(CHANGES, CHANGES, CHANGES, CAPTURES, CAPTURES, RESTARTS)
HISTORIES: Final = st.lists(STEPS, min_size=12, max_size=24)
BEGINNING: Final = (
    Write(disk="root", start=0, sectors=6000, pattern=254),
    Write(disk="data", start=300, sectors=4000, pattern=255),
)
"""Zeros are seen only where there was something before."""


def play(place: Path, history: Sequence[Step]) -> set[Kind]:
    """Let a history happen and check all of it; the kinds of captures that its points came from."""
    lab = Lab(place)
    with lab.daemon:
        for step in history:
            step.run(lab)
        return lab.check()


def test_a_history_with_all_kinds_of_steps_restores_at_every_point(tmp_path: Path) -> None:
    kinds = play(
        tmp_path,
        [
            Write(disk="root", sectors=300, start=0, pattern=1),
            Write(disk="data", sectors=300, start=999, pattern=2),
            FailedCapture(effect=Effect.REFUSED),
            Write(disk="root", sectors=300, start=500, pattern=3),
            Capture(),
            Zero(disk="root", sectors=300, start=10, unmap=True),
            Discard(disk="data", sectors=300, start=500),
            Write(disk="data", sectors=300, start=999, pattern=4),
            CrashedCapture(step=14, when="after"),
            Write(disk="root", sectors=300, start=501, pattern=5),
            FailedCapture(effect=Effect.REPLY_LOST),
            Restart(),
            Write(disk="root", sectors=300, start=502, pattern=6),
            Capture(),
            Capture(),
            Write(disk="root", sectors=300, start=503, pattern=7),
            HurriedCapture(),
            PowerCut(),
            Grow(disk="root", sectors=3),
            Write(disk="data", sectors=300, start=300, pattern=8),
            Capture(),
            Grow(disk="root", sectors=200),
            Write(disk="root", sectors=300, start=999, pattern=9),
            Capture(),
            Zero(disk="root", sectors=300, start=999, unmap=False),
            Grow(disk="data", sectors=1),
            CrashedCapture(step=8, when="before"),
            Capture(full=True),
        ],
    )
    assert kinds == set(Kind)


@dataclass(slots=True)
class Budget:
    """The time that new histories may take. A failing one is always played again, so that it is reported."""

    began_s: float = field(default_factory=time.monotonic)
    failed: bool = False

    @property
    def is_spent(self) -> bool:
        return not self.failed and time.monotonic() - self.began_s > BUDGET_S


def test_any_history_restores_at_every_point(tmp_path_factory: pytest.TempPathFactory) -> None:
    budget = Budget()

    @settings(
        max_examples=30,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.generate],  # shrinking would take minutes of real QEMU
        suppress_health_check=list(HealthCheck),
    )
    @given(history=HISTORIES)
    def any_history(history: list[Step]) -> None:
        if budget.is_spent:
            return
        try:
            play(tmp_path_factory.mktemp("history"), [*BEGINNING, *history])
        except BaseException:
            budget.failed = True
            raise

    any_history()
