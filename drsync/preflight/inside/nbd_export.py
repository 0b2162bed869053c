"""Offers a source to one QEMU over NBD, read only: how libguestfs gets disks that are no files.

Protocol: the NBD project's doc/proto.md; fixed newstyle, simple replies, no more than QEMU needs.
"""

import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from drsync.preflight.inside.source import Source

_OPTION_MAGIC: Final = b"IHAVEOPT"
_FLAGS: Final = 0b11  # fixed newstyle, no zeroes
_OPTION: Final = struct.Struct(">8sII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_ACK, _REPLY_INFO, _UNSUPPORTED = 1, 3, 0x80000001
_EXPORT_FLAGS: Final = 0b11  # has flags, read only
_REQUEST: Final = struct.Struct(">IHHQQI")
_REQUEST_MAGIC: Final = 0x25609513
_REPLY: Final = struct.Struct(">IIQ")
_REPLY_MAGIC: Final = 0x67446698
_READ, _DISCONNECT, _FLUSH = 0, 2, 3
_EIO, _EINVAL, _EPERM = 5, 22, 1
_MAX_OPTION: Final = 4096
_MAX_READ: Final = 32 * 1024 * 1024


def socket_name(place: int) -> str:
    """The socket's name in the directory that the processes share, by the disk's place in their order."""
    return f"{place}.nbd"


class _Gone(Exception):
    """The other side has closed, or does not speak NBD."""


class NbdExport:
    """A source behind a unix socket; each connection has a thread."""

    def __init__(self, source: Source, path: Path) -> None:
        self._source = source
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # it was closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(_Gone, OSError):
            connection.sendall(b"NBDMAGIC" + _OPTION_MAGIC + struct.pack(">H", _FLAGS))
            _exactly(connection, 4)
            if self._negotiate(connection):
                while self._answer(connection):
                    pass

    def _negotiate(self, connection: socket.socket) -> bool:
        """Options, until one begins the transmission; whether one did."""
        size_and_flags = struct.pack(">QH", self._source.size_bytes, _EXPORT_FLAGS)
        while True:
            magic, option, length = _OPTION.unpack(_exactly(connection, _OPTION.size))
            if magic != _OPTION_MAGIC or length > _MAX_OPTION:
                raise _Gone
            _exactly(connection, length)
            if option == _EXPORT_NAME:
                connection.sendall(size_and_flags)
                return True
            if option in {_GO, _INFO}:
                told = struct.pack(">H", 0) + size_and_flags
                connection.sendall(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, _REPLY_INFO, len(told)) + told)
            known = option in {_GO, _INFO, _ABORT}
            reply = _OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, _ACK if known else _UNSUPPORTED, 0)
            connection.sendall(reply)
            if option in {_GO, _ABORT}:
                return bool(option == _GO)

    def _answer(self, connection: socket.socket) -> bool:
        """Answer one request; whether more may come."""
        magic, _, kind, handle, offset, length = _REQUEST.unpack(_exactly(connection, _REQUEST.size))
        if magic != _REQUEST_MAGIC or kind == _DISCONNECT:
            return False
        error, data = self._result(kind, offset, length)
        connection.sendall(_REPLY.pack(_REPLY_MAGIC, error, handle) + data)
        return True

    def _result(self, kind: int, offset: int, length: int) -> tuple[int, bytes]:
        if kind == _FLUSH:
            return 0, b""
        if kind != _READ:
            return _EPERM, b""
        if length > _MAX_READ or offset + length > self._source.size_bytes:
            return _EINVAL, b""
        try:
            data = self._source.read(offset, length)
        except OSError:
            return _EIO, b""
        return (0, data) if len(data) == length else (_EIO, b"")


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise _Gone
        data += piece
    return bytes(data)
