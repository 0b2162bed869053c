"""VM Import: a disk becomes an EBS snapshot, or disks become an image whose guest AWS has converted.

    blocks ─▶ vmdk.py ─▶ upload.py ─▶ bucket ─▶ ImportSnapshot ─▶ snapshot        import_disk
                                        └─────▶ ImportImage ─▶ image              upload_disk, import_image
                             EBS snapshot ───────────┘

`read(first)` gives (block number, bytes) of the blocks of 64 KiB that hold data, ascending, from block `first` on.
It is called with 0, or, when an upload that was killed goes on, with the block where it goes on: the same disk of
the same point must give the same blocks then. It is not called at all when the image, or the task, is there already.

All are idempotent by `disk.name` or `image.name`: called again after a kill they go on with the upload, follow the
task that runs (found by its tag), or answer with what it has made. If they raise, what they made is removed, unless
`place.keep_on_error`; what a kill has left is removed by `remove_leftovers`.

A task's states are AWS's (VM Import guide; seen on AWS by others):

    active (pending, validating, converting, updating …) ─┬─▶ completed
                                                          └─▶ deleting ─▶ deleted     also when it failed: StatusMessage

The SDK's waiter knows neither that failure nor ImportImage, hence the poller here.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from drsync.errors import (
    CloudError,
    CloudLimit,
    CloudRefused,
    ImportCancelled,
    ImportNotSetUp,
    ImportTimeout,
)
from drsync.model import Clock, NoProgress, Pace, Progress
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.import_kinds import (
    ImageImport,
    ImageSource,
    ImageTasks,
    SnapshotTasks,
    Task,
    Tasks,
    TaskState,
    image_request,
    snapshot_request,
    tag_results,
)
from drsync.target.ec2.import_messages import clean, failure
from drsync.target.ec2.upload import DiskImport, ImageUpload, ImportPlace, ReadBlocks, Tuning, discard, remove_image
from drsync.units import format_duration

__all__ = [
    "DiskImport",
    "ImageImport",
    "ImageSource",
    "ImportPlace",
    "ImportedImage",
    "ReadBlocks",
    "Tuning",
    "import_disk",
    "import_image",
    "remove_leftovers",
    "upload_disk",
]

log = logging.getLogger(__name__)

MAX_IMAGE_DISKS: Final = 21


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedImage:
    """What ImportImage has made."""

    image_id: str
    snapshot_ids: tuple[str, ...]


def import_disk(
    aws: Aws,
    place: ImportPlace,
    disk: DiskImport,
    read: ReadBlocks,
    *,
    clock: Clock,
    progress: Progress | None = None,
    pace: Pace | None = None,
    tuning: Tuning | None = None,
) -> str:
    """An EBS snapshot with the disk's content: its id. The image that was in the bucket for it is removed.

    Raises:
        ImageUnfit: the disk can't go this way.
        ImportNotSetUp: the role, the bucket or a permission is missing.
        ImportFailed, ImportCancelled, ImportTimeout: the task came to nothing.
        CloudError: AWS failed or refused.
    """
    tasks = SnapshotTasks(aws, disk.name)
    run = _Run(aws, place, tasks, disk.size_bytes, clock=clock, progress=progress, tuning=tuning)
    if (task := run.find()) is None:
        ImageUpload(aws, place, disk, clock=clock, progress=progress, pace=pace, tuning=tuning).run(read)
    with _UndoneOnError(run, [disk.name]):
        done = run.follow(task or run.begin(aws.ec2.import_snapshot, snapshot_request(place, disk)))
        tag_results(aws, done.snapshot_ids, disk.name, disk.tags)
        remove_image(aws, place, disk.name)
    return done.snapshot_ids[0]


def upload_disk(
    aws: Aws,
    place: ImportPlace,
    disk: DiskImport,
    read: ReadBlocks,
    *,
    clock: Clock,
    progress: Progress | None = None,
    pace: Pace | None = None,
    tuning: Tuning | None = None,
) -> ImageSource:
    """The disk's image in the bucket, for `import_image`, which removes it.

    Raises:
        ImageUnfit: the disk can't go this way.
        CloudError: AWS failed or refused.
    """
    ImageUpload(aws, place, disk, clock=clock, progress=progress, pace=pace, tuning=tuning).run(read)
    return ImageSource(size_bytes=disk.size_bytes, name=disk.name)


def import_image(
    aws: Aws,
    place: ImportPlace,
    image: ImageImport,
    sources: Sequence[ImageSource],
    *,
    clock: Clock,
    progress: Progress | None = None,
    tuning: Tuning | None = None,
) -> ImportedImage:
    """An image (AMI) of the disks, the first of which boots, with a guest that AWS has converted.

    Images in the bucket are removed; snapshots that were given are left as they are.

    Raises:
        GuestNotImportable: VM Import does not take this guest; the remedy says what to change in it.
        ImageUnfit, ImportNotSetUp, ImportFailed, ImportCancelled, ImportTimeout, CloudError: as `import_disk`.
    """
    if not 1 <= len(sources) <= MAX_IMAGE_DISKS:
        raise ValueError(f"an image has 1 to {MAX_IMAGE_DISKS} disks, not {len(sources)}")
    given = [source.snapshot_id for source in sources]
    tasks = ImageTasks(aws, image.name, given)
    total_bytes = sum(source.size_bytes for source in sources)
    run = _Run(aws, place, tasks, total_bytes, clock=clock, progress=progress, tuning=tuning)
    uploaded = [source.name for source in sources if source.name]
    with _UndoneOnError(run, uploaded):
        done = run.follow(run.find() or run.begin(aws.ec2.import_image, image_request(place, image, sources)))
        made = [one for one in done.snapshot_ids if one not in given]  # what it was made of stays what it was
        tag_results(aws, [done.image_id, *made], image.name, image.tags)
        for name in uploaded:
            remove_image(aws, place, name)
    return ImportedImage(image_id=done.image_id, snapshot_ids=done.snapshot_ids)


def remove_leftovers(
    aws: Aws,
    place: ImportPlace,
    names: Iterable[str],
    *,
    clock: Clock,
    tuning: Tuning | None = None,
    images: bool = True,
) -> list[str]:
    """Remove what killed imports of these names have left; what that was.

    Tasks that run are cancelled; images, journals and uploads in the bucket are removed (unless `images` is false: then
    no bucket is known). What a task has made already (snapshots, AMIs) is left: import_leftovers.py knows whose it is.

    Raises:
        CloudError: AWS failed or refused; call it again.
    """
    removed: list[str] = []
    for name in names:
        kinds: tuple[Tasks, ...] = (SnapshotTasks(aws, name), ImageTasks(aws, name))
        for tasks in kinds:
            run = _Run(aws, place, tasks, 0, clock=clock, tuning=tuning)
            removed += [run.cancel(task) for task in tasks.known() if task.state is TaskState.RUNNING]
        removed += remove_image(aws, place, name) if images else []
    return removed


class _Run:
    """Begins one task, follows it to its end, or cancels it."""

    def __init__(
        self,
        aws: Aws,
        place: ImportPlace,
        tasks: Tasks,
        size_bytes: int,
        *,
        clock: Clock,
        progress: Progress | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self._aws = aws
        self._place = place
        self._tasks = tasks
        self._size_bytes = size_bytes
        self._clock = clock
        self._progress = progress or NoProgress()
        self._tuning = tuning or Tuning()

    def find(self) -> Task | None:
        """A task of an earlier run that has what is wanted, or is about to."""
        known = self._tasks.known()
        ready = [task for task in known if task.state is TaskState.COMPLETED and self._tasks.is_there(task)]
        running = [task for task in known if task.state is TaskState.RUNNING]
        for task in [*ready, *running]:
            log.info("import %s goes on with %s (%s)", self._tasks.name, task.id, task.status)
            return task
        return None

    def begin(self, call: Callable[..., Any], request: Mapping[str, Any]) -> Task:
        """A new task; when too many run already it waits for its turn."""
        attempt = len(self._tasks.known())
        deadline_s = self._clock.monotonic_s() + self._tuning.time_limit_s
        while True:
            try:
                with self._aws.translated(self._tasks.operation):
                    task_id: str = call(ClientToken=_token(request, attempt), **request)["ImportTaskId"]
            except CloudLimit as err:
                if self._clock.monotonic_s() >= deadline_s:
                    raise
                log.warning("import %s waits for its turn: %s", self._tasks.name, err)
                self._tuning.sleep(self._tuning.poll_longest_s)
            except CloudRefused as err:
                raise self._understood(err) from err
            else:
                return Task(id=task_id, status="active")

    def follow(self, task: Task) -> Task:
        """The task when it is completed.

        Raises:
            CloudError: it came to nothing.
        """
        self._progress.start("import", self._size_bytes)
        deadline_s = self._clock.monotonic_s() + self._tuning.time_limit_s
        wait_s, told_bytes, said = self._tuning.poll_first_s, 0, ""
        while task.state in (TaskState.RUNNING, TaskState.ENDING):
            if self._clock.monotonic_s() >= deadline_s:
                raise self._timeout(task)
            self._tuning.sleep(wait_s)
            wait_s = min(wait_s * 1.5, self._tuning.poll_longest_s)
            task = self._look(task)
            if task.message != said:
                said = task.message
                log.info("import %s: %s %s %s", self._tasks.name, task.id, task.status, said)
            done_bytes = max(told_bytes, self._size_bytes * min(task.progress, 100) // 100)
            self._progress.advance(done_bytes - told_bytes)
            told_bytes = done_bytes
        if task.state is TaskState.FAILED:
            self._tasks.remove_result(task)
            raise self._failure(task)
        self._progress.advance(self._size_bytes - told_bytes)
        return task

    def cancel(self, task: Task) -> str:
        """End a task that runs; returns when it has ended, with what was removed.

        Raises:
            CloudError: AWS failed or refused, or the task does not end.
        """
        with suppress(CloudRefused), self._aws.translated("CancelImportTask"):
            self._aws.ec2.cancel_import_task(ImportTaskId=task.id)  # refused: it has ended in the meantime
        deadline_s = self._clock.monotonic_s() + self._tuning.cancel_within_s
        while (task := self._look(task)).state in (TaskState.RUNNING, TaskState.ENDING):
            if self._clock.monotonic_s() >= deadline_s:
                raise self._timeout(task)
            self._tuning.sleep(self._tuning.poll_first_s)
        self._tasks.remove_result(task)
        return task.id

    def cancel_all(self) -> None:
        """End all tasks of this import that run."""
        for task in self._tasks.known():
            if task.state is TaskState.RUNNING:
                log.info("cancelled %s", self.cancel(task))

    def discard(self, images: Sequence[str]) -> None:
        """Remove all that this import has made, while another error is on its way; AWS's own refusals are logged.

        The objects go last: AWS must not miss them while a task runs.
        """
        if self._place.keep_on_error:
            return
        try:
            self.cancel_all()
        except CloudError as err:
            log.warning("can't cancel the tasks of %s: %s; remedy: %s", self._tasks.name, err, err.remedy)
            return
        for name in images:
            discard(self._aws, self._place, name)

    def _look(self, task: Task) -> Task:
        try:
            return self._tasks.look(task.id) or task
        except CloudRefused:  # not visible yet, as other things that were just made
            return task

    def _failure(self, task: Task) -> CloudError:
        if not task.message or task.message in ("deleted", "deleting"):
            return ImportCancelled(task=task.id, region=self._aws.region)
        return self._meaning(task.id, task.message)

    def _understood(self, err: CloudRefused) -> CloudError:
        """A refusal of the request itself, which AWS words like a failure of a task (aws/aws-sdk#808)."""
        meant = self._meaning(self._tasks.name, str(err.fields["problem"]))
        return meant if isinstance(meant, ImportNotSetUp) else err

    def _meaning(self, task: str, message: str) -> CloudError:
        return failure(message, task=task, region=self._aws.region, bucket=self._place.bucket, disk=self._tasks.name)

    def _timeout(self, task: Task) -> ImportTimeout:
        return ImportTimeout(
            task=task.id,
            region=self._aws.region,
            waited=format_duration(self._tuning.time_limit_s),
            message=clean(task.message) or task.status,
            describe=self._tasks.describe,
        )


class _UndoneOnError:
    """What was made within is removed if it raises."""

    def __init__(self, run: _Run, images: Sequence[str]) -> None:
        self._run = run
        self._images = images

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._run.discard(self._images)


def _token(request: Mapping[str, Any], attempt: int) -> str:
    """The same request is the same task; after one that came to nothing, it is a new one. At most 64 characters."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return f"drsync-{digest[:40]}-{attempt}"
