"""The disks of a point on their way into EBS: what is there already, over what the rest is written, and the writing.

Both ways use it: a restore, that wants them now, and the pilot light, that has them ahead of the disaster.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from drsync.catalog import Point
from drsync.errors import CloudRefused, DrsyncError
from drsync.finding import Finding
from drsync.image import PointImage
from drsync.model import Progress
from drsync.recovery.cloud.blocks import CloudDisk, beside
from drsync.session import Session
from drsync.target.ec2 import tags
from drsync.target.ec2.snapshot import (
    BLOCK_BYTES,
    FoundSnapshot,
    Indexes,
    Keeper,
    SnapshotJob,
    Snapshots,
    SnapshotWriter,
    volume_gib,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDisk:
    """A disk on its way."""

    name: str
    size_bytes: int
    image: PointImage
    before: PointImage | None
    blocks: Indexes
    """What has to be written."""
    parent: FoundSnapshot | None
    """The snapshot of an earlier point that it is written over."""
    existing: FoundSnapshot | None
    """The snapshot that holds this very point already: no data moves."""

    @property
    def volume_gib(self) -> int:
        return volume_gib(self.size_bytes)

    @property
    def put_blocks(self) -> int:
        return 0 if self.existing is not None else len(self.blocks)

    @property
    def put_bytes(self) -> int:
        return self.put_blocks * BLOCK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A disk that is a snapshot now."""

    snapshot_id: str
    sent_blocks: int


class FixedDisks(Protocol):
    """The disks of a prepared guest (fixing.py)."""

    content: str

    def holding_data(self, disk: str) -> Indexes: ...

    def read(self, disk: str, blocks: Indexes) -> Iterator[tuple[int, bytes]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskShipping:
    """Brings disks of points into EBS."""

    session: Session
    snapshots: Snapshots
    keeper: Keeper
    own_tags: Mapping[str, str] = field(default_factory=dict)
    is_fixed: bool = False
    """The guest is prepared for EC2 on the way: nothing of it is the point as it was captured."""

    def of(self, point: Point) -> tags.PointTags:
        """What everything of a point is tagged with."""
        capture = point.capture + (tags.FIXED if self.is_fixed else "")
        return tags.PointTags(
            repository=self.session.repository.id.hex(), vm=point.vm, capture=capture, point=point.number
        )

    def plan(
        self, point: Point, image: PointImage, names: Sequence[str], *, whole: bool = False
    ) -> Sequence[PlannedDisk]:
        """What has to be done for these disks of a point; `whole` uses no snapshot of an earlier point.

        Raises:
            CloudError: AWS can't be asked what it has.
            IntegrityError, StoreError: the log can't be read.
        """
        known = self.snapshots.find(self.of(point).owner())
        alone = whole or self.is_fixed
        usable = [s for s in known if not alone or s.tags.get(tags.CAPTURE) == self.of(point).capture]
        return [self._plan(point, image, name, usable) for name in names]

    def _plan(self, point: Point, image: PointImage, name: str, known: Sequence[FoundSnapshot]) -> PlannedDisk:
        size_bytes = image.disk(name).size_bytes
        mine = [s for s in known if s.tags.get(tags.DISK) == name]
        same = [s for s in mine if s.tags.get(tags.CAPTURE) == self.of(point).capture]
        existing = next((s for s in same if Snapshots.is_usable(s, size_bytes)), None)
        parent, before, beside_it = None, None, image
        if existing is None:
            parent, before, beside_it = self._parent(point, image, name, mine)
        disk = PlannedDisk(
            name=name,
            size_bytes=size_bytes,
            image=beside_it,
            before=before,
            blocks=self._disk(point.vm, name, beside_it, before).plan(),
            parent=parent,
            existing=existing,
        )
        return disk if parent is None else self._cheaper(point.vm, disk, image)

    def _cheaper(self, vm: str, disk: PlannedDisk, image: PointImage) -> PlannedDisk:
        """The disk over its parent or, if that takes more than half again of writing it whole, without one."""
        whole = replace(
            disk, image=image, before=None, parent=None, blocks=self._disk(vm, disk.name, image, None).plan()
        )
        return whole if len(disk.blocks) > 1.5 * len(whole.blocks) else disk

    def read_small(self, point: Point, disk: PlannedDisk, first: int) -> Iterator[tuple[int, bytes]]:
        """The disk's blocks of 64 KiB that hold data, from block `first` on.

        Raises:
            ObjectMissing, ObjectDamaged, StoreError: a block can't be had as it was written.
        """
        return self._disk(point.vm, disk.name, disk.image, None).read_small(first)

    def _disk(self, vm: str, name: str, image: PointImage, before: PointImage | None) -> CloudDisk:
        return CloudDisk(objects=self.session.log(vm).objects, image=image, name=name, before=before)

    def _parent(
        self, point: Point, image: PointImage, disk: str, known: Sequence[FoundSnapshot]
    ) -> tuple[FoundSnapshot | None, PointImage | None, PointImage]:
        """The newest snapshot of an earlier point that can be written over, that point, and this one beside it.

        A snapshot counts only if the log still says the same of its point: number and capture.
        """
        size_gib = volume_gib(image.disk(disk).size_bytes)
        usable = [s for s in known if s.state == "completed" and s.volume_gib <= size_gib]
        for snapshot in sorted(usable, key=lambda s: tags.number(s.tags, tags.POINT), reverse=True):
            number = tags.number(snapshot.tags, tags.POINT)
            if not 0 < number < point.number:
                continue
            try:
                older, before = Finding(self.session).find_point(point.vm, number=number)
                if older.capture == snapshot.tags.get(tags.CAPTURE) and disk in {d.name for d in older.disks}:
                    return snapshot, before, beside(self.session.log(point.vm), before, point.number)
            except DrsyncError as err:
                if err.retryable:
                    raise
                log.warning("snapshot %s can't be written over: %s", snapshot.id, err)
        return None, None, image

    def write(
        self,
        point: Point,
        disk: PlannedDisk,
        progress: Progress,
        *,
        opened: Callable[[str], None] = lambda _snapshot: None,
    ) -> Written:
        """Write a disk into a snapshot, or go on with one; `opened` is told its id before the first block.

        Raises:
            ObjectMissing, ObjectDamaged, StoreError: a block can't be had as it was written.
            CloudError: AWS does not take it; the snapshot stays as it is.
        """
        if disk.existing is not None:
            return Written(snapshot_id=disk.existing.id, sent_blocks=0)
        try:
            writer = self.snapshots.open(self._job(point, disk))
        except CloudRefused as err:
            if disk.parent is None:
                raise
            log.warning("snapshot %s can't be the parent: %s; everything is written", disk.parent.id, err)
            _, image = Finding(self.session).find_point(point.vm, number=point.number)
            blocks = self._disk(point.vm, disk.name, image, None).plan()
            whole = replace(disk, image=image, before=None, parent=None, blocks=blocks)
            return self.write(point, whole, progress, opened=opened)
        with writer:
            opened(writer.id)
            self._fill(writer, point, disk, progress)
            return Written(snapshot_id=writer.id, sent_blocks=writer.sent)

    def write_fixed(
        self,
        point: Point,
        disk: PlannedDisk,
        fixed: FixedDisks,
        progress: Progress,
        *,
        opened: Callable[[str], None] = lambda _snapshot: None,
    ) -> Written:
        """Write a disk of a prepared guest into a snapshot; what there is of earlier preparations goes.

        Raises:
            CloudError: AWS does not take it.
        """
        for old in self.snapshots.find({**self.of(point).identity(), tags.DISK: disk.name}):
            self.snapshots.delete(old.id)
        blocks = fixed.holding_data(disk.name)
        job = replace(self._job(point, disk), blocks=blocks, content=fixed.content)
        progress.start(f"{point.vm} {disk.name}", len(blocks) * BLOCK_BYTES)
        with self.snapshots.open(job) as writer:
            opened(writer.id)
            for index, data in fixed.read(disk.name, blocks):
                writer.put(index, data)
                progress.advance(len(data))
            writer.finish()
            return Written(snapshot_id=writer.id, sent_blocks=writer.sent)

    def _fill(self, writer: SnapshotWriter, point: Point, disk: PlannedDisk, progress: Progress) -> None:
        progress.start(f"{point.vm} {disk.name}", disk.put_bytes)
        if writer.is_complete:
            progress.advance(disk.put_bytes)
            return
        for index, data in self._disk(point.vm, disk.name, disk.image, disk.before).read(disk.blocks):
            writer.put(index, data)
            progress.advance(len(data))
        writer.finish()

    def tags(self, point: Point, disk: str) -> dict[str, str]:
        """What the snapshot of a disk is tagged with, however it is made."""
        mine = {tags.DISK: disk, tags.DISKS: str(len(point.disks)), tags.KEEPER: self.keeper.value}
        name = {tags.NAME: f"{point.vm} {disk} point {point.number}"}
        return {**name, **self.own_tags, **self.of(point).tags(), **mine}

    def _job(self, point: Point, disk: PlannedDisk) -> SnapshotJob:
        return SnapshotJob(
            of=self.of(point),
            disk=disk.name,
            size_bytes=disk.size_bytes,
            blocks=disk.blocks,
            parent=disk.parent.id if disk.parent is not None else None,
            of_disks=len(point.disks),
            keeper=self.keeper,
            own_tags=self.own_tags,
        )
