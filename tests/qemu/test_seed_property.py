"""A guest that writes, zeroes and discards all the time while it is seeded, with interruptions of every kind.

Hypothesis makes up the histories; they happen on a real QEMU with a qcow2 and a raw
disk. While drsync reads the disks live, the guest changes them between any two
pieces. drsync stops or dies at any step, QEMU is restarted or loses power, a bitmap is
lost: every point must be what the oracle says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from hypothesis import strategies as st
from protected_vm import VM
from seed_history import BEGINNING, SEEDS, DiesMeanwhile, Seed
from vm_history import CHANGES, DISKS, Change, Discard, Grow, Lab, PowerCut, Restart, Write, Zero, play_any

from drsync.model import Kind

BUDGET_S: Final = 45.0
"""No history is begun later than this after the first one: a loaded machine tries fewer."""
pytestmark = pytest.mark.qemu


@dataclass(frozen=True, slots=True, kw_only=True)
class LostBitmap:
    """All bitmaps of a disk are gone, nobody knows why; but for those that a dead drsync's exports hold on to."""

    disk: str

    def run(self, lab: Lab) -> None:
        for node in lab.daemon.execute("query-named-block-nodes", flat=True):
            found = node.get("dirty-bitmaps", []) if node["node-name"] == lab.daemon.node(self.disk) else []
            for bitmap in (bitmap for bitmap in found if not bitmap["busy"]):
                lab.daemon.execute("block-dirty-bitmap-remove", node=node["node-name"], name=bitmap["name"])


Step = Change | Grow | Seed | LostBitmap | DiesMeanwhile | Restart | PowerCut

TROUBLE: Final = st.one_of(
    st.sampled_from([Restart(), PowerCut()]),
    st.builds(LostBitmap, disk=DISKS),
    st.builds(DiesMeanwhile, after=st.integers(1, 5)),
)
HISTORIES: Final[st.SearchStrategy[list[Step]]] = st.lists(
    st.one_of(CHANGES, SEEDS, SEEDS, TROUBLE), min_size=6, max_size=12
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


def test_a_worker_that_is_stopped_leaves_nothing_on_its_way_while_others_go_on(tmp_path: Path) -> None:
    """Else a write that drains the disk waits for replies which nobody takes any more, and the guest with it."""
    meanwhile = [
        Zero(disk="root", start=990, sectors=16384, unmap=True),
        Discard(disk="data", start=999, sectors=4),
        Zero(disk="data", start=990, sectors=185, unmap=False),
        Discard(disk="data", start=990, sectors=7),
        Write(disk="data", start=999, sectors=390, pattern=1),
        Write(disk="data", start=990, sectors=361, pattern=166),
    ]
    play(
        tmp_path,
        [
            *BEGINNING,
            Grow(disk="root", sectors=246),
            Restart(),
            Seed(meanwhile=[], failing_pack=6),
            Grow(disk="root", sectors=182),
            Seed(meanwhile=[], failing_pack=6),
            LostBitmap(disk="data"),
            Discard(disk="root", start=990, sectors=7),
            Seed(meanwhile=meanwhile, stop_after=3),
        ],
    )


def test_any_history_of_seeds_restores_at_every_point(tmp_path_factory: pytest.TempPathFactory) -> None:
    play_any(
        HISTORIES, lambda history: play(tmp_path_factory.mktemp("history"), [*BEGINNING, *history]), budget_s=BUDGET_S
    )
