"""A VM in memory: the reference that the real sources are compared with, and a source for tests without QEMU.

MemoryVm ── MemoryDisk root ── bytes, and the bitmaps of 64 KiB blocks
    │   └── MemoryDisk data
    └─ MemorySource: a session; ends when the VM is restarted
"""

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from drsync.errors import CaptureFailed, CaptureTimeout, DiskMissing, SourceLost, SpoolUnusable
from drsync.model import BLOCK_SIZE, CaptureId, Clock, Consistency, Kind, Pace, Progress, SystemClock, block_count
from drsync.qcow2 import ENTRY_ZERO, TABLE_BLOCKS, Entries, ImageWriter
from drsync.source import NO_PACE, Base, CaptureResult, DiskSurvey, Instant, Numbers, Presence, at_once
from drsync.source.bitmap import DirtyBitmap, Owner, decide
from drsync.source.watch import Watch


@dataclass(slots=True, kw_only=True)
class MemoryBitmap:
    """A dirty bitmap: the numbers of the blocks written since it was made."""

    persistent: bool
    blocks: set[int] = field(default_factory=set)
    recording: bool = True
    inconsistent: bool = False
    granularity: int = BLOCK_SIZE


class MemoryDisk:
    """A disk whose writes go into all its recording bitmaps, as QEMU's do."""

    def __init__(self, size_bytes: int, *, persistent: bool) -> None:
        """A disk of zeros; `persistent` bitmaps survive a clean restart, as in qcow2."""
        self.content = bytearray(size_bytes)
        self.persistent = persistent
        self.bitmaps: dict[str, MemoryBitmap] = {}

    def write(self, offset: int, data: bytes) -> None:
        """Write `data`; it must lie on the disk.

        Raises:
            ValueError: it does not.
        """
        if offset < 0 or offset + len(data) > len(self.content):
            raise ValueError(f"{len(data)} bytes at {offset} are not on a disk of {len(self.content)}")
        self.content[offset : offset + len(data)] = data
        if data:
            self._mark(range(offset // BLOCK_SIZE, (offset + len(data) - 1) // BLOCK_SIZE + 1))

    def zero(self, offset: int, length: int) -> None:
        """Write zeros; a discard reads back so, and is recorded so, too."""
        self.write(offset, bytes(length))

    def resize(self, size_bytes: int) -> None:
        """Cut the disk, or add zeros, which no bitmap records; refused while a bitmap is inconsistent, as by QEMU.

        Raises:
            ValueError: a bitmap is inconsistent.
        """
        if any(bitmap.inconsistent for bitmap in self.bitmaps.values()):
            raise ValueError("a bitmap is inconsistent")
        del self.content[size_bytes:]
        self.content.extend(bytes(size_bytes - len(self.content)))
        for bitmap in self.bitmaps.values():
            bitmap.blocks = {block for block in bitmap.blocks if block < block_count(size_bytes)}

    def report(self) -> list[DirtyBitmap]:
        """The bitmaps as QEMU would report them."""
        return [
            DirtyBitmap(
                name=name,
                count=len(bitmap.blocks) * BLOCK_SIZE,
                granularity=bitmap.granularity,
                recording=bitmap.recording and not bitmap.inconsistent,
                busy=False,
                persistent=bitmap.persistent,
                inconsistent=bitmap.inconsistent,
            )
            for name, bitmap in self.bitmaps.items()
        ]

    def _mark(self, blocks: Iterable[int]) -> None:
        for bitmap in self.bitmaps.values():
            if bitmap.recording and not bitmap.inconsistent:
                bitmap.blocks.update(blocks)


class MemoryVm:
    """A machine with disks, which can be shut down, can crash, and can fail a capture."""

    def __init__(self, name: str, disks: Mapping[str, MemoryDisk]) -> None:
        self.name = name
        self.disks = dict(disks)
        self.starts = 1
        """Sessions of an earlier start are lost."""
        self.running = True
        """False while its processors are paused."""
        self.during_capture: Callable[[], None] = lambda: None
        """Called when a capture has begun and nothing is copied yet: a test may write, fail it, or end the VM."""
        self.during_read: Callable[[], None] = lambda: None
        """Called before each piece that is read live; from any thread, by one at a time."""
        self.reading = threading.Lock()

    def restart(self) -> None:
        """Shut down cleanly and start again: persistent bitmaps are saved, the others end."""
        self.starts += 1
        self.running = True
        for disk in self.disks.values():
            disk.bitmaps = {name: bitmap for name, bitmap in disk.bitmaps.items() if bitmap.persistent}

    def crash(self) -> None:
        """Lose power and start again: persistent bitmaps were not saved, so they are inconsistent."""
        self.restart()
        for disk in self.disks.values():
            for bitmap in disk.bitmaps.values():
                bitmap.inconsistent = True


class MemorySource:
    """A session with a MemoryVm; keeps the contract as the real sources do."""

    def __init__(
        self,
        vm: MemoryVm,
        repository_tag: str,
        *,
        disks: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`disks` maps disk names to the VM's own names of them; None takes all under their own names."""
        self._vm = vm
        self._start = vm.starts
        self._wanted = disks
        self._clock = clock or SystemClock()
        self._owner = Owner(repository=repository_tag, vm=vm.name)
        self._closed = False

    def survey(
        self, base: Base | None, *, full: bool = False, tidy: bool = True, keep: Collection[CaptureId] = ()
    ) -> Sequence[DiskSurvey]:
        disks = self._disks("survey")
        kept = {*keep, *([base.capture] if base is not None else [])}
        if tidy:
            self._remove_bitmaps(lambda made_by: made_by not in kept)
        return [self._survey_disk(name, disk, base, full=full) for name, disk in disks.items()]

    def capture(
        self,
        capture: CaptureId,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        layers: Mapping[str, Path],
        *,
        timeout_s: float,
        keep_free_bytes: int = 0,
        progress: Progress | None = None,
        instant: Instant = at_once,
        pace: Pace = NO_PACE,
    ) -> CaptureResult:
        watch = Watch(self._vm.name, layers, keep_free_bytes=keep_free_bytes, progress=progress)
        made: list[Path] = []
        try:
            self._prepare(disks, layers, made)
            with instant():
                time = self._clock.now().astimezone(UTC)
                copies = self._begin(capture, base, disks, layers)
            self._vm.during_capture()
            self._check_session("capture")
            total_bytes = sum(len(copy.blocks) for copy in copies) * BLOCK_SIZE
            watch.tick(0, total_bytes)
            for copy in copies:
                pace.take(len(copy.blocks) * BLOCK_SIZE)
                copy.write()
            watch.tick(total_bytes, total_bytes)
        except TimeoutError as err:
            self._abandon(capture, made)
            raise CaptureTimeout(vm=self._vm.name, timeout_s=timeout_s) from err
        except BaseException:
            self._abandon(capture, made)
            raise
        return CaptureResult(time=time, consistency=Consistency.CRASH, definition={"name": self._vm.name})

    def check_live(self, disks: Sequence[DiskSurvey]) -> None:
        self._disks("check_live")

    def begin_recording(self, capture: CaptureId, disks: Sequence[DiskSurvey]) -> Mapping[str, object]:
        present = self._disks("begin_recording")
        self._check_as_surveyed(present, disks)
        for survey in disks:
            bitmap = MemoryBitmap(persistent=survey.persistent)
            present[survey.name].bitmaps[self._owner.bitmap(capture, survey.name)] = bitmap
        return {}

    def open_live(self, base: Base | None, disks: Sequence[DiskSurvey], *, pace: Pace) -> "MemoryView":
        present = self._disks("open_live")
        self._check_as_surveyed(present, disks)
        dirty = {
            survey.name: frozenset(self._blocks(present[survey.name], survey, base))
            for survey in disks
            if survey.kind is Kind.INCREMENTAL
        }
        return MemoryView(self, self._vm, {d.name: present[d.name] for d in disks}, dirty, pace)

    def incarnation(self) -> str:
        self._check_session("incarnation")
        return str(self._vm.starts)

    def is_running(self) -> bool:
        self._check_session("is_running")
        return self._vm.running

    def pause(self, *, timeout_s: float) -> bool:
        self._check_session("pause")
        ran, self._vm.running = self._vm.running, False
        return ran

    def resume(self, *, timeout_s: float) -> None:
        self._check_session("resume")
        self._vm.running = True

    def release(self, keep: CaptureId) -> None:
        self._check_session("release")
        self._remove_bitmaps(lambda made_by: made_by != keep)

    def close(self) -> None:
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _disks(self, operation: str) -> dict[str, MemoryDisk]:
        self._check_session(operation)
        wanted = self._wanted if self._wanted is not None else {name: name for name in self._vm.disks}
        for node in wanted.values():
            if node not in self._vm.disks:
                raise DiskMissing(vm=self._vm.name, node=node, known=", ".join(sorted(self._vm.disks)) or "none")
        return {name: self._vm.disks[node] for name, node in sorted(wanted.items())}

    def _bitmap(self, base: Base | None, disk: str) -> str:
        return "" if base is None else self._owner.bitmap(base.capture, disk)

    def _survey_disk(self, name: str, disk: MemoryDisk, base: Base | None, *, full: bool) -> DiskSurvey:
        size_bytes = len(disk.content)
        decision = decide(name, size_bytes, disk.report(), base, name=self._bitmap(base, name), full=full)
        is_full = decision.kind is Kind.FULL
        return DiskSurvey(
            name=name,
            size_bytes=size_bytes,
            kind=decision.kind,
            reason=decision.reason,
            copy_bytes=len(_written(disk.content)) * BLOCK_SIZE if is_full else decision.dirty_bytes,
            persistent=disk.persistent,
        )

    def _prepare(self, disks: Sequence[DiskSurvey], layers: Mapping[str, Path], made: list[Path]) -> None:
        """Check the disks and make the layers' files; `made` is told those that exist."""
        present = self._disks("capture")
        for survey in disks:
            if len(present[survey.name].content) != survey.size_bytes:
                raise self._failed(f"disk {survey.name} is not as it was surveyed")
            _make_layer(layers[survey.name])
            made.append(layers[survey.name])

    def _begin(
        self, capture: CaptureId, base: Base | None, disks: Sequence[DiskSurvey], layers: Mapping[str, Path]
    ) -> list["_DiskCopy"]:
        """Keep what is to be copied as it is now, and start the new bitmaps."""
        present = self._disks("capture")
        copies = []
        for survey in disks:
            disk = present[survey.name]
            blocks = self._blocks(disk, survey, base)
            copies.append(_DiskCopy(path=layers[survey.name], content=bytes(disk.content), blocks=blocks))
        for survey in disks:
            bitmap = MemoryBitmap(persistent=survey.persistent)
            present[survey.name].bitmaps[self._owner.bitmap(capture, survey.name)] = bitmap
        return copies

    def _blocks(self, disk: MemoryDisk, survey: DiskSurvey, base: Base | None) -> Sequence[int]:
        """The blocks that a layer of `disk` holds."""
        if survey.kind is not Kind.INCREMENTAL:
            return _written(disk.content)
        bitmap = None if base is None else disk.bitmaps.get(self._owner.bitmap(base.capture, survey.name))
        if bitmap is None:
            raise self._failed(f"disk {survey.name} has no bitmap of the base")
        return sorted(bitmap.blocks)

    def _check_as_surveyed(self, present: Mapping[str, MemoryDisk], disks: Sequence[DiskSurvey]) -> None:
        for survey in disks:
            if survey.name not in present or len(present[survey.name].content) != survey.size_bytes:
                raise self._failed(f"disk {survey.name} is not as it was surveyed")

    def _failed(self, problem: str) -> CaptureFailed:
        return CaptureFailed(vm=self._vm.name, operation="transaction", problem=problem)

    def _abandon(self, capture: CaptureId, made: Sequence[Path]) -> None:
        for path in made:
            path.unlink(missing_ok=True)
        if self._vm.starts == self._start:
            self._remove_bitmaps(lambda made_by: made_by == capture)

    def _remove_bitmaps(self, unwanted: Callable[[CaptureId], bool]) -> None:
        for disk in self._vm.disks.values():
            for name in list(disk.bitmaps):
                made_by = self._owner.bitmap_capture(name)
                if made_by is not None and unwanted(made_by):
                    del disk.bitmaps[name]

    def check_session(self, operation: str) -> None:
        """Find out whether the VM is still the one that this session began with.

        Raises:
            SourceLost: it is not.
        """
        self._check_session(operation)

    def _check_session(self, operation: str) -> None:
        if self._closed:
            raise SourceLost(vm=self._vm.name, operation=operation, problem="the session was closed")
        if self._vm.starts != self._start:
            raise SourceLost(vm=self._vm.name, operation=operation, problem="it closed the connection")


class MemoryView:
    """A LiveView of a MemoryVm's disks."""

    def __init__(
        self,
        source: MemorySource,
        vm: MemoryVm,
        disks: Mapping[str, MemoryDisk],
        dirty: Mapping[str, frozenset[int]],
        pace: Pace,
    ) -> None:
        self.source = source
        self.vm = vm
        self.pace = pace
        self._disks = disks
        self._dirty = dirty

    def reader(self, disk: str) -> "MemoryReader":
        return MemoryReader(self, self._disks[disk], self._dirty.get(disk))

    def close(self) -> None:
        pass


class MemoryReader:
    """A LiveReader of a MemoryDisk."""

    def __init__(self, view: MemoryView, disk: MemoryDisk, dirty: frozenset[int] | None) -> None:
        self._view = view
        self._disk = disk
        self._dirty = dirty

    def presence(self, first_block: int, count: int) -> Presence:
        with self._view.vm.reading:
            self._view.source.check_session("reading")
            numbers = range(first_block, first_block + count)
            belongs = np.array([self._dirty is None or n in self._dirty for n in numbers], np.bool_)
            data = np.array([any(self._block(n)) for n in numbers], np.bool_)
        return Presence(holds=belongs & data, zeros=belongs & ~data)

    def read(self, blocks: Numbers) -> Iterator[tuple[Numbers, memoryview]]:
        for start in range(0, len(blocks), 2):
            piece = blocks[start : start + 2]
            self._view.pace.take(len(piece) * BLOCK_SIZE)
            with self._view.vm.reading:
                self._view.vm.during_read()
                self._view.source.check_session("reading")
                held = b"".join(self._block(n).ljust(BLOCK_SIZE, b"\0") for n in piece.tolist())
            yield piece, memoryview(bytearray(held))

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _block(self, number: int) -> bytes:
        return bytes(self._disk.content[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE])


@dataclass(frozen=True, slots=True, kw_only=True)
class _DiskCopy:
    """One disk's part of a capture: its content at the instant, and the blocks that the layer shall hold."""

    path: Path
    content: bytes
    blocks: Sequence[int]

    def write(self) -> None:
        """Write the layer: data as clusters, zeros explicitly, everything else absent."""
        with self.path.open("r+b") as file:
            writer = ImageWriter(file.fileno(), len(self.content))
            tables: dict[int, Entries] = {}
            for number in self.blocks:
                table = tables.setdefault(number // TABLE_BLOCKS, np.zeros(TABLE_BLOCKS, np.uint64))
                block = self.content[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]
                table[number % TABLE_BLOCKS] = _write_block(file.fileno(), writer, block)
            for index, table in tables.items():
                writer.set_table(index, table)
            writer.finish()


def _write_block(fd: int, writer: ImageWriter, block: bytes) -> int:
    if not any(block):
        return ENTRY_ZERO
    offset = writer.allocate(1)
    os.pwrite(fd, block.ljust(BLOCK_SIZE, b"\0"), offset)
    return offset


def _make_layer(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as err:
        raise SpoolUnusable(path=path, problem=err.strerror) from err


def _written(content: bytearray) -> list[int]:
    """The blocks that are not zeros."""
    view = memoryview(content)
    starts = range(0, len(content), BLOCK_SIZE)
    return [start // BLOCK_SIZE for start in starts if any(view[start : start + BLOCK_SIZE])]
