"""RegisterImage that checks and keeps what it is given.

Known (API reference, RegisterImage; user guide "Boot modes"): names have 3 to 128 characters of a set and are unique in
the account's Region (InvalidAMIName.Duplicate, .Malformed); the defaults are i386 and paravirtual; without a boot mode
an x86 image boots as legacy-bios; UefiData has up to 64000 characters; ImdsSupport v2.0 makes instances require IMDSv2
with a hop limit of 2; a snapshot that an image uses can't be deleted (InvalidSnapshot.InUse).

Guesses: all messages; that a snapshot which isn't completed is IncorrectState; that TPM needs UEFI is known, its code
here (InvalidParameterCombination) is not; PlatformDetails is always Linux/UNIX here, since an own snapshot carries no
billing data.
"""

import base64
import binascii
import re
import secrets
from collections.abc import Mapping
from typing import Any

from moto.ec2.models.amis import Ami

from drsync_localstack.refusal import Refused

NAME = re.compile(r"[A-Za-z0-9()\[\] ./\-'@_]{3,128}")


class RegisteredImage(Ami):
    """An image with all that RegisterImage was given; moto's serializer finds each attribute by its name."""

    def __init__(self, backend: Any, request: Mapping[str, Any], mappings: list[dict[str, Any]]) -> None:
        super().__init__(
            backend,
            f"ami-{secrets.token_hex(9)[:17]}",
            name=request["Name"],
            description=request.get("Description"),
            architecture=request.get("Architecture") or "i386",
            virtualization_type=request.get("VirtualizationType") or "paravirtual",
            hypervisor="xen",
            root_device_type="ebs",
            root_device_name=request.get("RootDeviceName"),
            boot_mode=request.get("BootMode"),
            image_location=f"{backend.account_id}/{request['Name']}",
            sriov=request.get("SriovNetSupport") or "",
            tags=tags_of(request, "image"),
        )
        backend.snapshots.pop(self.ebs_snapshot.id)  # the empty disk that moto makes up for any image
        self.mappings = mappings
        self.ena_support = bool(request.get("EnaSupport"))
        self.tpm_support = request.get("TpmSupport")
        self.imds_support = request.get("ImdsSupport")
        self.uefi_data = request.get("UefiData")
        self.sriov_net_support = request.get("SriovNetSupport")
        self.platform_details = "Linux/UNIX"
        self.usage_operation = "RunInstances"

    @property
    def block_device_mappings(self) -> list[dict[str, Any]]:
        """As they were registered, with what the snapshots add."""
        return self.mappings

    @property
    def snapshot_ids(self) -> set[str]:
        """The snapshots that it needs."""
        return {mapping["Ebs"]["SnapshotId"] for mapping in self.mappings if "SnapshotId" in mapping.get("Ebs", {})}


def register(backend: Any, request: Mapping[str, Any]) -> RegisteredImage:
    """Check a request of RegisterImage and make the image, in moto's backend of the account and Region.

    Raises:
        Refused: as AWS would.
    """
    _check(backend, request)
    mappings = [_mapping(backend, mapping) for mapping in request.get("BlockDeviceMappings") or ()]
    root = request.get("RootDeviceName")
    if root not in {mapping["DeviceName"] for mapping in mappings if "Ebs" in mapping}:
        raise Refused("InvalidBlockDeviceMapping", f"The root device {root} is not in the block device mappings.")
    image = RegisteredImage(backend, request, mappings)
    backend.amis[image.id] = image
    return image


def tags_of(request: Mapping[str, Any], resource: str) -> dict[str, str]:
    """The tags that a request has for a kind of resource."""
    specs = request.get("TagSpecifications") or ()
    return {tag["Key"]: tag["Value"] for spec in specs if spec["ResourceType"] == resource for tag in spec["Tags"]}


def _check(backend: Any, request: Mapping[str, Any]) -> None:
    name = request["Name"]
    if not NAME.fullmatch(name):
        raise Refused("InvalidAMIName.Malformed", "AMI names must be between 3 and 128 characters long.")
    taken = [image.id for image in backend.amis.values() if image.name == name and image.owner_id == backend.account_id]
    if taken:
        raise Refused("InvalidAMIName.Duplicate", f"AMI name {name} is already in use by AMI {taken[0]}")
    uefi = request.get("BootMode") in ("uefi", "uefi-preferred")
    if request.get("TpmSupport") and not uefi:
        raise Refused("InvalidParameterCombination", "TpmSupport needs a boot mode of UEFI.")
    if data := request.get("UefiData"):
        try:
            base64.b64decode(data, validate=True)
        except binascii.Error:
            raise Refused("InvalidParameterValue", "UefiData is not base64.") from None
        if not uefi:
            raise Refused("InvalidParameterCombination", "UefiData needs a boot mode of UEFI.")


def _mapping(backend: Any, mapping: Mapping[str, Any]) -> dict[str, Any]:
    if "Ebs" not in mapping:
        return dict(mapping)
    ebs = dict(mapping["Ebs"])
    if snapshot_id := ebs.get("SnapshotId"):
        snapshot = backend.snapshots.get(snapshot_id)
        if snapshot is None:
            raise Refused("InvalidSnapshot.NotFound", f"The snapshot '{snapshot_id}' does not exist.")
        if snapshot.status != "completed":
            raise Refused("IncorrectState", f"The snapshot {snapshot_id} is {snapshot.status}.")
        if ebs.setdefault("VolumeSize", snapshot.volume.size) < snapshot.volume.size:
            raise Refused("InvalidBlockDeviceMapping", f"The volume is smaller than its snapshot {snapshot_id}.")
        if "Encrypted" in ebs:
            raise Refused("InvalidBlockDeviceMapping", "Encrypted and SnapshotId can't be given together.")
        ebs["Encrypted"] = bool(snapshot.encrypted)
    elif "VolumeSize" not in ebs:
        raise Refused("MissingParameter", f"{mapping['DeviceName']} needs a SnapshotId or a VolumeSize.")
    ebs.setdefault("DeleteOnTermination", True)
    ebs.setdefault("VolumeType", "gp2")
    return {**mapping, "Ebs": ebs}
