"""What RegisterImage, RunInstances and ImportImage of LocalStack keep, honour and refuse."""

from typing import Any

import pytest
from botocore.exceptions import ClientError
from ec2_lab import BLOCK_BYTES, Cloud, refusal, wait_for

pytestmark = pytest.mark.localstack

BOOTABLE = (bytes(446) + b"\x80" + bytes(3) + b"\x83" + bytes(59) + b"\x55\xaa").ljust(BLOCK_BYTES, b"\0")
"""A block that starts with a partition table."""


def register(cloud: Cloud, **more: Any) -> str:
    mapping: Any = {
        "DeviceName": "/dev/sda1",
        "Ebs": {"SnapshotId": cloud.snapshot(1, {0: BOOTABLE}), "VolumeType": "gp3"},
    }
    given = {"Name": "image", "Architecture": "x86_64", "VirtualizationType": "hvm", "EnaSupport": True, **more}
    return cloud.ec2.register_image(RootDeviceName="/dev/sda1", BlockDeviceMappings=[mapping], **given)["ImageId"]


def test_an_instance_is_what_its_image_and_the_request_say(cloud: Cloud) -> None:
    image_id = register(cloud, BootMode="uefi", TpmSupport="v2.0", ImdsSupport="v2.0", UefiData="AAAA")
    subnet = cloud.ec2.describe_subnets()["Subnets"][0]
    address = subnet["CidrBlock"].rpartition(".")[0] + ".77"
    request: dict[str, Any] = {
        "ImageId": image_id,
        "InstanceType": "m5.large",
        "MinCount": 1,
        "MaxCount": 1,
        "ClientToken": "once",
        "NetworkInterfaces": [{"DeviceIndex": 0, "SubnetId": subnet["SubnetId"], "PrivateIpAddress": address}],
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 3, "DeleteOnTermination": False}}],
        "TagSpecifications": [
            {"ResourceType": kind, "Tags": [{"Key": "of", "Value": kind}]} for kind in ("instance", "volume")
        ],
    }
    first = cloud.ec2.run_instances(**request)["Instances"][0]["InstanceId"]
    assert cloud.ec2.run_instances(**request)["Instances"][0]["InstanceId"] == first
    with pytest.raises(ClientError) as other:
        cloud.ec2.run_instances(**{**request, "InstanceType": "m5.xlarge"})
    assert refusal(other.value)[0] == "IdempotentParameterMismatch"
    with pytest.raises(ClientError) as taken:
        cloud.ec2.run_instances(**{**request, "ClientToken": "twice"})
    assert refusal(taken.value)[0] == "InvalidIPAddress.InUse"

    instance = cloud.ec2.describe_instances(InstanceIds=[first])["Reservations"][0]["Instances"][0]
    assert (instance["PrivateIpAddress"], instance["BootMode"], instance["TpmSupport"]) == (address, "uefi", "v2.0")
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    assert instance["Tags"] == [{"Key": "of", "Value": "instance"}]
    assert cloud.ec2.get_instance_uefi_data(InstanceId=first)["UefiData"] == "AAAA"
    (volume,) = cloud.ec2.describe_volumes(VolumeIds=[instance["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]])["Volumes"]
    assert (volume["Size"], volume["VolumeType"], volume["Encrypted"]) == (3, "gp3", False)
    assert volume["Attachments"][0]["DeleteOnTermination"] is False
    assert volume["Tags"] == [{"Key": "of", "Value": "volume"}]


@pytest.mark.parametrize(
    ("image", "kind", "code"),
    [
        ({"BootMode": "uefi"}, "t2.micro", "InvalidParameterCombination"),
        ({"EnaSupport": False}, "m5.large", "InvalidParameterCombination"),
        ({}, "z9.huge", "InvalidParameterValue"),
    ],
)
def test_a_type_that_cannot_run_the_image_is_refused(cloud: Cloud, image: dict[str, Any], kind: Any, code: str) -> None:
    with pytest.raises(ClientError) as refused:
        cloud.ec2.run_instances(ImageId=register(cloud, **image), InstanceType=kind, MinCount=1, MaxCount=1)
    assert refusal(refused.value)[0] == code


def test_names_are_unique_and_a_snapshot_in_use_stays(cloud: Cloud) -> None:
    image_id = register(cloud)
    with pytest.raises(ClientError) as twice:
        register(cloud)
    assert refusal(twice.value)[0] == "InvalidAMIName.Duplicate"
    (image,) = cloud.ec2.describe_images(ImageIds=[image_id])["Images"]
    snapshot_id = image["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"]
    with pytest.raises(ClientError) as in_use:
        cloud.ec2.delete_snapshot(SnapshotId=snapshot_id)
    assert refusal(in_use.value)[0] == "InvalidSnapshot.InUse"
    cloud.ec2.deregister_image(ImageId=image_id)
    cloud.ec2.delete_snapshot(SnapshotId=snapshot_id)


@pytest.mark.parametrize(("first", "status"), [(BOOTABLE, "completed"), (bytes(BLOCK_BYTES), "deleted")])
def test_import_image_takes_a_snapshot_that_has_partitions(cloud: Cloud, first: bytes, status: str) -> None:
    cloud.make_role()
    snapshot_id = cloud.snapshot(1, {0: first})
    task_id = cloud.ec2.import_image(DiskContainers=[{"SnapshotId": snapshot_id}], BootMode="uefi", Platform="Linux")
    done = wait_for(lambda: cloud.image_task(task_id["ImportTaskId"]), lambda task: task["Status"] != "active")
    assert done["Status"] == status, done
    if status == "completed":
        (image,) = cloud.ec2.describe_images(ImageIds=[done["ImageId"]])["Images"]
        assert (image["BootMode"], image["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"]) == ("uefi", snapshot_id)
    else:
        assert done["StatusMessage"].startswith("ClientError: No valid partitions")


def test_a_task_can_be_cancelled(cloud: Cloud) -> None:
    cloud.faults(import_step_s=30)
    task_id = cloud.ec2.import_image(DiskContainers=[{"SnapshotId": cloud.snapshot(1, {})}])["ImportTaskId"]
    assert cloud.ec2.cancel_import_task(ImportTaskId=task_id)["PreviousState"] == "active"
    wait_for(lambda: cloud.image_task(task_id), lambda task: task["Status"] == "deleted")
