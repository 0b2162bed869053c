"""A guest that came back on a site: its console is a pseudo-terminal now, wherever it was before."""

import os
import select
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


class PtyConsole(SerialConsole):
    """The shell behind a pseudo-terminal; a thread carries the bytes."""

    def __init__(self, path: str) -> None:
        self._received = b""
        self._in_step = False
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        tty.setraw(fd)
        self._socket, inner = socket.socketpair()
        self._carrier = threading.Thread(target=_carry, args=[fd, inner], daemon=True)
        self._carrier.start()

    def close(self) -> None:
        super().close()
        self._carrier.join()


def _carry(fd: int, inner: socket.socket) -> None:
    """Carry bytes both ways until one side hangs up, then close both.

    Who reads is who closes: a thread that reads from a number which another one has closed would take
    what belongs to whoever gets that number next.
    """
    with inner, suppress(OSError):  # the guest is gone
        try:
            while True:
                ready, _, _ = select.select([fd, inner.fileno()], [], [])
                if inner.fileno() in ready:
                    data = inner.recv(4096)
                    if not data:
                        return
                    while data:
                        data = data[os.write(fd, data) :]
                if fd in ready:
                    inner.sendall(os.read(fd, 4096))
        finally:
            os.close(fd)


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
        return PtyConsole(path)

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
