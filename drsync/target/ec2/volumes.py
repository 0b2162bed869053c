"""The volumes of an instance, and snapshots of all of them at one instant.

CreateSnapshots takes all volumes of an instance crash-consistently together (API reference), whether it runs or is
stopped; of a volume one snapshot can be begun every 15 seconds. It has no client token: what a lost answer has made is
found by its tags.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_fixed

from drsync.errors import CloudRefused
from drsync.target.ec2 import tags
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.images import ROOT_DEVICE

if TYPE_CHECKING:
    from mypy_boto3_ec2.type_defs import VolumeTypeDef

_TOO_SOON: Final = "SnapshotCreationPerVolumeRateExceeded"
_PAUSE_S: Final = 5.0
_TRIES: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A volume that is attached to an instance."""

    id: str
    size_gib: int
    snapshot_id: str
    """The snapshot that it was made from; empty if of none."""
    device: str
    tags: Mapping[str, str]

    @property
    def is_root(self) -> bool:
        return self.device == ROOT_DEVICE


class Volumes:
    """The volumes of a region's instances."""

    def __init__(self, aws: Aws, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._aws = aws
        self._sleep = sleep

    def of_instance(self, instance_id: str) -> list[Volume]:
        """All volumes that are attached to an instance, by their devices.

        Raises:
            CloudError: AWS can't be asked.
        """
        with self._aws.translated("DescribeVolumes"):
            pages = self._aws.ec2.get_paginator("describe_volumes").paginate(
                Filters=[{"Name": "attachment.instance-id", "Values": [instance_id]}]
            )
            found = [_volume(one, instance_id) for page in pages for one in page["Volumes"]]
        return sorted(found, key=lambda volume: volume.device)

    def snapshot(
        self, instance_id: str, wanted: Collection[str], own: Mapping[str, str], description: str
    ) -> dict[str, str]:
        """Begin snapshots of these volumes of an instance, of one instant: volume → snapshot, pending still.

        Raises:
            CloudError: AWS refuses; none was made.
        """
        others = [volume for volume in self.of_instance(instance_id) if volume.id not in wanted]
        instance: dict[str, Any] = {"InstanceId": instance_id}
        if any(volume.is_root for volume in others):
            instance["ExcludeBootVolume"] = True
        if excluded := [volume.id for volume in others if not volume.is_root]:
            instance["ExcludeDataVolumeIds"] = excluded
        request: dict[str, Any] = {
            "InstanceSpecification": instance,
            "Description": description[:255],
            "TagSpecifications": [{"ResourceType": "snapshot", "Tags": tags.listed(own)}],
        }
        retrying = Retrying(
            retry=retry_if_exception(lambda e: isinstance(e, CloudRefused) and e.fields["aws_code"] == _TOO_SOON),
            stop=stop_after_attempt(_TRIES),
            wait=wait_fixed(_PAUSE_S),
            sleep=self._sleep,
            reraise=True,
        )
        return retrying(self._snapshot, request)

    def _snapshot(self, request: dict[str, Any]) -> dict[str, str]:
        with self._aws.translated("CreateSnapshots"):
            answer = self._aws.ec2.create_snapshots(**request)
        return {one["VolumeId"]: one["SnapshotId"] for one in answer["Snapshots"]}


def _volume(volume: "VolumeTypeDef", instance_id: str) -> Volume:
    attached = [one for one in volume.get("Attachments", []) if one.get("InstanceId") == instance_id]
    return Volume(
        id=volume["VolumeId"],
        size_gib=volume["Size"],
        snapshot_id=volume.get("SnapshotId", ""),
        device=attached[0].get("Device", "") if attached else "",
        tags=tags.read(volume.get("Tags")),
    )
