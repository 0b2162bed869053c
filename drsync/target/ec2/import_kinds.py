"""The two kinds of tasks of VM Import: what is asked for, what AWS tells of them, and what they have made.

Tasks are found by a tag that has the import's name; AWS lists them for seven days.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final, Protocol

from drsync.errors import CloudNotFound
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.upload import DiskImport, ImportPlace, check_name

IMPORT_TAG: Final = "drsync:import"
"""On tasks, and on what they make: the name of the import."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """A disk of an image: an image in the bucket (of `upload_disk`), or an EBS snapshot."""

    size_bytes: int
    name: str = ""
    """Of the DiskImport that was uploaded."""
    snapshot_id: str = ""

    def __post_init__(self) -> None:
        if bool(self.name) == bool(self.snapshot_id):
            raise ValueError("a disk is either in the bucket or a snapshot")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageImport:
    """What ImportImage is to make; AWS changes the guest's drivers, network and boot loader."""

    name: str
    """Of this image of this point in this repository, and of no other."""
    description: str = ""
    boot_mode: str | None = None
    """legacy-bios or uefi; None: AWS finds out."""
    platform: str = "Linux"
    """Linux or Windows."""
    license_type: str | None = None
    """AWS or BYOL; excludes `usage_operation`."""
    usage_operation: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    """For the task, the image and its snapshots."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.boot_mode not in (None, "legacy-bios", "uefi"):
            raise ValueError(f"VM Import knows no boot mode {self.boot_mode}")
        if self.license_type and self.usage_operation:
            raise ValueError("license_type and usage_operation exclude each other")


class TaskState(Enum):
    """A task's state. Moves: RUNNING → COMPLETED, RUNNING → ENDING → FAILED."""

    RUNNING = auto()
    ENDING = auto()
    """It was cancelled, or has failed, and tidies up."""
    COMPLETED = auto()
    FAILED = auto()
    """Also: cancelled."""

    @classmethod
    def of(cls, status: str) -> "TaskState":
        """What a status means. One that is not known is of a task that runs: the time limit ends it."""
        return {"completed": cls.COMPLETED, "deleting": cls.ENDING, "deleted": cls.FAILED, "error": cls.FAILED}.get(
            status, cls.RUNNING
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task as AWS describes it."""

    id: str
    status: str
    message: str = ""
    progress: int = 0
    image_id: str = ""
    snapshot_ids: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def state(self) -> TaskState:
        return TaskState.of(self.status)


class Tasks(Protocol):
    """The tasks of one import: of one kind, with its tag."""

    @property
    def name(self) -> str:
        """The import's."""
        ...

    @property
    def operation(self) -> str:
        """What begins one."""
        ...

    @property
    def describe(self) -> str:
        """The command of `aws ec2` that shows them."""
        ...

    def known(self) -> Sequence[Task]:
        """Those that AWS still lists."""
        ...

    def look(self, task_id: str) -> Task | None:
        """One of them as it is now; None if AWS does not tell."""
        ...

    def is_there(self, task: Task) -> bool:
        """Whether what a completed task has made is still there."""
        ...

    def remove_result(self, task: Task) -> None:
        """Remove what a task has made."""
        ...


class SnapshotTasks:
    """ImportSnapshot's tasks of one import."""

    operation = "ImportSnapshot"
    describe = "describe-import-snapshot-tasks"

    def __init__(self, aws: Aws, name: str) -> None:
        self._aws = aws
        self.name = name

    def known(self) -> Sequence[Task]:
        return [task for task in self.listed([]) if task.tags.get(IMPORT_TAG) == self.name]

    def look(self, task_id: str) -> Task | None:
        return next(iter(self.listed([task_id])), None)

    def listed(self, ids: Sequence[str]) -> list[Task]:
        """These tasks of the account, whatever import they are of; without ids, all that AWS still lists."""
        with self._aws.translated("DescribeImportSnapshotTasks"):
            pages = self._aws.ec2.get_paginator("describe_import_snapshot_tasks").paginate(ImportTaskIds=ids)
            return [_snapshot_task(one) for page in pages for one in page["ImportSnapshotTasks"]]

    def is_there(self, task: Task) -> bool:
        try:
            with self._aws.translated("DescribeSnapshots"):
                found = self._aws.ec2.describe_snapshots(SnapshotIds=list(task.snapshot_ids))["Snapshots"]
        except CloudNotFound:
            return False
        return bool(task.snapshot_ids) and bool(found)

    def remove_result(self, task: Task) -> None:
        _delete_snapshots(self._aws, self.name, task.snapshot_ids)


class ImageTasks:
    """ImportImage's tasks of one import; `given` are snapshots that they are made of, and stay."""

    operation = "ImportImage"
    describe = "describe-import-image-tasks"

    def __init__(self, aws: Aws, name: str, given: Iterable[str] = ()) -> None:
        self._aws = aws
        self.name = name
        self._given = frozenset(given)

    def known(self) -> Sequence[Task]:
        return [task for task in self.listed([]) if task.tags.get(IMPORT_TAG) == self.name]

    def look(self, task_id: str) -> Task | None:
        return next(iter(self.listed([task_id])), None)

    def listed(self, ids: Sequence[str]) -> list[Task]:
        """These tasks of the account, whatever import they are of; without ids, all that AWS still lists."""
        with self._aws.translated("DescribeImportImageTasks"):
            pages = self._aws.ec2.get_paginator("describe_import_image_tasks").paginate(ImportTaskIds=ids)
            return [_image_task(one) for page in pages for one in page["ImportImageTasks"]]

    def is_there(self, task: Task) -> bool:
        with self._aws.translated("DescribeImages"):
            found = self._aws.ec2.describe_images(
                Owners=["self"], Filters=[{"Name": "image-id", "Values": [task.image_id]}]
            )
        return bool(task.image_id) and bool(found["Images"])

    def remove_result(self, task: Task) -> None:
        if task.image_id:
            with suppress(CloudNotFound):
                tag_results(self._aws, [task.image_id], self.name, {})
                with self._aws.translated("DeregisterImage"):
                    self._aws.ec2.deregister_image(ImageId=task.image_id)
        _delete_snapshots(self._aws, self.name, [one for one in task.snapshot_ids if one not in self._given])


def snapshot_request(place: ImportPlace, disk: DiskImport) -> dict[str, Any]:
    """ImportSnapshot of an image in the bucket, without a token."""
    return {
        "Description": f"drsync {disk.name}",
        "DiskContainer": _in_bucket(place, disk.name),
        "RoleName": place.role_name,
        "TagSpecifications": _tag_specification("import-snapshot-task", disk.name, disk.tags),
        **_encryption(place),
    }


def image_request(place: ImportPlace, image: ImageImport, sources: Sequence[ImageSource]) -> dict[str, Any]:
    """ImportImage of these disks, without a token."""
    containers = [
        {"SnapshotId": source.snapshot_id} if source.snapshot_id else _in_bucket(place, source.name)
        for source in sources
    ]
    optional = {
        "BootMode": image.boot_mode,
        "LicenseType": image.license_type,
        "UsageOperation": image.usage_operation,
    }
    return {
        "Architecture": "x86_64",
        "Description": image.description or f"drsync {image.name}",
        "DiskContainers": containers,
        "Platform": image.platform,
        "RoleName": place.role_name,
        "TagSpecifications": _tag_specification("import-image-task", image.name, image.tags),
        **{name: value for name, value in optional.items() if value},
        **_encryption(place),
    }


def tag_results(aws: Aws, resources: Sequence[str], name: str, tags: Mapping[str, str]) -> None:
    """Tags of a request are the task's alone; what it has made gets them here."""
    with aws.translated("CreateTags"):
        aws.ec2.create_tags(Resources=resources, Tags=_listed({**tags, IMPORT_TAG: name}))  # type: ignore[arg-type]


def _in_bucket(place: ImportPlace, name: str) -> dict[str, Any]:
    bucket = {"S3Bucket": place.bucket, "S3Key": place.image_key(name)}
    return {"Description": name, "Format": "VMDK", "UserBucket": bucket}


def _snapshot_task(one: Mapping[str, Any]) -> Task:
    detail = one.get("SnapshotTaskDetail", {})
    return Task(
        id=one["ImportTaskId"],
        status=detail.get("Status", ""),
        message=detail.get("StatusMessage", ""),
        progress=_percent(detail.get("Progress")),
        snapshot_ids=tuple(filter(None, [detail.get("SnapshotId")])),
        tags=_tags_of(one),
    )


def _image_task(one: Mapping[str, Any]) -> Task:
    return Task(
        id=one["ImportTaskId"],
        status=one.get("Status", ""),
        message=one.get("StatusMessage", ""),
        progress=_percent(one.get("Progress")),
        image_id=one.get("ImageId", ""),
        snapshot_ids=tuple(disk["SnapshotId"] for disk in one.get("SnapshotDetails", ()) if disk.get("SnapshotId")),
        tags=_tags_of(one),
    )


def _percent(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _tags_of(one: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag.get("Value", "") for tag in one.get("Tags", ())}


def _tag_specification(resource: str, name: str, tags: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"ResourceType": resource, "Tags": _listed({**tags, IMPORT_TAG: name})}]


def _listed(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in sorted(tags.items())]


def _encryption(place: ImportPlace) -> dict[str, Any]:
    return {"Encrypted": True, "KmsKeyId": place.kms_key_id} if place.kms_key_id else {}


def _delete_snapshots(aws: Aws, name: str, snapshot_ids: Iterable[str]) -> None:
    """Delete what a task has made. It gets the import's tag first: without one, the policy lets nobody delete it."""
    for snapshot_id in snapshot_ids:
        with suppress(CloudNotFound):
            tag_results(aws, [snapshot_id], name, {})
            with aws.translated("DeleteSnapshot"):
                aws.ec2.delete_snapshot(SnapshotId=snapshot_id)
