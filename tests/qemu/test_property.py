"""Any history of a VM, captured in any split, restores at every point to what an oracle says.

Hypothesis makes up the histories; they happen on a real qemu-storage-daemon with
a qcow2 and a raw disk, and go through the real cycle: QMP, spool, directory
store, restore. The oracle is a bytearray a disk that each step changes, too.

A failure prints the history, and the line that makes it happen again.
"""

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
from vm_history import CHANGES, Discard, Grow, Lab, PowerCut, Restart, Write, Zero, play_any

from drsync.errors import CaptureTimeout, StoreUnavailable
from drsync.format import names
from drsync.model import Kind

BUDGET_S: Final = 30.0
"""No history is begun later than this after the first one: a loaded machine tries fewer."""

pytestmark = pytest.mark.qemu


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


def test_any_history_restores_at_every_point(tmp_path_factory: pytest.TempPathFactory) -> None:
    play_any(
        HISTORIES, lambda history: play(tmp_path_factory.mktemp("history"), [*BEGINNING, *history]), budget_s=BUDGET_S
    )
