"""Which blocks of a fresh snapshot have to be read, so that what is read and the newest point make up the volume.

changed since the reference      by ListChangedBlocks
+ where the newest point differs from the reference's point, if that is an older one
+ the block with the disk's old end, if that was not whole and the disk is larger now
= chosen; without a reference, or if AWS can't compare: all that the snapshot has, and the rest is zeros
"""

import logging
from dataclasses import dataclass

import numpy as np

from drsync.errors import CloudRefused
from drsync.model import BLOCK_SIZE, Pace
from drsync.recovery.cloud.blocks import CloudDisk, beside
from drsync.recovery.failback.request import FailbackDisk, FailbackPlan
from drsync.recovery.failback.view import SnapshotDisk
from drsync.session import Session
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.changed_blocks import ChangedBlocks, Comparison, is_unrelated
from drsync.target.ec2.snapshot import BLOCK_BYTES, Indexes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A disk as it will be read, and what reads it."""

    disk: SnapshotDisk
    blocks: ChangedBlocks
    listed: ChangedBlocks
    """What the blocks were found by; may be `blocks` itself."""

    @property
    def list_requests(self) -> int:
        return sum(one.list_requests for one in {id(one): one for one in (self.blocks, self.listed)}.values())


class Reading:
    """Chooses the blocks of one pass."""

    def __init__(self, session: Session, aws: Aws, plan: FailbackPlan, pace: Pace) -> None:
        self._session = session
        self._aws = aws
        self._plan = plan
        self._pace = pace

    def choose(self, disk: FailbackDisk, snapshot_id: str) -> Chosen:
        """What has to be read of a disk.

        Raises:
            CloudError: AWS can't be asked.
            ObjectMissing, ObjectDamaged, StoreError: the log can't be read.
        """
        if disk.reference is not None:
            compared = self._blocks(snapshot_id, disk.reference.snapshot.id)
            try:
                return self._choose_changed(disk, compared, compared.indexes())
            except CloudRefused as err:
                if not is_unrelated(err):
                    raise
                log.warning("vm=%s disk=%s is read as a whole: %s", self._plan.request.vm, disk.name, err)
        blocks = self._blocks(snapshot_id)
        chosen = SnapshotDisk(chosen=_within(blocks.indexes(), disk), is_whole=True, read=blocks.read)
        return Chosen(disk=chosen, blocks=blocks, listed=blocks)

    def _choose_changed(self, disk: FailbackDisk, compared: ChangedBlocks, changed: Indexes) -> Chosen:
        more = np.union1d(self._gone_on(disk), _old_end(disk))
        blocks = compared
        if len(np.setdiff1d(more, changed)):  # the comparison has no tokens for these
            blocks = self._blocks(compared.comparison.snapshot)
        chosen = _within(np.union1d(changed, more), disk)
        return Chosen(
            disk=SnapshotDisk(chosen=chosen, is_whole=False, read=blocks.read), blocks=blocks, listed=compared
        )

    def _gone_on(self, disk: FailbackDisk) -> Indexes:
        """Where the newest point differs from the one that the reference holds."""
        plan = self._plan
        if disk.reference is None or disk.reference.point == plan.head.number or plan.origin_image is None:
            return np.zeros(0, np.uint32)
        vm_log = self._session.log(plan.request.vm)
        image = beside(vm_log, plan.origin_image, plan.head.number)
        return CloudDisk(objects=vm_log.objects, image=image, name=disk.name, before=plan.origin_image).plan()

    def _blocks(self, snapshot_id: str, older: str | None = None) -> ChangedBlocks:
        return ChangedBlocks(self._aws, Comparison(snapshot_id, older), pace=self._pace)


def _old_end(disk: FailbackDisk) -> Indexes:
    """The block with the old end of a disk that has another size now: it was short, and is no longer."""
    if disk.before_bytes is None or disk.before_bytes == disk.size_bytes or not disk.before_bytes % BLOCK_SIZE:
        return np.zeros(0, np.uint32)
    return np.array([disk.before_bytes // BLOCK_BYTES], np.uint32)


def _within(indexes: Indexes, disk: FailbackDisk) -> Indexes:
    return indexes[indexes < disk.size_bytes // BLOCK_BYTES].astype(np.uint32)
