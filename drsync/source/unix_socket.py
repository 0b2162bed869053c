"""Connects to a unix socket within a time limit, and tells which process listens there."""

import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PEER_CREDENTIALS: Final = struct.Struct("3i")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """The process that listens at the socket, as the kernel knows it."""

    pid: int
    uid: int
    gid: int


def connect_unix(path: Path, timeout_s: float) -> tuple[socket.socket, Peer]:
    """A connected, blocking socket, and who is at its other end.

    Raises:
        OSError: nobody listens there; EAGAIN: the queue of those who wait to be accepted
            stayed full for `timeout_s`.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Connecting to a socket whose queue is full blocks in the kernel, for as long as this option says.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
        connection.connect(str(path))
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    except BaseException:
        connection.close()
        raise
    pid, uid, gid = _PEER_CREDENTIALS.unpack(credentials)
    return connection, Peer(pid=pid, uid=uid, gid=gid)


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
