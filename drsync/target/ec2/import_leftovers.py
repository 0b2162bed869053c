"""What imports have left that were killed and never begun again: tasks, images in the bucket, results nobody has.

    task runs                              cancelled
    task is completed, its result untagged the snapshot or AMI is nobody's: removed
    image, journal, upload in the bucket   removed

An import that goes on somewhere looks the same: this is for when none does. A result that is tagged (`tag_results`)
belongs to its restore, and goes with that.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from drsync.errors import CloudNotFound
from drsync.model import Clock
from drsync.target.ec2 import tags
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.import_kinds import IMPORT_TAG, ImageTasks, SnapshotTasks, Task, Tasks, TaskState
from drsync.target.ec2.import_task import remove_leftovers
from drsync.target.ec2.upload import ImportPlace, Tuning

_SUFFIXES = (".vmdk", ".journal")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportLeftover:
    """Something that an import has left."""

    kind: str
    """import task, uploaded image, or imported result."""
    id: str
    name: str
    """The import's."""


class ImportLeftovers:
    """What imports have left whose names `belongs` accepts; `place` None: no bucket is looked into."""

    def __init__(
        self,
        aws: Aws,
        place: ImportPlace | None,
        belongs: Callable[[str], bool],
        *,
        clock: Clock,
        tuning: Tuning | None = None,
    ) -> None:
        self._aws = aws
        self._place = place
        self._belongs = belongs
        self._clock = clock
        self._tuning = tuning

    def find(self) -> list[ImportLeftover]:
        """All of it.

        Raises:
            CloudError: AWS can't be asked.
        """
        found: list[ImportLeftover] = []
        for tasks in self._tasks():
            for task in tasks.all():
                name = task.tags.get(IMPORT_TAG, "")
                if not self._belongs(name):
                    continue
                if task.state is TaskState.RUNNING:
                    found.append(ImportLeftover(kind="import task", id=task.id, name=name))
                elif task.state is TaskState.COMPLETED:
                    found += [ImportLeftover(kind="imported result", id=r, name=name) for r in self._unclaimed(task)]
        return found + [
            ImportLeftover(kind="uploaded image", id=f"s3://{bucket}/{key}", name=name)
            for bucket, key, name in self._uploads()
        ]

    def remove(self, leftovers: Iterable[ImportLeftover]) -> None:
        """Remove what `find` found.

        Raises:
            CloudError: AWS failed or refused; call it again.
        """
        results: dict[str, set[str]] = {}
        names: set[str] = set()
        for one in leftovers:
            names.add(one.name)
            if one.kind == "imported result":
                results.setdefault(one.name, set()).add(one.id)
        for tasks in self._tasks():
            for task in tasks.all():
                mine = results.get(task.tags.get(IMPORT_TAG, ""), set())
                if mine & {task.image_id, *task.snapshot_ids}:
                    self._remove_result(tasks, task)
        place = self._place or ImportPlace(bucket="")
        remove_leftovers(
            self._aws, place, sorted(names), clock=self._clock, tuning=self._tuning, images=self._place is not None
        )

    def _remove_result(self, tasks: "_All", task: Task) -> None:
        """Remove what a task has made, but for snapshots of a restore that it was made of."""
        theirs = [one for one in task.snapshot_ids if tags.REPOSITORY in (self._tags_of(one) or {})]
        kept = replace(task, snapshot_ids=tuple(one for one in task.snapshot_ids if one not in theirs))
        tasks.of(task).remove_result(kept)

    def _tasks(self) -> "list[_All]":
        return [_All(self._aws, SnapshotTasks), _All(self._aws, ImageTasks)]

    def _unclaimed(self, task: Task) -> list[str]:
        """What a completed task has made that is there still and has no tag of ours."""
        made = [task.image_id] if task.image_id else list(task.snapshot_ids)
        return [one for one in made if one and (found := self._tags_of(one)) is not None and IMPORT_TAG not in found]

    def _tags_of(self, resource_id: str) -> Mapping[str, str] | None:
        """The tags of a snapshot or an image; None if it is not there."""
        try:
            if resource_id.startswith("ami-"):
                with self._aws.translated("DescribeImages"):
                    images = self._aws.ec2.describe_images(ImageIds=[resource_id])["Images"]
                return tags.read(images[0].get("Tags")) if images else None
            with self._aws.translated("DescribeSnapshots"):
                snapshots = self._aws.ec2.describe_snapshots(SnapshotIds=[resource_id])["Snapshots"]
            return tags.read(snapshots[0].get("Tags")) if snapshots else None
        except CloudNotFound:
            return None

    def _uploads(self) -> list[tuple[str, str, str]]:
        """Bucket, key and name of images, journals and uploads that were not completed."""
        if self._place is None:
            return []
        bucket, prefix = self._place.bucket, f"{self._place.prefix}/"
        with self._aws.translated("ListObjectsV2"):
            pages = self._aws.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            keys = {one["Key"] for page in pages for one in page.get("Contents", ())}
        with self._aws.translated("ListMultipartUploads"):
            uploads = self._aws.s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
            keys |= {one["Key"] for page in uploads for one in page.get("Uploads", ())}
        named = [(key, _name_of(key, prefix)) for key in sorted(keys)]
        return [(bucket, key, name) for key, name in named if name and self._belongs(name)]


class _All:
    """All tasks of one kind, and one import's of them."""

    def __init__(self, aws: Aws, kind: type[SnapshotTasks] | type[ImageTasks]) -> None:
        self._aws = aws
        self._kind = kind

    def all(self) -> list[Task]:
        return self._kind(self._aws, "").listed([])

    def of(self, task: Task) -> Tasks:
        return self._kind(self._aws, task.tags.get(IMPORT_TAG, ""))


def _name_of(key: str, prefix: str) -> str:
    """The import's name of a key; empty if it is none."""
    for suffix in _SUFFIXES:
        if key.startswith(prefix) and key.endswith(suffix):
            return key.removeprefix(prefix).removesuffix(suffix)
    return ""
