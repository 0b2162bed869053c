"""EBS snapshots become an AMI: RegisterImage with all that it does not guess rightly.

Its defaults are i386 and paravirtual, so everything is said (API reference, RegisterImage): architecture, hvm,
ENA, boot mode, root device. A name is unique in an account's region; drsync makes it of what the image is,
so that a second run finds the image of the first, also when the first one's answer got lost.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from drsync.errors import CloudNotFound, CloudRefused
from drsync.target.ec2 import tags
from drsync.target.ec2.aws import Aws

if TYPE_CHECKING:
    from mypy_boto3_ec2.type_defs import ImageTypeDef

ROOT_DEVICE: Final = "/dev/sda1"
MAX_VOLUMES: Final = 27
_DATA_DEVICES: Final = [f"/dev/sd{c}" for c in "fghijklmnopqrstuvwxyz"] + [f"/dev/xvdb{c}" for c in "abcdefgh"]
_MAX_NAME: Final = 128


def devices(count: int) -> list[str]:
    """Names for the root disk and the others. Guests on Nitro see /dev/nvmeNn1, in any order."""
    return [ROOT_DEVICE, *_DATA_DEVICES][:count]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDisk:
    """A disk of the image; the first one is the root."""

    name: str
    snapshot_id: str
    volume_gib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """What is registered."""

    of: tags.PointTags
    disks: Sequence[ImageDisk]
    architecture: str
    boot_mode: str
    tpm: bool = False
    uefi_data: str | None = None
    volume_type: str = "gp3"
    own_tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique to what the image is."""
        what = [f"{disk.name} {disk.snapshot_id} {disk.volume_gib}" for disk in self.disks]
        what += [self.architecture, self.boot_mode, str(self.tpm), self.uefi_data or "", self.volume_type]
        digest = hashlib.sha256("\n".join([*what, *self.of.identity().values()]).encode()).hexdigest()[:12]
        return f"drsync {self.of.vm} point {self.of.point} {digest}"[:_MAX_NAME]


def register(aws: Aws, spec: ImageSpec) -> tuple[str, bool]:
    """The image of a spec, and whether it was made now.

    Raises:
        CloudError: AWS refuses it, or can't be asked.
    """
    known = find(aws, {}, name=spec.name)
    if known:
        return known[0]["ImageId"], False
    try:
        with aws.translated("RegisterImage"):
            return aws.ec2.register_image(**_request(spec))["ImageId"], True
    except CloudRefused as err:
        if err.fields["aws_code"] != "InvalidAMIName.Duplicate":
            raise
        known = find(aws, {}, name=spec.name)  # the answer to an earlier try got lost
        if not known:
            raise
        return known[0]["ImageId"], True


def _request(spec: ImageSpec) -> dict[str, Any]:
    request: dict[str, Any] = {
        "Name": spec.name,
        "Description": f"drsync: {spec.of.vm} point {spec.of.point}"[:255],
        "Architecture": spec.architecture,
        "VirtualizationType": "hvm",
        "EnaSupport": True,
        "BootMode": spec.boot_mode,
        "ImdsSupport": "v2.0",
        "RootDeviceName": ROOT_DEVICE,
        "BlockDeviceMappings": [
            {
                "DeviceName": device,
                "Ebs": {
                    "SnapshotId": disk.snapshot_id,
                    "VolumeSize": disk.volume_gib,
                    "VolumeType": spec.volume_type,
                    "DeleteOnTermination": True,
                },
            }
            for device, disk in zip(devices(len(spec.disks)), spec.disks, strict=True)
        ],
        "TagSpecifications": [
            {
                "ResourceType": "image",
                "Tags": tags.listed({tags.NAME: spec.name, **spec.own_tags, **spec.of.tags()}),
            }
        ],
    }
    if spec.tpm:
        request["TpmSupport"] = "v2.0"
    if spec.uefi_data:
        request["UefiData"] = spec.uefi_data
    return request


def find(aws: Aws, wanted: Mapping[str, str], *, name: str | None = None) -> Sequence["ImageTypeDef"]:
    """Own images with these tags, and this name.

    Raises:
        CloudError: AWS can't be asked.
    """
    filters = tags.filters(wanted)
    if name is not None:
        filters.append({"Name": "name", "Values": [tags.literal(name)]})
    with aws.translated("DescribeImages"):
        return aws.ec2.describe_images(Owners=["self"], Filters=filters)["Images"]


def devices_of(aws: Aws, image_id: str) -> dict[str, str]:
    """Snapshot → device of an image's disks.

    Raises:
        CloudError: AWS can't be asked.
    """
    with aws.translated("DescribeImages"):
        (image,) = aws.ec2.describe_images(ImageIds=[image_id])["Images"]
    mappings = image.get("BlockDeviceMappings", [])
    return {m["Ebs"]["SnapshotId"]: m["DeviceName"] for m in mappings if "SnapshotId" in m.get("Ebs", {})}


def platform_details(aws: Aws, image_id: str) -> str:
    """What AWS takes the image's system for: licences are billed by it."""
    with aws.translated("DescribeImages"):
        (image,) = aws.ec2.describe_images(ImageIds=[image_id])["Images"]
    return image.get("PlatformDetails", "")


def deregister(aws: Aws, image_id: str) -> None:
    """Remove an image; its snapshots stay. One that is gone already is fine.

    Raises:
        CloudError: AWS refuses.
    """
    try:
        with aws.translated(f"DeregisterImage {image_id}"):
            aws.ec2.deregister_image(ImageId=image_id)
    except CloudNotFound:
        return
    except CloudRefused as err:
        if err.fields["aws_code"] != "InvalidAMIID.Unavailable":  # deregistered before
            raise
