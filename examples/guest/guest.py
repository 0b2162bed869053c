"""The examples' guest in a real QEMU: start it, run commands in it, lose it.

    with Guest(directory, [GuestDisk(node="d0", path=disk)]) as guest:
        guest.check("echo hello > /mnt/hello; sync")
        guest.kill()

QEMU runs without KVM (TCG), so this works on any machine. It has two QMP
sockets: `qmp_socket` is left to drsync, the other is this class's own; and the
guest agent's channel, `agent_socket`. Commands
go over the serial console; everything that was ever printed there is in
`<directory>/console.log`. Only the standard library is used.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from qmp_socket import QmpClosed, QmpSocket
from serial_console import ConsoleBroken, ConsoleTimeout, Ran, SerialConsole

START_TIMEOUT_S = 120.0
"""The guest is up in about 3 s; a machine that is busy may need many times that."""


class GuestFailed(Exception):
    """The guest or its QEMU did not do what was asked; the text ends with the console's last lines."""


class GuestTimeout(GuestFailed):
    """A command in the guest took too long; it was interrupted, how far it came is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDisk:
    """A disk of the guest: an image file under a block node's name. The guest boots from its first disk."""

    node: str
    path: Path
    format: Literal["qcow2", "raw"] = "qcow2"


class Guest:
    """One virtual machine. A context manager that starts it, waits until it is up, and ends it by force."""

    def __init__(
        self,
        directory: Path,
        disks: Sequence[GuestDisk],
        *,
        controller: Literal["virtio-blk-pci", "nvme"] = "virtio-blk-pci",
        iothread: bool = False,
        memory_mib: int = 256,
        firmware: Path | None = None,
    ) -> None:
        """`firmware` is what boots it, for example OVMF; None: QEMU's BIOS."""
        self.directory = directory
        self.disks = tuple(disks)
        self.boots = 0
        """How often this disk was booted, by the guest's own count on the disk; 0 until it is up."""
        # A socket's path may have 107 bytes only, which a directory of tests can exceed.
        self._sockets = Path(tempfile.mkdtemp(prefix="drsync-guest-"))
        self.qmp_socket = self._sockets / "drsync.qmp"
        self.agent_socket = self._sockets / "agent"
        self._command = _qemu_command(self, controller=controller, iothread=iothread, memory_mib=memory_mib)
        self._command += ["-bios", str(firmware)] if firmware is not None else []
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = False
        self._control: QmpSocket | None = None
        self._console: SerialConsole | None = None

    @property
    def running(self) -> bool:
        """Whether QEMU's process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """QEMU's process id, also after its end."""
        if self._process is None:
            raise GuestFailed("the guest was not started")
        return self._process.pid

    @property
    def control_socket(self) -> Path:
        """The QMP socket that `execute` uses."""
        return self._sockets / "control.qmp"

    @property
    def console_socket(self) -> Path:
        """The serial console."""
        return self._sockets / "console"

    @property
    def console_log(self) -> Path:
        """Everything that was printed on the serial console, of every start."""
        return self.directory / "console.log"

    @property
    def qemu_log(self) -> Path:
        """What QEMU itself printed."""
        return self.directory / "qemu.log"

    def start(self, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start QEMU and return when the guest is up.

        Raises:
            GuestFailed: it did not come up; QEMU is ended.
        """
        if self.running:
            raise GuestFailed("the guest runs already")
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in (*self._sockets.iterdir(), self.console_log):  # of the start before
            path.unlink(missing_ok=True)
        self._ending = False
        with self.qemu_log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_up(time.monotonic() + timeout_s, timeout_s)
        except BaseException:
            self.kill()
            raise

    def run(self, command: str, *, timeout_s: float = 60.0) -> Ran:
        """Run a shell command in the guest: its exit status and what it printed (both streams, as one).

        Raises:
            GuestTimeout: it was not done in `timeout_s`; it was interrupted.
            GuestFailed: the guest is gone, or its console is garbled.
        """
        if self._console is None:
            raise GuestFailed("the guest is not running")
        try:
            return self._console.run(command, time.monotonic() + timeout_s)
        except ConsoleTimeout as err:
            self._console.interrupt()
            raise GuestTimeout(f"no end of `{command}` in {timeout_s:g} s\n{self.last_words()}") from err
        except ConsoleBroken as err:
            raise GuestFailed(f"can't run `{command}`: {err}\n{self.last_words()}") from err

    def check(self, command: str, *, timeout_s: float = 60.0) -> str:
        """Run a command that has to succeed, and give its output back.

        Raises:
            GuestFailed: as `run`, and when the command's status is not 0.
        """
        ran = self.run(command, timeout_s=timeout_s)
        if ran.status != 0:
            raise GuestFailed(f"`{command}` ended with status {ran.status}: {ran.output}")
        return ran.output

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command on this class's own socket; drsync's stays free."""
        if self._control is None:
            raise GuestFailed("the guest is not running")
        return self._control.execute(command, **arguments)

    def kill(self) -> None:
        """End QEMU at once, as a power cut would: whatever it had in memory is lost. Safe to call at any time."""
        self._disconnect()
        if self._process is not None:
            if not self._ending and (status := self._process.poll()) is not None:
                # The guest crashed, or QEMU did (a negative status is a signal): say so while its last words are there.
                print(f"QEMU had ended, with status {status}\n{self.last_words()}", file=sys.stderr)
            self._ending = True
            self._process.kill()
            self._process.wait()

    def poweroff(self, *, timeout_s: float = 60.0) -> None:
        """Shut the guest down in good order; QEMU ends and saves its persistent bitmaps.

        Raises:
            GuestFailed: it did not end in time; it is killed.
        """
        if self._process is None or self._console is None:
            raise GuestFailed("the guest is not running")
        self.check("umount /mnt || sync", timeout_s=timeout_s)
        self._ending = True
        self._console.type("poweroff -f")
        try:
            self._console.wait_for_hang_up(time.monotonic() + timeout_s)
            self._process.wait(timeout=timeout_s)
        except (ConsoleTimeout, subprocess.TimeoutExpired) as err:
            raise GuestFailed(f"the guest did not power off in {timeout_s:g} s\n{self.last_words()}") from err
        finally:
            self.kill()

    def last_words(self) -> str:
        """The last lines of the console and of QEMU, for messages."""
        return f"console: {_tail(self.console_log)}\nqemu: {_tail(self.qemu_log)}"

    def close(self) -> None:
        """End QEMU by force if it runs, and remove its sockets; disks and logs stay."""
        self.kill()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait_until_up(self, deadline: float, timeout_s: float) -> None:
        try:
            self._control = QmpSocket(self.control_socket, timeout_s=timeout_s, alive=lambda: self.running)
            self._console = SerialConsole(self.console_socket)
        except (QmpClosed, OSError) as err:
            raise GuestFailed(f"QEMU did not start: {err}\n{self.last_words()}") from err
        # The log, not the socket: QEMU writes it from its first moment on, whoever is connected.
        while not (up := re.search(rb"GUEST-UP boots=(\d+)[^\n]*\n", self.console_log.read_bytes())):
            if time.monotonic() >= deadline:
                raise GuestFailed(f"the guest was not up in {timeout_s:g} s\n{self.last_words()}")
            try:
                self._console.drain(0.02)
            except ConsoleBroken as err:
                raise GuestFailed(f"QEMU ended before the guest was up{self._status()}\n{self.last_words()}") from err
        self.boots = int(up.group(1))

    def _status(self) -> str:
        """How QEMU ended, for messages; its sockets close a moment before."""
        if self._process is None:
            return ""
        with suppress(subprocess.TimeoutExpired):
            return f", with status {self._process.wait(timeout=5)}"
        return ", or hung up"

    def _disconnect(self) -> None:
        for connection in (self._control, self._console):
            if connection is not None:
                connection.close()
        self._control = self._console = None


def _qemu_command(guest: Guest, *, controller: str, iothread: bool, memory_mib: int) -> list[str]:
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    command += ["-machine", "pc", "-accel", "tcg", "-m", str(memory_mib), "-nic", "none"]
    command += [
        "-chardev",
        f"socket,id=console,path={guest.console_socket},server=on,wait=off,logfile={guest.console_log}",
    ]
    command += ["-serial", "chardev:console"]
    for name, path in (("drsync", guest.qmp_socket), ("control", guest.control_socket)):
        command += ["-chardev", f"socket,id={name},path={path},server=on,wait=off"]
        command += ["-mon", f"chardev={name},mode=control"]
    command += ["-chardev", f"socket,id=agent,path={guest.agent_socket},server=on,wait=off"]
    command += ["-device", "virtio-serial", "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    if iothread:
        command += ["-object", "iothread,id=io0"]
    for number, disk in enumerate(guest.disks):
        file = f"file.driver=file,file.filename={_escaped(disk.path)},file.discard=unmap"
        command += ["-blockdev", f"driver={disk.format},node-name={disk.node},discard=unmap,{file}"]
        device = f"{controller},id=disk{number},drive={disk.node},bootindex={number}"
        device += f",serial=disk{number}" if controller == "nvme" else ""
        command += ["-device", device + (",iothread=io0" if iothread else "")]
    return command


def _escaped(path: Path) -> str:
    """A path as a QEMU option's value, where a comma separates and two are one."""
    return str(path.absolute()).replace(",", ",,")


def _tail(path: Path) -> str:
    text = path.read_bytes()[-2000:].decode(errors="replace") if path.exists() else ""
    return "\n".join(line.rstrip() for line in text.splitlines()[-12:]) or "(nothing)"
