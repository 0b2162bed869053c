"""A domain's backup job in libvirt: begun, followed to its end, or ended.

    backupBegin ─▶ running ─▶ completed           libvirt sends an event at the end, and
                      │   └─▶ failed               keeps the statistics of the last job
                      └─ abortJob ─▶ cancelled

One job a domain: while somebody else's backup, migration or save runs, nothing can begin.
"""

import fcntl
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import libvirt

from drsync.model import Clock, Pace
from drsync.source.jobs import speed_of
from drsync.source.libvirt_connection import LibvirtDomain, LibvirtRefused, is_error
from drsync.source.libvirt_xml import backup_targets

log = logging.getLogger(__name__)

TICK_S: Final = 0.5
"""How often a wait looks around (progress, free space); an event ends it earlier."""
_CLOSE_TIMEOUT_S: Final = 30.0
"""libvirt tells of a job's end a moment before QEMU has closed the layers; longer means that QEMU hangs."""
_FLOCK: Final = struct.Struct("hhqqi4x")
"""struct flock of fcntl(2) on 64-bit Linux."""


class CopySpeeds:
    """Tells QEMU, through libvirt, how fast it may copy the disks of a push-mode backup, all together."""

    def __init__(self, domain: LibvirtDomain, targets: Sequence[str], pace: Pace) -> None:
        self._domain = domain
        self._targets = targets
        self._pace = pace
        self._told = 0

    def look(self) -> None:
        """Tell it again if the limit is another one now. A disk that is copied already takes none: it needs none."""
        speed = speed_of(self._pace, len(self._targets))
        if speed == self._told:
            return
        self._told = speed
        log.debug("vm=%s virDomainBlockJobSetSpeed %d", self._domain.vm, speed)
        flags = libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
        for target in self._targets:
            set_speed = partial(self._domain.handle.blockJobSetSpeed, target, speed, flags)
            try:
                self._domain.call("virDomainBlockJobSetSpeed", set_speed)
            except LibvirtRefused as err:
                log.debug("vm=%s disk=%s takes no limit: %s", self._domain.vm, target, err)


class BackupFailed(Exception):
    """The job ended, but not well; the text is QEMU's or libvirt's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What libvirt says of the domain's present job."""

    operation: int
    done_bytes: int
    total_bytes: int


class BackupJobs:
    """The backup jobs of one running domain."""

    def __init__(self, domain: LibvirtDomain, clock: Clock) -> None:
        self._domain = domain
        self._clock = clock

    @contextmanager
    def watched(self) -> Iterator[threading.Event]:
        """An event that is set whenever some job of the domain ends."""
        ended = threading.Event()
        connection = self._domain.connection

        def on_end(*_: object) -> None:
            ended.set()

        def register() -> list[int]:
            handle = self._domain.handle
            return [
                connection.domainEventRegisterAny(handle, kind, on_end, None)
                for kind in (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE)
            ]

        registered = self._domain.call("virConnectDomainEventRegisterAny", register)
        try:
            yield ended
        finally:
            for number in registered:
                with suppress(libvirt.libvirtError):
                    connection.domainEventDeregisterAny(number)

    def present(self) -> JobState | None:
        """The job that runs now, if one does."""
        stats = self._stats(0)
        if stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) == libvirt.VIR_DOMAIN_JOB_NONE:
            return None
        return JobState(
            operation=_number(stats, libvirt.VIR_DOMAIN_JOB_OPERATION),
            done_bytes=_number(stats, libvirt.VIR_DOMAIN_JOB_DISK_PROCESSED),
            total_bytes=_number(stats, libvirt.VIR_DOMAIN_JOB_DISK_TOTAL),
        )

    def wait(self, ended: threading.Event, *, deadline_s: float, on_progress: Callable[[int, int], None]) -> None:
        """Wait until the backup has ended well; `on_progress` is told, now and then, the done and the total bytes.

        Raises:
            BackupFailed: it ended otherwise.
            TimeoutError: the clock's `monotonic_s` passed `deadline_s`; it runs on.
            SourceLost: the domain or libvirt went away.
        """
        seen = JobState(operation=0, done_bytes=0, total_bytes=0)
        while (job := self.present()) is not None:
            if job.operation == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP:
                seen = job
                on_progress(job.done_bytes, job.total_bytes)
            left_s = deadline_s - self._clock.monotonic_s()
            if left_s <= 0:
                raise TimeoutError
            ended.wait(min(left_s, TICK_S))
            ended.clear()
        self._domain.check_run("backup")
        total_bytes = self._check_completed(seen)
        on_progress(total_bytes, total_bytes)

    def end_ours(self, is_ours: Callable[[Path], bool], *, timeout_s: float) -> None:
        """Abort the backup that runs if all of its files are ours; returns when it is gone.

        Raises:
            TimeoutError: it does not end, which only a disk that hangs can cause.
        """
        with self.watched() as ended:
            deadline_s = self._clock.monotonic_s() + timeout_s
            while self._runs(is_ours):
                with suppress(LibvirtRefused):  # it ended by itself meanwhile: the next look tells
                    self._domain.call("virDomainAbortJob", self._domain.handle.abortJob)
                left_s = deadline_s - self._clock.monotonic_s()
                if left_s <= 0:
                    raise TimeoutError
                ended.wait(min(left_s, TICK_S))
                ended.clear()

    def blocker(self, is_ours: Callable[[Path], bool]) -> str:
        """What runs now and keeps a backup from beginning, if it is not a backup of ours; empty if nothing does.

        libvirt would wait for it for half a minute, then say that it can't have a lock.
        """
        job = self.present()
        if job is None or (job.operation == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP and self._runs(is_ours)):
            return ""
        names = {
            libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP: "somebody else's backup",
            libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "a migration to this host",
            libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "a migration to another host",
            libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "a save of its memory",
            libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "a snapshot",
            libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "a dump of its memory",
        }
        return f"{names.get(job.operation, 'another job')} of the domain is running"

    def _runs(self, is_ours: Callable[[Path], bool]) -> bool:
        try:
            text = self._domain.call("virDomainBackupGetXMLDesc", self._domain.handle.backupGetXMLDesc)
        except LibvirtRefused as err:
            if is_error(err, "VIR_ERR_NO_DOMAIN_BACKUP", "VIR_ERR_OPERATION_INVALID"):
                return False
            raise
        files = backup_targets(text)
        return bool(files) and all(map(is_ours, files))

    def _stats(self, flags: int) -> Mapping[str, Any]:
        stats: Mapping[str, Any] = self._domain.call(
            "virDomainGetJobStats", lambda: self._domain.handle.jobStats(flags)
        )
        return stats

    def _check_completed(self, seen: JobState) -> int:
        """Check how the last job ended; its total bytes."""
        stats = self._stats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
        kind, operation = stats.get("type"), _number(stats, libvirt.VIR_DOMAIN_JOB_OPERATION)
        if operation != libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP:
            raise BackupFailed("libvirt does not tell how it ended")
        if kind != libvirt.VIR_DOMAIN_JOB_COMPLETED:
            cancelled = kind == libvirt.VIR_DOMAIN_JOB_CANCELLED
            problem = stats.get(libvirt.VIR_DOMAIN_JOB_ERRMSG) or ("it was cancelled" if cancelled else "it failed")
            raise BackupFailed(str(problem))
        return max(_number(stats, libvirt.VIR_DOMAIN_JOB_DISK_TOTAL), seen.total_bytes, seen.done_bytes)


def wait_until_closed(layers: Sequence[Path], clock: Clock) -> None:
    """Wait until no process has a layer open for writing any more: until then its tables are not all written.

    QEMU holds locks on the images that it has open (OFD locks, fcntl(2)), which any other
    process can see. A QEMU without them is not supported by libvirt either.

    Raises:
        TimeoutError: one is still open after half a minute.
    """
    deadline_s = clock.monotonic_s() + _CLOSE_TIMEOUT_S
    for layer in layers:
        while _is_locked(layer):
            if clock.monotonic_s() > deadline_s:
                raise TimeoutError
            time.sleep(0.005)


def _is_locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def _number(stats: Mapping[str, Any], key: str) -> int:
    return int(stats.get(key, 0))
