"""A QMP session with one QEMU: the only module that knows `qemu.qmp`.

The library is asynchronous; this face is not. A private event loop runs only
inside calls, so a Monitor belongs to the thread that uses it, and nothing
happens between calls: events wait in the socket until the next one.

What comes back is untyped JSON from another program. `query` checks it against
a type before anyone looks into it.
"""

import asyncio
import errno
import inspect
import logging
import socket
import stat
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self, TypeVar

import msgspec
from qemu.qmp import ConnectError, EventListener, ExecuteError, Message, QMPClient, QMPError, Runstate

from drsync.errors import DrsyncError, NotQmp, SourceBusy, SourceLost, SourceUnreachable
from drsync.source.unix_socket import Peer, connect_unix

T = TypeVar("T")
log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S: Final = 60.0
"""QEMU answers in milliseconds, unless its main loop waits for a disk to drain; longer than this is a hang."""
REPLY_LIMIT_BYTES: Final = 64 * 1024 * 1024
"""A reply is one line; that of query-named-block-nodes has about 2 KiB for every image of every backing chain."""
_CLOSE_TIMEOUT_S: Final = 5.0


class CommandRefused(Exception):
    """QEMU understood the command and said no; nothing changed. Translated by who knows what was meant."""

    def __init__(self, command: str, error_class: str, text: str) -> None:
        super().__init__(f"{command}: {text}")
        self.command = command
        self.error_class = error_class
        self.text = text


class _Numbers(msgspec.Struct, frozen=True, kw_only=True):
    major: int
    minor: int
    micro: int


class _Version(msgspec.Struct, frozen=True, kw_only=True):
    """QEMU's version (VersionInfo)."""

    qemu: _Numbers


class Monitor:
    """An open QMP session. Not thread-safe. A context manager that closes it."""

    def __init__(self, vm: str, path: Path) -> None:
        self._vm = vm
        self._path = path
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._client = _Client(vm, readbuflen=REPLY_LIMIT_BYTES)
        self._client.logger = _WireLogger(log)
        self._client.events.event_filter = lambda _: False  # it would keep every event of the session
        self._bell = _JobBell()
        self._client.register_listener(self._bell)
        self._closed = False
        self._end = ""
        self.peer = Peer(pid=0, uid=0, gid=0)

    @classmethod
    def connect(cls, vm: str, path: Path, *, timeout_s: float) -> "Monitor":
        """A session with the QEMU that listens at the unix socket `path`.

        Raises:
            SourceUnreachable: nobody listens there, or it hangs up at once.
            SourceBusy: no greeting in `timeout_s`: QEMU talks to one client at a time.
            NotQmp: what answers does not speak QMP.
        """
        monitor = cls(vm, path)
        try:
            monitor._connect(timeout_s)
        except BaseException:
            monitor.close()
            raise
        return monitor

    @classmethod
    def attach(cls, vm: str, connection: socket.socket, *, timeout_s: float) -> "Monitor":
        """A session over a socket that is connected to a QEMU already; the session owns it from now on.

        Raises:
            SourceUnreachable, SourceBusy, NotQmp: as `connect`.
        """
        monitor = cls(vm, Path("a QEMU of drsync's own"))
        try:
            monitor._greet(connection, timeout_s)
        except BaseException:
            monitor.close()
            raise
        return monitor

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> object:
        """Run a command; returns what QEMU answers.

        Raises:
            CommandRefused: QEMU said no.
            SourceLost: the connection broke, or no answer came in `timeout_s`;
                whether the command was carried out is unknown.
        """
        if self._end:
            raise self._lost(command)
        try:
            return self._run(lambda: self._client.execute(command, arguments), timeout_s)
        except ExecuteError as err:
            raise CommandRefused(command, err.error_class, str(err)) from err
        except TimeoutError as err:
            self._disconnect(f"no answer in {timeout_s:g} s")
            raise self._lost(command) from err
        except QMPError as err:
            self._disconnect(str(err))
            raise self._lost(command) from err

    def query(self, command: str, answer: type[T], arguments: Mapping[str, object] | None = None) -> T:
        """Run a command whose answer has the type `answer`; unknown members are ignored.

        Raises:
            CommandRefused, SourceLost: as `execute`.
            NotQmp: the answer is of another shape than QEMU's.
        """
        reply = self.execute(command, arguments)
        try:
            return msgspec.convert(reply, answer)
        except msgspec.ValidationError as err:
            raise NotQmp(vm=self._vm, socket=self._path, problem=f"{command} answered otherwise: {err}") from err

    def qemu_version(self) -> tuple[int, int, int]:
        """Major, minor and micro version of the QEMU at the other end.

        Raises:
            SourceLost, NotQmp: as `query`.
        """
        numbers = self.query("query-version", _Version).qemu
        return numbers.major, numbers.minor, numbers.micro

    def wait_for_job(self, timeout_s: float) -> bool:
        """Wait until some job has changed its state since the last call, at most `timeout_s`; whether one has.

        Raises:
            SourceLost: the connection broke.
        """
        if not self._end:
            self._run(lambda: self._wait_for_bell(timeout_s))
        if self._client.runstate is not Runstate.RUNNING:
            self._disconnect("the session broke")
            raise self._lost("waiting for jobs")
        rung = self._bell.rung.is_set()
        self._bell.rung.clear()
        return rung

    def pause(self, seconds: float) -> None:
        """Wait a little; the session goes on meanwhile."""
        self._run(lambda: asyncio.sleep(seconds))

    def close(self) -> None:
        """End the session; QEMU runs on. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._disconnect("the session was closed")
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self, timeout_s: float) -> None:
        self._greet(self._open_socket(timeout_s), timeout_s)

    def _greet(self, connection: socket.socket, timeout_s: float) -> None:
        try:
            self._check_first_byte(connection, timeout_s)
            self._run(lambda: self._client.connect(connection), timeout_s)
        except TimeoutError as err:
            raise SourceBusy(vm=self._vm, socket=self._path, timeout_s=timeout_s) from err
        except ConnectError as err:
            self._explain_no_session(err)
        except AssertionError as err:  # the library's way to say that it broke right after the greeting
            self._disconnect("it hung up at once")
            raise SourceUnreachable(vm=self._vm, socket=self._path, problem=self._end) from err
        finally:
            if self._client.runstate is not Runstate.RUNNING:
                connection.close()

    def _open_socket(self, timeout_s: float) -> socket.socket:
        """A connected socket; the library could open it too, but could not say who is at the other end."""
        try:
            connection, self.peer = connect_unix(self._path, timeout_s)
        except OSError as err:
            raise self._no_connection(err, timeout_s) from err
        return connection

    def _check_first_byte(self, connection: socket.socket, timeout_s: float) -> None:
        """See that a greeting begins. The library waits for its end, which no other protocol may ever send."""
        connection.settimeout(timeout_s)
        try:
            first = connection.recv(1, socket.MSG_PEEK)
        except TimeoutError as err:
            raise SourceBusy(vm=self._vm, socket=self._path, timeout_s=timeout_s) from err
        except OSError as err:
            raise self._no_connection(err, timeout_s) from err
        connection.setblocking(False)
        if first not in {b"", b"{"}:
            raise NotQmp(vm=self._vm, socket=self._path, problem="what it sends is no greeting")

    def _no_connection(self, err: OSError, timeout_s: float) -> DrsyncError:
        if err.errno == errno.EAGAIN:
            return SourceBusy(vm=self._vm, socket=self._path, timeout_s=timeout_s)
        problem = err.strerror or str(err)
        if err.errno == errno.ECONNREFUSED and not _is_socket(self._path):
            problem = "it is not a socket"
        return SourceUnreachable(vm=self._vm, socket=self._path, problem=problem)

    def _explain_no_session(self, err: ConnectError) -> NoReturn:
        """Translate a failed greeting: whoever hangs up is gone, whoever says something else is no QEMU."""
        cause: BaseException = err.exc
        if isinstance(cause, EOFError | OSError):
            problem = "it hung up at once" if isinstance(cause, EOFError) else str(cause)
            raise SourceUnreachable(vm=self._vm, socket=self._path, problem=problem) from err
        raise NotQmp(vm=self._vm, socket=self._path, problem="what it sends is no greeting") from err

    async def _wait_for_bell(self, timeout_s: float) -> None:
        waits = {
            asyncio.create_task(self._bell.rung.wait()),
            asyncio.create_task(_changed(self._client)),
        }
        try:
            await asyncio.sleep(0)  # both wait from here on: a change of state can't slip through
            if self._client.runstate is Runstate.RUNNING:
                await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]], timeout_s: float | None = None) -> T:
        """Drive the loop until `work` is done; Ctrl-C cancels it and comes out as KeyboardInterrupt.

        Raises:
            TimeoutError: it was not done in `timeout_s`, and was cancelled.
        """
        coroutine = _within(work, timeout_s)
        try:
            return self._runner.run(coroutine)
        finally:
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()  # Ctrl-C came before the loop took it

    def _lost(self, operation: str) -> SourceLost:
        return SourceLost(vm=self._vm, operation=operation, problem=self._end)

    def _disconnect(self, reason: str) -> None:
        """End the library's session for `reason`, or for the deeper one that the library tells now."""
        if self._end:
            return
        self._end = reason
        if self._client.runstate is Runstate.IDLE:
            return
        try:
            self._run(self._client.disconnect, _CLOSE_TIMEOUT_S)
        except EOFError:
            self._end = "it closed the connection"
        except Exception as cause:  # noqa: BLE001 - whatever broke the session is what is asked for
            self._end = str(cause) or type(cause).__name__


class _Client(QMPClient):
    """The library's client, for a QEMU in which other programs have jobs.

    QEMU sends events from the moment that it takes `qmp_capabilities`, which is
    before it answers: an event that comes in between is no answer, as the library
    thinks. It is passed over, as those before the session are.
    """

    async def _do_recv(self) -> Message:
        message = await super()._do_recv()
        while self.runstate is Runstate.CONNECTING and "event" in message:
            message = await super()._do_recv()
        return message


class _JobBell(EventListener):
    """Rings when a job changes its state; keeps no history, so that a long session does not grow."""

    def __init__(self) -> None:
        super().__init__("JOB_STATUS_CHANGE")
        self.rung = asyncio.Event()

    def accept(self, event: Message) -> bool:
        if super().accept(event):
            self.rung.set()
        return False


class _WireLogger(logging.Logger):
    """Says what the library logs at debug level: its errors reach the user as exceptions already."""

    def __init__(self, target: logging.Logger) -> None:
        super().__init__(f"{target.name}.wire")
        self._target = target

    def isEnabledFor(self, level: int) -> bool:
        return self._target.isEnabledFor(logging.DEBUG)

    def handle(self, record: logging.LogRecord) -> None:
        record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
        self._target.handle(record)


async def _within(work: Callable[[], Coroutine[Any, Any, T]], timeout_s: float | None) -> T:
    async with asyncio.timeout(timeout_s):
        return await work()


async def _changed(client: QMPClient) -> None:
    await client.runstate_changed()


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False
