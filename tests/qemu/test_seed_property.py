"""A guest that writes, zeroes and discards all the time while it is seeded, with interruptions of every kind.

Hypothesis makes up the histories; they happen on a real QEMU with a qcow2 and a raw
disk. While drsync reads the disks live, the guest changes them between any two
pieces. drsync stops or dies at any step, QEMU is restarted or loses power, a bitmap is
lost: every point must be what the oracle says.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from crashing import WHENS, Bomb, Crash, When
from faulty import Effect, Fault, FaultyStore
from hypothesis import strategies as st
from protected_vm import VM
from vm_history import CHANGES, DISKS, SIZES, Change, Lab, PowerCut, Restart, Write, Zero, play_any

from drsync.capture import Result
from drsync.errors import SourceLost, StoreUnavailable
from drsync.format import names
from drsync.model import Kind
from drsync.seed import SeedOptions
from drsync.ship import ShipLimits

BUDGET_S: Final = 45.0
"""No history is begun later than this after the first one: a loaded machine tries fewer."""
SMALL: Final = ShipLimits(object_blocks=8, object_zero_runs=8, workers=3)

pytestmark = pytest.mark.qemu


class Guest:
    """A Pace at which the guest changes its disks: something before every piece that is read."""

    def __init__(self, lab: Lab, changes: Sequence[Change], stop_after: int | None) -> None:
        self._lab = lab
        self._changes = list(changes)
        self._stop_after = stop_after
        self._lock = threading.Lock()
        self.pieces = 0

    def take(self, size_bytes: int) -> None:
        with self._lock:
            self.pieces += 1
            if self._changes:
                self._changes.pop(0).run(self._lab)  # type: ignore[attr-defined]

    def take_now(self, size_bytes: int) -> bool:
        return False

    def is_asked_to_stop(self) -> bool:
        return self._stop_after is not None and self.pieces >= self._stop_after


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """A cycle that reads live whatever is not an increment. `stop_after`: it is asked to stop after so many pieces."""

    meanwhile: Sequence[Change]
    stop_after: int | None = None
    full: bool = False
    bomb: tuple[int, When] | None = None
    failing_pack: int | None = None

    def run(self, lab: Lab) -> None:
        guest = Guest(lab, self.meanwhile, self.stop_after)
        seed = SeedOptions(stream_above_bytes=0, read_pace=guest, stop=guest.is_asked_to_stop, limits=SMALL)
        bomb = Bomb(*self.bomb) if self.bomb else None
        store = None
        if self.failing_pack:
            fault = Fault("create", call=self.failing_pack, key=names.pack_prefix(VM), effect=Effect.REPLY_LOST)
            store = FaultyStore(lab.store, fault)
        with suppress(Crash, StoreUnavailable):
            outcome = lab.cycle(seed=seed, full=self.full, bomb=bomb, store=store)
            if outcome.result is not Result.SEEDING and not self.meanwhile:
                assert outcome.segment is not None
                assert outcome.segment.meta.point is not None
                assert lab.seen[outcome.segment.meta.point.capture] == lab.contents()


@dataclass(frozen=True, slots=True, kw_only=True)
class LostBitmap:
    """All bitmaps of a disk are gone, nobody knows why."""

    disk: str

    def run(self, lab: Lab) -> None:
        for node in lab.daemon.execute("query-named-block-nodes", flat=True):
            for bitmap in node.get("dirty-bitmaps", []) if node["node-name"] == lab.daemon.node(self.disk) else []:
                lab.daemon.execute("block-dirty-bitmap-remove", node=node["node-name"], name=bitmap["name"])


@dataclass(frozen=True, slots=True, kw_only=True)
class DiesMeanwhile:
    """QEMU loses power while it is read."""

    after: int

    def run(self, lab: Lab) -> None:
        class Killer(Guest):
            def take(inner, size_bytes: int) -> None:
                super().take(size_bytes)
                if inner.pieces == self.after and lab.daemon.running:
                    lab.daemon.kill()

        guest = Killer(lab, [], None)
        seed = SeedOptions(stream_above_bytes=0, read_pace=guest, limits=SMALL)
        with suppress(SourceLost):
            lab.cycle(seed=seed, full=True)
        if not lab.daemon.running:
            lab.daemon.start()
            lab.oracle = {name: bytearray(lab.daemon.read(name)) for name in SIZES}


Step = Change | Seed | LostBitmap | DiesMeanwhile | Restart | PowerCut

MEANWHILE: Final = st.lists(CHANGES.filter(lambda c: type(c).__name__ != "Grow"), max_size=8)
SEEDS: Final = st.one_of(
    st.builds(Seed, meanwhile=MEANWHILE, full=st.sampled_from([False, False, True])),
    st.builds(Seed, meanwhile=MEANWHILE, stop_after=st.integers(1, 6)),
    st.builds(Seed, meanwhile=MEANWHILE, bomb=st.tuples(st.integers(1, 45), st.sampled_from(WHENS))),
    st.builds(Seed, meanwhile=MEANWHILE, failing_pack=st.integers(1, 6)),
)
TROUBLE: Final = st.one_of(
    st.sampled_from([Restart(), PowerCut()]),
    st.builds(LostBitmap, disk=DISKS),
    st.builds(DiesMeanwhile, after=st.integers(1, 5)),
)
HISTORIES: Final[st.SearchStrategy[list[Step]]] = st.lists(
    st.one_of(CHANGES, SEEDS, SEEDS, TROUBLE), min_size=6, max_size=12
)
BEGINNING: Final = (
    Write(disk="root", start=0, sectors=6000, pattern=254),
    Write(disk="data", start=300, sectors=3000, pattern=255),
)


def play(place: Path, history: Sequence[Step]) -> set[Kind]:
    """Let a history happen and check all of it; the kinds of captures that its points came from."""
    lab = Lab(place, free_nbd=True)
    with lab.daemon:
        for step in history:
            step.run(lab)  # type: ignore[union-attr]
        kinds = lab.check()
        assert lab.daemon.execute("query-block-exports") == []
        assert not lab.spool.vm(VM).journal_path.exists()
        return kinds


def test_a_history_with_all_kinds_of_interruptions_restores_at_every_point(tmp_path: Path) -> None:
    busy = [
        Write(disk="root", sectors=300, start=0, pattern=1),
        Write(disk="data", sectors=300, start=999, pattern=2),
        Zero(disk="root", sectors=700, start=30, unmap=True),
        Write(disk="root", sectors=3, start=500, pattern=3),
    ]
    kinds = play(
        tmp_path,
        [
            *BEGINNING,
            Seed(meanwhile=busy, stop_after=2),
            Seed(meanwhile=busy, bomb=(9, "after")),
            Write(disk="root", sectors=300, start=501, pattern=5),
            Restart(),
            Seed(meanwhile=busy, failing_pack=2),
            LostBitmap(disk="data"),
            Seed(meanwhile=busy),
            Write(disk="root", sectors=300, start=30, pattern=6),
            Seed(meanwhile=busy),
            PowerCut(),
            Seed(meanwhile=busy, stop_after=3),
            DiesMeanwhile(after=2),
            Write(disk="data", sectors=300, start=300, pattern=7),
            Seed(meanwhile=busy),
            LostBitmap(disk="root"),
            Write(disk="data", sectors=30, start=310, pattern=8),
            Seed(meanwhile=[]),
            Seed(meanwhile=busy, full=True),
        ],
    )
    assert kinds == set(Kind)


def test_any_history_of_seeds_restores_at_every_point(tmp_path_factory: pytest.TempPathFactory) -> None:
    play_any(
        HISTORIES, lambda history: play(tmp_path_factory.mktemp("history"), [*BEGINNING, *history]), budget_s=BUDGET_S
    )
