"""A guest that is prepared for EC2 on its way there (`--fix-guest`): restored here, changed, and sent from the files.

    repository ▶ raw files in a working directory ▶ libguestfs: drivers, fstab, network ▶ blocks with data ▶ EBS

What is sent is no longer what was captured: its snapshots, image and instance carry the capture with tags.FIXED behind
it, so that nobody takes them for the point, writes over them, or compares with them.

The files take the room of the disks' data, and go when this ends. Another run makes them anew: an initramfs is never
the same twice.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np

from drsync.errors import TargetUnusable
from drsync.model import Progress
from drsync.preflight.fix import Image
from drsync.preflight.fix.prepare import prepare
from drsync.recovery.cloud.request import CloudPlan
from drsync.restore import restore_disk
from drsync.session import Session
from drsync.target.ec2.snapshot import BLOCK_BYTES, ZERO_BLOCK, Indexes
from drsync.target.image import ImageDisk, ImageFormat, check_room
from drsync.target.partial import translated

WORK_DIR: Final = Path("/var/tmp")  # noqa: S108 - a directory of our own is made in it, for us alone
"""Where the files are made, unless it is said otherwise: not /tmp, which may be memory."""


class FixedDisks:
    """The disks of a prepared guest, as files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.content = secrets.token_hex(8)
        """Names what is in the files: what was written of other ones is of no use."""

    def path(self, disk: str) -> Path:
        return self._directory / f"{disk}.raw"

    def blocks(self, disk: str) -> Indexes:
        """The blocks of 512 KiB that may hold data, by the file's holes."""
        with self.path(disk).open("rb") as file:
            found = [np.arange(start, end, dtype=np.uint32) for start, end in _data(file.fileno())]
        return np.unique(np.concatenate([np.zeros(0, np.uint32), *found])).astype(np.uint32)

    def holding_data(self, disk: str) -> Indexes:
        """Those of them that are not all zeros."""
        return np.array([index for index, data in self.read(disk, self.blocks(disk)) if data != ZERO_BLOCK], np.uint32)

    def read(self, disk: str, blocks: Indexes) -> Iterator[tuple[int, bytes]]:
        """These blocks, in their order."""
        with self.path(disk).open("rb") as file:
            for index in blocks.tolist():
                data = os.pread(file.fileno(), BLOCK_BYTES, index * BLOCK_BYTES)
                yield index, data.ljust(BLOCK_BYTES, b"\0")


@contextmanager
def fixed_disks(
    session: Session, plan: CloudPlan, progress: Progress, say: Callable[[str], None]
) -> Iterator[FixedDisks]:
    """Restore the disks of a plan into files, and prepare the guest on them; they are gone afterwards.

    Raises:
        TargetFull, TargetUnusable: the working directory can't take them.
        ObjectMissing, ObjectDamaged, StoreError: the point can't be read.
        FixUnavailable, FixFailed: the guest can't be prepared.
    """
    vm, place = plan.request.vm, plan.request.work_dir or WORK_DIR
    check_room(place, sum(disk.image.live_bytes(disk.name) for disk in plan.disks))
    with _directory(place / f"drsync-{vm}-{plan.point.capture}") as made:
        fixed = FixedDisks(made)
        progress.start(f"restore {vm} to prepare it", sum(disk.size_bytes for disk in plan.disks))
        for disk in plan.disks:
            target = ImageDisk(fixed.path(disk.name), disk.size_bytes, ImageFormat.RAW, vm=vm, overwrite=False)
            restore_disk(session.log(vm).objects, disk.image, disk.name, target, progress)
        say(f"{vm}: preparing the guest for EC2, in a small VM of its own (minutes, if this host has no KVM)")
        prepare(vm, [Image(path=fixed.path(disk.name), format="raw") for disk in plan.disks], say)
        yield fixed


@contextmanager
def _directory(path: Path) -> Iterator[Path]:
    """A new directory for us alone; one that a killed run has left goes first.

    Raises:
        TargetUnusable: it can't be made, is somebody else's, or a live process has it.
    """
    with translated(path):
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise TargetUnusable(path=path, problem="it is another user's")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise TargetUnusable(path=path, problem="another process prepares this guest there") from err
        with translated(path):
            for left in path.iterdir():
                left.unlink()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(fd)


def _data(fd: int) -> Iterator[tuple[int, int]]:
    """The blocks (first, end) in which a sparse file has data."""
    at, size = 0, os.fstat(fd).st_size
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: no data from here on
            return
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start // BLOCK_BYTES, -(-at // BLOCK_BYTES)
