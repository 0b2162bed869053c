"""A guest agent without a guest: speaks qemu-ga's protocol at a unix socket, and misbehaves as a test says."""

import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_FREEZE = {"name": "guest-fsfreeze-freeze", "enabled": True, "success-response": True}
Answer = bytes | None
"""What goes over the line; None: nothing, ever."""
Script = Callable[[str, dict[str, Any]], Answer]


class FakeAgent:
    """One guest with `file_systems` file systems; takes one client at a time, as QEMU's socket does."""

    def __init__(self, path: Path, *, file_systems: int = 2) -> None:
        self.path = path
        self.file_systems = file_systems
        self.frozen = False
        self.thaws_itself = False
        """Thaws by itself just before it is asked to, as Windows does after 10 s."""
        self.commands: list[str] = []
        """Every command that arrived, syncs left out."""
        self.script: dict[str, Script] = {}
        """Command → what is answered instead; called with the right answer at hand by `answer`."""
        self.hangs = threading.Event()
        """While set, nothing is read: requests wait in the channel, as with an agent that is stopped."""
        self.froze = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the thread that waits in accept
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def answer(self, command: str, arguments: dict[str, Any]) -> Answer:
        """What a good agent answers."""
        if command == "guest-sync-delimited":
            return b"\xff" + _line({"return": arguments["id"]})
        does = {
            "guest-ping": dict,
            "guest-info": lambda: {"version": "7.2.22", "supported_commands": [_FREEZE]},
            "guest-fsfreeze-status": lambda: "frozen" if self.frozen else "thawed",
            "guest-fsfreeze-freeze": self._freeze,
            "guest-fsfreeze-thaw": self._thaw,
        }.get(command)
        return _line({"return": does()}) if does else refusal(f"The command {command} has not been found")

    def _freeze(self) -> int:
        self.frozen = True
        self.froze.set()
        return self.file_systems

    def _thaw(self) -> int:
        was_frozen, self.frozen = self.frozen and not self.thaws_itself, False
        return self.file_systems if was_frozen else 0

    def _serve(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                self._talk(client)

    def _talk(self, client: socket.socket) -> None:
        received = b""
        while True:
            while self.hangs.is_set() and not self._closed:
                threading.Event().wait(0.01)
            try:
                data = client.recv(65536)
            except OSError:
                return
            if not data:
                return
            *lines, received = (received + data).split(b"\n")
            for line in lines:
                if not self._handle(client, line):
                    return

    def _handle(self, client: socket.socket, line: bytes) -> bool:
        """Answer one request; whether the connection goes on."""
        message = json.loads(line.rpartition(b"\xff")[2])
        command, arguments = message["execute"], message.get("arguments", {})
        if command != "guest-sync-delimited":
            self.commands.append(command)
        said = self.script.get(command, self.answer)(command, arguments)
        if said == HANG_UP:
            return False
        with suppress(OSError):  # who asked has hung up: the agent does what it was asked for all the same
            client.sendall(said or b"")
        return True


HANG_UP = b"hang up"


def refusal(text: str) -> bytes:
    return _line({"error": {"class": "GenericError", "desc": text}})


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


@contextmanager
def fake_agent(*, file_systems: int = 2) -> Iterator[FakeAgent]:
    directory = Path(tempfile.mkdtemp(prefix="drsync-agent-"))  # a socket's path has to be short
    agent = FakeAgent(directory / f"{os.getpid()}.qga", file_systems=file_systems)
    try:
        yield agent
    finally:
        agent.close()
        shutil.rmtree(directory, ignore_errors=True)
