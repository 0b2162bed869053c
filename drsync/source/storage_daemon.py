"""A qemu-storage-daemon of drsync's own: QEMU's block layer over the images of a VM that is off.

It lives as long as one session, and ends when drsync does. Images are opened
in one of two ways:

    for reading   no lock is taken: the VM may be started at any moment, which
                  whoever reads has to notice
    for writing   for milliseconds, to add or remove bitmaps. QEMU's image locks
                  keep the VM from starting meanwhile, and us from images in use
"""

import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from drsync.errors import CaptureFailed, DrsyncError
from drsync.source.monitor import Monitor

PROGRAM: Final = "qemu-storage-daemon"
_START_TIMEOUT_S: Final = 30.0
_END_TIMEOUT_S: Final = 60.0
"""It writes the bitmaps of all its images before it ends."""


class StorageDaemon:
    """A running daemon without images; `monitor` adds them. A context manager that ends it."""

    def __init__(self, vm: str) -> None:
        """Start it.

        Raises:
            CaptureFailed: it does not start here.
        """
        self._vm = vm
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(  # noqa: S603  fixed words, and a number of our own
                _command(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except OSError as err:
            ours.close()
            raise self._failed(f"{err.strerror}; apt install qemu-system-common util-linux") from err
        finally:
            theirs.close()
        try:
            self.monitor = Monitor.attach(vm, ours, timeout_s=_START_TIMEOUT_S)
        except DrsyncError as err:
            said = self._end()
            raise self._failed(said or str(err)) from err
        except BaseException:
            self._end()
            raise

    def add_image(self, node: str, file: Mapping[str, object], image_format: str, *, writable: bool) -> None:
        """Open an image as the block node `node`.

        Raises:
            CommandRefused: it can't be opened; for writing, also when a running VM has it open.
        """
        access = {"read-only": not writable, "force-share": not writable}
        options = {"driver": image_format, "node-name": node, "file": {**file, **access}, **access}
        self.monitor.execute("blockdev-add", options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> str:
        """Let it write its bitmaps and go; one that hangs is killed. What it said, if it complained."""
        monitor = getattr(self, "monitor", None)
        if monitor is not None:
            with suppress(DrsyncError):
                monitor.execute("quit")
            monitor.close()
        else:
            self._process.terminate()
        try:
            _, said = self._process.communicate(timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _, said = self._process.communicate()
        return str(said[:2000].decode(errors="replace").strip())

    def _failed(self, problem: str) -> CaptureFailed:
        return CaptureFailed(vm=self._vm, operation=PROGRAM, problem=problem)


def _command(fd: int) -> list[str]:
    """Its monitor is a socket that is connected before it starts, so there is no moment at which it can't answer.

    Without drsync it must not go on: it could hold the lock of an image (setpriv(1)).
    """
    monitor = ("--chardev", f"socket,id=m,fd={fd}", "--monitor", "chardev=m")
    return ["setpriv", "--pdeathsig", "TERM", PROGRAM, *monitor]
