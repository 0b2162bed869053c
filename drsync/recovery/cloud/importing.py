"""Disks by VM Import: a snapshot of a disk (ImportSnapshot), or an image whose guest AWS has converted (ImportImage).

    --via vm-import                    each disk ▶ image in the bucket ▶ ImportSnapshot ▶ snapshot ▶ registered as usual
    --via vm-import --convert-guest    each disk ▶ image in the bucket ─┐
    --convert-guest                    each disk ▶ snapshot by EBS ─────┴▶ ImportImage ▶ image

Names of imports are made of repository, VM, capture and disk, so a run that was killed finds its upload and its task.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial

from drsync.errors import CantRunInCloud
from drsync.model import Progress
from drsync.recovery.cloud.disks import DiskShipping, PlannedDisk
from drsync.recovery.cloud.request import CloudPlan
from drsync.target.ec2 import images, tags
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.import_kinds import ImageImport, ImageSource
from drsync.target.ec2.import_task import ImportedImage, import_disk, import_image, upload_disk
from drsync.target.ec2.upload import DiskImport, ImportPlace, ReadBlocks, Tuning

_NO_BUCKET = "none"
"""What is never read: the disks of the image are snapshots."""


def _prefix(repository: str, vm: str) -> str:
    return f"{repository[:8]}-{vm}-"


def belongs_to(repository: str, vm: str) -> Callable[[str], bool]:
    """Whether an import's name is of this VM: others may have names that begin the same."""
    pattern = re.compile(re.escape(_prefix(repository, vm)) + r"[0-9a-f]{16}-(?:disk-.+|image)")
    return lambda name: pattern.fullmatch(name) is not None


class ImportRoute:
    """What VM Import does for one plan."""

    def __init__(self, aws: Aws, shipping: DiskShipping, plan: CloudPlan, *, tuning: Tuning | None = None) -> None:
        self._aws = aws
        self._shipping = shipping
        self._plan = plan
        self._tuning = tuning
        self._clock = shipping.session.clock

    def snapshot(self, disk: PlannedDisk, progress: Progress) -> str:
        """The snapshot of one disk.

        Raises:
            CloudError: see import_task.import_disk.
        """
        return import_disk(
            self._aws,
            self._place(),
            self._import_of(disk),
            self._read(disk),
            clock=self._clock,
            progress=progress,
            tuning=self._tuning,
        )

    def converted(self) -> str | None:
        """The image that an earlier run has had converted."""
        found = images.find(self._aws, {**self._plan.of.identity(), tags.CONVERTED: "yes"})
        return found[0]["ImageId"] if found else None

    def convert(self, snapshots: Mapping[str, str], progress: Progress) -> ImportedImage:
        """The image of all disks; those that have no snapshot go through the bucket.

        Raises:
            CloudError: see import_task.import_image.
        """
        sources = [self._source(disk, snapshots.get(disk.name), progress) for disk in self._plan.disks]
        place = self._place(needed=any(source.name for source in sources))
        return import_image(
            self._aws, place, self._image(), sources, clock=self._clock, progress=progress, tuning=self._tuning
        )

    def _source(self, disk: PlannedDisk, snapshot_id: str | None, progress: Progress) -> ImageSource:
        if snapshot_id is not None:
            return ImageSource(size_bytes=disk.size_bytes, snapshot_id=snapshot_id)
        return upload_disk(
            self._aws,
            self._place(),
            self._import_of(disk),
            self._read(disk),
            clock=self._clock,
            progress=progress,
            tuning=self._tuning,
        )

    def _place(self, *, needed: bool = True) -> ImportPlace:
        request = self._plan.request
        if needed and request.import_bucket is None:  # which is one of the plan's errors
            raise CantRunInCloud(vm=request.vm, region=self._plan.region, problem="no bucket is chosen")
        return ImportPlace(
            bucket=request.import_bucket or _NO_BUCKET,
            role_name=request.import_role,
            keep_on_error=request.keep_on_error,
        )

    def _import_of(self, disk: PlannedDisk) -> DiskImport:
        return DiskImport(
            name=self._name(f"disk-{disk.name}"),
            size_bytes=disk.size_bytes,
            data_bytes=disk.image.live_bytes(disk.name),
            tags=self._shipping.tags(self._plan.point, disk.name),
        )

    def _read(self, disk: PlannedDisk) -> ReadBlocks:
        return partial(self._shipping.read_small, self._plan.point, disk)

    def _image(self) -> ImageImport:
        plan = self._plan
        mine = {tags.NAME: f"drsync {plan.request.vm} point {plan.point.number} converted", tags.CONVERTED: "yes"}
        return ImageImport(
            name=self._name("image"),
            description=f"drsync: {plan.request.vm} point {plan.point.number}",
            boot_mode=plan.boot_mode,
            platform="Windows" if plan.guest.may_be_windows else "Linux",
            tags={**plan.request.tags, **plan.of.tags(), **mine},
        )

    def _name(self, what: str) -> str:
        of = self._plan.of
        return f"{_prefix(of.repository, of.vm)}{of.capture}-{what}"
