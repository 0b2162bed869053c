"""A disk's blocks become an EBS snapshot: 512 KiB each, only those that hold data or differ from the parent.

    find it by its tags ─┬─ completed ───────────────────────────────▶ used as it is
                         ├─ pending, of the same list of blocks ─┐
                         └─ none: StartSnapshot (client token) ──┴▶ PutSnapshotBlock … ▶ CompleteSnapshot ▶ wait

AWS's rules (EBS direct API reference): a block has exactly 524288 bytes and is sent with its SHA-256;
CompleteSnapshot names how many blocks were written and the SHA-256 over all their digests, raw, in the
order of their indexes; a child has its parent's blocks where it has none of its own, so zeros that replace
data must be written; a child may be larger than its parent, not smaller. At most 100 snapshots may be pending.
Seen on AWS: a snapshot "does not exist" for up to two minutes after StartSnapshot (awslabs/coldsnap#43, #56).

A run that was killed: AWS can't be asked which blocks of a pending snapshot it has. So the snapshot carries
two tags: the digest of the list of blocks that it takes, and how many of them (from the list's start) are surely
written, renewed every TAG_EVERY_S. The next run goes on there, reads what lies before again only to reckon the
aggregate checksum, and sends nothing of it twice. If the list is another one by now, the snapshot is made anew.
"""

import base64
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import numpy as np
import numpy.typing as npt
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from drsync.errors import CloudLimit, CloudNotFound, CloudRefused, DrsyncError, SnapshotFailed
from drsync.model import Clock, NoPace, Pace
from drsync.target.ec2 import tags
from drsync.target.ec2.aws import Aws

if TYPE_CHECKING:
    from mypy_boto3_ec2.type_defs import SnapshotTypeDef

log = logging.getLogger(__name__)

T = TypeVar("T")
Indexes = npt.NDArray[np.uint32]

BLOCK_BYTES: Final = 512 * 1024
GIB: Final = 1024**3
BLOCKS_PER_GIB: Final = GIB // BLOCK_BYTES
MAX_VOLUME_GIB: Final = 65536
ZERO_BLOCK: Final = bytes(BLOCK_BYTES)

WORKERS: Final = 16
"""Blocks that are on their way at once; each also waits in memory: 16 MiB with as many waiting."""
VISIBLE_WITHIN_S: Final = 150.0
"""So long a new snapshot may "not exist": two minutes were seen, and a little for us."""
TIMEOUT_MIN: Final = 24 * 60
"""After so long without a new block AWS gives a pending snapshot up; a run that was killed can go on until then."""
TAG_EVERY_S: Final = 15.0
COMPLETED_WITHIN_S: Final = 2 * 3600.0
_PENDING_WAIT_S: Final = 30 * 60.0
"""So long it is waited until the account has less than 100 pending snapshots."""
_GENERATIONS: Final = 8
"""Snapshots that can be begun for one job: each one that failed or was deleted has used up its client token."""


class Keeper(StrEnum):
    """Who keeps a snapshot."""

    RESTORE = "restore"
    SYNC = "sync"
    FAILBACK = "failback"


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotJob:
    """What a snapshot shall hold."""

    of: tags.PointTags
    disk: str
    size_bytes: int
    blocks: Indexes
    """The blocks to write, ascending."""
    parent: str | None = None
    """The snapshot whose blocks it has where it has none of its own."""
    of_disks: int = 1
    """How many disks the point has: it is whole when each has its snapshot."""
    keeper: Keeper = Keeper.RESTORE
    own_tags: Mapping[str, str] = field(default_factory=dict)
    content: str = ""
    """Names what the blocks hold, where the same list can have another content."""
    encrypted: bool = False
    """With the account's default key. Only without a parent: a child is as its parent."""
    kms_key: str | None = None

    @property
    def volume_gib(self) -> int:
        return volume_gib(self.size_bytes)

    @property
    def plan(self) -> str:
        """The digest of all that makes what is written: a pending snapshot of another plan is of no use."""
        digest = hashlib.sha256(self.blocks.astype("<u4").tobytes())
        digest.update(f"{self.size_bytes} {self.parent or '-'} {self.encrypted} {self.kms_key or '-'}".encode())
        digest.update(self.content.encode())
        return digest.hexdigest()[:32]

    @property
    def identity(self) -> dict[str, str]:
        return {**self.of.identity(), tags.DISK: self.disk}

    @property
    def tags(self) -> dict[str, str]:
        name = {tags.NAME: f"{self.of.vm} {self.disk} point {self.of.point}"}
        mine = {tags.DISK: self.disk, tags.KEEPER: self.keeper.value, tags.PLAN: self.plan}
        mine[tags.DISKS] = str(self.of_disks)
        return {**name, **self.own_tags, **self.of.tags(), **mine}


def volume_gib(size_bytes: int) -> int:
    """The size of the volume that holds a disk of `size_bytes`."""
    return max(1, -(-size_bytes // GIB))


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSnapshot:
    """A snapshot of drsync's that AWS has."""

    id: str
    state: str
    volume_gib: int
    tags: Mapping[str, str]
    started_at: datetime
    encrypted: bool = False
    volume_id: str = ""
    """The volume that it shows; of one that was written by EBS direct, none that exists."""

    @property
    def written(self) -> int:
        """How many blocks of its list are surely written."""
        return tags.number(self.tags, tags.WRITTEN)


class Snapshots:
    """The EBS snapshots of a region."""

    def __init__(
        self,
        aws: Aws,
        clock: Clock,
        *,
        pace: Pace | None = None,
        sleep: Callable[[float], None] = time.sleep,
        visible_within_s: float = VISIBLE_WITHIN_S,
        pending_wait_s: float = _PENDING_WAIT_S,
        workers: int = WORKERS,
        tag_every_s: float = TAG_EVERY_S,
    ) -> None:
        """`pace` holds the bytes that are sent; `sleep` waits, and may raise to give up."""
        self._aws = aws
        self.clock = clock
        self.workers = workers
        self.tag_every_s = tag_every_s
        self._pace = pace or NoPace()
        self._sleep = sleep
        self._visible_within_s = visible_within_s
        self._pending_wait_s = pending_wait_s

    def find(self, wanted: Mapping[str, str]) -> list[FoundSnapshot]:
        """All own snapshots with these tags.

        Raises:
            CloudError: AWS can't be asked.
        """
        found: list[FoundSnapshot] = []
        with self._aws.translated("DescribeSnapshots"):
            pages = self._aws.ec2.get_paginator("describe_snapshots").paginate(
                OwnerIds=["self"], Filters=tags.filters(wanted)
            )
            for page in pages:
                found += [_found(snapshot) for snapshot in page["Snapshots"]]
        return found

    def described(self, snapshot_ids: Collection[str]) -> list[FoundSnapshot]:
        """These snapshots.

        Raises:
            CloudNotFound: one of them is not there.
            CloudError: AWS can't be asked.
        """
        with self._aws.translated("DescribeSnapshots"):
            answer = self._aws.ec2.describe_snapshots(SnapshotIds=list(snapshot_ids))
        return [_found(snapshot) for snapshot in answer["Snapshots"]]

    def open(self, job: SnapshotJob) -> "SnapshotWriter":
        """The snapshot of a job, to be written or to go on with; one that is complete already says so.

        Raises:
            CloudLimit: too many snapshots are pending, for longer than it was waited.
            CloudError: AWS refuses.
        """
        found = self.find(job.identity)
        for snapshot in found:
            if self.is_usable(snapshot, job.size_bytes, encrypted=job.encrypted):
                return SnapshotWriter(self, job, snapshot.id, written=len(job.blocks), is_complete=True)
        for snapshot in found:
            if snapshot.state == "pending" and snapshot.tags.get(tags.PLAN) == job.plan:
                log.info("vm=%s disk=%s goes on with snapshot %s", job.of.vm, job.disk, snapshot.id)
                return SnapshotWriter(self, job, snapshot.id, written=snapshot.written, is_complete=False)
            if snapshot.state != "completed" and snapshot.tags.get(tags.KEEPER) == job.keeper:
                log.warning("snapshot %s is of no use (%s, or of another list of blocks)", snapshot.id, snapshot.state)
                self.delete(snapshot.id)
        return self._start(job)

    @staticmethod
    def is_usable(snapshot: FoundSnapshot, size_bytes: int, *, encrypted: bool = False) -> bool:
        """Whether a snapshot that was found by its point and disk can be used as it is, whoever made it."""
        return (
            snapshot.state == "completed"
            and snapshot.volume_gib == volume_gib(size_bytes)
            and (snapshot.encrypted or not encrypted)
        )

    def _start(self, job: SnapshotJob) -> "SnapshotWriter":
        for generation in range(_GENERATIONS):
            request = _start_request(job, generation)
            try:
                answer = self._within_limit(lambda request=request: self._aws.ebs.start_snapshot(**request))  # type: ignore[misc]
            except CloudRefused as err:
                if err.fields["aws_code"] == "ConflictException":  # the token is known, with other parameters
                    continue
                raise
            if answer["Status"] == "pending" and self._is_there(answer["SnapshotId"]):
                return SnapshotWriter(self, job, answer["SnapshotId"], written=0, is_complete=False)
            if answer["Status"] == "completed":
                return SnapshotWriter(self, job, answer["SnapshotId"], written=len(job.blocks), is_complete=True)
        raise SnapshotFailed(snapshot="of disk " + job.disk, region=self._aws.region, problem="no token of it is left")

    def _is_there(self, snapshot_id: str) -> bool:
        """Whether a started snapshot can be seen, at last; a token also answers for one that was deleted since."""
        try:
            self._once_visible(lambda: self._state(snapshot_id), self.clock.monotonic_s())
        except CloudNotFound:
            return False
        return True

    def _within_limit(self, start: Callable[[], T]) -> T:
        """Start when less than 100 snapshots are pending."""

        def call() -> T:
            with self._aws.translated("StartSnapshot"):
                return start()

        return self._retrying(CloudLimit, self.clock.monotonic_s() + self._pending_wait_s, 30.0)(call)

    def _once_visible(self, call: Callable[[], T], started_s: float) -> T:
        """Call again while the snapshot "does not exist", for as long as that is no more than a delay."""
        return self._retrying(CloudNotFound, started_s + self._visible_within_s, 5.0)(call)

    def _retrying(self, what: type[DrsyncError], until_s: float, longest_s: float) -> Retrying:
        def is_over(state: RetryCallState) -> bool:
            return self.clock.monotonic_s() + state.upcoming_sleep > until_s

        return Retrying(
            retry=retry_if_exception(lambda err: isinstance(err, what)),
            stop=is_over,
            wait=wait_random_exponential(multiplier=0.5, max=longest_s),
            sleep=self._sleep,
            before_sleep=lambda state: log.info(
                "%s; waiting for it", state.outcome.exception() if state.outcome is not None else ""
            ),
            reraise=True,
        )

    def put(self, snapshot_id: str, index: int, data: bytes, started_s: float) -> bytes:
        """Write one block; its digest. Writing it again changes nothing.

        Raises:
            CloudError: AWS does not take it.
        """
        digest = hashlib.sha256(data).digest()
        self._pace.take(len(data))

        def call() -> None:
            with self._aws.translated(f"PutSnapshotBlock {snapshot_id}/{index}"):
                self._aws.ebs.put_snapshot_block(
                    SnapshotId=snapshot_id,
                    BlockIndex=index,
                    BlockData=data,
                    DataLength=len(data),
                    Checksum=base64.b64encode(digest).decode(),
                    ChecksumAlgorithm="SHA256",
                )

        self._once_visible(call, started_s)
        return digest

    def remember(self, snapshot_id: str, written: int) -> None:
        """Note at the snapshot how many blocks of its list it has."""
        self.tag(snapshot_id, {tags.WRITTEN: str(written)})

    def tag(self, snapshot_id: str, own: Mapping[str, str]) -> None:
        """Add tags to a snapshot, which may just have been begun.

        Raises:
            CloudError: AWS refuses.
        """

        def call() -> None:
            with self._aws.translated("CreateTags"):
                self._aws.ec2.create_tags(Resources=[snapshot_id], Tags=tags.listed(own))

        self._once_visible(call, self.clock.monotonic_s())

    def complete(self, snapshot_id: str, count: int, aggregate: bytes, started_s: float) -> None:
        """Say that all blocks are written, with what AWS checks that by; return when it is completed.

        Raises:
            SnapshotFailed: AWS has something else than was written; the snapshot is of no use.
            CloudError: AWS does not answer, or refuses.
        """

        def call() -> None:
            with self._aws.translated(f"CompleteSnapshot {snapshot_id}"):
                self._aws.ebs.complete_snapshot(
                    SnapshotId=snapshot_id,
                    ChangedBlocksCount=count,
                    Checksum=base64.b64encode(aggregate).decode(),
                    ChecksumAlgorithm="SHA256",
                    ChecksumAggregationMethod="LINEAR",
                )

        try:
            self._once_visible(call, started_s)
        except CloudRefused as err:
            if not self._was_completed(snapshot_id, err):
                raise SnapshotFailed(snapshot=snapshot_id, region=self._aws.region, problem=str(err)) from err
        self.wait_completed(snapshot_id)

    def _was_completed(self, snapshot_id: str, err: CloudRefused) -> bool:
        """Whether the refusal means that an earlier try, whose answer got lost, has completed it.

        A count or checksum that does not fit leaves it pending for good, and AWS names the parameter as the
        reason; one that was completed is refused as no snapshot to write to.
        """
        return err.fields.get("reason") == "INVALID_SNAPSHOT_ID" or self._state(snapshot_id) == "completed"

    def wait_completed(self, snapshot_id: str, *, within_s: float = COMPLETED_WITHIN_S) -> None:
        """Return when AWS says that a snapshot is complete; one that was just begun may not be seen at first.

        Raises:
            SnapshotFailed: it failed, or takes longer.
            CloudError: AWS can't be asked.
        """
        pause_s, began_s = 0.2, self.clock.monotonic_s()
        give_up_s = began_s + within_s
        while (state := self._once_visible(lambda: self._state(snapshot_id), began_s)) != "completed":
            if state == "error":
                raise SnapshotFailed(snapshot=snapshot_id, region=self._aws.region, problem="AWS says: error")
            if self.clock.monotonic_s() > give_up_s:
                raise SnapshotFailed(snapshot=snapshot_id, region=self._aws.region, problem="it stays pending")
            self._sleep(pause_s)
            pause_s = min(pause_s * 1.5, 10.0)

    def _state(self, snapshot_id: str) -> str:
        with self._aws.translated("DescribeSnapshots"):
            (snapshot,) = self._aws.ec2.describe_snapshots(SnapshotIds=[snapshot_id])["Snapshots"]
        return str(snapshot["State"])

    def delete(self, snapshot_id: str) -> None:
        """Delete it; one that is gone already is fine.

        Raises:
            CloudError: AWS refuses, for example since an image uses it.
        """
        try:
            with self._aws.translated(f"DeleteSnapshot {snapshot_id}"):
                self._aws.ec2.delete_snapshot(SnapshotId=snapshot_id)
        except CloudNotFound:
            log.info("snapshot %s is gone already", snapshot_id)


class SnapshotWriter:
    """Takes the blocks of one job in order, and sends them side by side.

    `put` must be called once for each block of the job, ascending. Memory is bounded: it waits while
    enough are on their way. Used as a context, it ends its threads; it never deletes the snapshot.
    """

    def __init__(
        self, snapshots: Snapshots, job: SnapshotJob, snapshot_id: str, *, written: int, is_complete: bool
    ) -> None:
        self.id = snapshot_id
        self.is_complete = is_complete
        """Nothing is to be written: the snapshot is as it shall be."""
        self.written_before = min(written, len(job.blocks))
        """So many blocks of the list are there: they need not be sent, but must be put all the same."""
        self.sent = 0
        """Blocks that were sent by this run."""
        self._snapshots = snapshots
        self._job = job
        self._aggregate = hashlib.sha256()
        self._taken = self._settled = 0
        self._on_way: deque[Future[bytes]] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._clock = snapshots.clock
        self._started_s = self._tagged_s = self._clock.monotonic_s()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._on_way:
            future.cancel()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, index: int, data: bytes) -> None:
        """Take the next block of the list.

        Raises:
            CloudError: it, or one before it, could not be written.
            ValueError: it is not the next block of the list, or not a block.
        """
        if len(data) != BLOCK_BYTES or self._taken >= len(self._job.blocks) or self._job.blocks[self._taken] != index:
            raise ValueError(f"block {index} of {len(data)} bytes is not the next one of the list")
        self._taken += 1
        if self._taken <= self.written_before:
            self._aggregate.update(hashlib.sha256(data).digest())
            self._settled += 1
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._snapshots.workers, thread_name_prefix="ebs")
            self._send(index, data).result()  # the first one alone: it waits until the snapshot is visible
        else:
            self._send(index, data)
        self._settle(at_most=2 * self._snapshots.workers)

    def _send(self, index: int, data: bytes) -> Future[bytes]:
        if self._pool is None:
            raise ValueError("it is not open")
        self.sent += 1
        self._on_way.append(self._pool.submit(self._snapshots.put, self.id, index, data, self._started_s))
        return self._on_way[-1]

    def _settle(self, *, at_most: int) -> None:
        """Wait until no more than so many are on their way; in their order, as the aggregate needs them."""
        while len(self._on_way) > at_most or (self._on_way and self._on_way[0].done()):
            self._aggregate.update(self._on_way[0].result())
            self._on_way.popleft()
            self._settled += 1
        now_s = self._clock.monotonic_s()
        if now_s - self._tagged_s >= self._snapshots.tag_every_s:
            self._snapshots.remember(self.id, self._settled)
            self._tagged_s = now_s

    def finish(self) -> None:
        """All blocks were put: complete the snapshot, and return when AWS has it.

        Raises:
            SnapshotFailed, CloudError: see Snapshots.complete.
        """
        if self.is_complete:
            return
        self._settle(at_most=0)
        if self._settled != len(self._job.blocks):
            raise ValueError(f"{self._settled} of {len(self._job.blocks)} blocks were put")
        self._snapshots.complete(self.id, self._settled, self._aggregate.digest(), self._started_s)


def _start_request(job: SnapshotJob, generation: int) -> dict[str, Any]:
    """StartSnapshot for a job: the same job and generation is the same request, token included."""
    what = {**job.tags, "gib": str(job.volume_gib), "generation": str(generation)}
    token = hashlib.sha256(repr(sorted(what.items())).encode()).hexdigest()[:40]
    request: dict[str, Any] = {
        "VolumeSize": job.volume_gib,
        "Description": f"drsync: {job.of.vm} {job.disk} point {job.of.point}"[:255],
        "Tags": tags.listed(job.tags),
        "ClientToken": f"drsync-{token}",
        "Timeout": TIMEOUT_MIN,
    }
    if job.parent is not None:
        request["ParentSnapshotId"] = job.parent
    elif job.encrypted or job.kms_key:
        request["Encrypted"] = True
        if job.kms_key:
            request["KmsKeyArn"] = job.kms_key
    return request


def _found(snapshot: "SnapshotTypeDef") -> FoundSnapshot:
    return FoundSnapshot(
        id=snapshot["SnapshotId"],
        state=str(snapshot["State"]),
        volume_gib=snapshot["VolumeSize"],
        tags=tags.read(snapshot.get("Tags")),
        started_at=snapshot["StartTime"],
        encrypted=snapshot.get("Encrypted", False),
        volume_id=snapshot.get("VolumeId", ""),
    )
