"""A process of its own that ends a domain's pull-mode job when drsync can't any more.

    drsync ── stdin ──▶ guard        "." and the end: all is well, the guard leaves
                                     the end without it: drsync has died; the guard ends the job, then leaves
    free space ───────▶ guard        less than half of what drsync itself keeps free: drsync hangs; likewise

While replies of QEMU's are on their way to a client that takes them no more, QEMU can't end the
job, and the guest waits: so a drsync that hangs with such ones is killed. It loses nothing by that.
One that has let go of the guard has left QEMU before: it lives on, however long the job takes to end.

QEMU goes on with such a job for ever, whoever began it. If its scratch space were
full, the guest's writes would fail: a drsync that was killed must not bring that about.
"""

import logging
import os
import select
import selectors
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from drsync.errors import CaptureFailed, DrsyncError
from drsync.model import SystemClock
from drsync.source.libvirt_connection import LibvirtDomain, LibvirtRefused
from drsync.source.libvirt_jobs import BackupJobs
from drsync.source.libvirt_scratch import free_bytes, remove_scratch

log = logging.getLogger(__name__)

_TICK_S: Final = 0.5
_LEAVE_S: Final = 5.0
_HANG_S: Final = 5.0
"""A job that a client does not hold up ends in less than a second."""
_RETRY_S: Final = 1.0
_TRIES: Final = 600
"""libvirtd may be down at the very moment: ten minutes."""


class Guard:
    """The process, from drsync's side."""

    def __init__(self, vm: str, uri: str, uuid: str, directory: Path, keep_free_bytes: int) -> None:
        """Start it. `directory`: a backup that has its files there is ours.

        Raises:
            CaptureFailed: no process can be started.
        """
        self._vm = vm
        arguments = [vm, uri, uuid, str(directory), str(keep_free_bytes // 2), str(os.getpid())]
        try:
            self._process = subprocess.Popen(  # noqa: S603 - no shell, and this very Python
                [sys.executable, "-m", "drsync.source.libvirt_guard", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # what ends drsync's terminal or group does not end it
            )
        except OSError as err:
            raise CaptureFailed(vm=vm, operation="starting the guard of scratch space", problem=err) from err

    def check(self) -> None:
        """Check that it is there.

        Raises:
            CaptureFailed: it is not: it was killed, or has ended the job itself.
        """
        if self._process.poll() is not None:
            raise CaptureFailed(vm=self._vm, operation="reading live", problem="the guard of scratch space has ended")

    def dismiss(self) -> None:
        """Say that there is nothing to guard any more."""
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.write(b".")
                self._process.stdin.flush()

    def close(self) -> None:
        """Let it go: if it was not dismissed, it ends the job first."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=_LEAVE_S)
        except subprocess.TimeoutExpired:  # it has work to do, and leaves by itself
            threading.Thread(target=self._process.wait, name=f"guard {self._vm}", daemon=True).start()


def end_dead_job(vm: str, uri: str, domain: str, directory: Path, *, timeout_s: float = 60.0) -> None:
    """End a pull-mode job whose scratch files are in `directory`, if one runs; then remove them.

    Raises:
        SourceError: libvirt can't be asked, or the job does not end.
    """
    found = LibvirtDomain(vm, uri, domain)
    try:
        if found.active:
            jobs = BackupJobs(found, SystemClock())
            jobs.end_ours(lambda path: path.is_relative_to(directory), timeout_s=timeout_s)
    except (LibvirtRefused, TimeoutError) as err:
        raise CaptureFailed(vm=vm, operation="virDomainAbortJob", problem=err) from err
    finally:
        found.close()
    remove_scratch(directory)


def watch(fd: int, directory: Path, least_free_bytes: int) -> str:
    """Wait until there is something to do, and tell what; empty if all is well and nobody needs a guard any more."""
    os.set_blocking(fd, False)
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while True:
            if selector.select(_TICK_S):
                return "" if b"." in os.read(fd, 16) else "drsync has ended without ending it"
            if directory.exists() and free_bytes(directory) < least_free_bytes:
                return "its scratch space runs full"


def main(arguments: list[str]) -> None:
    """The process: VM, URI, the domain's UUID, the view's directory, the least free bytes, and drsync's process id."""
    vm, uri, uuid, directory, least_free, drsync = arguments
    cause = watch(sys.stdin.fileno(), Path(directory), int(least_free))
    if not cause:
        return
    log.warning("vm=%s ends its backup in pull mode: %s", vm, cause)
    killing = threading.Timer(_HANG_S, _kill, [int(drsync), sys.stdin.fileno()])
    killing.daemon = True
    killing.start()
    try:
        _end(vm, uri, uuid, Path(directory))
    finally:
        killing.cancel()


def _kill(drsync: int, fd: int) -> None:
    """End a drsync that is in the way, unless it has ended by itself, or holds the other end of `fd` no more."""
    let_go, _, _ = select.select([fd], [], [], 0)
    if not let_go and os.getppid() == drsync:
        log.warning("drsync (process %d) hangs, and QEMU with it: it is killed", drsync)
        os.kill(drsync, signal.SIGKILL)


def _end(vm: str, uri: str, uuid: str, directory: Path) -> None:
    said = ""
    for _ in range(_TRIES):
        if not directory.exists():  # somebody else has ended it, and cleared away
            return
        try:
            end_dead_job(vm, uri, uuid, directory)
        except DrsyncError as err:
            if str(err) != said:
                log.warning("vm=%s the backup in pull mode does not end yet: %s", vm, err)
            said = str(err)
            time.sleep(_RETRY_S)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    main(sys.argv[1:])
