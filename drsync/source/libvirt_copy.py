"""Copies what a capture takes out of a running domain itself, by a backup in pull mode: gently.

    checkpoint of P ┐ one instant
    pull-mode job   ┘ ─▶ NBD ─▶ a few small reads at a time ─▶ layer 1, layer 2 ─▶ the job ends

In push mode QEMU copies 64 pieces of 1 MiB side by side, which libvirt can't be told
to change. They fill QEMU's threads, and a guest's write waits behind them all: the
slowest hundredth of a guest's writes took 0.7 to 1 s while 256 MiB were copied, and
4 to 32 ms when drsync read them (QEMU 7.2, one disk, busy machine).

What the guest overwrites meanwhile goes to scratch files until the job ends. If it
is more than there is room for, the capture fails, not the guest's write; a process
of its own sees to that if this one dies or hangs (libvirt_guard.py).
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from drsync.errors import CaptureFailed
from drsync.model import BLOCK_SIZE, Clock, Kind, Pace, block_count
from drsync.qcow2 import ENTRY_ABSENT, ENTRY_ZERO, TABLE_BLOCKS, ImageWriter
from drsync.source import Base, DiskSurvey, LiveReader
from drsync.source.backup import make_layer
from drsync.source.bitmap import Owner
from drsync.source.libvirt_connection import LibvirtDomain
from drsync.source.libvirt_guard import Guard
from drsync.source.libvirt_pull import PullJob, PullOptions, view_directory
from drsync.source.libvirt_scratch import Scratch
from drsync.source.libvirt_xml import DomainXml
from drsync.source.nbd import NbdReader
from drsync.source.watch import Watch

READS: Final = 4
"""Requests on their way at a time, and the largest of them: what QEMU's own copy is told where it can be."""
_READ_BLOCKS: Final = 4
_LOOK_S: Final = 0.1
"""How often scratch space is looked at."""


class PulledCopy:
    """One capture's copy, inside `pulled_copy`."""

    def __init__(self, job: PullJob, guard: Guard, disks: Sequence[DiskSurvey], clock: Clock) -> None:
        self._job = job
        self._guard = guard
        self._disks = disks
        self._clock = clock
        self._text = ""
        self._looked_s = -math.inf

    def prepare(self, xml: DomainXml, layers: Mapping[str, Path]) -> None:
        """Make all files, the layers too: nothing that takes long is left for `begin`.

        Raises:
            LiveUnavailable, SpoolUnusable: they can't be made.
        """
        self._text = self._job.prepare(xml)
        for disk in self._disks:
            make_layer(layers[disk.name], disk.size_bytes, (os.geteuid(), os.getegid()))

    def begin(self, checkpoint: str | None) -> None:
        """Hold all disks as they are now, and let the bitmaps of `checkpoint` (its XML) record from now on.

        Raises:
            LiveUnavailable, CaptureFailed, SourceLost: as PullJob.begin.
        """
        self._job.begin(self._text, checkpoint)

    def write(self, layers: Mapping[str, Path], watch: Watch, *, deadline_s: float, pace: Pace) -> None:
        """Fill the layers, reading at `pace`.

        Raises:
            TimeoutError: the clock's `monotonic_s` passed `deadline_s`.
            CaptureFailed: a layer can't be written, a disk can't be read any more, or scratch space is spent.
            SourceLost: the domain went away.
        """
        total_bytes = sum(disk.copy_bytes for disk in self._disks)
        done_bytes = 0

        def went_on(more_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += more_bytes
            watch.tick(min(done_bytes, total_bytes), total_bytes)
            self._look(deadline_s)

        went_on(0)
        for disk in self._disks:
            export, bitmap = self._job.exports[disk.name]
            reader = NbdReader(
                self._job.vm,
                self._job.scratch.socket,
                export,
                size_bytes=disk.size_bytes,
                bitmap=bitmap,
                pace=_Looking(pace, lambda: self._look(deadline_s)),
                depth=READS,
                piece_blocks=_READ_BLOCKS,
            )
            try:
                write_layer(reader, layers[disk.name], disk, went_on)
            except TimeoutError:  # is an OSError, but not of the layer
                raise
            except OSError as err:
                problem = f"{layers[disk.name]}: {err.strerror}"
                raise CaptureFailed(vm=self._job.vm, operation="copying", problem=problem) from err
            finally:
                reader.close()
        watch.tick(total_bytes, total_bytes)

    def _look(self, deadline_s: float) -> None:
        now_s = self._clock.monotonic_s()
        if now_s > deadline_s:
            raise TimeoutError
        if now_s < self._looked_s + _LOOK_S:
            return
        self._looked_s = now_s
        self._guard.check()
        if self._job.scratch.is_spent(now_s):
            problem = "the guest overwrites more during the copy than the spool has room for"
            raise CaptureFailed(vm=self._job.vm, operation="copying", problem=problem)


class _Looking:
    """A Pace that lets `look` look around while it waits."""

    def __init__(self, pace: Pace, look: Callable[[], None]) -> None:
        self._pace = pace
        self._look = look

    def limit_bytes_per_s(self) -> float | None:
        return self._pace.limit_bytes_per_s()

    def take_now(self, size_bytes: int) -> bool:
        return self._pace.take_now(size_bytes)

    def take(self, size_bytes: int) -> None:
        left = size_bytes
        while left > 0:
            limit = self._pace.limit_bytes_per_s()
            part = left if limit is None else min(left, max(1, int(limit * _LOOK_S)))
            self._pace.take(part)
            left -= part
            self._look()


@contextmanager
def pulled_copy(
    domain: LibvirtDomain,
    owner: Owner,
    base: Base | None,
    disks: Sequence[DiskSurvey],
    options: PullOptions,
    clock: Clock,
) -> Iterator[PulledCopy]:
    """What copies `disks`, against which `check_pull` found nothing; the job has ended behind the block.

    Raises:
        CaptureFailed, SourceLost: the guard or another connection can't be had; or the job does not end.
    """
    own = LibvirtDomain(domain.vm, domain.uri, domain.uuid)
    try:
        limits = replace(options.scratch, most_bytes=options.copy_scratch_bytes)
        scratch = Scratch(domain.vm, view_directory(options), limits)
        guard = Guard(domain.vm, domain.uri, domain.uuid, scratch.directory, options.scratch.keep_free_bytes)
    except BaseException:
        own.close()
        raise
    job = PullJob(own, owner, base, disks, scratch, clock)
    try:
        yield PulledCopy(job, guard, disks, clock)
    finally:
        try:
            job.end()
            guard.dismiss()
        finally:
            guard.close()
            job.close()


def write_layer(reader: LiveReader, path: Path, disk: DiskSurvey, went_on: Callable[[int], None]) -> None:
    """Write what `reader` holds of a disk into the empty layer at `path`; `went_on` is told of each so many bytes.

    An increment says of every block in it that is zeros that it is; a full need not, as nothing is below it.

    Raises:
        OSError: it can't be written.
        CaptureFailed, SourceLost: as LiveReader.
    """
    zeros = ENTRY_ZERO if disk.kind is Kind.INCREMENTAL else ENTRY_ABSENT
    blocks = block_count(disk.size_bytes)
    fd = os.open(path, os.O_RDWR | os.O_TRUNC | os.O_CLOEXEC)
    try:
        writer = ImageWriter(fd, disk.size_bytes)
        for index, first in enumerate(range(0, blocks, TABLE_BLOCKS)):
            presence = reader.presence(first, min(TABLE_BLOCKS, blocks - first))
            entries = np.where(presence.zeros, zeros, ENTRY_ABSENT).astype(np.uint64)
            for numbers, raw in reader.read(np.flatnonzero(presence.holds) + first):
                at = writer.allocate(len(numbers))
                _write(fd, raw[: len(numbers) * BLOCK_SIZE], at)
                entries[numbers - first] = at + np.arange(len(numbers), dtype=np.uint64) * BLOCK_SIZE
                went_on(len(numbers) * BLOCK_SIZE)
            if np.any(entries):
                writer.set_table(index, entries)
        writer.finish()
    finally:
        os.close(fd)


def _write(fd: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written
