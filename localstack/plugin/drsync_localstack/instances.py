"""RunInstances that honours what it and its image were given.

moto makes the instance; the volumes, the boot mode and the rest that it leaves out are added here.

Known (API reference, user guides "Boot modes", "NitroTPM", "ENA", "Block device mappings"):
- a request's mapping replaces the image's for the same device, adds others, and can only grow a snapshot's volume;
- a client token with the same request is the same instance, with another one IdempotentParameterMismatch;
- an image's boot mode needs a type that supports it; a type that requires ENA needs an image with it; NitroTPM too;
- an image with ImdsSupport v2.0 makes IMDSv2 required, with a hop limit of 2, where the request says nothing;
- an address outside of the subnet is InvalidParameterValue, one that is taken InvalidIPAddress.InUse.

Guesses: the messages, and InvalidParameterCombination for the types that can't. Types come from moto's table, a copy of
what DescribeInstanceTypes said at its release.
"""

import ipaddress
import threading
from collections.abc import Callable, Mapping
from typing import Any

from moto.ec2.models.instance_types import INSTANCE_TYPES

from drsync_localstack.catalog import Catalog
from drsync_localstack.images import RegisteredImage, tags_of
from drsync_localstack.refusal import Refused


class Launches:
    """Launches by their client token, so that a repeated one is the same."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_token: dict[tuple[str, str, str], tuple[Mapping[str, Any], Any]] = {}

    def once(
        self, key: tuple[str, str, str], request: Mapping[str, Any], launch: Callable[[], Any]
    ) -> tuple[Any, bool]:
        """The reservation of a token, launched at its first use only; whether it was."""
        given = {name: value for name, value in request.items() if name != "ClientToken"}
        with self._lock:
            if not key[-1]:
                return launch(), True
            if key in self._by_token:
                before, answer = self._by_token[key]
                if before != given:
                    message = "Arguments on this idempotent request are inconsistent with arguments used before."
                    raise Refused("IdempotentParameterMismatch", message)
                return answer, False
            answer = launch()
            self._by_token[key] = given, answer
            return answer, True


def check(backend: Any, request: Mapping[str, Any]) -> Any:
    """Check a request against its image, type and subnet; give the image.

    Raises:
        Refused: as AWS would.
    """
    image = backend.amis.get(request.get("ImageId"))
    if image is None:
        raise Refused("InvalidAMIID.NotFound", f"The image id '[{request.get('ImageId')}]' does not exist")
    if isinstance(image, RegisteredImage):
        _check_type(image, request.get("InstanceType") or "m1.small")
    _check_address(backend, request)
    return image


def mappings_for(backend: Any, image: Any, request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The volumes that an instance gets: its image's, as the request changes them, and those that it adds."""
    merged = {mapping["DeviceName"]: dict(mapping.get("Ebs") or {}) for mapping in image.block_device_mappings}
    for mapping in request.get("BlockDeviceMappings") or ():
        device = mapping["DeviceName"]
        if mapping.get("NoDevice") is not None:
            merged.pop(device, None)
        elif "Ebs" in mapping:
            merged[device] = {**merged.get(device, {}), **mapping["Ebs"]}
    for device, ebs in merged.items():
        check_volume(backend, device, ebs)
    return [{"DeviceName": device, "Ebs": ebs} for device, ebs in merged.items()]


def finish(
    backend: Any,
    catalog: Catalog,
    instance: Any,
    image: Any,
    mappings: list[dict[str, Any]],
    request: Mapping[str, Any],
) -> None:
    """Give an instance of moto's its volumes, and what its image says of it."""
    instance.teardown_defaults()
    for mapping in mappings:
        ebs = mapping["Ebs"]
        volume = backend.create_volume(
            size=ebs.get("VolumeSize"),
            zone_name=instance._placement.zone,
            snapshot_id=ebs.get("SnapshotId"),
            encrypted=bool(ebs.get("Encrypted")),
            kms_key_id=ebs.get("KmsKeyId") if ebs.get("Encrypted") else None,
            volume_type=ebs.get("VolumeType") or "gp2",
            iops=ebs.get("Iops"),
            throughput=ebs.get("Throughput"),
        )
        catalog.volume(volume.id, ebs.get("SnapshotId"))
        volume.add_tags(tags_of(request, "volume"))
        keep = ebs.get("DeleteOnTermination")
        backend.attach_volume(volume.id, instance.id, mapping["DeviceName"], True if keep is None else keep)
    if isinstance(image, RegisteredImage):
        _take_over(instance, image, request)


def _take_over(instance: Any, image: RegisteredImage, request: Mapping[str, Any]) -> None:
    boots_uefi = image.boot_mode in ("uefi", "uefi-preferred")
    instance.boot_mode = image.boot_mode
    instance.current_instance_boot_mode = "uefi" if boots_uefi else "legacy-bios"
    instance.ena_support = image.ena_support
    instance.tpm_support = image.tpm_support
    instance.uefi_data = image.uefi_data
    instance.platform_details = image.platform_details
    instance.usage_operation = image.usage_operation
    instance.hypervisor = "xen"
    if image.imds_support == "v2.0":
        asked = request.get("MetadataOptions") or {}
        instance.metadata_options.http_tokens = asked.get("HttpTokens", "required")
        instance.metadata_options.http_put_response_hop_limit = asked.get("HttpPutResponseHopLimit", 2)


def _check_type(image: RegisteredImage, name: str) -> None:
    found = INSTANCE_TYPES.get(name)
    if found is None:
        raise Refused("InvalidParameterValue", f"Invalid value '{name}' for InstanceType.")
    if image.architecture not in found["ProcessorInfo"]["SupportedArchitectures"]:
        _can_not(name, f"the architecture {image.architecture}")
    modes = found.get("SupportedBootModes") or ["legacy-bios"]
    if image.boot_mode != "uefi-preferred" and (image.boot_mode or "legacy-bios") not in modes:
        _can_not(name, f"the boot mode {image.boot_mode or 'legacy-bios'}")
    if found["NetworkInfo"].get("EnaSupport") == "required" and not image.ena_support:
        message = f"Enhanced networking with the Elastic Network Adapter (ENA) is required for '{name}'. "
        raise Refused("InvalidParameterCombination", message + "Ensure that you are using an AMI enabled for ENA.")
    if image.tpm_support and found.get("NitroTpmSupport", "supported") != "supported":
        _can_not(name, "NitroTPM")


def _can_not(name: str, what: str) -> None:
    raise Refused("InvalidParameterCombination", f"The instance type '{name}' does not support {what}.")


def _check_address(backend: Any, request: Mapping[str, Any]) -> None:
    interface: Mapping[str, Any] = next(iter(request.get("NetworkInterfaces") or ()), {})
    address = request.get("PrivateIpAddress") or interface.get("PrivateIpAddress")
    subnet_id = request.get("SubnetId") or interface.get("SubnetId")
    if not address or not subnet_id:
        return
    subnet = backend.get_subnet(subnet_id)
    if ipaddress.ip_address(address) not in ipaddress.ip_network(subnet.cidr_block):
        raise Refused("InvalidParameterValue", f"Address {address} does not fall within the subnet's address range")
    if address in subnet._subnet_ips:
        raise Refused("InvalidIPAddress.InUse", f"Address {address} is in use.")


def check_volume(backend: Any, device: str, ebs: Mapping[str, Any]) -> None:
    """Refuse a volume that its snapshot does not allow."""
    snapshot_id = ebs.get("SnapshotId")
    if not snapshot_id:
        if not ebs.get("VolumeSize"):
            raise Refused("MissingParameter", f"{device} needs a SnapshotId or a VolumeSize.")
        return
    snapshot = backend.snapshots.get(snapshot_id)
    if snapshot is None:
        raise Refused("InvalidSnapshot.NotFound", f"The snapshot '{snapshot_id}' does not exist.")
    if snapshot.status != "completed":
        raise Refused("IncorrectState", f"The snapshot {snapshot_id} is {snapshot.status}.")
    if (ebs.get("VolumeSize") or snapshot.volume.size) < snapshot.volume.size:
        message = f"Volume of size {ebs['VolumeSize']}GB is smaller than snapshot '{snapshot_id}', "
        raise Refused("InvalidBlockDeviceMapping", message + f"expect size >= {snapshot.volume.size}GB")
