"""What drsync shall reach on libvirt VMs, beside what it did: printed figures, which fail nothing."""

import statistics
from collections.abc import Sequence

from bench.goals import OURS, Goal
from bench.guest_latency import Latency
from bench.measuring import MIB, Journal

_PEER = "virtnbdbackup"
_STEPS = ("full", "increment", "restore")


def libvirt_goals(journal: Journal, latencies: Sequence[tuple[str, str, Latency]]) -> list[Goal]:
    """Every goal, from the medians of all runs."""
    return [
        *(_twice_as_fast(journal, step) for step in _STEPS),
        *(_fewer_bytes(journal, step) for step in _STEPS[:2]),
        *(_no_slower_guest(latencies, step) for step in _STEPS[:2]),
    ]


def _twice_as_fast(journal: Journal, step: str) -> Goal:
    goal = f"{step}: at least 2 x as fast as {_PEER}"
    mine, theirs = journal.median(OURS, step), journal.median(_PEER, step)
    if mine is None or theirs is None:
        return Goal(goal=goal, measured="-", reached=None)
    ratio = theirs.wall_s / mine.wall_s
    return Goal(goal=goal, measured=f"{ratio:.2f} x ({mine.wall_s:.2f} : {theirs.wall_s:.2f} s)", reached=ratio >= 2)


def _fewer_bytes(journal: Journal, step: str) -> Goal:
    goal = f"{step}: fewer bytes stored than {_PEER}"
    mine, theirs = journal.median(OURS, step), journal.median(_PEER, step)
    if mine is None or theirs is None or mine.stored_bytes is None or theirs.stored_bytes is None:
        return Goal(goal=goal, measured="-", reached=None)
    measured = f"{mine.stored_bytes / MIB:.0f} : {theirs.stored_bytes / MIB:.0f} MiB"
    return Goal(goal=goal, measured=measured, reached=mine.stored_bytes < theirs.stored_bytes)


def _no_slower_guest(latencies: Sequence[tuple[str, str, Latency]], step: str) -> Goal:
    goal = f"{step}: the guest's writes (p99) no slower than with {_PEER}"
    mine, theirs = ([x.p99_ms for tool, s, x in latencies if (tool, s) == (name, step)] for name in (OURS, _PEER))
    if not mine or not theirs:
        return Goal(goal=goal, measured="-", reached=None)
    ours_ms, their_ms = statistics.median(mine), statistics.median(theirs)
    return Goal(goal=goal, measured=f"{ours_ms:.1f} : {their_ms:.1f} ms", reached=ours_ms <= their_ms)
