"""A guest that came back on a site: its console is a pseudo-terminal now, wherever it was before."""

import os
import socket
import threading
import time
import tty
from contextlib import suppress
from types import TracebackType
from typing import Self

from libvirt_guest import GuestTrouble
from libvirt_site import LibvirtSite
from serial_console import ConsoleBroken, ConsoleTimeout, SerialConsole

UP_TIMEOUT_S = 180.0


class _PtyConsole(SerialConsole):
    """The shell behind a pseudo-terminal; two threads carry the bytes."""

    def __init__(self, path: str) -> None:
        self._received = b""
        self._in_step = False
        self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self._fd)
        self._socket, self._inner = socket.socketpair()
        for carry in (self._to_guest, self._from_guest):
            threading.Thread(target=carry, daemon=True).start()

    def close(self) -> None:
        self._inner.shutdown(socket.SHUT_RDWR)
        self._inner.close()
        super().close()

    def _to_guest(self) -> None:
        with suppress(OSError):
            while data := self._inner.recv(4096):
                while data:
                    data = data[os.write(self._fd, data) :]
        with suppress(OSError):
            os.close(self._fd)

    def _from_guest(self) -> None:
        with suppress(OSError):
            while data := os.read(self._fd, 4096):
                self._inner.sendall(data)
        with suppress(OSError):
            self._inner.shutdown(socket.SHUT_RDWR)


class RecoveredGuest:
    """A running domain of a site, which may have booted long ago or not yet."""

    def __init__(self, site: LibvirtSite, name: str) -> None:
        self.site = site
        self.name = name
        self._console: SerialConsole | None = None

    def check(self, command: str, *, timeout_s: float = UP_TIMEOUT_S) -> str:
        """Run a command that has to succeed, when the guest is up; its output."""
        if self._console is None:
            self._console = self._open_console()
        try:
            ran = self._console.run(command, time.monotonic() + timeout_s)
        except (ConsoleTimeout, ConsoleBroken) as err:
            raise GuestTrouble(f"{self.name}: `{command}`: {err!r}\n{self._qemu_log()}") from err
        if ran.status != 0:
            raise GuestTrouble(f"{self.name}: `{command}` ended with status {ran.status}: {ran.output}")
        return ran.output

    def _open_console(self) -> SerialConsole:
        path = self.site.virsh("ttyconsole", self.name).strip()
        if not path:  # what virsh says of a domain that does not run
            state = self.site.virsh("domstate", "--reason", self.name).strip()
            raise GuestTrouble(f"{self.name} is {state}\n{self._qemu_log()}\n{self.site.log()}")
        return _PtyConsole(path)

    def _qemu_log(self) -> str:
        log = self.site.path / "log" / "qemu" / f"{self.name}.log"
        return log.read_text(errors="replace")[-1000:] if log.exists() else ""

    def remove(self) -> None:
        """End the domain and forget it; its disks stay."""
        self.close()
        self.site.power_off(self.name)
        self.site.virsh("undefine", self.name, "--keep-nvram")

    def close(self) -> None:
        """Hang up."""
        if self._console is not None:
            self._console.close()
            self._console = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
