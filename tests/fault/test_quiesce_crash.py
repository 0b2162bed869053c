"""A process that dies before or after any step while it holds its guest: the next one lets the guest go."""

import itertools
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import cast

import pytest
from crashing import WHENS, Bomb, Crash, Mined, When
from fake_agent import FakeAgent, fake_agent
from protected_vm import VM, ProtectedVm

from drsync.model import Consistency, SystemClock
from drsync.quiesce import Alone, Quiesce, QuiescePolicy
from drsync.source import Source
from drsync.source.agent import AgentSocket, GuestAgent
from drsync.spool import VmSpool


class Pausing(Alone):
    """As in a group of one."""

    alone, pauses = False, True


def cycle(lab: ProtectedVm, agent: FakeAgent, bomb: Bomb, *, pauses: bool) -> None:
    """One cycle of a process that has the bomb in it."""
    spool = cast(VmSpool, Mined(lab.spool().vm(VM), bomb))
    clock = SystemClock()

    def open_agent() -> GuestAgent:
        opened = AgentSocket(agent.path, clock=clock)
        sockets.callback(opened.close)
        return cast(GuestAgent, Mined(opened, bomb))

    def open_source() -> Source:
        return cast(Source, Mined(lab.source(), bomb))

    policy = QuiescePolicy(consistency=Consistency.FILESYSTEM, limit_s=600.0)
    quiesce = Quiesce(policy, spool, open_agent, open_source, clock, Pausing() if pauses else None)
    with ExitStack() as sockets:  # the kernel closes a dead process's sockets
        lab.cycle(spool=spool, open_source=open_source, quiesce=quiesce)


def crash_at(place: Path, step: int, when: When, *, pauses: bool) -> str:
    """Crash a cycle at one step, then run another; where it crashed, or nothing if it did not come so far."""
    with fake_agent() as agent:
        lab = ProtectedVm(place / f"{step}-{when}")
        lab.cycle()
        lab.write()
        bomb = Bomb(step, when)
        with suppress(Crash):
            cycle(lab, agent, bomb, pauses=pauses)
        was_held = agent.frozen or not lab.vm.running
        if was_held:
            assert lab.spool().vm(VM).held() is not None, f"nobody knows: {when} {bomb.fired_at}"
        lab.write()
        cycle(lab, agent, Bomb(0, "before"), pauses=pauses)
        assert not agent.frozen
        assert lab.vm.running
        assert lab.spool().vm(VM).held() is None
        assert lab.check_settled().consistency is Consistency.FILESYSTEM
        return f"{when} {bomb.fired_at}{' (held)' if was_held else ''}" if bomb.fired_at else ""


@pytest.mark.parametrize("pauses", [False, True], ids=["frozen", "frozen and paused"])
def test_a_crash_at_any_step_leaves_no_guest_held(tmp_path: Path, pauses: bool) -> None:
    fired: list[str] = []
    for step in itertools.count(1):
        crashed = [crash_at(tmp_path, step, when, pauses=pauses) for when in WHENS]
        if not any(crashed):
            break
        fired += crashed
    assert {"before VmSpool.hold", "before AgentSocket.freeze", "before AgentSocket.close"} <= set(fired)
    assert {"after AgentSocket.freeze (held)", "before AgentSocket.thaw (held)"} <= set(fired)
    assert ("after Witness.pause (held)" in fired) is pauses
    assert ("before Witness.resume (held)" in fired) is pauses
