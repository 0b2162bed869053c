"""A VM whose captures are written by a test and shipped into a log, and an oracle that knows each point.

    Step ──▶ disks (oracle) ──▶ layers ──▶ ship ──▶ log in a MemoryStore
                │                                    │
                └ what each point must hold ═══ compared with ═══ what it restores to

Blocks are kept as {number: bytes}; what is not in there is zeros. So disks may be large.
"""

import errno
import hashlib
import os
import random
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt
from fake_clock import FakeClock
from forged import put_pack

from drsync.format.frame import HASH_BYTES, FrameSealer
from drsync.format.keys import RecoveryKey, RootKey
from drsync.format.segment import DiskRows, PackEntry, position
from drsync.image import PointImage, load_image
from drsync.log import Log, Segment
from drsync.model import (
    BLOCK_SIZE,
    CaptureId,
    Consistency,
    Kind,
    NoProgress,
    Progress,
    block_count,
    block_length,
    new_capture_id,
)
from drsync.qcow2 import ENTRY_ZERO, TABLE_BLOCKS, ImageWriter
from drsync.repository import Repository, create_repository, open_repository
from drsync.restore import restore_disk
from drsync.ship import Seeded, ShipLimits, ship
from drsync.source.layer import Layer
from drsync.spooled import SpooledCapture, SpooledDisk
from drsync.store import ObjectStore
from drsync.store.memory import MemoryStore
from drsync.writer import LogWriter, open_writer

Blocks = dict[int, bytes]
SMALL: Final = ShipLimits(object_blocks=3, object_zero_runs=4, workers=2)
"""Limits with which a handful of blocks becomes several packs."""
NO_PROGRESS: Final = NoProgress()
ZEROED: Final = 0
"""A content: the guest zeroed or discarded the block, and the layer says so without bytes."""
WRITTEN_ZEROS: Final = -1
"""A content: the guest wrote zeros, and the layer has them as bytes."""


def content(number: int, length: int) -> bytes:
    """The content `number` of a block: zeros, a pattern that compresses well, or random bytes."""
    if number in {ZEROED, WRITTEN_ZEROS}:
        return bytes(length)
    if number % 2:
        return bytes([number % 251 + 1]) * length
    return random.Random(number).randbytes(length)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStep:
    """What happens to a disk until a capture, and how it is captured."""

    size_bytes: int
    writes: Mapping[int, int] = field(default_factory=dict)
    """Content numbers by block."""
    whole: bool = False
    """The bitmap was lost: the layer holds the whole disk, also if an increment were possible."""
    explicit_zeros: bool = False
    """A layer of the whole disk says "zeros" of its empty blocks, instead of not having them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A capture; disks that it does not name are gone."""

    disks: Mapping[str, DiskStep]
    compare: bool = True
    """Disks that are read as a whole are compared with the point before (resync), not sent whole (full)."""
    limits: ShipLimits = SMALL
    taken_over: bool = False
    """Another host takes the VM over first."""
    rounds: Sequence[Mapping[str, Mapping[int, int]]] = ()
    """Content numbers by disk and block that were read live before: the capture lies over them."""


@dataclass(slots=True)
class OracleDisk:
    """What a disk holds."""

    size_bytes: int
    blocks: Blocks = field(default_factory=dict)

    def resize(self, size_bytes: int) -> None:
        """Bytes that are cut off are gone; bytes that are added are zeros."""
        self.size_bytes = size_bytes
        held, self.blocks = self.blocks, {}
        for number, data in held.items():
            if number < block_count(size_bytes):
                length = block_length(number, size_bytes)
                self.put(number, data[:length].ljust(length, b"\0"))

    def put(self, number: int, data: bytes) -> None:
        if any(data):
            self.blocks[number] = data
        else:
            self.blocks.pop(number, None)

    def copy(self) -> "OracleDisk":
        return OracleDisk(self.size_bytes, dict(self.blocks))


def write_layer(path: Path, size_bytes: int, blocks: Mapping[int, bytes | None]) -> None:
    """Write a layer as QEMU would: `None` is a block that explicitly reads as zeros."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        image = ImageWriter(fd, size_bytes)
        for index in sorted({number // TABLE_BLOCKS for number in blocks}):
            entries = np.zeros(TABLE_BLOCKS, np.uint64)
            for number in sorted(n for n in blocks if n // TABLE_BLOCKS == index):
                data = blocks[number]
                entries[number % TABLE_BLOCKS] = ENTRY_ZERO if data is None else image.allocate(1)
                if data is not None:
                    os.pwrite(fd, data, int(entries[number % TABLE_BLOCKS]))
            image.set_table(index, entries)
        image.finish()
    finally:
        os.close(fd)


class CountingProgress:
    """A Progress that sums up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.done_bytes = 0

    def start(self, step: str, total_bytes: int) -> None:
        pass

    def advance(self, done_bytes: int) -> None:
        with self._lock:
            self.done_bytes += done_bytes


class BlockTarget:
    """A restored disk in memory (a DiskWriter)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.written: dict[int, bytes] = {}
        self.finished = False
        self.abandoned = False

    def place(self, window: int, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return blocks * BLOCK_SIZE

    def write(self, at: int, buffers: Sequence[bytes]) -> None:
        with self._lock:
            for number, data in enumerate(buffers, at // BLOCK_SIZE):
                assert number not in self.written, "a block was written twice"
                self.written[number] = data

    def finish(self) -> None:
        self.finished = True

    def abandon(self) -> None:
        self.abandoned = True


def restored(log: Log, point: int) -> dict[str, OracleDisk]:
    """What a point restores to."""
    image = load_image(log, point)
    assert image.seq == point
    return {disk.name: restored_disk(image, log, disk.name) for disk in image.point.disks}


def restored_disk(image: PointImage, log: Log, disk: str) -> OracleDisk:
    target = BlockTarget()
    try:
        restore_disk(log.objects, image, disk, target, NO_PROGRESS)
    except BaseException:
        assert (target.finished, target.abandoned) == (False, True)
        raise
    assert (target.finished, target.abandoned) == (True, False)
    held = OracleDisk(image.disk(disk).size_bytes)
    for number, data in target.written.items():
        assert len(data) == block_length(number, held.size_bytes)
        assert any(data), "zeros are not stored"
        held.blocks[number] = data
    return held


class ShippedVm:
    """A VM, its repository, and the oracle: `points` has what each point must restore to."""

    def __init__(
        self,
        directory: Path,
        *,
        store: ObjectStore | None = None,
        root: RootKey | None = None,
        repository: Repository | None = None,
        vm: str = "web",
        definition: Mapping[str, object] | None = None,
    ) -> None:
        self._directory = directory
        self.store = store or (repository.store if repository else MemoryStore(FakeClock()))
        self.root = root or RootKey.generate()
        self.recovery: RecoveryKey | None = None
        if repository is None:
            self.recovery = create_repository(self.store, self.root, FakeClock())
            repository = open_repository(self.store, self.root, "key")
        self.repository = repository
        self.vm = vm
        self.definition = dict(definition or {"machine": "q35"})
        self.log = Log(repository.vm(vm))
        self.disks: dict[str, OracleDisk] = {}
        self.points: dict[int, dict[str, OracleDisk]] = {}
        self.captures: list[CaptureId] = []
        self.writer_id = secrets.token_hex(8)

    def run(self, steps: Iterable[Step]) -> Self:
        for step in steps:
            self.capture(step)
        return self

    def writer(self) -> LogWriter:
        return open_writer(self.log, self.writer_id)

    def capture(self, step: Step, *, writer: LogWriter | None = None, progress: Progress = NO_PROGRESS) -> Segment:
        """Do what the step says to the disks, then ship it; the committed segment."""
        if step.taken_over:
            self.writer_id = secrets.token_hex(8)
        return self.ship(*self.spool(step), step, writer=writer, progress=progress)

    def ship(
        self,
        spooled: SpooledCapture,
        layers: Mapping[str, Path],
        step: Step,
        *,
        writer: LogWriter | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> Segment:
        """Ship what `spool` captured; the committed segment."""
        writer = writer or self.writer()
        before = load_image(self.log, self.log.newest()) if step.compare and self.points else None
        with ExitStack() as stack:
            opened = {d.name: stack.enter_context(Layer(layers[d.name], d.size_bytes)) for d in spooled.disks}
            seeded = self._seeded(spooled, step) if step.rounds else None
            segment = ship(spooled, opened, writer, before, progress, step.limits, seeded)
        for path in layers.values():
            path.unlink()
        self.captures.append(spooled.capture)
        self.points[segment.seq] = {name: disk.copy() for name, disk in self.disks.items()}
        return segment

    def _seeded(self, spooled: SpooledCapture, step: Step) -> Seeded:
        """Store the packs of a seed, two blocks each. A disk that is read whole is compared with nothing here."""
        known = self.points[max(self.points)] if self.points else {}
        rounds: list[list[PackEntry]] = []
        for blocks_of in step.rounds:
            entries: list[PackEntry] = []
            for number, disk in enumerate(spooled.disks):
                blocks = sorted(blocks_of.get(disk.name, {}).items())
                pairs = [dict(blocks[at : at + 2]) for at in range(0, len(blocks), 2)]
                entries += [self._pack(number, disk, pair) for pair in pairs]
            rounds.append(entries)
        kinds = {
            d.name: (Kind.RESYNC if d.full else Kind.INCREMENTAL) if step.compare and d.name in known else Kind.FULL
            for d in spooled.disks
        }
        return Seeded(rounds=rounds, kinds=kinds, changed_bytes={})

    def _pack(self, number: int, disk: SpooledDisk, contents: Mapping[int, int]) -> PackEntry:
        data = {n: content(kind, block_length(n, disk.size_bytes)) for n, kind in contents.items()}
        held = [n for n, block in data.items() if any(block)]
        zeros = [n for n, block in data.items() if not any(block)]
        rows = DiskRows(
            disk=disk.name,
            blocks=np.array(held, np.uint32),
            lengths=np.zeros(len(held), np.uint32),
            hashes=np.zeros((len(held), HASH_BYTES), np.uint8),
            zero_first=np.array(zeros, np.uint32),
            zero_count=np.ones(len(zeros), np.uint32),
        )
        for row, block in enumerate(held):
            sealer = FrameSealer(self.log.objects.object_keys(self.log.objects.new_header("pack")))
            digest = sealer.hash_block(memoryview(data[block]))
            rows.hashes[row] = np.frombuffer(digest, np.uint8)
        first, last = position(number, min(data)), position(number, max(data))
        return put_pack(self.log, [rows], [data[n] for n in held], first, last)

    def spool(self, step: Step) -> tuple[SpooledCapture, dict[str, Path]]:
        """Do what the step says to the disks, and capture them into layers."""
        capture = new_capture_id()
        layers: dict[str, Path] = {}
        disks: list[SpooledDisk] = []
        known = self.points[max(self.points)] if self.points else {}
        self.disks = {name: disk for name, disk in self.disks.items() if name in step.disks}
        for name, change in sorted(step.disks.items()):
            full = change.whole or name not in known or known[name].size_bytes != change.size_bytes
            layers[name] = self._directory / f"{capture}-{name}.qcow2"
            for blocks_of in step.rounds:
                self._read_live(name, change.size_bytes, blocks_of.get(name, {}))
            held = self._apply(name, change, full=full and not step.rounds)
            write_layer(layers[name], change.size_bytes, held)
            disks.append(
                SpooledDisk(
                    name=name,
                    size_bytes=change.size_bytes,
                    full=full,
                    reason="bitmap is missing" if full else "",
                    persistent_bitmap=True,
                )
            )
        spooled = SpooledCapture(
            capture=capture,
            base=self.captures[-1] if self.captures else None,
            boot_id="boot",
            time="2026-01-02T03:04:05+00:00",
            consistency=Consistency.CRASH,
            send_all=not step.compare,
            disks=disks,
            definition=self.definition,
        )
        return spooled, layers

    def _read_live(self, name: str, size_bytes: int, contents: Mapping[int, int]) -> None:
        """A round of a seed finds this on a disk, and what is not in it as it was."""
        disk = self.disks.setdefault(name, OracleDisk(size_bytes))
        for number, kind in contents.items():
            disk.put(number, content(kind, block_length(number, size_bytes)))

    def _apply(self, name: str, change: DiskStep, *, full: bool) -> dict[int, bytes | None]:
        """Change a disk; what its layer must hold."""
        disk = self.disks.setdefault(name, OracleDisk(change.size_bytes))
        disk.resize(change.size_bytes)
        layer: dict[int, bytes | None] = {}
        for number, kind in change.writes.items():
            data = content(kind, block_length(number, change.size_bytes))
            disk.put(number, data)
            layer[number] = None if kind == ZEROED else data
        if full:
            empty = range(block_count(change.size_bytes)) if change.explicit_zeros else ()
            layer = dict.fromkeys(empty) | {n: d for n, d in layer.items() if d is not None} | dict(disk.blocks)
        return layer


def reopened(vm: ShippedVm, store: ObjectStore) -> Log:
    """The log of a VM in another store, that may hold a damaged copy of its repository."""
    return Log(open_repository(store, vm.root, "key").vm(vm.vm))


def objects_of(store: ObjectStore) -> dict[str, bytes]:
    """All objects of a store."""
    return {info.key: store.get(info.key, limit_bytes=2**30) for info in store.list("")}


def store_of(objects: Mapping[str, bytes]) -> MemoryStore:
    """A store that holds these objects."""
    store = MemoryStore(FakeClock())
    for key, data in objects.items():
        store.create(key, data, sha256=hashlib.sha256(data).digest())
    return store


def write_directory(objects: Mapping[str, bytes], directory: Path) -> Path:
    """Write objects as a file:// repository, as a synced copy of a bucket would be."""
    for key, data in objects.items():
        path = directory / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def write_raw(disk: OracleDisk, path: Path) -> Path:
    """Write what the oracle knows of a disk as a sparse raw image."""
    with path.open("xb") as file:
        file.truncate(disk.size_bytes)
        for number, data in disk.blocks.items():
            file.seek(number * BLOCK_SIZE)
            file.write(data)
    return path


def read_raw(path: Path) -> OracleDisk:
    """What a raw image holds; its holes are not read."""
    disk = OracleDisk(path.stat().st_size)
    with path.open("rb") as file:
        for number in _blocks_with_data(file.fileno(), disk.size_bytes):
            disk.put(number, os.pread(file.fileno(), BLOCK_SIZE, number * BLOCK_SIZE))
    return disk


def _blocks_with_data(fd: int, size_bytes: int) -> Iterator[int]:
    at = 0
    while at < size_bytes:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as err:
            if err.errno != errno.ENXIO:  # nothing but a hole is left
                raise
            return
        at = os.lseek(fd, start, os.SEEK_HOLE)
        at = -(-at // BLOCK_SIZE) * BLOCK_SIZE
        yield from range(start // BLOCK_SIZE, at // BLOCK_SIZE)
