"""A blocking QMP client of a few lines: enough to steer the lab's QEMU, with the standard library alone.

It is a second pair of hands for examples and tests. drsync itself talks to QEMU
through `qemu.qmp`, on a socket of its own: QEMU serves one client a socket.
"""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class QmpRefused(Exception):
    """QEMU answered a command with an error; `error_class` and `problem` are its own words."""

    def __init__(self, command: str, error_class: str, problem: str) -> None:
        super().__init__(f"QEMU refused {command}: {problem} ({error_class})")
        self.command = command
        self.error_class = error_class
        self.problem = problem


class QmpClosed(Exception):
    """QEMU closed the socket, or never answered; whether the last command ran is not known."""


class QmpSocket:
    """One connection to a QMP socket. Events are kept in `events`, in the order they came."""

    def __init__(self, path: Path, *, timeout_s: float = 30.0, alive: Callable[[], bool] = lambda: True) -> None:
        """Connect and negotiate; waits up to `timeout_s` for the socket to be there, as long as QEMU is `alive`.

        Raises:
            QmpClosed: nobody listened, or no greeting came.
        """
        self.events: list[dict[str, Any]] = []
        self._path = path
        self._next_id = 0
        self._socket = _connect(path, timeout_s, alive)
        self._lines = self._socket.makefile("rb")
        try:
            self._read_message()
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, **arguments: object) -> Any:
        """Run one command and give its answer back; arguments with a hyphen go in as ``**{"node-name": …}``.

        Raises:
            QmpRefused: QEMU answered with an error.
            QmpClosed: no answer came.
        """
        self._next_id += 1
        request = {"execute": command, "arguments": arguments, "id": self._next_id}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as err:
            raise QmpClosed(f"{self._path}: {err}") from err
        while True:
            message = self._read_message()
            if "event" in message:
                self.events.append(message)
            elif message.get("id") == self._next_id:
                return _answer(command, message)

    def close(self) -> None:
        """End the connection; QEMU runs on. Safe to call twice."""
        self._lines.close()
        self._socket.close()

    def _read_message(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except OSError as err:
            raise QmpClosed(f"{self._path}: {err}") from err
        if not line.endswith(b"\n"):
            raise QmpClosed(f"{self._path}: QEMU closed the connection")
        message: dict[str, Any] = json.loads(line)
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _answer(command: str, message: dict[str, Any]) -> Any:
    if "error" in message:
        raise QmpRefused(command, message["error"]["class"], message["error"]["desc"])
    return message["return"]


def _connect(path: Path, timeout_s: float, alive: Callable[[], bool]) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError) as err:
            connection.close()
            if not alive():
                raise QmpClosed(f"{path}: QEMU ended") from err
            if time.monotonic() >= deadline:
                raise QmpClosed(f"{path}: nobody listens after {timeout_s:g} s") from err
            time.sleep(0.01)
        except BaseException:
            connection.close()
            raise
        else:
            return connection
