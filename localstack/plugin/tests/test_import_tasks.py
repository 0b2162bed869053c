"""VM Import's tasks by themselves: states, messages, tokens, cancelling. S3, IAM and EC2 are twins in memory."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from drsync_localstack.blocks import BLOCK_BYTES, BlockStore
from drsync_localstack.catalog import Catalog, Place, Snapshot, State
from drsync_localstack.disk_format import ImageObject
from drsync_localstack.faults import Faults
from drsync_localstack.import_tasks import ImportFailed, ImportTasks, Status, Surroundings, Task
from drsync_localstack.refusal import Refused

HERE, ELSEWHERE = Place("000000000001", "us-east-1"), Place("000000000002", "us-east-1")
MIB = 2**20


class Object:
    """An object of S3; a read can be held up."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size_bytes = len(data)
        self.may_read = threading.Event()
        self.may_read.set()
        self.was_read = threading.Event()

    def read(self, offset: int, length: int) -> bytes:
        if offset >= BLOCK_BYTES:
            self.was_read.set()
            assert self.may_read.wait(20)
        return self.data[offset : offset + length]


class Aws:
    """What is around the tasks, and what they did to it."""

    def __init__(self) -> None:
        self.roles = {"vmimport"}
        self.objects: dict[tuple[str, str], Object] = {}
        self.seen: dict[str, State] = {}
        self.images: list[Mapping[str, Any]] = []
        self.has_bug = False

    def open_object(self, _place: Place, bucket: str, key: str) -> ImageObject:
        try:
            return self.objects[bucket, key]
        except KeyError:
            raise ImportFailed("Disk validation failed [We do not have access to the given resource. 404]") from None

    def announce(self, _place: Place, snapshot: Snapshot) -> None:
        self.seen[snapshot.id] = snapshot.state
        if self.has_bug:
            raise ZeroDivisionError

    def retire(self, _place: Place, snapshot: Snapshot) -> None:
        del self.seen[snapshot.id]

    def register(self, _place: Place, request: Mapping[str, Any]) -> str:
        self.images.append(request)
        return "ami-1"


class Lab:
    """Tasks, and all that they touch."""

    def __init__(self, directory: Path) -> None:
        self.now_s = 1_000_000.0
        self.faults = Faults()
        self.catalog = Catalog(BlockStore(directory), self.faults, lambda: self.now_s)
        self.aws = Aws()
        around = Surroundings(
            open_object=self.aws.open_object,
            has_role=lambda _place, name: name in self.aws.roles,
            announce=self.aws.announce,
            retire=self.aws.retire,
            register=self.aws.register,
        )
        self.tasks = ImportTasks(self.catalog, self.faults, around, lambda: self.now_s)

    def put(self, data: bytes, key: str = "disk") -> Object:
        self.aws.objects["bucket", key] = made = Object(data)
        return made

    def snapshot(self, **more: object) -> Task:
        container = {"Format": "RAW", "UserBucket": {"S3Bucket": "bucket", "S3Key": "disk"}}
        return self.tasks.import_snapshot(HERE, {"DiskContainer": container, **more})

    def image(self, *keys: str, **more: object) -> Task:
        containers = [{"Format": "RAW", "UserBucket": {"S3Bucket": "bucket", "S3Key": key}} for key in keys]
        return self.tasks.import_image(HERE, {"DiskContainers": containers, **more})


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path / "blocks")
    yield made
    for thread in threading.enumerate():
        if thread.name.startswith("import-"):
            thread.join(20)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ended(task: Task) -> Task:
    wait_for(lambda: task.status in (Status.COMPLETED, Status.DELETED))
    return task


def bootable(size: int = 2 * MIB) -> bytes:
    """A disk with a partition table of one partition, and data behind it."""
    disk = bytearray(size)
    disk[450], disk[510:512] = 0x83, b"\x55\xaa"
    disk[MIB : MIB + 3] = b"abc"
    return bytes(disk)


def test_a_snapshot_has_the_disks_blocks_and_is_announced_when_it_is_complete(lab: Lab) -> None:
    lab.put(bootable())
    task = ended(lab.snapshot())
    assert (task.status, task.message, task.progress) == (Status.COMPLETED, "", 100)
    snapshot = lab.catalog.readable(HERE, task.disks[0]["SnapshotId"])
    assert sorted(snapshot.own) == [0, 2]
    assert lab.catalog.store.read(snapshot.own[2].digest)[:3] == b"abc"
    assert snapshot.request.volume_gib == 1
    assert lab.aws.seen == {snapshot.id: State.COMPLETED}


def test_an_image_has_all_its_disks_in_order_and_the_boot_mode(lab: Lab) -> None:
    lab.put(bootable(), "root")
    lab.put(b"\1" * MIB, "data")
    task = ended(lab.image("root", "data", BootMode="uefi", Platform="Linux"))
    assert (task.status, task.image_id) == (Status.COMPLETED, "ami-1")
    (request,) = lab.aws.images
    assert request["BootMode"] == "uefi"
    assert [mapping["Ebs"]["SnapshotId"] for mapping in request["BlockDeviceMappings"]] == list(lab.aws.seen)
    assert request["RootDeviceName"] == request["BlockDeviceMappings"][0]["DeviceName"]


def test_an_image_can_be_made_of_a_snapshot(lab: Lab) -> None:
    lab.put(bootable())
    snapshot_id = ended(lab.snapshot()).disks[0]["SnapshotId"]
    task = ended(lab.tasks.import_image(HERE, {"DiskContainers": [{"SnapshotId": snapshot_id}]}))
    assert (task.status, task.disks[0]["SnapshotId"]) == (Status.COMPLETED, snapshot_id)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "no role",
            "ClientError: The service role vmimport provided does not exist or does not have sufficient permissions",
        ),
        ("no such role", "ClientError: The service role other provided does not exist or"),
        ("no object", "ClientError: Disk validation failed [We do not have access to the given resource. 404]"),
        ("no disk", "ClientError: Unsupported specified file format"),
        ("cut off", "ClientError: The image ends too early"),
        ("switched on", "ClientError: Unsupported kernel version 5.9"),
        ("a bug", "ServerError: ZeroDivisionError"),
    ],
)
def test_a_task_that_fails_ends_as_deleted_and_leaves_no_snapshot(lab: Lab, case: str, message: str) -> None:
    image = lab.put(b"QFI\xfb" + bytes(MIB) if case == "no disk" else bootable())
    more = {"RoleName": "other"} if case == "no such role" else {}
    match case:
        case "no role":
            lab.aws.roles.clear()
        case "no object":
            lab.aws.objects.clear()
        case "cut off":
            image.data = image.data[:-1]
        case "switched on":
            lab.faults.set({"import_failures": ["ClientError: Unsupported kernel version 5.9"]})
        case "a bug":
            lab.aws.has_bug = True
    task = ended(lab.snapshot(**more))
    assert (task.status, task.message[: len(message)]) == (Status.DELETED, message)
    assert "SnapshotId" not in task.disks[0]
    assert lab.aws.seen == {}
    assert lab.catalog.states(HERE) == {}


@pytest.mark.parametrize(
    "start", [bytes(512), bytes(510) + b"\x55\xaa", bootable()[:510] + b"\0\0"], ids=["zeros", "no entry", "no mark"]
)
def test_an_image_needs_a_partition(lab: Lab, start: bytes) -> None:
    lab.put(start + b"\1" * MIB)
    task = ended(lab.image("disk"))
    assert (task.status, task.message) == (
        Status.DELETED,
        "ClientError: No valid partitions. Not a valid volume.",
    )
    assert not lab.aws.images


def test_a_snapshot_that_is_pending_or_gone_makes_no_image(lab: Lab) -> None:
    pending = lab.catalog.add_import(HERE, 1, "")
    for snapshot_id in (pending.id, "snap-gone"):
        task = ended(lab.tasks.import_image(HERE, {"DiskContainers": [{"SnapshotId": snapshot_id}]}))
        assert task.message.startswith(f"ClientError: Snapshot {snapshot_id} ")


def test_the_same_token_is_the_same_task_and_other_parameters_conflict(lab: Lab) -> None:
    lab.put(bootable())
    first = lab.snapshot(ClientToken="t")
    assert lab.snapshot(ClientToken="t") is first
    assert lab.snapshot() is not first
    with pytest.raises(Refused) as refused:
        lab.snapshot(ClientToken="t", Description="another")
    assert refused.value.code == "IdempotentParameterMismatch"
    ended(first)
    assert lab.snapshot(ClientToken="t") is first, "also when it has ended"


def test_a_task_that_is_cancelled_while_it_reads_is_deleted_with_its_snapshot(lab: Lab) -> None:
    image = lab.put(b"\1" * (4 * MIB))
    image.may_read.clear()
    task = lab.snapshot()
    assert image.was_read.wait(20)
    assert lab.tasks.cancel(HERE, task.id) == (Status.ACTIVE, Status.DELETING)
    assert lab.tasks.cancel(HERE, task.id) == (Status.DELETING, Status.DELETING)
    image.may_read.set()
    ended(task)
    assert (task.status, task.message, lab.aws.seen) == (Status.DELETED, "", {})
    assert lab.tasks.cancel(HERE, task.id) == (Status.DELETED, Status.DELETED)


def test_what_is_completed_or_not_there_cannot_be_cancelled(lab: Lab) -> None:
    lab.put(bootable())
    task = ended(lab.snapshot())
    for place, task_id, code in [
        (HERE, task.id, "IncorrectState"),
        (HERE, "import-snap-0", "InvalidConversionTaskId"),
        (ELSEWHERE, task.id, "InvalidConversionTaskId"),
    ]:
        with pytest.raises(Refused) as refused:
            lab.tasks.cancel(place, task_id)
        assert refused.value.code == code


def test_tasks_are_listed_by_kind_id_state_and_place_for_seven_days(lab: Lab) -> None:
    lab.put(bootable())
    snapshot, image = ended(lab.snapshot()), ended(lab.image("disk"))
    lab.aws.objects.clear()
    failed = ended(lab.snapshot())
    assert lab.tasks.listed(HERE, "import-snap-", [], []) == [snapshot, failed]
    assert lab.tasks.listed(HERE, "import-ami-", [], []) == [image]
    assert lab.tasks.listed(HERE, "import-snap-", [failed.id], []) == [failed]
    assert lab.tasks.listed(HERE, "import-snap-", [], ["completed"]) == [snapshot]
    assert lab.tasks.listed(ELSEWHERE, "import-snap-", [], []) == []
    with pytest.raises(Refused, match="not valid"):
        lab.tasks.listed(HERE, "import-snap-", [image.id], [])
    lab.now_s += 7 * 24 * 3600
    assert lab.tasks.listed(HERE, "import-snap-", [], []) == []


def test_tags_are_the_tasks(lab: Lab) -> None:
    lab.put(bootable())
    tags = [{"Key": "k", "Value": "v"}]
    task = ended(lab.snapshot(TagSpecifications=[{"ResourceType": "import-snapshot-task", "Tags": tags}]))
    assert task.tags == tags
    assert lab.catalog.find(HERE, task.disks[0]["SnapshotId"]).request.tags == ()


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"DiskContainer": {}},
        {"DiskContainer": {"Format": "RAW"}},
        {"DiskContainer": {"Format": "RAW", "UserBucket": {"S3Bucket": "bucket"}}},
    ],
    ids=str,
)
def test_a_request_that_names_no_disk_is_refused_at_once(lab: Lab, request_: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        lab.tasks.import_snapshot(HERE, request_)


@pytest.mark.parametrize(
    "more",
    [
        {"BootMode": "uefi-preferred"},
        {"BootMode": "uefi"},
        {"Architecture": "arm64"},
        {"LicenseType": "BYOL", "UsageOperation": "RunInstances"},
    ],
    ids=str,
)
def test_what_import_image_does_not_take_is_refused_at_once(lab: Lab, more: dict[str, str]) -> None:
    lab.put(bootable())
    with pytest.raises(Refused):
        lab.image("disk", **more)


@pytest.mark.parametrize("count", [0, 22])
def test_an_image_has_1_to_21_disks(lab: Lab, count: int) -> None:
    with pytest.raises(Refused, match="1 to 21"):
        lab.image(*["disk"] * count)
