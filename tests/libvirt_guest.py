"""A guest that libvirt runs at a LibvirtSite: the examples' guest, or any other disk, with a shell on its console.

    with LibvirtGuest(site, "web", [SiteDisk(target="vda", path=site.images / "web.qcow2")]) as guest:
        guest.define()
        guest.start()
        guest.check("echo hello > /mnt/hello; sync")

Uses TCG, so it needs no KVM. What was printed on the console is in `console_log`.
"""

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from xml.sax.saxutils import quoteattr

from libvirt_site import LibvirtSite, LibvirtSiteFailed
from serial_console import ConsoleBroken, ConsoleTimeout, Ran, SerialConsole

START_TIMEOUT_S: Final = 180.0
"""The guest is up in about 3 s; a machine that is busy may need many times that."""
UP: Final = rb"GUEST-UP boots=(\d+)[^\n]*\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteDisk:
    """A disk of a domain: an image file."""

    target: str
    path: Path
    format: str = "qcow2"
    driver: str = ""
    """More attributes of <driver>, such as "iothread='1'"."""
    extra: str = ""
    """More elements of <disk>."""

    def xml(self) -> str:
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='{self.format}' discard='unmap' {self.driver}/>"
            f"<source file={quoteattr(str(self.path))}/><target dev='{self.target}' bus='virtio'/>{self.extra}</disk>"
        )


@dataclass(slots=True, kw_only=True)
class Machine:
    """What a domain has beside its disks."""

    memory_mib: int = 256
    os: str = "<boot dev='hd'/>"
    """What stands in <os> behind the type."""
    machine: str = "pc"
    top: str = ""
    """More elements of <domain>, such as <iothreads>."""
    devices: str = ""
    """More elements of <devices>: an agent's channel, a TPM, an interface …"""
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))


class GuestTrouble(Exception):
    """The guest did not do what was asked; the text ends with the console's last lines."""


class LibvirtGuest:
    """One domain of a site. A context manager that hangs up its console; the domain is the site's."""

    def __init__(self, site: LibvirtSite, name: str, disks: Sequence[SiteDisk], machine: Machine | None = None) -> None:
        self.site = site
        self.name = name
        self.disks = list(disks)
        self.machine = machine or Machine()
        self.boots = 0
        """How often this disk was booted, by the guest's own count on the disk; 0 until it is up."""
        self._console: SerialConsole | None = None

    @property
    def console_socket(self) -> Path:
        return self.site.path / f"{self.name}.console"

    @property
    def console_log(self) -> Path:
        """Everything that was printed on the console since the last `start`."""
        return self.site.path / f"{self.name}.log"

    @property
    def state(self) -> str:
        """As libvirt says: "running", "paused", "shut off"."""
        return self.site.virsh("domstate", self.name).strip()

    def xml(self) -> str:
        machine = self.machine
        return (
            f"<domain type='qemu'><name>{self.name}</name><uuid>{machine.uuid}</uuid>"
            f"<memory unit='MiB'>{machine.memory_mib}</memory><vcpu>1</vcpu>"
            f"<os><type arch='x86_64' machine='{machine.machine}'>hvm</type>{machine.os}</os>"
            f"<features><acpi/></features>{machine.top}<devices>{''.join(disk.xml() for disk in self.disks)}"
            f"<serial type='unix'><source mode='bind' path={quoteattr(str(self.console_socket))}/>"
            f"<log file={quoteattr(str(self.console_log))} append='off'/><target port='0'/></serial>"
            f"{machine.devices}</devices></domain>"
        )

    def define(self) -> None:
        """Make it known to libvirt, or change what libvirt knows of it."""
        self.site.define(self.xml())

    def start(self, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it and return when its system is up."""
        self.disconnect()
        self.console_log.unlink(missing_ok=True)
        self.site.virsh("start", self.name)
        self.wait_until_up(timeout_s=timeout_s)

    def wait_until_up(self, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Take its console, and wait for its system to say that it is up.

        Raises:
            GuestTrouble: it does not come up.
        """
        self.connect()
        deadline = time.monotonic() + timeout_s
        while not (up := re.search(UP, self.console_log.read_bytes() if self.console_log.exists() else b"")):
            if time.monotonic() > deadline:
                raise GuestTrouble(f"{self.name} was not up in {timeout_s:g} s: {self.last_words()}")
            try:
                self._connected().drain(0.02)
            except ConsoleBroken as err:
                raise GuestTrouble(f"{self.name} ended before it was up: {self.last_words()}") from err
        self.boots = int(up.group(1))

    def connect(self) -> None:
        """Take the console of a domain that runs, also one that was restored or has migrated."""
        self.disconnect()
        self._console = SerialConsole(self.console_socket)

    def disconnect(self) -> None:
        if self._console is not None:
            self._console.close()
            self._console = None

    def run(self, command: str, *, timeout_s: float = 60.0) -> Ran:
        """Run a shell command in the guest: its exit status and what it printed.

        Raises:
            GuestTrouble: it took too long, or the console is gone.
        """
        console = self._connected()
        try:
            return console.run(command, time.monotonic() + timeout_s)
        except ConsoleTimeout as err:
            console.interrupt()
            raise GuestTrouble(f"no end of `{command}` in {timeout_s:g} s: {self.last_words()}") from err
        except ConsoleBroken as err:
            raise GuestTrouble(f"can't run `{command}`: {err}: {self.last_words()}") from err

    def check(self, command: str, *, timeout_s: float = 60.0) -> str:
        """Run a command that has to succeed, and give its output back."""
        ran = self.run(command, timeout_s=timeout_s)
        if ran.status != 0:
            raise GuestTrouble(f"`{command}` ended with status {ran.status}: {ran.output}")
        return ran.output

    def poweroff(self, *, timeout_s: float = 60.0) -> None:
        """Shut it down in good order from inside, so that QEMU saves its persistent bitmaps."""
        console = self._connected()
        self.check("umount /mnt 2>/dev/null || sync")
        console.type("poweroff -f")
        try:
            console.wait_for_hang_up(time.monotonic() + timeout_s)
        except ConsoleTimeout as err:
            raise GuestTrouble(f"{self.name} did not power off: {self.last_words()}") from err
        self.disconnect()
        self.wait_for_state("shut off", timeout_s=timeout_s)

    def destroy(self) -> None:
        """Take its power away."""
        self.disconnect()
        self.site.power_off(self.name)

    def wait_for_state(self, state: str, *, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.state != state:
            if time.monotonic() > deadline:
                raise GuestTrouble(f"{self.name} is {self.state}, not {state}, after {timeout_s:g} s")
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disconnect()

    def last_words(self) -> str:
        text = self.console_log.read_bytes()[-1500:].decode(errors="replace") if self.console_log.exists() else ""
        log = self.site.path / "log" / "qemu" / f"{self.name}.log"
        qemu = log.read_text(errors="replace")[-1000:] if log.exists() else ""
        return f"console: {text}\nqemu: {qemu}"

    def _connected(self) -> SerialConsole:
        if self._console is None:
            raise GuestTrouble(f"{self.name} is not running, or nobody took its console")
        return self._console


__all__ = ["GuestTrouble", "LibvirtGuest", "LibvirtSite", "LibvirtSiteFailed", "Machine", "SiteDisk"]
