"""VM Import's tasks: ImportSnapshot and ImportImage, from request to `completed` or `deleted`.

Known (VM Import guide, botocore, projects that use it):
- a task that fails ends as `deleted`, with a StatusMessage "ClientError: …"; no state is called failed, and the SDK's
  waiter doesn't see it;
- messages on the way: pending, validating, downloading/converting, updating, booting, preparing ami;
- the service reads the object itself, with the role `vmimport` or the one that was named; without it:
  "The service role vmimport provided does not exist or does not have sufficient permissions";
- `uefi-preferred` is no boot mode of ImportImage, LicenseType and UsageOperation exclude each other, ARM64 isn't taken;
- ImportImage also takes an EBS snapshot; a disk without a partition fails with "No valid partitions";
- the tags of a request are the task's, not the snapshot's;
- CancelImportTask ends a task that is active.

Guesses: the percentages; which of the messages ImportSnapshot shows; the error codes of requests that are refused; that
a token with other parameters is IdempotentParameterMismatch. What the double can't see by itself (kernels, boot
loaders, a first boot) a test can let it find: `import_failures` in faults.py.
"""

import math
import secrets
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from drsync_localstack.blocks import BLOCK_BYTES, ZERO_BLOCK
from drsync_localstack.catalog import Catalog, Place, Snapshot, State
from drsync_localstack.disk_format import BadImage, ImageObject, blocks_of, open_disk
from drsync_localstack.faults import Faults
from drsync_localstack.refusal import Refused

GIB = 2**30
MAX_DISKS = 21
"""Known: an imported image has at most 21 volumes."""

KEPT_S = 7 * 24 * 3600
"""Known: tasks are listed for 7 days."""


class Status(Enum):
    """A task's status. Moves: active → completed, active → deleting → deleted (also on failure)."""

    ACTIVE = "active"
    DELETING = "deleting"
    DELETED = "deleted"
    COMPLETED = "completed"


class Cancelled(Exception):
    """The task was cancelled while it ran."""


class ImportFailed(Exception):
    """The task fails; the text is what stands behind "ClientError: "."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the tasks need of the rest of AWS."""

    open_object: Callable[[Place, str, str], ImageObject]
    """An object of S3, by bucket and key; ImportFailed when it can't be read."""
    has_role: Callable[[Place, str], bool]
    announce: Callable[[Place, Snapshot], None]
    """Make a snapshot known to EC2; called again when its state has changed."""
    retire: Callable[[Place, Snapshot], None]
    """Take it back: the import came to nothing."""
    register: Callable[[Place, Mapping[str, Any]], str]
    """RegisterImage; the image's id."""


@dataclass(slots=True, kw_only=True)
class Task:
    """One task, as the Describe calls show it."""

    id: str
    place: Place
    request: Mapping[str, Any]
    started_at: float
    disks: list[dict[str, Any]]
    """SnapshotTaskDetail, SnapshotDetails: one for each disk."""
    status: Status = Status.ACTIVE
    message: str = "pending"
    progress: int = 0
    image_id: str = ""
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def tags(self) -> list[dict[str, str]]:
        """The task's own tags."""
        return [tag for spec in self.request.get("TagSpecifications") or () for tag in spec.get("Tags") or ()]


class ImportTasks:
    """All tasks; each runs in a thread of its own."""

    def __init__(
        self, catalog: Catalog, faults: Faults, surroundings: Surroundings, now: Callable[[], float] = time.time
    ) -> None:
        self._catalog = catalog
        self._faults = faults
        self._around = surroundings
        self._now = now
        self._lock = threading.Lock()
        self._tasks: dict[str, Task] = {}
        self._by_token: dict[tuple[Place, str], Task] = {}

    def import_snapshot(self, place: Place, request: Mapping[str, Any]) -> Task:
        """ImportSnapshot: the task, which has begun."""
        disk = request.get("DiskContainer")
        if not disk:
            raise Refused("MissingParameter", "The request must contain the parameter DiskContainer")
        return self._begin(place, request, "import-snap", [_disk_of(disk)], self._run_snapshot)

    def import_image(self, place: Place, request: Mapping[str, Any]) -> Task:
        """ImportImage: the task, which has begun."""
        containers = request.get("DiskContainers") or []
        _check_image_request(request, len(containers))
        disks = [_disk_of(container) for container in containers]
        for number, disk in enumerate(disks):
            disk.setdefault("DeviceName", "/dev/sda1" if number == 0 else f"/dev/sd{chr(ord('e') + number)}")
        return self._begin(place, request, "import-ami", disks, self._run_image)

    def listed(self, place: Place, prefix: str, ids: list[str], states: list[str]) -> list[Task]:
        """The tasks of one kind, in the order in which they began.

        Raises:
            Refused: an id is not that of a task.
        """
        with self._lock:
            mine = {
                task.id: task
                for task in self._tasks.values()
                if task.place == place and task.id.startswith(prefix) and self._now() < task.started_at + KEPT_S
            }
        for task_id in ids:
            if task_id not in mine:
                raise unknown_task(task_id)
        return [
            task
            for task in mine.values()
            if (not ids or task.id in ids) and (not states or task.status.value in states)
        ]

    def cancel(self, place: Place, task_id: str) -> tuple[Status, Status]:
        """CancelImportTask: the state before, and that of now."""
        with self._lock:
            task = self._tasks.get(task_id)
            if task is None or task.place != place:
                raise unknown_task(task_id)
            before = task.status
            if before is Status.COMPLETED:
                raise Refused("IncorrectState", f"The task {task_id} is completed and can't be cancelled.")
            if before is Status.ACTIVE:
                task.status, task.message = Status.DELETING, "deleting"
                task.cancelled.set()
            return before, task.status

    def _begin(
        self,
        place: Place,
        request: Mapping[str, Any],
        prefix: str,
        disks: list[dict[str, Any]],
        run: Callable[[Task], None],
    ) -> Task:
        token = request.get("ClientToken") or ""
        given = {name: value for name, value in request.items() if name != "ClientToken"}
        with self._lock:
            if token and (known := self._by_token.get((place, token))) is not None:
                if known.request != given:
                    raise Refused("IdempotentParameterMismatch", "The client token was used with other parameters.")
                return known
            task_id = f"{prefix}-{secrets.token_hex(9)[:17]}"
            task = Task(id=task_id, place=place, request=given, started_at=self._now(), disks=disks)
            self._tasks[task_id] = task
            if token:
                self._by_token[place, token] = task
        threading.Thread(target=self._guarded, args=(task, run), name=task_id, daemon=True).start()
        return task

    def _guarded(self, task: Task, run: Callable[[Task], None]) -> None:
        try:
            self._step(task, "pending", 2)
            if failure := self._faults.next_import_failure():
                raise ImportFailed(failure.removeprefix("ClientError: "))
            role = task.request.get("RoleName") or "vmimport"
            if not self._around.has_role(task.place, role):
                raise ImportFailed(
                    f"The service role {role} provided does not exist or does not have sufficient permissions"
                )
            run(task)
        except Cancelled:
            self._end(task, Status.DELETED, "")
        except (ImportFailed, BadImage, Refused) as err:
            self._end(task, Status.DELETED, f"ClientError: {err}")
        except Exception as err:  # noqa: BLE001 - a thread's end is seen by nobody; the task tells it
            self._end(task, Status.DELETED, f"ServerError: {type(err).__name__}: {err}")

    def _run_snapshot(self, task: Task) -> None:
        self._import_disk(task, task.disks[0])
        self._step(task, "updating", 95)
        self._end(task, Status.COMPLETED, "")

    def _run_image(self, task: Task) -> None:
        self._step(task, "validating", 5)
        for disk in task.disks:
            self._import_disk(task, disk)
            disk["Status"] = "completed"
        self._check_partitions(task)
        for message, progress in (("updating", 50), ("booting", 75), ("preparing ami", 95)):
            self._step(task, message, progress)
        task.image_id = self._around.register(task.place, _image_request(task))
        self._end(task, Status.COMPLETED, "")

    def _import_disk(self, task: Task, disk: dict[str, Any]) -> None:
        if snapshot_id := disk.get("SnapshotId"):
            self._check_snapshot(task.place, snapshot_id)
            return
        image = self._around.open_object(task.place, *_bucket_and_key(disk))
        opened = open_disk(image, disk["Format"])
        self._step(task, "downloading/converting", 10)
        size_gib = math.ceil(opened.size_bytes / GIB)
        snapshot = self._catalog.add_import(task.place, size_gib, f"Created by AWS-VMImport service for {task.id}")
        try:
            self._around.announce(task.place, snapshot)
            self._fill(task, snapshot, opened.pieces, opened.size_bytes)
        except BaseException:
            self._catalog.delete(snapshot.id)
            self._around.retire(task.place, snapshot)
            raise
        self._catalog.finish_import(snapshot)
        self._around.announce(task.place, snapshot)
        disk.update(SnapshotId=snapshot.id, DiskImageSize=float(image.size_bytes))

    def _fill(self, task: Task, snapshot: Snapshot, pieces: Any, size_bytes: int) -> None:
        """Gather pieces to blocks; pieces may come in any order, one block is held at a time."""
        current, held = -1, bytearray()
        for index, within, data in blocks_of(pieces):
            if index != current:
                self._flush(snapshot, current, held)
                known = snapshot.own.get(index)
                held = bytearray(self._catalog.store.read(known.digest) if known else ZERO_BLOCK)
                current = index
                self._check_cancelled(task)
                task.progress = 10 + int(30 * index * BLOCK_BYTES / size_bytes)
            held[within : within + len(data)] = data
        self._flush(snapshot, current, held)

    def _flush(self, snapshot: Snapshot, index: int, held: bytearray) -> None:
        if index >= 0 and held != ZERO_BLOCK:
            self._catalog.write_import(snapshot, index, bytes(held))

    def _check_snapshot(self, place: Place, snapshot_id: str) -> None:
        try:
            state = self._catalog.find(place, snapshot_id).state
        except Refused as err:
            raise ImportFailed(f"Snapshot {snapshot_id} not found") from err
        if state is not State.COMPLETED:
            raise ImportFailed(f"Snapshot {snapshot_id} is not completed")

    def _check_partitions(self, task: Task) -> None:
        blocks = self._catalog.find(task.place, task.disks[0]["SnapshotId"]).blocks
        start = self._catalog.store.read(blocks[0].digest)[:512] if 0 in blocks else bytes(512)
        kinds = [struct.unpack_from("B", start, 446 + 16 * number + 4)[0] for number in range(4)]
        if start[510:512] != b"\x55\xaa" or not any(kinds):
            raise ImportFailed("No valid partitions. Not a valid volume.")

    def _step(self, task: Task, message: str, progress: int) -> None:
        self._check_cancelled(task)
        with self._lock:
            if task.status is Status.ACTIVE:
                task.message, task.progress = message, progress
        task.cancelled.wait(self._faults.settings.import_step_s)
        self._check_cancelled(task)

    def _check_cancelled(self, task: Task) -> None:
        if task.cancelled.is_set():
            raise Cancelled

    def _end(self, task: Task, status: Status, message: str) -> None:
        with self._lock:
            if task.status is Status.DELETING:  # cancelled in its last moment: what was made stays, as on AWS (a guess)
                status = Status.DELETED
            task.status, task.message = status, message
            if status is Status.COMPLETED:
                task.progress = 100


def unknown_task(task_id: str) -> Refused:
    """Known: the code (EC2 API reference, error codes)."""
    return Refused("InvalidConversionTaskId", f"The conversion task ID '{task_id}' is not valid")


def _check_image_request(request: Mapping[str, Any], disks: int) -> None:
    if not 1 <= disks <= MAX_DISKS:
        raise Refused("InvalidParameter", f"An image has 1 to {MAX_DISKS} disk containers, not {disks}")
    if request.get("BootMode") not in (None, "legacy-bios", "uefi"):
        raise Refused("InvalidParameterValue", f"The boot mode {request['BootMode']} is not supported for import")
    if request.get("BootMode") == "uefi" and not request.get("Platform"):
        raise Refused("InvalidParameter", "Platform is required for the boot mode uefi")
    if request.get("LicenseType") and request.get("UsageOperation"):
        raise Refused("InvalidParameterCombination", "LicenseType and UsageOperation can't be given together")
    if request.get("Architecture") not in (None, "", "x86_64"):
        raise Refused("InvalidParameterValue", f"The architecture {request['Architecture']} is not supported")
    if request.get("Platform") not in (None, "", "Linux", "Windows"):
        raise Refused("InvalidParameterValue", f"The platform {request['Platform']} is not supported")


def _disk_of(container: Mapping[str, Any]) -> dict[str, Any]:
    """A disk's detail, as the Describe calls show it, from its container."""
    bucket = container.get("UserBucket") or {}
    if not (container.get("Url") or container.get("SnapshotId") or (bucket.get("S3Bucket") and bucket.get("S3Key"))):
        raise Refused("InvalidParameter", "A disk container needs a UserBucket, a Url or a SnapshotId")
    named = {name: container[name] for name in ("Description", "DeviceName", "Url", "SnapshotId") if name in container}
    disk = {**named, "Format": (container.get("Format") or "RAW").upper(), "Status": "active"}
    return {**disk, "UserBucket": dict(bucket)} if bucket else disk


def _bucket_and_key(disk: Mapping[str, Any]) -> tuple[str, str]:
    if bucket := disk.get("UserBucket"):
        return bucket["S3Bucket"], bucket["S3Key"]
    scheme, _, rest = str(disk["Url"]).partition("://")
    bucket_name, _, key = rest.partition("/")
    if scheme != "s3" or not bucket_name or not key:
        raise ImportFailed("Only s3:// URLs are known here")
    return bucket_name, key


def _image_request(task: Task) -> dict[str, Any]:
    """The RegisterImage that ImportImage ends with."""
    mappings = [
        {"DeviceName": disk["DeviceName"], "Ebs": {"SnapshotId": disk["SnapshotId"], "DeleteOnTermination": True}}
        for disk in task.disks
    ]
    request = {
        "Name": task.id,
        "Description": task.request.get("Description") or f"AWS-VMImport service: {task.id}",
        "Architecture": "x86_64",
        "VirtualizationType": "hvm",
        "EnaSupport": True,
        "RootDeviceName": task.disks[0]["DeviceName"],
        "BlockDeviceMappings": mappings,
    }
    if task.request.get("BootMode"):
        request["BootMode"] = task.request["BootMode"]
    return request
