"""An "instance" of LocalStack really boots: its volume, taken out, behind NVMe as EC2 would present it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from drsync_localstack import volume_files
from ec2_lab import BLOCK_BYTES, Cloud, wait_for
from guest import Guest, GuestDisk
from s3_lab import ROOT

from drsync.model import BLOCK_SIZE, SystemClock
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.import_task import (
    DiskImport,
    ImageImport,
    ImageSource,
    ImportPlace,
    Tuning,
    import_disk,
    import_image,
)

pytestmark = [pytest.mark.localstack, pytest.mark.qemu]


@pytest.fixture(scope="module")
def guest_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples' guest as a raw file."""
    built = subprocess.run(
        ["bash", ROOT / "examples/guest/build.sh"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    raw = tmp_path_factory.mktemp("guest") / "guest.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", built.stdout.splitlines()[-1], raw], check=True)
    return raw


def launch(cloud: Cloud, snapshot_id: str) -> str:
    """An instance from a snapshot; its volume."""
    image_id = cloud.ec2.register_image(
        Name="the guest",
        Architecture="x86_64",
        VirtualizationType="hvm",
        EnaSupport=True,
        BootMode="legacy-bios",
        RootDeviceName="/dev/sda1",
        BlockDeviceMappings=[{"DeviceName": "/dev/sda1", "Ebs": {"SnapshotId": snapshot_id}}],
    )["ImageId"]
    run = cloud.ec2.run_instances(ImageId=image_id, InstanceType="m5.large", MinCount=1, MaxCount=1)
    wanted = [{"Name": "attachment.instance-id", "Values": [run["Instances"][0]["InstanceId"]]}]
    (volume,) = cloud.ec2.describe_volumes(Filters=wanted)["Volumes"]  # type: ignore[arg-type]
    return volume["VolumeId"]


def test_a_guest_written_block_by_block_boots_and_its_changes_are_a_small_increment(
    cloud: Cloud, guest_raw: Path, tmp_path: Path
) -> None:
    blocks = {}
    with guest_raw.open("rb") as file:
        for index in range(guest_raw.stat().st_size // BLOCK_BYTES):
            data = file.read(BLOCK_BYTES)
            if any(data):
                blocks[index] = data
    snapshot_id = cloud.snapshot(2, blocks)
    volume_id = launch(cloud, snapshot_id)
    disk = tmp_path / "instance.raw"
    volume_files.get(cloud.endpoint_url, volume_id, disk)
    with Guest(tmp_path / "qemu", [GuestDisk(node="d0", path=disk, format="raw")], controller="nvme") as guest:
        assert "/dev/nvme0n1p2 on /mnt type ext4" in guest.check("mount")
        assert "the guest's own" in guest.check("cat /mnt/README")
        guest.check("echo from the cloud > /mnt/cloud; sync")
        guest.poweroff()

    written = volume_files.put(cloud.endpoint_url, volume_id, disk)
    fresh = cloud.ec2.create_snapshot(VolumeId=volume_id)["SnapshotId"]
    changed = cloud.ebs.list_changed_blocks(FirstSnapshotId=snapshot_id, SecondSnapshotId=fresh)["ChangedBlocks"]
    assert 0 < len(changed) == written < len(blocks) / 2


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("RAW", ["raw"]), ("VMDK", ["vmdk", "-o", "subformat=streamOptimized"]), ("VHD", ["vpc", "-o", "force_size=on"])],
)
def test_an_imported_guest_has_the_same_disk(
    cloud: Cloud, guest_raw: Path, tmp_path: Path, image_format: str, options: list[str]
) -> None:
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", *options, guest_raw, image], check=True)
    cloud.make_role()
    cloud.s3.create_bucket(
        Bucket=f"import-{tmp_path.name.lower()[:20].replace('_', '-').strip('-')}-{image_format.lower()}"
    )
    bucket = cloud.s3.list_buckets()["Buckets"][0]["Name"]
    cloud.s3.upload_file(str(image), bucket, "disk")
    task_id = cloud.ec2.import_snapshot(
        DiskContainer={"Format": image_format, "UserBucket": {"S3Bucket": bucket, "S3Key": "disk"}}
    )["ImportTaskId"]
    done = wait_for(lambda: cloud.snapshot_task(task_id), lambda task: task["Status"] != "active", 60)
    assert done["Status"] == "completed", done
    disk = tmp_path / "instance.raw"
    volume_files.get(cloud.endpoint_url, launch(cloud, done["SnapshotId"]), disk)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", guest_raw, disk], check=True)


def test_a_guest_that_drsync_imports_has_the_same_disk(cloud: Cloud, aws: Aws, guest_raw: Path, tmp_path: Path) -> None:
    """Block by block as a VMDK through the bucket; and by ImportImage, whose AMI starts."""

    def read(first: int) -> Iterator[tuple[int, bytes]]:
        with guest_raw.open("rb") as file:
            file.seek(first * BLOCK_SIZE)
            yield from enumerate(iter(lambda: file.read(BLOCK_SIZE), b""), start=first)

    cloud.make_role()
    place = ImportPlace(bucket=f"import-{cloud.account}")
    cloud.s3.create_bucket(Bucket=place.bucket)
    size_bytes = guest_raw.stat().st_size
    guest = DiskImport(name="guest-1-vda", size_bytes=size_bytes, data_bytes=size_bytes)
    snapshot_id = import_disk(aws, place, guest, read, clock=SystemClock(), tuning=Tuning(poll_first_s=0.1))
    disk = tmp_path / "instance.raw"
    volume_files.get(cloud.endpoint_url, launch(cloud, snapshot_id), disk)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", guest_raw, disk], check=True)

    source = ImageSource(size_bytes=size_bytes, snapshot_id=snapshot_id)
    tuning = Tuning(poll_first_s=0.1)
    made = import_image(aws, place, ImageImport(name="guest-1"), [source], clock=SystemClock(), tuning=tuning)
    cloud.ec2.run_instances(ImageId=made.image_id, InstanceType="m5.large", MinCount=1, MaxCount=1)
    assert not cloud.s3.list_objects_v2(Bucket=place.bucket).get("Contents")


@pytest.mark.parametrize("case", ["no role", "no object", "wrong format", "known message"])
def test_an_import_that_fails_ends_as_deleted_with_aws_own_message(cloud: Cloud, case: str) -> None:
    cloud.faults(import_failures=["ClientError: Unsupported kernel version 5.9"] if case == "known message" else [])
    if case != "no role":
        cloud.make_role()
    bucket = f"failing-{case.replace(' ', '-')}"
    cloud.s3.create_bucket(Bucket=bucket)
    if case != "no object":
        cloud.s3.put_object(Bucket=bucket, Key="disk", Body=bytes(2**20))
    task_id = cloud.ec2.import_snapshot(
        DiskContainer={"Format": "VMDK", "UserBucket": {"S3Bucket": bucket, "S3Key": "disk"}}
    )["ImportTaskId"]
    failed = wait_for(lambda: cloud.snapshot_task(task_id), lambda task: task["Status"] != "active")
    wanted = {
        "no role": "ClientError: The service role vmimport provided does not exist or",
        "no object": "ClientError: Disk validation failed",
        "wrong format": "ClientError: Unsupported specified file format",
        "known message": "ClientError: Unsupported kernel version 5.9",
    }
    assert (failed["Status"], failed["StatusMessage"][: len(wanted[case])]) == ("deleted", wanted[case])
    assert "SnapshotId" not in failed
