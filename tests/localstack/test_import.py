"""Disks by VM Import, from blocks to snapshots and images; what fails, what is killed, and that nothing is left."""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.compat import HTTPHeaders
from ec2_lab import Cloud, wait_for
from fake_clock import FakeClock

from drsync.errors import (
    CloudError,
    CloudUnavailable,
    GuestNotImportable,
    ImageUnfit,
    ImportCancelled,
    ImportFailed,
    ImportNotSetUp,
    ImportTimeout,
)
from drsync.model import BLOCK_SIZE, SystemClock
from drsync.target.ec2.aws import Aws, Call
from drsync.target.ec2.import_task import (
    DiskImport,
    ImageImport,
    ImageSource,
    ImportPlace,
    Tuning,
    import_disk,
    import_image,
    remove_leftovers,
    upload_disk,
)
from drsync.target.ec2.upload import ImageUpload, part_bytes_for
from drsync.units import GiB, MiB, TiB

pytestmark = pytest.mark.localstack

SIZE = 100 * MiB
PART = 5 * MiB
BLOCKS = 260
"""Of the usual disk: three parts and a bit."""
FAST = Tuning(
    part_bytes=PART,
    parallel=1,
    deflate_workers=1,
    journal_every_s=0,
    poll_first_s=0.05,
    poll_longest_s=0.2,
    time_limit_s=60,
)
"""One part after the other, so that it is known which one is noted when something happens."""


def blocks_of(count: int = BLOCKS, seed: int = 1) -> dict[int, bytes]:
    """A disk with a partition table; most of it can't be compressed, so that there are several parts."""
    made = {number: random.Random(f"{seed} {number}").randbytes(BLOCK_SIZE) for number in range(0, 2 * count, 2)}
    table = bytearray(made[0])
    table[446:512] = bytes(4) + b"\x83" + bytes(59) + b"\x55\xaa"
    return {**made, 0: bytes(table)}


@dataclass(slots=True)
class Disk:
    """Blocks that can be read from anywhere, as a recovery point's; remembers where it was read from."""

    blocks: Mapping[int, bytes]
    reads: list[int] = field(default_factory=list)
    on_block: Callable[[int], None] = lambda _: None

    def read(self, first: int) -> Iterator[tuple[int, bytes]]:
        self.reads.append(first)
        for number, data in sorted(self.blocks.items()):
            if number >= first:
                self.on_block(number)
                yield number, data


@dataclass(slots=True)
class Bar:
    """What progress was told."""

    steps: dict[str, list[int]] = field(default_factory=dict)
    now: str = ""

    def start(self, step: str, total_bytes: int) -> None:
        self.now = step
        self.steps[step] = [total_bytes, 0]

    def advance(self, done_bytes: int) -> None:
        self.steps[self.now][1] += done_bytes


@pytest.fixture
def place(cloud: Cloud) -> ImportPlace:
    """A bucket and a role."""
    bucket = f"import-{cloud.account}"
    cloud.s3.create_bucket(Bucket=bucket)
    cloud.make_role()
    return ImportPlace(bucket=bucket)


def disk_import(blocks: Mapping[int, bytes], name: str = "repo-vm-7-vda", size_bytes: int = SIZE) -> DiskImport:
    return DiskImport(
        name=name,
        size_bytes=size_bytes,
        data_bytes=len(blocks) * BLOCK_SIZE,
        tags={"drsync:vm": "vm", "Name": "vm vda"},
    )


def content(cloud: Cloud, snapshot_id: str) -> dict[int, bytes]:
    """A snapshot's blocks of 64 KiB that are not zero."""
    found = {}
    for index, data in cloud.read(snapshot_id).items():
        for part in range(8):
            piece = data[part * BLOCK_SIZE : (part + 1) * BLOCK_SIZE]
            if any(piece):
                found[index * 8 + part] = piece
    return found


def in_bucket(cloud: Cloud, place: ImportPlace) -> list[str]:
    """Keys, and keys of uploads that were not completed."""
    listed = cloud.s3.list_objects_v2(Bucket=place.bucket).get("Contents", [])
    uploads = cloud.s3.list_multipart_uploads(Bucket=place.bucket).get("Uploads", [])
    return [entry["Key"] for entry in listed] + [f"upload of {upload['Key']}" for upload in uploads]


def snapshots(cloud: Cloud) -> list[str]:
    """Those of a test: moto gives every account some of its own AMIs."""
    listed = cloud.ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]
    return [one["SnapshotId"] for one in listed if not one["Description"].startswith("Auto-created snapshot for AMI")]


def names(calls: list[Call], operation: str) -> int:
    return sum(call.operation == operation for call in calls)


# --- What goes well --------------------------------------------------------------------------------------------------


def test_a_disk_becomes_a_snapshot_with_the_same_content_and_nothing_is_left(
    cloud: Cloud, aws: Aws, place: ImportPlace, calls: list[Call]
) -> None:
    disk, bar = Disk(blocks_of()), Bar()
    snapshot_id = import_disk(
        aws,
        place,
        disk_import(disk.blocks),
        disk.read,
        clock=SystemClock(),
        progress=bar,
        tuning=replace(FAST, parallel=4, deflate_workers=4),
    )
    assert content(cloud, snapshot_id) == disk.blocks
    (seen,) = cloud.ec2.describe_snapshots(SnapshotIds=[snapshot_id])["Snapshots"]
    assert {tag["Key"]: tag["Value"] for tag in seen["Tags"]} == {
        "drsync:vm": "vm",
        "Name": "vm vda",
        "drsync:import": "repo-vm-7-vda",
    }
    assert seen["VolumeSize"] == 1
    assert in_bucket(cloud, place) == []
    assert names(calls, "UploadPart") == 4
    assert bar.steps == {"upload": [BLOCKS * BLOCK_SIZE] * 2, "import": [SIZE] * 2}


def test_the_same_import_again_answers_with_the_same_snapshot_and_reads_nothing(
    cloud: Cloud, aws: Aws, place: ImportPlace
) -> None:
    disk = Disk(blocks_of(3))
    wanted = disk_import(disk.blocks)
    first = import_disk(aws, place, wanted, disk.read, clock=SystemClock(), tuning=FAST)
    assert import_disk(aws, place, wanted, disk.read, clock=SystemClock(), tuning=FAST) == first
    assert disk.reads == [0]
    cloud.ec2.delete_snapshot(SnapshotId=first)
    other = import_disk(aws, place, wanted, disk.read, clock=SystemClock(), tuning=FAST)
    assert other != first
    assert content(cloud, other) == disk.blocks


def test_a_disk_of_2_tib_sends_only_its_data(cloud: Cloud, aws: Aws, place: ImportPlace, calls: list[Call]) -> None:
    last = 2 * TiB // BLOCK_SIZE - 1
    disk = Disk({0: b"\1" * BLOCK_SIZE, 7_000_000: b"\2" * BLOCK_SIZE, last: b"\3" * BLOCK_SIZE})
    wanted = disk_import(disk.blocks, size_bytes=2 * TiB)
    snapshot_id = import_disk(aws, place, wanted, disk.read, clock=SystemClock(), tuning=FAST)
    assert content(cloud, snapshot_id) == disk.blocks
    assert cloud.ec2.describe_snapshots(SnapshotIds=[snapshot_id])["Snapshots"][0]["VolumeSize"] == 2048
    (part,) = [call.parameters for call in calls if call.operation == "UploadPart"]
    assert part["ContentLength"] < 512 * 1024


def test_disks_become_an_image_whose_objects_are_removed(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    root, data = Disk(blocks_of(3)), Disk(blocks_of(3, seed=2))
    sources = [
        upload_disk(aws, place, disk_import(disk.blocks, name), disk.read, clock=SystemClock(), tuning=FAST)
        for name, disk in (("vm-7-vda", root), ("vm-7-vdb", data))
    ]
    assert len(in_bucket(cloud, place)) == 2
    made = import_image(
        aws,
        place,
        ImageImport(name="vm-7", boot_mode="uefi", tags={"a": "b"}),
        sources,
        clock=SystemClock(),
        tuning=FAST,
    )
    (image,) = cloud.ec2.describe_images(ImageIds=[made.image_id])["Images"]
    mapped = [mapping["Ebs"]["SnapshotId"] for mapping in image["BlockDeviceMappings"]]
    assert (image["BootMode"], mapped) == ("uefi", list(made.snapshot_ids))
    assert [content(cloud, one) for one in mapped] == [root.blocks, data.blocks]
    assert {"Key": "drsync:import", "Value": "vm-7"} in image["Tags"]
    assert in_bucket(cloud, place) == []
    again = import_image(aws, place, ImageImport(name="vm-7"), sources, clock=SystemClock(), tuning=FAST)
    assert again == made


def test_an_ebs_snapshot_becomes_an_image_and_stays(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    snapshot_id = cloud.snapshot(1, {0: blocks_of(1)[0] + bytes(7 * BLOCK_SIZE)})
    source = ImageSource(size_bytes=GiB, snapshot_id=snapshot_id)
    made = import_image(aws, place, ImageImport(name="vm-7"), [source], clock=SystemClock(), tuning=FAST)
    assert made.snapshot_ids == (snapshot_id,)
    cloud.faults(import_failures=["ClientError: Unsupported kernel version 5.9"])
    with pytest.raises(GuestNotImportable):
        import_image(aws, place, ImageImport(name="vm-8"), [source], clock=SystemClock(), tuning=FAST)
    assert snapshots(cloud) == [snapshot_id]


# --- What fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("ClientError: Unsupported kernel version 5.9", GuestNotImportable),
        ("ClientError: Disk validation failed [We do not have access to the given resource. 403]", ImportNotSetUp),
        ("ServerError: an internal error has occurred", ImportFailed),
    ],
)
def test_a_task_that_fails_is_told_in_its_own_words_and_leaves_nothing(
    cloud: Cloud, aws: Aws, place: ImportPlace, message: str, kind: type[CloudError]
) -> None:
    cloud.faults(import_failures=[message])
    disk = Disk(blocks_of(2))
    with pytest.raises(kind, match=message.partition(": ")[2].partition("[")[0].strip(" .")):
        import_disk(aws, place, disk_import(disk.blocks), disk.read, clock=SystemClock(), tuning=FAST)
    assert cloud.fired() == {"import_failures": 1}
    assert (in_bucket(cloud, place), snapshots(cloud)) == ([], [])
    snapshot_id = import_disk(aws, place, disk_import(disk.blocks), disk.read, clock=SystemClock(), tuning=FAST)
    assert content(cloud, snapshot_id) == disk.blocks, "a task that failed is not found again by its token"


def test_without_the_role_it_says_how_to_make_it(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    other = ImportPlace(bucket=place.bucket, role_name="nobody")
    disk = Disk(blocks_of(2))
    with pytest.raises(ImportNotSetUp) as caught:
        import_disk(aws, other, disk_import(disk.blocks), disk.read, clock=SystemClock(), tuning=FAST)
    assert f"drsync cloud setup --bucket {place.bucket} --check" in caught.value.remedy
    assert in_bucket(cloud, place) == []


def test_a_refusal_of_the_request_itself_is_understood_too(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    cloud.faults(
        rules=[
            {
                "operation": "ImportSnapshot",
                "times": 1,
                "error": {
                    "code": "InvalidParameter",
                    "message": "The service role vmimport provided does not exist or does not have sufficient rights",
                },
            }
        ]
    )
    disk = Disk(blocks_of(2))
    with pytest.raises(ImportNotSetUp):
        import_disk(aws, place, disk_import(disk.blocks), disk.read, clock=SystemClock(), tuning=FAST)
    assert in_bucket(cloud, place) == []


def test_an_image_that_fails_takes_its_snapshots_along(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    """The double leaves the snapshots of a failed ImportImage, as AWS may."""
    disk = Disk({5: b"x" * BLOCK_SIZE})
    source = upload_disk(aws, place, disk_import(disk.blocks), disk.read, clock=SystemClock(), tuning=FAST)
    with pytest.raises(GuestNotImportable, match="No valid partitions"):
        import_image(aws, place, ImageImport(name="vm-7"), [source], clock=SystemClock(), tuning=FAST)
    assert (in_bucket(cloud, place), snapshots(cloud)) == ([], [])


def test_what_aws_limits_is_waited_for(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    limit = {"code": "ResourceCountLimitExceeded", "message": "too many import tasks"}
    cloud.faults(rules=[{"operation": "ImportSnapshot", "times": 2, "error": limit}])
    disk = Disk(blocks_of(2))
    import_disk(aws, place, disk_import(disk.blocks), disk.read, clock=SystemClock(), tuning=FAST)
    assert cloud.fired() == {"ImportSnapshot": 2}


def test_a_lost_answer_makes_no_second_task(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    lost = {"code": "InternalError", "status": 500}
    cloud.faults(rules=[{"operation": "ImportSnapshot", "times": 1, "after": True, "error": lost}])
    disk = Disk(blocks_of(2))
    snapshot_id = import_disk(aws, place, disk_import(disk.blocks), disk.read, clock=SystemClock(), tuning=FAST)
    assert cloud.fired() == {"ImportSnapshot": 1}
    assert len(cloud.ec2.describe_import_snapshot_tasks()["ImportSnapshotTasks"]) == 1
    assert snapshots(cloud) == [snapshot_id]


def test_a_task_that_does_not_end_is_cancelled(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    cloud.faults(import_step_s=30)
    clock, disk = FakeClock(), Disk(blocks_of(2))
    patience = Tuning(part_bytes=PART, time_limit_s=600, sleep=lambda s: (clock.sleep(s), time.sleep(0.01))[0])  # type: ignore[func-returns-value]
    with pytest.raises(ImportTimeout, match=r"within 10 min.*pending") as caught:
        import_disk(aws, place, disk_import(disk.blocks), disk.read, clock=clock, tuning=patience)
    assert "aws ec2 describe-import-snapshot-tasks" in caught.value.remedy
    assert max(clock.slept) == 30
    (task,) = cloud.ec2.describe_import_snapshot_tasks()["ImportSnapshotTasks"]
    assert task["SnapshotTaskDetail"]["Status"] == "deleted"
    assert in_bucket(cloud, place) == []


def test_a_task_that_somebody_else_cancels_is_told_so(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    cloud.faults(import_step_s=0.5)
    disk = Disk(blocks_of(2))

    def cancel() -> None:
        (task,) = wait_for(lambda: cloud.ec2.describe_import_snapshot_tasks()["ImportSnapshotTasks"], bool)
        cloud.ec2.cancel_import_task(ImportTaskId=task["ImportTaskId"])

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(ImportCancelled):
        import_disk(aws, place, disk_import(disk.blocks), disk.read, clock=SystemClock(), tuning=FAST)
    canceller.join()
    assert (in_bucket(cloud, place), snapshots(cloud)) == ([], [])


def test_an_upload_that_fails_is_aborted(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    def gone(number: int) -> None:
        if number == 500:
            raise OSError("the repository is gone")

    disk = Disk(blocks_of(), on_block=gone)
    with pytest.raises(OSError, match="is gone"):
        import_disk(aws, place, disk_import(disk.blocks), disk.read, clock=SystemClock(), tuning=FAST)
    assert in_bucket(cloud, place) == []


def test_an_upload_that_fails_can_be_kept_and_goes_on_where_it_was(
    cloud: Cloud, aws: Aws, place: ImportPlace, calls: list[Call]
) -> None:
    def gone(number: int) -> None:
        if number == 500:
            raise OSError("the repository is gone")

    kept = ImportPlace(bucket=place.bucket, keep_on_error=True)
    disk = Disk(blocks_of(), on_block=gone)
    with pytest.raises(OSError, match="is gone"):
        upload_disk(aws, kept, disk_import(disk.blocks), disk.read, clock=SystemClock(), tuning=FAST)
    assert len(in_bucket(cloud, place)) == 2
    sent = names(calls, "UploadPart")
    disk.on_block = lambda _: None
    bar = Bar()
    snapshot_id = import_disk(
        aws, kept, disk_import(disk.blocks), disk.read, clock=SystemClock(), progress=bar, tuning=FAST
    )
    assert content(cloud, snapshot_id) == disk.blocks
    assert disk.reads[0] == 0
    assert disk.reads[1] > 100
    assert (sent, names(calls, "UploadPart") - sent) == (2, 2)
    assert bar.steps["upload"] == [BLOCKS * BLOCK_SIZE] * 2
    assert in_bucket(cloud, place) == []


@pytest.mark.parametrize("damage", ["no json", "negative", "no such upload", "other part"])
def test_a_journal_that_can_not_be_true_is_not_followed(
    cloud: Cloud, aws: Aws, place: ImportPlace, damage: str
) -> None:
    def gone(number: int) -> None:
        if number == 500:
            raise OSError

    kept = ImportPlace(bucket=place.bucket, keep_on_error=True)
    disk = Disk(blocks_of(), on_block=gone)
    wanted = disk_import(disk.blocks)
    with pytest.raises(OSError):
        upload_disk(aws, kept, wanted, disk.read, clock=SystemClock(), tuning=FAST)
    key = place.journal_key(wanted.name)
    journal: dict[str, Any] = json.loads(cloud.s3.get_object(Bucket=place.bucket, Key=key)["Body"].read())
    match damage:
        case "negative":
            journal["position"]["next_block"] = -1
        case "no such upload":
            journal["upload_id"] = "none"
        case "other part":
            journal["parts"][0][0] = '"0"'
    body = b"\xff{" if damage == "no json" else json.dumps(journal).encode()
    cloud.s3.put_object(Bucket=place.bucket, Key=key, Body=body)
    disk.on_block = lambda _: None
    snapshot_id = import_disk(aws, kept, wanted, disk.read, clock=SystemClock(), tuning=FAST)
    assert disk.reads == [0, 0]
    assert content(cloud, snapshot_id) == disk.blocks
    assert in_bucket(cloud, place) == []


def test_a_disk_of_16_tib_is_refused_before_anything_is_sent(aws: Aws, place: ImportPlace, calls: list[Call]) -> None:
    with pytest.raises(ImageUnfit, match="16 TiB") as caught:
        import_disk(aws, place, disk_import({}, size_bytes=16 * TiB), Disk({}).read, clock=SystemClock())
    assert "--via ebs" in caught.value.remedy
    assert names(calls, "CreateMultipartUpload") == 0


class Answer:
    """A reply's body, as botocore reads it."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def stream(self) -> Iterator[bytes]:
        yield self._body


def test_a_disk_goes_into_no_bucket_that_is_missing_or_somebody_elses(
    cloud: Cloud, aws: Aws, place: ImportPlace, calls: list[Call]
) -> None:
    """LocalStack does not look at the owner that the request expects; the test answers as AWS would."""

    def refuse(request: Any, **_: object) -> Any:
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        return AWSResponse(request.url, 403, HTTPHeaders(), Answer(body))

    missing = f"none-{cloud.account}"
    for bucket in (missing, place.bucket):
        if bucket == place.bucket:
            aws.s3.meta.events.register("before-send.s3.CreateMultipartUpload", refuse)
        with pytest.raises(
            ImportNotSetUp, match=f"can't write s3://{bucket}/drsync-import/repo-vm-7-vda.vmdk"
        ) as caught:
            import_disk(aws, ImportPlace(bucket=bucket), disk_import({}), Disk({}).read, clock=SystemClock())
        assert f"drsync cloud setup --bucket {bucket} --check" in caught.value.remedy
    (begun,) = [call.parameters for call in calls if call.operation == "CreateMultipartUpload"]
    assert begun["ExpectedBucketOwner"] == cloud.account
    assert names(calls, "UploadPart") == 0


def test_parts_grow_with_the_data_so_that_there_are_never_too_many() -> None:
    for data_bytes in (0, GiB, 200 * GiB, 2 * TiB, 15 * TiB):
        size = part_bytes_for(data_bytes)
        assert size >= 16 * MiB
        assert data_bytes * 1.02 / size < 10_000


# --- What is killed --------------------------------------------------------------------------------------------------


@contextmanager
def to_be_killed(tmp_path: Path, bucket: str, *, stall_at: int = -1) -> Iterator["subprocess.Popen[str]"]:
    """An import of blocks_of() in a process of its own, which is killed at the end of the block."""
    code = f"""
import random, time
from drsync.model import SystemClock, BLOCK_SIZE
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.import_task import DiskImport, ImportPlace, Tuning, import_disk

def read(first):
    for number in range(first + first % 2, 2 * {BLOCKS}, 2):
        if number == {stall_at}:
            print("stalls", flush=True)
            time.sleep(60)
        data = random.Random(f"1 {{number}}").randbytes(BLOCK_SIZE)
        if number == 0:
            data = data[:446] + bytes(4) + b"\\x83" + bytes(59) + b"\\x55\\xaa" + data[512:]
        yield number, data

disk = DiskImport(name="vm-7-vda", size_bytes={SIZE}, data_bytes={BLOCKS} * BLOCK_SIZE)
tuning = Tuning(part_bytes={PART}, parallel=1, deflate_workers=1, journal_every_s=0, poll_first_s=0.05)
print(import_disk(Aws(), ImportPlace(bucket={bucket!r}), disk, read, clock=SystemClock(), tuning=tuning))
"""
    with (tmp_path / "stderr").open("w") as errors:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=errors, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_an_import_killed_while_it_uploads_goes_on_with_the_upload(
    cloud: Cloud, aws: Aws, place: ImportPlace, tmp_path: Path, calls: list[Call]
) -> None:
    def parts() -> int:
        (upload,) = cloud.s3.list_multipart_uploads(Bucket=place.bucket)["Uploads"]
        found = cloud.s3.list_parts(Bucket=place.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return len(found.get("Parts", []))

    with to_be_killed(tmp_path, place.bucket, stall_at=510) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stalls\n", (tmp_path / "stderr").read_text()
        wait_for(parts, lambda count: count >= 2)
    assert len(in_bucket(cloud, place)) == 2
    disk = Disk(blocks_of())
    wanted = DiskImport(name="vm-7-vda", size_bytes=SIZE, data_bytes=BLOCKS * BLOCK_SIZE)
    snapshot_id = import_disk(aws, place, wanted, disk.read, clock=SystemClock(), tuning=FAST)
    assert disk.reads[0] > 0
    assert names(calls, "UploadPart") in (2, 3)
    assert content(cloud, snapshot_id) == disk.blocks
    assert (in_bucket(cloud, place), snapshots(cloud)) == ([], [snapshot_id])


def test_an_import_killed_while_it_waits_follows_the_same_task(
    cloud: Cloud, aws: Aws, place: ImportPlace, tmp_path: Path, calls: list[Call]
) -> None:
    cloud.faults(import_step_s=2)
    with to_be_killed(tmp_path, place.bucket):
        (task,) = wait_for(lambda: cloud.ec2.describe_import_snapshot_tasks()["ImportSnapshotTasks"], bool)
    assert task["SnapshotTaskDetail"]["Status"] == "active"
    disk = Disk(blocks_of())
    wanted = DiskImport(name="vm-7-vda", size_bytes=SIZE, data_bytes=BLOCKS * BLOCK_SIZE)
    snapshot_id = import_disk(aws, place, wanted, disk.read, clock=SystemClock(), tuning=FAST)
    assert disk.reads == []
    assert names(calls, "ImportSnapshot") == 0
    assert content(cloud, snapshot_id) == disk.blocks
    assert (in_bucket(cloud, place), snapshots(cloud)) == ([], [snapshot_id])


def test_what_a_killed_import_has_left_can_be_removed(
    cloud: Cloud, aws: Aws, place: ImportPlace, tmp_path: Path
) -> None:
    cloud.faults(import_step_s=1)
    with to_be_killed(tmp_path, place.bucket):
        wait_for(lambda: cloud.ec2.describe_import_snapshot_tasks()["ImportSnapshotTasks"], bool)
    cloud.s3.create_multipart_upload(Bucket=place.bucket, Key=place.image_key("vm-7-vda"))
    removed = remove_leftovers(aws, place, ["vm-7-vda", "vm-7-vdb"], clock=SystemClock(), tuning=FAST)
    assert len(removed) == 3, removed
    assert removed[0].startswith("import-snap-")
    assert (in_bucket(cloud, place), snapshots(cloud)) == ([], [])
    assert remove_leftovers(aws, place, ["vm-7-vda"], clock=SystemClock(), tuning=FAST) == []


def test_a_ctrl_c_while_it_waits_cancels_the_task(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    cloud.faults(import_step_s=30)
    disk = Disk(blocks_of(2))
    slept: list[float] = []

    def interrupted(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt
        time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        import_disk(
            aws, place, disk_import(disk.blocks), disk.read, clock=SystemClock(), tuning=Tuning(sleep=interrupted)
        )
    (task,) = cloud.ec2.describe_import_snapshot_tasks()["ImportSnapshotTasks"]
    assert task["SnapshotTaskDetail"]["Status"] == "deleted"
    assert (in_bucket(cloud, place), snapshots(cloud)) == ([], [])


def test_completing_an_upload_whose_answer_was_lost_is_no_failure(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    """botocore sends it again, and S3 knows the upload no more."""
    disk = Disk(blocks_of(2))
    uploads: list[str] = []

    def complete_before(params: dict[str, Any], **_: object) -> None:
        if not uploads:
            uploads.append(params["UploadId"])
            cloud.s3.complete_multipart_upload(**params)

    aws.s3.meta.events.register("before-parameter-build.s3.CompleteMultipartUpload", complete_before)
    upload_disk(aws, place, disk_import(disk.blocks), disk.read, clock=SystemClock(), tuning=FAST)
    assert len(uploads) == 1
    assert in_bucket(cloud, place) == [place.image_key("repo-vm-7-vda")]


def test_a_part_that_never_gets_through_fails_the_upload(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    broken: list[int] = []

    def fail(request: Any, **_: object) -> None:
        broken.append(1)
        raise ConnectionResetError("reset by the test")

    aws.s3.meta.events.register("before-send.s3.UploadPart", fail)
    disk = Disk(blocks_of(2))
    with pytest.raises((CloudUnavailable, CloudError)):
        ImageUpload(aws, place, disk_import(disk.blocks), clock=SystemClock(), tuning=FAST).run(disk.read)
    assert broken
    assert in_bucket(cloud, place) == []
