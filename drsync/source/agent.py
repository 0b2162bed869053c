"""Talks to the agent in a guest (qemu-ga): freezes the guest's file systems, and thaws them again.

    drsync ── unix socket ── QEMU ── virtio-serial ── qemu-ga

The other end is the guest, so whatever comes from there may be late, cut,
endless, or a lie: every request has a time limit, what is read for it is
bounded, and text goes through `_shown` before anybody sees it. A guest that
lies about freezing spoils its own points' label, nothing else.

**In step.** Answers carry no number, and a request that was given up is still
answered some day. So a session begins with `guest-sync-delimited`: the agent
repeats a random number behind a byte 0xFF that no JSON holds; all before that is old
and dropped. After every failure the next request does the same again.

**A late freeze.** An agent that hangs, and wakes up when nobody waits any more, still
does what it was asked for. A freeze is therefore sent only to an agent that has just
answered, and a thaw is sent without waiting for an answer to the sync before it: it
then stands in the queue right behind the freeze.

Source: QEMU's docs/interop/qemu-ga-ref and qga/qapi-schema.json.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

import msgspec

from drsync.model import Clock
from drsync.source.unix_socket import connect_unix

T = TypeVar("T")

ANSWER_S: Final = 5.0
"""An agent that is well answers in milliseconds; one on a guest that is very busy may need a moment."""
MAX_REPLY_BYTES: Final = 1024 * 1024
"""What is read for one request, old answers and noise included; guest-info has some 10 KiB."""
_MAX_TEXT: Final = 200
_DELIMITER: Final = b"\xff"


class AgentFailed(Exception):
    """The agent did not do what was asked. Translated by who knows what was meant."""


class AgentAbsent(AgentFailed):
    """Nobody listens where the agent is to be reached: the VM is off."""


class AgentSilent(AgentFailed):
    """No answer came in time, or none that is one; whether the request was or will be carried out is unknown."""


class AgentRefused(AgentFailed):
    """The agent understood and said no; the guest is as it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentInfo:
    """What an agent says of itself."""

    version: str
    can_freeze: bool


class GuestAgent(Protocol):
    """An open session with the agent of one VM. One thread at a time uses it."""

    @property
    def vm_run(self) -> str:
        """Names this run of the VM: under another name its guest has been started anew, and nothing is frozen."""
        ...

    def about(self, *, timeout_s: float) -> AgentInfo:
        """What the agent says of itself.

        Raises:
            AgentFailed: it does not answer, or answers nonsense.
        """
        ...

    def is_frozen(self, *, timeout_s: float) -> bool:
        """Whether the agent holds file systems frozen; True also if it can't be told.

        Raises:
            AgentFailed: it does not answer, or answers nonsense.
        """
        ...

    def freeze(self, *, timeout_s: float) -> int:
        """Freeze all file systems; how many were frozen.

        Raises:
            AgentRefused: none is frozen by this call.
            AgentSilent: they may be frozen now, or later: call `thaw`.
        """
        ...

    def thaw(self, *, timeout_s: float) -> int:
        """Thaw all file systems; how many were thawed. They are thawed when this returns.

        Raises:
            AgentFailed: they may still be frozen: call it again, in a new session.
        """
        ...

    def close(self) -> None:
        """End the session; the guest is left as it is. Safe to call twice."""
        ...


class _Command(msgspec.Struct, frozen=True, kw_only=True):
    """One command that an agent knows (GuestAgentCommandInfo)."""

    name: str
    enabled: bool


class _Info(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to guest-info (GuestAgentInfo)."""

    version: str
    supported_commands: Sequence[_Command]


class AgentSocket:
    """A GuestAgent at a unix socket of QEMU's (`-chardev socket,server=on` behind a virtserialport)."""

    def __init__(self, path: Path, *, clock: Clock, timeout_s: float = ANSWER_S) -> None:
        """Connect, and see that the agent answers.

        Raises:
            AgentAbsent: nobody listens at `path`.
            AgentSilent: QEMU or the agent does not answer; the guest was asked for nothing but an answer.
        """
        self._clock = clock
        self._received = b""
        self._in_step = False
        try:
            self._socket, peer = connect_unix(path, timeout_s)
        except (FileNotFoundError, ConnectionRefusedError) as err:
            raise AgentAbsent(f"nobody listens at {path}") from err
        except BlockingIOError as err:
            raise AgentSilent(f"{path} is in use by another program") from err
        except OSError as err:
            raise AgentSilent(f"can't connect to {path}: {err.strerror}") from err
        self._vm_run = f"{peer.pid}-{_start_of(peer.pid)}"
        try:
            self._call("guest-ping", dict[str, object], timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def vm_run(self) -> str:
        return self._vm_run

    def about(self, *, timeout_s: float) -> AgentInfo:
        info = self._call("guest-info", _Info, timeout_s)
        can_freeze = any(c.name == "guest-fsfreeze-freeze" and c.enabled for c in info.supported_commands)
        return AgentInfo(version=_shown(info.version), can_freeze=can_freeze)

    def is_frozen(self, *, timeout_s: float) -> bool:
        return self._call("guest-fsfreeze-status", str, timeout_s) != "thawed"

    def freeze(self, *, timeout_s: float) -> int:
        deadline_s = self._clock.monotonic_s() + timeout_s
        if self.is_frozen(timeout_s=timeout_s):
            raise AgentRefused("the file systems are frozen already, by another program")
        return self._count("guest-fsfreeze-freeze", deadline_s - self._clock.monotonic_s())

    def thaw(self, *, timeout_s: float) -> int:
        deadline_s = self._clock.monotonic_s() + timeout_s
        count = self._count("guest-fsfreeze-thaw", timeout_s, blindly=True)
        if self.is_frozen(timeout_s=deadline_s - self._clock.monotonic_s()):
            raise AgentRefused("the agent says that file systems are still frozen")
        return count

    def close(self) -> None:
        self._socket.close()

    def _count(self, command: str, timeout_s: float, *, blindly: bool = False) -> int:
        count = self._call(command, int, timeout_s, blindly=blindly)
        if not 0 <= count < 2**31:
            raise AgentSilent(f"{command} is answered with nonsense")
        return count

    def _call(self, command: str, answer: type[T], timeout_s: float, *, blindly: bool = False) -> T:
        """Run a command; its answer. `blindly`: send it before it is known whether the agent answers at all."""
        exchange = _Exchange(self._clock.monotonic_s() + timeout_s)
        token = secrets.randbits(48)
        was_in_step, self._in_step = self._in_step, False  # until the answer is there
        sync = _DELIMITER + _request("guest-sync-delimited", id=token)
        request = _request(command)
        if was_in_step:
            self._send(request, exchange)
        else:
            self._send(sync + request if blindly else sync, exchange)
            self._get_in_step(token, exchange)
            if not blindly:
                self._send(request, exchange)
        reply = self._reply(command, answer, exchange)
        self._in_step = True
        if isinstance(reply, AgentRefused):
            raise reply
        return reply

    def _get_in_step(self, token: int, exchange: "_Exchange") -> None:
        """Drop all that comes before the answer that repeats `token`."""
        while True:
            _, found, line = self._line(exchange).rpartition(_DELIMITER)
            if found and _decoded(line).get("return") == token:
                return

    def _reply(self, command: str, answer: type[T], exchange: "_Exchange") -> T | AgentRefused:
        reply = _decoded(self._line(exchange))
        if isinstance(error := reply.get("error"), dict):
            return AgentRefused(f"{command}: {_shown(error.get('desc'))}")
        try:
            return msgspec.convert(reply["return"], answer)
        except (KeyError, msgspec.ValidationError, RecursionError) as err:
            raise AgentSilent(f"{command} is answered with nonsense") from err

    def _line(self, exchange: "_Exchange") -> bytes:
        while b"\n" not in self._received:
            self._socket.settimeout(self._left_s(exchange))
            try:
                data = self._socket.recv(65536)
            except TimeoutError as err:
                raise AgentSilent("it gave no answer in time") from err
            except OSError as err:
                raise AgentSilent(f"the connection broke: {err.strerror}") from err
            if not data:
                raise AgentSilent("QEMU closed the connection")
            exchange.read_bytes += len(data)
            if exchange.read_bytes > MAX_REPLY_BYTES:
                self._received = b""
                raise AgentSilent("it sends more than any answer has")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _send(self, data: bytes, exchange: "_Exchange") -> None:
        self._socket.settimeout(self._left_s(exchange))
        try:
            self._socket.sendall(data)
        except TimeoutError as err:
            raise AgentSilent("it takes no request") from err
        except OSError as err:
            raise AgentSilent(f"the connection broke: {err.strerror}") from err

    def _left_s(self, exchange: "_Exchange") -> float:
        left_s = exchange.deadline_s - self._clock.monotonic_s()
        if left_s <= 0:
            raise AgentSilent("it gave no answer in time")
        return left_s


@dataclass(slots=True)
class _Exchange:
    """The bounds of one request."""

    deadline_s: float
    read_bytes: int = 0


def _request(command: str, **arguments: object) -> bytes:
    message: dict[str, object] = {"execute": command}
    if arguments:
        message["arguments"] = arguments
    return msgspec.json.encode(message) + b"\n"


def _decoded(line: bytes) -> dict[str, object]:
    """A line as the object that it has to be; an empty one if it is none."""
    try:
        return msgspec.json.decode(line, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}


def _shown(text: object) -> str:
    """What the guest says, cut and without anything that could upset a terminal or a log."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:_MAX_TEXT])


def _start_of(pid: int) -> str:
    """When a process started, in the kernel's ticks since boot: with its id, the name of one run of it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return "0"
    return stat.rpartition(b")")[2].split()[19].decode("ascii", "replace")
