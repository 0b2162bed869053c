"""Keeps pull-mode jobs going, one after the other, and reads through whichever runs.

    thread    ├─ job 1 ──┤ 0.3 s ├─ job 2 ───┤ …      ended after 20 s, or when scratch space is spent
    readers      ▲ ▲ ▲              ▲ ▲ ▲             a connection each; when its job is over, they wait for the next

While a job runs, libvirt grants nobody a snapshot, a migration or a save of the
domain. So a job is short, and behind it there is a moment in which whoever waits is served.
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final, TypeVar

from drsync.errors import CaptureFailed, DrsyncError, SourceLost
from drsync.model import Clock, Pace
from drsync.source import Base, DiskSurvey, Numbers, Presence
from drsync.source.bitmap import Owner
from drsync.source.libvirt_connection import LibvirtDomain
from drsync.source.libvirt_guard import Guard
from drsync.source.libvirt_pull import PullJob, PullOptions, view_directory
from drsync.source.libvirt_scratch import Scratch
from drsync.source.libvirt_xml import DomainXml, read_domain
from drsync.source.nbd import NbdReader

T = TypeVar("T")
log = logging.getLogger(__name__)

TICK_S: Final = 0.05
"""How often scratch space is looked at. A guest that overwrites 1 GB/s fills 50 MB of it in between."""
PAUSE_S: Final = 0.3
"""Between two jobs: longer than libvirt needs to wake up whoever waits for the end of the first."""
_FREE_TIMEOUT_S: Final = 20.0
"""How long a snapshot, or what else came in between, may take; then this run of the seed ends, to be gone on with."""


class Slices:
    """One domain's jobs, from `start` to `stop`. `wait_for` and `is_over` may be called from any thread."""

    def __init__(
        self, job: PullJob, guard: Guard, look: Callable[[], DomainXml], clock: Clock, *, slice_s: float
    ) -> None:
        """`look` tells what the domain is made of now. Job and guard belong to this from now on."""
        self._job = job
        self._guard = guard
        self._look = look
        self._clock = clock
        self._slice_s = slice_s
        self._changed = threading.Condition()
        self._number = 0
        """Of the job that runs, or ran last."""
        self._runs = False
        self._failure: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"pull {job.vm}", daemon=True)
        self._began_s = 0.0

    @property
    def job(self) -> PullJob:
        return self._job

    def start(self) -> None:
        """Begin the first job.

        Raises:
            LiveUnavailable, SpoolUnusable, CaptureFailed, SourceLost: as PullJob.prepare and begin; nothing is left.
        """
        try:
            self._begin()
        except BaseException:
            self.stop()
            raise
        self._thread.start()

    def wait_for(self, after: int = 0) -> int:
        """The number of the job that runs; waits for one with a number above `after`.

        Raises:
            DrsyncError: there will be none any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or (self._runs and self._number > after))
            if self._failure is not None:
                raise self._failure
            return self._number

    def is_over(self, number: int) -> bool:
        """Whether this job was ended by this side: what fails then is asked of the next one."""
        with self._changed:
            return self._number != number or not self._runs

    def stop(self) -> None:
        """End the job that runs; there are no more. Safe to call twice."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._changed:
            self._runs = False
            if self._failure is None:
                self._failure = SourceLost(vm=self._job.vm, operation="reading live", problem="the view was closed")
            self._changed.notify_all()
        try:
            self._job.end()
            self._guard.dismiss()
        except (SourceLost, CaptureFailed) as err:
            log.warning("vm=%s live reading is not cleared away yet: %s", self._job.vm, err)
        finally:
            self._guard.close()
            self._job.close()

    def _watch(self) -> None:
        try:
            while not self._stopped.wait(TICK_S):
                self._guard.check()
                spent = self._job.scratch.is_spent(self._clock.monotonic_s())
                if spent or self._clock.monotonic_s() - self._began_s >= self._slice_s:
                    log.debug("vm=%s ends job=%d scratch_spent=%s", self._job.vm, self._number, spent)
                    self._renew()
        except Exception as err:  # noqa: BLE001 - raised by whoever waits for the next job
            with self._changed:
                self._failure = err
                self._changed.notify_all()
            with suppress(DrsyncError):  # else `stop` tries again, and then the guard
                self._job.end()

    def _renew(self) -> None:
        with self._changed:
            self._runs = False
        self._job.end()
        if not self._stopped.wait(PAUSE_S):
            self._wait_until_free()
        if not self._stopped.is_set():
            self._begin()

    def _wait_until_free(self) -> None:
        deadline_s = self._clock.monotonic_s() + _FREE_TIMEOUT_S
        while blocker := self._job.blocker():
            if self._clock.monotonic_s() > deadline_s:
                raise CaptureFailed(vm=self._job.vm, operation="virDomainBackupBegin", problem=blocker)
            if self._stopped.wait(PAUSE_S):
                return

    def _begin(self) -> None:
        self._job.begin(self._job.prepare(self._look()))
        self._began_s = self._clock.monotonic_s()
        with self._changed:
            self._number += 1
            self._runs = True
            self._changed.notify_all()


def open_view(
    domain: LibvirtDomain,
    owner: Owner,
    base: Base | None,
    disks: Sequence[DiskSurvey],
    pace: Pace,
    options: PullOptions,
    exclude: Collection[str],
    clock: Clock,
) -> "PullView":
    """Read `disks` of a domain live, which `check_pull` found nothing against; over a connection of its own.

    Raises:
        LiveUnavailable, SpoolUnusable: there is no room, or no place, for scratch files.
        CaptureFailed, SourceLost: as Source.open_live.
    """
    own = LibvirtDomain(domain.vm, domain.uri, domain.uuid)
    try:
        if own.run_id != domain.run_id:
            raise domain.lost("open_live", "the domain was started again")
        scratch = Scratch(domain.vm, view_directory(options), options.scratch)
        guard = Guard(domain.vm, domain.uri, domain.uuid, scratch.directory, options.scratch.keep_free_bytes)
    except BaseException:
        own.close()
        raise
    job = PullJob(own, owner, base, disks, scratch, clock)

    def look() -> DomainXml:
        return read_domain(own.call("virDomainGetXMLDesc", lambda: own.handle.XMLDesc(0)), exclude)

    slices = Slices(job, guard, look, clock, slice_s=options.slice_s)
    slices.start()
    return PullView(slices, {disk.name: disk for disk in disks}, pace)


class PullView:
    """A LiveView over one domain's jobs."""

    def __init__(self, slices: Slices, disks: Mapping[str, DiskSurvey], pace: Pace) -> None:
        self._slices = slices
        self._disks = disks
        self._pace = pace
        self._closed = False

    def reader(self, disk: str) -> "PullReader":
        reader = PullReader(self._slices, self._disks[disk], self._pace)
        reader.connect()
        return reader

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._slices.stop()


class PullReader:
    """A LiveReader that goes on with the next job when its own is over."""

    def __init__(self, slices: Slices, disk: DiskSurvey, pace: Pace) -> None:
        self._slices = slices
        self._disk = disk
        self._pace = pace
        self._number = 0
        self._inner: NbdReader | None = None

    def connect(self) -> None:
        """See that somebody answers.

        Raises:
            SourceLost, CaptureFailed: as NbdReader.
        """
        self._persist(lambda _: None)

    def presence(self, first_block: int, count: int) -> Presence:
        return self._persist(lambda inner: inner.presence(first_block, count))

    def read(self, blocks: Numbers) -> Iterator[tuple[Numbers, memoryview]]:
        done = 0
        while done < len(blocks):
            try:
                for some, raw in self._connected().read(blocks[done:]):
                    done += len(some)
                    yield some, raw
            except (SourceLost, CaptureFailed) as err:
                self._go_on(err)

    def settle(self) -> None:
        if self._inner is not None:
            try:
                self._inner.settle()
            except (SourceLost, CaptureFailed) as err:
                if not self._slices.is_over(self._number):
                    raise
                log.debug("vm=%s reads again what was on its way: %s", self._slices.job.vm, err)

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None

    def _persist(self, ask: Callable[[NbdReader], T]) -> T:
        while True:
            try:
                return ask(self._connected())
            except (SourceLost, CaptureFailed) as err:
                self._go_on(err)

    def _go_on(self, err: DrsyncError) -> None:
        """Leave a job that is over.

        Raises:
            SourceLost, CaptureFailed: it is not over, so `err` is what it says; or there will be no other job.
        """
        self.close()
        if not self._slices.is_over(self._number):
            raise err
        self._slices.wait_for(self._number)

    def _connected(self) -> NbdReader:
        number = self._slices.wait_for()
        if self._inner is None or number != self._number:
            self.close()
            self._number = number
            export, bitmap = self._slices.job.exports[self._disk.name]
            self._inner = NbdReader(
                self._slices.job.vm,
                self._slices.job.scratch.socket,
                export,
                size_bytes=self._disk.size_bytes,
                bitmap=bitmap,
                pace=self._pace,
            )
        return self._inner
