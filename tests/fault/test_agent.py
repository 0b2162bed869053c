"""The guest agent's other end is the guest: it may hang, lie, babble or answer old questions, and harms nobody."""

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from fake_agent import HANG_UP, Answer, FakeAgent, fake_agent, refusal

from drsync.model import SystemClock
from drsync.source.agent import (
    MAX_REPLY_BYTES,
    AgentAbsent,
    AgentFailed,
    AgentInfo,
    AgentRefused,
    AgentSilent,
    AgentSocket,
)

SOON_S = 0.3


@pytest.fixture
def agent() -> Iterator[FakeAgent]:
    with fake_agent() as agent:
        yield agent


def session(agent: FakeAgent, timeout_s: float = 5.0) -> AgentSocket:
    return AgentSocket(agent.path, clock=SystemClock(), timeout_s=timeout_s)


def test_file_systems_are_frozen_and_thawed_and_counted(agent: FakeAgent) -> None:
    with closing(session(agent)) as guest:
        assert guest.about(timeout_s=5) == AgentInfo(version="7.2.22", can_freeze=True)
        assert guest.is_frozen(timeout_s=5) is False
        assert guest.freeze(timeout_s=5) == 2
        assert guest.is_frozen(timeout_s=5) is True
        assert guest.thaw(timeout_s=5) == 2
        assert guest.thaw(timeout_s=5) == 0
    assert not agent.frozen


def test_one_run_of_a_vm_has_one_name(agent: FakeAgent) -> None:
    with closing(session(agent)) as guest:
        first = guest.vm_run
    with closing(session(agent)) as guest:
        assert guest.vm_run == first
        assert first.split("-")[1] != "0"


def test_nobody_at_the_socket_is_an_absent_agent(tmp_path: Path, agent: FakeAgent) -> None:
    with pytest.raises(AgentAbsent, match="nobody listens at"):
        AgentSocket(tmp_path / "none", clock=SystemClock())
    agent.close()
    with pytest.raises(AgentAbsent):
        session(agent)


def test_an_agent_that_hangs_costs_the_time_limit_and_no_more(agent: FakeAgent) -> None:
    agent.hangs.set()
    started_s = time.monotonic()
    with pytest.raises(AgentSilent, match="no answer in time"):
        session(agent, SOON_S)
    assert SOON_S <= time.monotonic() - started_s < 3


def test_an_agent_that_does_not_answer_was_not_asked_to_freeze(agent: FakeAgent) -> None:
    """It would freeze the guest when it wakes up, and nobody would be there to thaw it."""
    with closing(session(agent)) as guest:
        agent.script["guest-ping"] = lambda *_: None
        with pytest.raises(AgentSilent):
            guest._call("guest-ping", dict, SOON_S)
        agent.hangs.set()
        with pytest.raises(AgentSilent):
            guest.freeze(timeout_s=SOON_S)
        agent.hangs.clear()
        time.sleep(0.1)
    assert "guest-fsfreeze-freeze" not in agent.commands
    assert not agent.frozen


def test_a_freeze_that_is_carried_out_late_is_thawed_by_what_stands_behind_it(agent: FakeAgent) -> None:
    def hang_after(command: str, arguments: dict[str, Any]) -> Answer:
        agent.hangs.set()
        return agent.answer(command, arguments)

    with closing(session(agent)) as guest:
        agent.script["guest-fsfreeze-status"] = hang_after
        with pytest.raises(AgentSilent):
            guest.freeze(timeout_s=SOON_S)
        del agent.script["guest-fsfreeze-status"]
        with pytest.raises(AgentSilent):
            guest.thaw(timeout_s=SOON_S)
    agent.hangs.clear()
    with closing(session(agent)) as guest:
        assert guest.is_frozen(timeout_s=5) is False
    freeze = agent.commands.index("guest-fsfreeze-freeze")
    assert agent.commands[freeze + 1] == "guest-fsfreeze-thaw"


def test_answers_to_questions_that_were_given_up_are_not_taken_for_new_ones(agent: FakeAgent) -> None:
    with closing(session(agent)) as guest:
        agent.script["guest-fsfreeze-thaw"] = lambda *_: None
        with pytest.raises(AgentSilent):
            guest.thaw(timeout_s=SOON_S)
        del agent.script["guest-fsfreeze-thaw"]
        late = b'{"return": 7}\n\xff{"return": 7}\n{"return": "frozen"}\nnoise \xff\xff{'
        agent.script["guest-sync-delimited"] = lambda c, a: late + (agent.answer(c, a) or b"")
        assert guest.is_frozen(timeout_s=5) is False


@pytest.mark.parametrize(
    "said",
    [
        b'{"return": "2"}\n',
        b'{"return": true}\n',
        b'{"return": -1}\n',
        b'{"return": 99999999999999999999}\n',
        b'{"return": 1.5}\n',
        b"{}\n",
        b"[]\n",
        b"null\n",
        b"\x00\xfe\n",
        b"\n",
        b'{"return": ' + b"[" * 100_000 + b"\n",
        b'{"error": "no"}\n',
    ],
)
def test_nonsense_is_an_agent_that_does_not_answer(agent: FakeAgent, said: bytes) -> None:
    agent.script["guest-fsfreeze-freeze"] = lambda *_: said
    with closing(session(agent)) as guest:
        with pytest.raises(AgentSilent, match="nonsense"):
            guest.freeze(timeout_s=5)
        assert guest.thaw(timeout_s=5) == 0, "the session goes on"


@pytest.mark.parametrize("piece", [b"x", b"x\n", b'\xff{"return": 1}\n'], ids=["one line", "lines", "old answers"])
def test_a_guest_that_babbles_is_cut_off(agent: FakeAgent, piece: bytes) -> None:
    agent.script["guest-sync-delimited"] = lambda *_: piece * (4 * MAX_REPLY_BYTES // len(piece))
    with pytest.raises(AgentSilent, match="more than any answer has"):
        session(agent)


def test_a_guest_that_babbles_slowly_is_cut_off_in_time() -> None:
    """The limit is on the whole request, not on each byte."""
    with tempfile.TemporaryDirectory(prefix="drsync-agent-") as directory, socket.socket(socket.AF_UNIX) as listener:
        path = Path(directory) / "qga"
        listener.bind(str(path))
        listener.listen(1)
        sent: list[int] = []

        def drip() -> None:
            client, _ = listener.accept()
            with client, suppress(OSError):
                while True:
                    sent.append(client.send(b"x"))
                    time.sleep(0.02)

        thread = threading.Thread(target=drip)
        thread.start()
        started_s = time.monotonic()
        with pytest.raises(AgentSilent, match="no answer in time"):
            AgentSocket(path, clock=SystemClock(), timeout_s=SOON_S)
        assert time.monotonic() - started_s < 3
        thread.join()
    assert len(sent) > 3


def test_a_refusal_is_told_in_the_agents_words_without_what_could_upset_a_terminal(agent: FakeAgent) -> None:
    agent.script["guest-fsfreeze-freeze"] = lambda *_: refusal("hook \x1b[2J failed " + "y" * 10_000)
    with closing(session(agent)) as guest, pytest.raises(AgentRefused) as caught:
        guest.freeze(timeout_s=5)
    assert "\x1b" not in str(caught.value)
    assert str(caught.value).startswith("guest-fsfreeze-freeze: hook ?[2J failed yyy")
    assert len(str(caught.value)) < 300


def test_what_another_program_has_frozen_is_not_frozen_again(agent: FakeAgent) -> None:
    agent.frozen = True
    with closing(session(agent)) as guest, pytest.raises(AgentRefused, match="already, by another program"):
        guest.freeze(timeout_s=5)
    assert agent.frozen


def test_an_agent_that_says_it_thawed_and_is_still_frozen_is_not_believed(agent: FakeAgent) -> None:
    agent.script["guest-fsfreeze-thaw"] = lambda *_: b'{"return": 2}\n'
    with closing(session(agent)) as guest:
        guest.freeze(timeout_s=5)
        with pytest.raises(AgentRefused, match="still frozen"):
            guest.thaw(timeout_s=5)


@pytest.mark.parametrize("command", ["guest-ping", "guest-fsfreeze-status", "guest-fsfreeze-freeze"])
def test_a_connection_that_breaks_leaves_the_state_unknown(agent: FakeAgent, command: str) -> None:
    agent.script[command] = lambda *_: HANG_UP
    with pytest.raises(AgentSilent, match="closed the connection"):
        with closing(session(agent)) as guest:
            guest.freeze(timeout_s=5)


def test_a_channel_that_another_program_uses_is_silent(agent: FakeAgent) -> None:
    with closing(session(agent)), pytest.raises(AgentFailed):
        session(agent, SOON_S)
