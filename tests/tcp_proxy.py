"""A line to a server that breaks as a test scripts it: TCP on the loopback interface, real sockets.

    with Proxy("127.0.0.1", 4566) as proxy:
        proxy.arm(ResetReply(after_bytes=1000))

Each fault is used up by one connection, the next one that is opened; without a
fault, bytes pass. Arming closes the connections that are open, so that a client
that keeps some has to open a new one. Leaving the `with` block checks that every
fault has fired.
"""

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from figures import count

PIECE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetReply:
    """The request arrives; of the reply so many bytes come back, then the line is cut (RST)."""

    after_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetRequest:
    """Of the request so many bytes arrive, then the line is cut (RST)."""

    after_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EndReply:
    """As ResetReply, but with an orderly end (FIN), as a proxy that stops does it."""

    after_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The server is not asked: this is the reply."""

    reply: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlackHole:
    """The connection is taken, and nothing ever comes back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """Both ways a piece of 4 KiB waits so long before it goes on."""

    wait_s: float


CONTINUE_BYTES = len(b"HTTP/1.1 100 Continue\r\n\r\n")
"""What a server sends before a PUT's body comes: not the reply yet."""

Fault = ResetReply | ResetRequest | EndReply | Answer | BlackHole | Slow


def unavailable(status: str = "503 Slow Down", code: str = "SlowDown") -> Answer:
    """The reply of an S3 that has too much to do."""
    body = f"<Error><Code>{code}</Code><Message>Please reduce your request rate.</Message></Error>".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return Answer(reply=head.encode() + b"Connection: close\r\n\r\n" + body)


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes on to a server, with the faults it is armed with."""

    def __init__(self, host: str, port: int, *, buffer_bytes: int | None = None) -> None:
        """`buffer_bytes`: what the kernel may hold of what goes back to a client, so that `replied` tells the truth."""
        self._server = (host, port)
        self._buffer_bytes = buffer_bytes
        self.requested: list[tuple[float, int]] = []
        """When how many bytes came from clients, by the monotonic clock."""
        self.replied: list[tuple[float, int]] = []
        """When how many bytes went to clients."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._faults: deque[Fault] = deque()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._unfired = 0
        self._scripted = 0
        self._start(self._accept)

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def arm(self, *faults: Fault) -> None:
        with self._lock:
            self._faults.extend(faults)
            self._unfired += len(faults)
            self._scripted += len(faults)
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=10)
        self._listener.close()
        if error is None:
            assert self._unfired == 0, f"{self._unfired} faults never happened"
            count("faults injected and survived", self._scripted)

    def _start(self, function: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._buffer_bytes is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer_bytes)
            with self._lock:
                self._open.add(client)
                fault = self._faults.popleft() if self._faults else None
            self._start(self._serve, client, fault)

    def _fired(self) -> None:
        with self._lock:
            self._unfired -= 1

    def _serve(self, client: socket.socket, fault: Fault | None) -> None:
        try:
            match fault:
                case Answer(reply=reply):
                    client.recv(65536)
                    self._fired()
                    client.sendall(reply)
                case BlackHole():
                    self._fired()
                    while client.recv(65536):
                        pass
                case _:
                    self._relay(client, fault)
        except OSError:
            pass
        finally:
            self._close(client)

    def _relay(self, client: socket.socket, fault: Fault | None) -> None:
        if isinstance(fault, Slow):
            self._fired()
        server = socket.create_connection(self._server)
        with self._lock:
            self._open.add(server)
        back = threading.Thread(target=self._pass_reply, args=(server, client, fault), daemon=True)
        back.start()
        try:
            limit = fault.after_bytes if isinstance(fault, ResetRequest) else None
            if self._pass(client, server, limit, fault, self.requested):
                self._fired()
                _reset(client)
        finally:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            back.join()
            self._close(server)

    def _pass_reply(self, server: socket.socket, client: socket.socket, fault: Fault | None) -> None:
        limit = fault.after_bytes if isinstance(fault, ResetReply | EndReply) else None
        with suppress(OSError):
            if self._pass(server, client, limit, fault, self.replied):
                self._fired()
                if isinstance(fault, ResetReply):
                    _reset(client)
            client.shutdown(socket.SHUT_RDWR)

    def _pass(
        self,
        source: socket.socket,
        target: socket.socket,
        limit: int | None,
        fault: Fault | None,
        counts: list[tuple[float, int]],
    ) -> bool:
        """Pass bytes on until the end, or until there are more than `limit`: then True."""
        passed = 0
        while piece := source.recv(PIECE_BYTES):
            if isinstance(fault, Slow):
                time.sleep(fault.wait_s)
            if limit is not None and passed + len(piece) > limit:
                target.sendall(piece[: limit - passed])
                return True
            target.sendall(piece)
            passed += len(piece)
            counts.append((time.monotonic(), len(piece)))
        return False

    def _close(self, each: socket.socket) -> None:
        with self._lock:
            self._open.discard(each)
        each.close()


def _reset(client: socket.socket) -> None:
    """Close with RST instead of FIN: linger on, for zero seconds."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with suppress(OSError):
        client.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it
    client.close()
