"""A real `qemu-storage-daemon` with disks to write to: QEMU's block layer without a guest.

It answers the same block commands over QMP as a running VM and starts in
milliseconds, so tests can go through many histories of writes, zeros, discards
and captures:

    test ──io()──▶ NBD export ──▶ d-<name> (qcow2 or raw) ──▶ <directory>/<name>.<format>
    drsync ──────▶ qmp_socket ──▶   "          and its dirty bitmaps

A QEMU process has one NBD server. A daemon with `free_nbd` is a qemu-system without a
machine, in which the test's writes are commands of its human monitor: so the NBD server
is left to whoever starts it.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from qmp_socket import QmpClosed, QmpSocket

START_TIMEOUT_S = 30.0
"""The daemon is up in 0.1 s; more only helps on a machine that is overloaded."""


class StorageDaemonFailed(Exception):
    """The daemon or a tool on its disks failed; the text holds what it printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonDisk:
    """A disk of the daemon; made empty the first time the daemon starts."""

    name: str
    size_bytes: int
    format: Literal["qcow2", "raw"] = "qcow2"

    @property
    def node(self) -> str:
        """The block node that a VM's device would use, and that drsync captures."""
        return f"d-{self.name}"


class StorageDaemon:
    """A qemu-storage-daemon on disk files in `directory`. A context manager that starts it and ends it for good.

    The sockets keep their paths from one `start` to the next. They live in a
    short directory of their own, as a socket's path may have 107 bytes only.
    """

    def __init__(self, directory: Path, disks: Sequence[DaemonDisk], *, free_nbd: bool = False) -> None:
        self.directory = directory
        self._free_nbd = free_nbd
        self.disks = {disk.name: disk for disk in disks}
        self._sockets = Path(tempfile.mkdtemp(prefix="drsync-qsd-"))
        self.qmp_socket = self._sockets / "drsync.qmp"
        self._control_socket = self._sockets / "control.qmp"
        self._nbd_socket = self._sockets / "nbd"
        self._process: subprocess.Popen[bytes] | None = None
        self._control: QmpSocket | None = None
        self._hung = False

    @property
    def running(self) -> bool:
        """Whether the daemon's process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The running daemon's process id."""
        return self._running_process().pid

    def path(self, name: str) -> Path:
        """The disk's file."""
        return self.directory / f"{name}.{self.disks[name].format}"

    def node(self, name: str) -> str:
        """The disk's block node: the one with the dirty bitmaps."""
        return self.disks[name].node

    def nbd_uri(self, name: str) -> str:
        """Where qemu-io, qemu-img and NBD clients read and write the disk."""
        return f"nbd+unix:///{name}?socket={self._nbd_socket}"

    def start(self) -> None:
        """Start the daemon on its disk files, making those that don't exist; returns when it answers.

        Raises:
            StorageDaemonFailed: it did not come up.
        """
        if self.running:
            raise StorageDaemonFailed("the daemon runs already")
        for disk in self.disks.values():
            if not self.path(disk.name).exists():
                _run("qemu-img", "create", "-q", "-f", disk.format, str(self.path(disk.name)), str(disk.size_bytes))
        if not self._launch():
            self._launch()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command on the test's own socket; drsync's stays free."""
        if self._control is None:
            raise StorageDaemonFailed("the daemon is not running")
        return self._control.execute(command, **arguments)

    def io(self, name: str, *commands: str) -> str:
        """Run qemu-io commands on the disk: ``write -P 1 0 1M``, ``write -z 2M 1M``, ``discard 4M 1M``.

        Raises:
            StorageDaemonFailed: a command failed.
        """
        if self._free_nbd:
            return self._io_by_monitor(name, commands)
        arguments = [part for command in commands for part in ("-c", command)]
        output = _run("qemu-io", "-f", "raw", *arguments, self.nbd_uri(name))
        if "failed" in output:
            raise StorageDaemonFailed(f"qemu-io {commands}: {output}")
        return output

    def read(self, name: str) -> bytes:
        """The whole content of a (small) disk: through the daemon when it runs, else from its file."""
        copy = self.directory / f"{name}.content"
        source = [self.disks[name].format, str(self.path(name))]
        if self.running and self._free_nbd:
            self.io(name, "flush")  # then what is in the file is all there is
            source = ["-U", *source]
        elif self.running:
            source = ["raw", self.nbd_uri(name)]
        try:
            _run("qemu-img", "convert", "-O", "raw", *source[:-2], "-f", *source[-2:], str(copy))
            return copy.read_bytes()
        finally:
            copy.unlink(missing_ok=True)

    def resize(self, name: str, size_bytes: int) -> None:
        """Give the running disk another size; the export is gone for that moment, as it forbids a resize."""
        if self._free_nbd:
            self.execute("block_resize", **{"node-name": self.node(name), "size": size_bytes})
            return
        self.execute("block-export-del", id=f"e-{name}", mode="hard")
        try:
            self.execute("block_resize", **{"node-name": self.node(name), "size": size_bytes})
        finally:
            self.execute("block-export-add", **_export(self.disks[name]))

    def stop(self) -> None:
        """End the daemon cleanly: QEMU saves the persistent bitmaps, as at a VM's shutdown."""
        process = self._running_process()
        self.execute("quit")
        self._close_control()
        try:
            process.wait(timeout=START_TIMEOUT_S)
        except subprocess.TimeoutExpired as err:
            self.kill()
            raise StorageDaemonFailed(f"the daemon did not quit; it was killed; log: {self._log_text()}") from err
        if process.returncode != 0:
            raise StorageDaemonFailed(f"the daemon ended with status {process.returncode}; log: {self._log_text()}")

    def kill(self) -> None:
        """End the daemon as a power cut would: bitmaps in memory are lost, saved ones become inconsistent."""
        self._close_control()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Kill the daemon if it runs and remove the sockets; the disk files stay."""
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

    @property
    def _log(self) -> Path:
        return self.directory / "qemu-storage-daemon.log"

    def _log_text(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise StorageDaemonFailed("the daemon is not running")
        return self._process

    def _close_control(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None

    def _launch(self) -> bool:
        """Start the process; False: it lives but does not answer, and was killed.

        Once in thousands of starts QEMU 7.2 greets and then answers nothing, on a busy machine.
        """
        for socket in self._sockets.iterdir():  # left by a killed daemon
            socket.unlink()
        with self._log.open("ab") as log:
            self._process = process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            # The daemon handles its options in order, the monitors last: who can talk to it, has all of it.
            self._control = QmpSocket(
                self._control_socket, timeout_s=START_TIMEOUT_S, alive=lambda: process.poll() is None
            )
        except QmpClosed as err:
            hangs = process.poll() is None and isinstance(err.__cause__, TimeoutError) and not self._hung
            self._hung = hangs
            self.kill()
            if hangs:
                return False
            raise StorageDaemonFailed(f"the daemon did not start: {err}; log: {self._log_text()}") from err
        self._hung = False
        return True

    def _io_by_monitor(self, name: str, commands: Sequence[str]) -> str:
        """qemu-io prints to QEMU's own stdout, which is the log."""
        before = self._log.stat().st_size
        for command in commands:
            self.execute("human-monitor-command", **{"command-line": f'qemu-io {self.node(name)} "{command}"'})
        output = self._log.read_bytes()[before:].decode(errors="replace")
        if "failed" in output or "rror" in output:
            raise StorageDaemonFailed(f"qemu-io {commands}: {output}")
        return output

    def _machine_command(self) -> list[str]:
        command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
        for disk in self.disks.values():
            file = f"driver=file,node-name=f-{disk.name},filename={self.path(disk.name)},discard=unmap"
            command += ["-blockdev", file]
            command += ["-blockdev", f"driver={disk.format},node-name={disk.node},file=f-{disk.name},discard=unmap"]
        for name, path in (("drsync", self.qmp_socket), ("control", self._control_socket)):
            command += ["-chardev", f"socket,id={name},path={path},server=on,wait=off"]
            command += ["-mon", f"chardev={name},mode=control"]
        return command

    def _command(self) -> list[str]:
        if self._free_nbd:
            return self._machine_command()
        command = ["qemu-storage-daemon"]
        for disk in self.disks.values():
            file = f"driver=file,node-name=f-{disk.name},filename={self.path(disk.name)},discard=unmap"
            command += ["--blockdev", file]
            command += ["--blockdev", f"driver={disk.format},node-name={disk.node},file=f-{disk.name},discard=unmap"]
        command += ["--nbd-server", f"addr.type=unix,addr.path={self._nbd_socket}"]
        for disk in self.disks.values():
            options = _export(disk) | {"writable": "on"}
            command += ["--export", ",".join(f"{key}={value}" for key, value in options.items())]
        for name, path in (("drsync", self.qmp_socket), ("control", self._control_socket)):
            command += ["--chardev", f"socket,id={name},path={path},server=on,wait=off"]
            command += ["--monitor", f"chardev={name}"]
        return command


def _export(disk: DaemonDisk) -> dict[str, object]:
    return {"type": "nbd", "id": f"e-{disk.name}", "node-name": disk.node, "name": disk.name, "writable": True}


def _run(*command: str) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise StorageDaemonFailed(f"{' '.join(command)}: status {done.returncode}: {output}")
    return output
