"""An image on its way into the bucket: a multipart upload of a stream, which can go on after a kill.

    blocks ─▶ VmdkStream ─▶ part 1 │ part 2 │ part 3 …   several parts at once, each with its SHA-256
                                   ▲
              journal ─────────────┘ parts that S3 has, and where the stream stood behind them

AWS's rules (S3 API reference): parts have 5 MiB to 5 GiB, all but the last, and there are at most 10,000; each
part's SHA-256 is checked when it arrives, the object's checksum is that over the parts'. What was uploaded costs
until the upload is completed or aborted, so a failure aborts it, and `remove_image` finds what a kill left.

S3 tells which parts it has, but not where in the disk the stream stood: grains are compressed. That is in the
journal, a small object beside the image, renewed every JOURNAL_EVERY_S. Who can write the bucket can write any
image there anyway; the journal gives them nothing more, and is read within limits.
"""

import base64
import hashlib
import io
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from drsync.errors import CloudDenied, CloudError, CloudNotFound, CloudRefused, ImageUnfit, ImportNotSetUp
from drsync.model import BLOCK_SIZE, Clock, NoPace, NoProgress, Pace, Progress
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.role import account_of
from drsync.target.ec2.vmdk import SECTOR, ImageTooLarge, Position, VmdkStream
from drsync.units import GiB, MiB, TiB

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

log = logging.getLogger(__name__)

ReadBlocks = Callable[[int], Iterable[tuple[int, bytes]]]
"""Gives (number, bytes) of the blocks of 64 KiB that hold data, ascending, from a block on. Zeros may be left out."""

MAX_DISK_BYTES: Final = 16 * TiB
"""VM Import takes images of less than this (VM Import guide, limitations)."""
LEAST_PART_BYTES: Final = 16 * MiB
MAX_PARTS: Final = 10_000
_PLANNED_PARTS: Final = 9_000
"""Fewer than S3 allows: an image of random data is a little larger than the data."""
_HELD_BYTES: Final = 256 * MiB
"""Parts that are sent at once have together no more than this, or there is only one."""
JOURNAL_EVERY_S: Final = 10.0
MAX_JOURNAL_BYTES: Final = 32 * MiB
_JOURNAL_FORMAT: Final = 1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,199}")
_IDENTITY: Final = "drsync-image"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPlace:
    """Where images lie while AWS reads them, and as whom it reads."""

    bucket: str
    """In the Region of the import."""
    prefix: str = "drsync-import"
    role_name: str = "vmimport"
    kms_key_id: str | None = None
    """Encrypts the snapshots that are made; None: as the account does by default."""
    keep_on_error: bool = False

    def image_key(self, name: str) -> str:
        return f"{self.prefix}/{name}.vmdk"

    def journal_key(self, name: str) -> str:
        return f"{self.prefix}/{name}.journal"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskImport:
    """One disk of one point."""

    name: str
    """Of this disk of this point in this repository, and of no other: makes the object's key, tags and tokens."""
    size_bytes: int
    data_bytes: int
    """No more than this of it is data (so many blocks of 64 KiB)."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """For the task and the snapshot."""

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def identity(self) -> str:
        """What an image of this disk carries in its metadata."""
        return hashlib.sha256(f"{self.name}\n{self.size_bytes}".encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How fast and how patiently; the defaults are for AWS, tests have others."""

    part_bytes: int = LEAST_PART_BYTES
    parallel: int = 4
    deflate_workers: int = field(default_factory=lambda: min(8, max(2, os.cpu_count() or 2)))
    journal_every_s: float = JOURNAL_EVERY_S
    poll_first_s: float = 5.0
    poll_longest_s: float = 30.0
    time_limit_s: float = 24 * 3600.0
    """Of one task. Conversions of over an hour are usual."""
    cancel_within_s: float = 600.0
    sleep: Callable[[float], None] = time.sleep


class _Part(msgspec.Struct, array_like=True):
    """A part that S3 has."""

    etag: str
    sha256: str


class _Journal(msgspec.Struct):
    """The parts that S3 has without a gap, and where the stream stood behind them."""

    format: int
    upload_id: str
    identity: str
    part_bytes: int
    parts: list[_Part]
    position: Position


def check_name(name: str) -> None:
    """Refuse a name that can't be part of a key and of a tag."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} can't be the name of an import")


def part_bytes_for(data_bytes: int, least: int = LEAST_PART_BYTES) -> int:
    """The size of parts with which so much data, even if it is random, is less than 10,000 of them."""
    return max(least, -(-data_bytes // _PLANNED_PARTS // MiB) * MiB)


class ImageUpload:
    """Brings the image of one disk into the bucket; done by `run`."""

    def __init__(
        self,
        aws: Aws,
        place: ImportPlace,
        disk: DiskImport,
        *,
        clock: Clock,
        progress: Progress | None = None,
        pace: Pace | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self._aws = aws
        self._place = place
        self._disk = disk
        self._clock = clock
        self._progress = progress or NoProgress()
        self._pace = pace or NoPace()
        self._tuning = tuning or Tuning()
        self._key = place.image_key(disk.name)
        self._journal_key = place.journal_key(disk.name)
        self._state = _Journal(
            format=_JOURNAL_FORMAT,
            upload_id="",
            identity=disk.identity,
            part_bytes=part_bytes_for(disk.data_bytes, self._tuning.part_bytes),
            parts=[],
            position=Position(),
        )
        self._journaled_s = clock.monotonic_s()

    def run(self, read: ReadBlocks) -> str:
        """Upload the image, or the rest of it; its key. What is there already as a whole is not sent again.

        Raises:
            ImageUnfit: VM Import can't take such a disk.
            ImportNotSetUp: the bucket is missing, somebody else's, or may not be written.
            CloudError: AWS failed or refused; nothing of the upload is left, unless it is to be kept.
        """
        if self._disk.size_bytes >= MAX_DISK_BYTES:
            raise ImageUnfit(disk=self._disk.name, problem="VM Import takes images below 16 TiB")
        try:
            if self._is_there():
                return self._key
            if not self._resume():
                self._begin()
        except (CloudDenied, CloudNotFound) as err:
            place = f"s3://{self._place.bucket}/{self._key}"
            problem = f"can't write {place} ({err.fields['operation']}: {err.fields['problem']})"
            raise ImportNotSetUp(region=self._aws.region, bucket=self._place.bucket, problem=problem) from err
        try:
            self._send(read)
            self._complete()
        except BaseException as err:
            if not self._place.keep_on_error:
                discard(self._aws, self._place, self._disk.name)
            if isinstance(err, ImageTooLarge):
                raise ImageUnfit(disk=self._disk.name, problem="its image would have more than 2 TiB") from err
            raise
        self._delete_journal()
        return self._key

    def _is_there(self) -> bool:
        """Whether the image of this very disk is in the bucket."""
        with self._aws.translated("HeadObject"):
            found = head(self._aws, self._place.bucket, self._key)
        return found is not None and found.get("Metadata", {}).get(_IDENTITY) == self._disk.identity

    def _resume(self) -> bool:
        """Whether an upload was begun that can go on."""
        journal = self._read_journal()
        if journal is None:
            return False
        known = [(n, part.etag.strip('"')) for n, part in enumerate(journal.parts, start=1)]
        try:
            has = self._parts_of(journal.upload_id, len(known))
        except (CloudNotFound, CloudRefused):
            return False
        if has[: len(known)] != known:
            return False
        self._state = journal
        log.info("upload of %s goes on behind %d parts", self._key, len(known))
        return True

    def _parts_of(self, upload_id: str, count: int) -> list[tuple[int, str]]:
        """Numbers and ETags of the parts that S3 has, `count` of them at least, if there are so many."""
        found: list[tuple[int, str]] = []
        with self._aws.translated("ListParts"):
            for page in self._aws.s3.get_paginator("list_parts").paginate(
                Bucket=self._place.bucket, Key=self._key, UploadId=upload_id
            ):
                found += [(part["PartNumber"], part["ETag"].strip('"')) for part in page.get("Parts", ())]
                if len(found) >= count:
                    break
        return found

    def _begin(self) -> None:
        """Begin a new upload; what an earlier one has left is aborted.

        A disk, not encrypted by drsync, never goes into somebody else's bucket, whatever that one allows.
        """
        owner = account_of(self._aws)
        remove_image(self._aws, self._place, self._disk.name)
        with self._aws.translated("CreateMultipartUpload"):
            self._state.upload_id = self._aws.s3.create_multipart_upload(
                Bucket=self._place.bucket,
                Key=self._key,
                ExpectedBucketOwner=owner,
                ChecksumAlgorithm="SHA256",
                ContentType="application/octet-stream",
                Metadata={_IDENTITY: self._disk.identity},
            )["UploadId"]
        self._write_journal()

    def _send(self, read: ReadBlocks) -> None:
        start = self._state.position
        stream = VmdkStream(
            self._disk.size_bytes,
            self._disk.name,
            start=start if self._state.parts else None,
            workers=self._tuning.deflate_workers,
        )
        self._progress.start("upload", max(self._disk.data_bytes, start.data_blocks * BLOCK_SIZE))
        self._progress.advance(start.data_blocks * BLOCK_SIZE)
        parallel = max(1, min(self._tuning.parallel, _HELD_BYTES // self._state.part_bytes))
        waiting: deque[tuple[Future[_Part], Position]] = deque()
        with (
            closing(stream.pieces(read(start.next_block))) as pieces,
            ThreadPoolExecutor(parallel, thread_name_prefix="image-upload") as workers,
        ):
            try:
                number = len(self._state.parts)
                for data, position in self._parts(stream, pieces):
                    while waiting and (len(waiting) >= parallel or waiting[0][0].done()):
                        self._settle(*waiting.popleft())
                    number += 1
                    if number > MAX_PARTS:
                        raise ImageTooLarge
                    waiting.append((workers.submit(self._put, number, data), position))
                while waiting:
                    self._settle(*waiting.popleft())
            except BaseException:
                self._keep_what_arrives(waiting)
                raise

    def _keep_what_arrives(self, waiting: "deque[tuple[Future[_Part], Position]]") -> None:
        """After a failure: note the parts that are on their way, if the upload is to go on one day."""
        if not self._place.keep_on_error:
            for future, _ in waiting:
                future.cancel()
            return
        with suppress(CloudError):  # the first failure is the one to tell
            while waiting:
                self._settle(*waiting.popleft())
            self._write_journal()

    def _parts(self, stream: VmdkStream, pieces: Iterator[bytes]) -> Iterator[tuple[bytes, Position]]:
        """The stream cut into parts, each with the stream's position behind it."""
        held: list[bytes] = []
        size = 0
        for piece in pieces:
            held.append(piece)
            size += len(piece)
            if size >= self._state.part_bytes:
                yield b"".join(held), stream.position
                held.clear()
                size = 0
        if held:
            yield b"".join(held), stream.position

    def _put(self, number: int, data: bytes) -> _Part:
        self._pace.take(len(data))
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        with self._aws.translated("UploadPart"):
            answer = self._aws.s3.upload_part(
                Bucket=self._place.bucket,
                Key=self._key,
                UploadId=self._state.upload_id,
                PartNumber=number,
                Body=io.BytesIO(data),  # a file is sent in small pieces, each with its own time
                ContentLength=len(data),
                ChecksumSHA256=digest,
            )
        return _Part(etag=answer["ETag"], sha256=digest)

    def _settle(self, sent: "Future[_Part]", position: Position) -> None:
        self._state.parts.append(sent.result())
        self._progress.advance((position.data_blocks - self._state.position.data_blocks) * BLOCK_SIZE)
        self._state.position = position
        if self._clock.monotonic_s() - self._journaled_s >= self._tuning.journal_every_s:
            self._write_journal()

    def _complete(self) -> None:
        parts: list[CompletedPartTypeDef] = [
            {"PartNumber": number, "ETag": part.etag, "ChecksumSHA256": part.sha256}
            for number, part in enumerate(self._state.parts, start=1)
        ]
        try:
            with self._aws.translated("CompleteMultipartUpload"):
                self._aws.s3.complete_multipart_upload(
                    Bucket=self._place.bucket,
                    Key=self._key,
                    UploadId=self._state.upload_id,
                    MultipartUpload={"Parts": parts},
                )
        except CloudNotFound:  # an answer that got lost was sent again: the upload is gone, since it is completed
            if not self._is_there():
                raise
        found = head(self._aws, self._place.bucket, self._key)
        if found is None or found["ContentLength"] != self._state.position.sectors * SECTOR:
            raise ImageUnfit(disk=self._disk.name, problem=f"the object {self._key} is not what was sent")

    def _read_journal(self) -> _Journal | None:
        """The journal, if there is one of this disk that can be true."""
        try:
            with self._aws.translated("GetObject"):
                answer = self._aws.s3.get_object(Bucket=self._place.bucket, Key=self._journal_key)
                raw = answer["Body"].read(MAX_JOURNAL_BYTES + 1)
                answer["Body"].close()
            journal = msgspec.json.decode(raw[: MAX_JOURNAL_BYTES + 1], type=_Journal)
        except CloudNotFound:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as err:
            log.warning("the journal %s can't be used: %s", self._journal_key, err)
            return None
        return journal if self._can_be_true(journal) else None

    def _can_be_true(self, journal: _Journal) -> bool:
        at, blocks = journal.position, -(-self._disk.size_bytes // BLOCK_SIZE)
        return (
            journal.format == _JOURNAL_FORMAT
            and journal.identity == self._disk.identity
            and len(journal.parts) < MAX_PARTS
            and 5 * MiB <= journal.part_bytes <= 5 * GiB
            and 0 <= at.next_block <= blocks
            and 0 <= at.data_blocks <= at.next_block
            and (len(journal.parts) == 0) == (at.sectors == 0)
            and all(0 <= n <= blocks // 512 and 0 < s < at.sectors for n, s in at.tables.items())
            and all(0 <= n < at.next_block and 0 < s < at.sectors for n, s in at.grains.items())
            and len({n // 512 for n in at.grains}) <= 1
        )

    def _write_journal(self) -> None:
        with self._aws.translated("PutObject"):
            self._aws.s3.put_object(
                Bucket=self._place.bucket, Key=self._journal_key, Body=msgspec.json.encode(self._state)
            )
        self._journaled_s = self._clock.monotonic_s()

    def _delete_journal(self) -> None:
        with self._aws.translated("DeleteObject"):
            self._aws.s3.delete_object(Bucket=self._place.bucket, Key=self._journal_key)


def head(aws: Aws, bucket: str, key: str) -> Mapping[str, Any] | None:
    """What S3 tells of an object; None if there is none.

    Raises:
        CloudError: S3 failed or refused to tell.
    """
    try:
        with aws.translated("HeadObject"):
            return aws.s3.head_object(Bucket=bucket, Key=key)
    except CloudNotFound:
        return None


def remove_image(aws: Aws, place: ImportPlace, name: str) -> list[str]:
    """Remove an image, its journal, and uploads of it that were never completed; what of that was there.

    Raises:
        CloudError: AWS failed or refused; call it again.
    """
    key, removed = place.image_key(name), []
    with aws.translated("ListMultipartUploads"):
        pages = aws.s3.get_paginator("list_multipart_uploads").paginate(Bucket=place.bucket, Prefix=key)
        uploads = [u["UploadId"] for page in pages for u in page.get("Uploads", ()) if u["Key"] == key]
    for upload_id in uploads:
        try:
            with aws.translated("AbortMultipartUpload"):
                aws.s3.abort_multipart_upload(Bucket=place.bucket, Key=key, UploadId=upload_id)
            removed.append(f"upload of s3://{place.bucket}/{key}")
        except CloudNotFound:
            pass  # completed or aborted in the meantime
    for one in (key, place.journal_key(name)):
        if head(aws, place.bucket, one) is not None:
            with aws.translated("DeleteObject"):
                aws.s3.delete_object(Bucket=place.bucket, Key=one)
            removed.append(f"s3://{place.bucket}/{one}")
    return removed


def discard(aws: Aws, place: ImportPlace, name: str) -> None:
    """Remove what there is of an image, while another error is on its way: a failure is logged, with what to run."""
    try:
        for what in remove_image(aws, place, name):
            log.info("removed %s", what)
    except CloudError as err:
        log.warning(
            "can't remove what there is of %s (%s); remedy: aws s3 rm s3://%s/%s",
            name,
            err,
            place.bucket,
            place.image_key(name),
        )
