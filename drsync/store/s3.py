"""Objects in a bucket of AWS S3, or of another store that speaks its protocol.

What this relies on (AWS documentation, "Conditional writes", "Checking object
integrity"): PutObject with ``If-None-Match: *`` is refused with 412 if the key
exists, also in a race; ``x-amz-checksum-sha256`` makes S3 refuse bytes that do
not match; listings are complete at once and in the order of the keys.

The SDK's own retries are off: after a lost reply they would turn one's own
success into "exists already". retry.py retries, and tells the two apart.
"""

import base64
import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final, Literal
from urllib.parse import urlsplit

import boto3.session
from botocore.config import Config

from drsync import __version__
from drsync.boto import FOREIGN
from drsync.errors import (
    LocksMissing,
    ObjectDamaged,
    ObjectMissing,
    StoreDenied,
    StoreMisconfigured,
    StoreUnavailable,
)
from drsync.model import Clock, NoPace, Pace, SystemClock
from drsync.store import Bytes, ObjectInfo, Tail, Unfinished
from drsync.store.body import BodyReader
from drsync.store.key import check_folder, check_key, check_prefix, is_key
from drsync.store.lock import Lock, LockMode, LockPolicy, LockSupport
from drsync.store.s3_errors import is_lock_missing, is_without_lock, translate

if TYPE_CHECKING:
    from botocore.awsrequest import AWSPreparedRequest
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        GetObjectOutputTypeDef,
        GetObjectRequestTypeDef,
        ListObjectsV2OutputTypeDef,
        ListObjectsV2RequestTypeDef,
        PutObjectRequestTypeDef,
    )

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_READ_PIECE_BYTES: Final = 16 * 1024
"""What is read at a time where there is a limit: as much as botocore sends at a time."""
_AHEAD_BYTES: Final = 128 * 1024
"""What Linux takes for a connection before it is read, until it has seen how fast that goes (tcp_rmem in tcp(7))."""
_LOCK_MODES: Final[Mapping[LockMode, Literal["COMPLIANCE", "GOVERNANCE"]]] = {
    LockMode.COMPLIANCE: "COMPLIANCE",
    LockMode.GOVERNANCE: "GOVERNANCE",
}
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Options:
    """Where the bucket is and how long to wait for it.

    Raises:
        StoreMisconfigured: a value that can't be used.
    """

    bucket: str
    prefix: str = ""
    """All keys are below this one, without slashes at its ends."""
    endpoint_url: str | None = None
    """Only for stores that are not AWS; they are then addressed by path."""
    region: str | None = None
    connect_timeout_s: float = 10.0
    """To connect, and for every 16 KiB that are sent."""
    read_timeout_s: float = 60.0
    """Until the reply begins, and between two parts of it. What the kernel had still to send when the
    request was handed to it (up to some MiB) must have gone out by then, too."""
    pool_size: int = 32
    """Connections kept open; more threads than this wait for each other."""

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"

    def __post_init__(self) -> None:
        if _BUCKET.fullmatch(self.bucket) is None:
            raise StoreMisconfigured(url=self.url, problem=f"{self.bucket!r} can't be the name of a bucket")
        if self.prefix and not is_key(self.prefix):
            raise StoreMisconfigured(url=self.url, problem=f"{self.prefix!r} can't be the prefix of a repository")
        if self.endpoint_url is not None:
            self._check_endpoint(self.endpoint_url)

    def _check_endpoint(self, endpoint_url: str) -> None:
        try:
            parts = urlsplit(endpoint_url)
            good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good or parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
            # Not repeated in the message: it may hold a password.
            raise StoreMisconfigured(url=self.url, problem="endpoint_url must look like https://host:port")


class S3Store:
    """An ObjectStore in a bucket. Credentials are found as boto3 finds them; the bucket is first reached when used.

    What it sends of objects keeps to `pace`, block by block, and what it reads of them to `read_pace`. With `lock` each
    object is created locked, until `clock` says that the period is over; the bucket must have Object Lock.
    """

    def __init__(
        self,
        options: S3Options,
        *,
        pace: Pace | None = None,
        read_pace: Pace | None = None,
        lock: LockPolicy | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._options = options
        self._pace = pace
        self._read_pace = read_pace or NoPace()
        self._policy = lock
        self._clock = clock or SystemClock()
        self._root = f"{options.prefix}/" if options.prefix else ""
        self._lock = threading.Lock()
        self._made_client: S3Client | None = None

    @property
    def url(self) -> str:
        return self._options.url

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        request = self._put_request(key, body, sha256)
        request["IfNoneMatch"] = "*"
        if self._policy is not None:
            request["ObjectLockMode"] = _LOCK_MODES[self._policy.mode]
            request["ObjectLockRetainUntilDate"] = self._clock.now() + self._policy.period
            # With a lock S3 wants the checksum named, too ("PutObject", Object Lock parameters).
            request["ChecksumAlgorithm"] = "SHA256"
        self._put("create", key, request)

    def replace(self, key: str, body: Bytes) -> None:
        self._put("replace", key, self._put_request(key, body, hashlib.sha256(body).digest()))

    def get(self, key: str, *, limit_bytes: int) -> bytes:
        with self._reply("get", key) as reply:
            data = _drain(reply, limit_bytes, self._read_pace, 0)
        if data is None:
            raise ObjectDamaged(key=key, problem=f"it has more than the {limit_bytes} bytes it may have")
        return data

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        if length == 0:  # HTTP has no empty range
            start, end, size_bytes, data = offset, offset, self._size(key), b""
        else:
            paid_bytes = self._pay_ahead(length)
            with self._reply("get", key, f"bytes={offset}-{offset + length - 1}") as reply:
                start, end, size_bytes = self._extent(reply)
                data = _drain(reply, length, self._read_pace, paid_bytes) or b""
        if offset + length > size_bytes:
            raise ObjectDamaged(key=key, problem=f"it ends at byte {size_bytes}, before {offset + length}")
        self._check_part(data, start, end, offset, offset + length)
        return data

    def get_tail(self, key: str, length: int) -> Tail:
        if length == 0:
            return Tail(data=b"", object_size_bytes=self._size(key))
        try:
            with self._reply("get", key, f"bytes=-{length}") as reply:
                start, end, size_bytes = self._extent(reply)
                data = _drain(reply, length, self._read_pace, 0) or b""  # often much less than was asked for
        except ObjectDamaged:  # the range is outside: only an empty object has no last byte
            return Tail(data=b"", object_size_bytes=0)
        self._check_part(data, start, end, max(0, size_bytes - length), size_bytes)
        return Tail(data=data, object_size_bytes=size_bytes)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix, self.url)
        last = self._root + after if after else ""
        token: str | None = None
        while True:
            page = self._page(prefix, after, token)
            for entry in page.get("Contents", ()):
                if not entry["Key"].startswith(self._root + prefix) or entry["Key"] <= last:
                    raise StoreMisconfigured(url=self.url, problem="its listings are not in the order of the keys")
                last = entry["Key"]
                key = last.removeprefix(self._root)
                if is_key(key):  # others are not drsync's: for example the mark that a console makes for a "folder"
                    yield ObjectInfo(key=key, size_bytes=entry["Size"], modified=entry["LastModified"].astimezone(UTC))
            if not page["IsTruncated"]:
                return
            token = self._next_token(page, token)

    def folders(self, prefix: str) -> Iterator[str]:
        check_folder(prefix, self.url)
        token: str | None = None
        while True:
            page = self._page(prefix, "", token, delimiter="/")
            for entry in page.get("CommonPrefixes", ()):
                name = entry["Prefix"].removeprefix(self._root + prefix).removesuffix("/")
                if is_key(name):  # others are not drsync's
                    yield name
            if not page["IsTruncated"]:
                return
            token = self._next_token(page, token)

    def lock_support(self) -> LockSupport:
        bucket = self._options.bucket
        with self._translated("look at the versioning of", bucket):
            versioned = self._client.get_bucket_versioning(Bucket=bucket).get("Status") == "Enabled"
        try:
            found = self._client.get_object_lock_configuration(Bucket=bucket).get("ObjectLockConfiguration", {})
        except FOREIGN as err:
            if is_lock_missing(err):
                return LockSupport(enabled=False, versioned=versioned)
            raise translate(err, url=self.url, operation="look at the locks of", key=bucket) from err
        rule = found.get("Rule", {}).get("DefaultRetention", {})
        period = f"{rule.get('Days', 0)} days" if rule.get("Days") else f"{rule.get('Years', 0)} years"
        default = f"{rule['Mode'].lower()} for {period}" if "Mode" in rule else ""
        return LockSupport(enabled=found.get("ObjectLockEnabled") == "Enabled", versioned=versioned, default=default)

    def lock_of(self, key: str) -> Lock | None:
        check_key(key, self.url)
        try:
            reply = self._client.get_object_retention(Bucket=self._options.bucket, Key=self._root + key)
        except FOREIGN as err:
            if is_without_lock(err) or is_lock_missing(err):
                return None
            raise translate(err, url=self.url, operation="look at the lock of", key=key) from err
        found = reply.get("Retention", {})
        if "Mode" not in found or "RetainUntilDate" not in found:
            return None
        return Lock(mode=LockMode(found["Mode"].lower()), until=found["RetainUntilDate"].astimezone(UTC))

    def extend_lock(self, key: str, lock: Lock) -> None:
        check_key(key, self.url)
        try:
            self._client.put_object_retention(
                Bucket=self._options.bucket,
                Key=self._root + key,
                Retention={"Mode": _LOCK_MODES[lock.mode], "RetainUntilDate": lock.until},
                ChecksumAlgorithm="SHA256",
            )
        except FOREIGN as err:
            if is_lock_missing(err):
                raise LocksMissing(url=self.url, problem="the bucket has no Object Lock") from err
            failure = translate(err, url=self.url, operation="lock", key=key)
            if not (isinstance(failure, StoreDenied) and self._is_locked(key, lock)):
                raise failure from err

    def _is_locked(self, key: str, lock: Lock) -> bool:
        """Whether an object is locked at least so: S3 refuses what would make a lock weaker."""
        found = self.lock_of(key)
        if found is None or found.until < lock.until:
            return False
        return found.mode is LockMode.COMPLIANCE or lock.mode is LockMode.GOVERNANCE

    def now(self) -> datetime:
        with self._translated("list", self._root):
            page = self._client.list_objects_v2(Bucket=self._options.bucket, Prefix=self._root, MaxKeys=1)
        try:
            told = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
        except (KeyError, ValueError, TypeError) as err:
            raise StoreMisconfigured(url=self.url, problem="its replies don't tell the time (HTTP Date)") from err
        return told.astimezone(UTC)

    def delete(self, key: str) -> None:
        check_key(key, self.url)
        try:
            with self._translated("delete", key):
                self._client.delete_object(Bucket=self._options.bucket, Key=self._root + key)
        except ObjectMissing:  # AWS does not say so, other stores do
            pass

    def unfinished(self) -> Iterator[Unfinished]:
        with self._translated("list unfinished uploads", self._root):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._options.bucket, Prefix=self._root
            )
            for page in pages:
                for upload in page.get("Uploads", ()):
                    key = upload["Key"].removeprefix(self._root)
                    if is_key(key) and upload["Key"].startswith(self._root):
                        began = upload["Initiated"].astimezone(UTC)
                        yield Unfinished(key=key, upload=upload["UploadId"], began=began)

    def abandon(self, unfinished: Unfinished) -> None:
        check_key(unfinished.key, self.url)
        try:
            with self._translated("abandon", unfinished.key):
                self._client.abort_multipart_upload(
                    Bucket=self._options.bucket, Key=self._root + unfinished.key, UploadId=unfinished.upload
                )
        except ObjectMissing:
            pass

    def _pay_ahead(self, length: int) -> int:
        """Pay for what the kernel will take of a reply before anybody reads it; how much that is."""
        ahead_bytes = min(length, _AHEAD_BYTES)
        self._read_pace.take(ahead_bytes)
        return ahead_bytes

    def _put_request(self, key: str, body: Bytes, sha256: bytes) -> "PutObjectRequestTypeDef":
        check_key(key, self.url)
        return {
            "Bucket": self._options.bucket,
            "Key": self._root + key,
            "Body": BodyReader(body, self._pace),  # type: ignore[typeddict-item]  # the stubs want all of IO; botocore reads and seeks
            "ChecksumSHA256": base64.b64encode(sha256).decode(),
        }

    def _put(self, operation: str, key: str, request: "PutObjectRequestTypeDef") -> None:
        try:
            reply = self._client.put_object(**request)
        except FOREIGN as err:
            if self._policy is not None and is_lock_missing(err):
                raise LocksMissing(url=self.url, problem="the bucket has no Object Lock") from err
            raise translate(err, url=self.url, operation=operation, key=key) from err
        if not reply.get("ETag"):
            # Some web server said 200, and nothing was stored: S3 always sends an ETag.
            raise StoreUnavailable(url=self.url, problem="what it sent is not the reply to a write")

    def _page(self, prefix: str, after: str, token: str | None, *, delimiter: str = "") -> "ListObjectsV2OutputTypeDef":
        request: ListObjectsV2RequestTypeDef = {"Bucket": self._options.bucket, "Prefix": self._root + prefix}
        if delimiter:
            request["Delimiter"] = delimiter
        if token is not None:
            request["ContinuationToken"] = token
        elif after:
            request["StartAfter"] = self._root + after
        with self._translated("list", prefix):
            page = self._client.list_objects_v2(**request)
        if page.get("IsTruncated", None) is None:
            # botocore takes any XML, such as a login page, for a listing of nothing.
            raise StoreUnavailable(url=self.url, problem="what it sent is not a listing")
        return page

    def _next_token(self, page: "ListObjectsV2OutputTypeDef", token: str | None) -> str:
        """How to go on after a page that is not the last; never "nothing more", which would cut the listing short."""
        following = page.get("NextContinuationToken")
        if not following or following == token:
            raise StoreUnavailable(url=self.url, problem="a listing breaks off in the middle")
        return following

    def _size(self, key: str) -> int:
        check_key(key, self.url)
        with self._translated("get", key):
            head = self._client.head_object(Bucket=self._options.bucket, Key=self._root + key)
        return head["ContentLength"]

    @contextmanager
    def _reply(self, operation: str, key: str, byte_range: str = "") -> Iterator["GetObjectOutputTypeDef"]:
        """The reply to a GET; what is left of its body is dropped, with its connection, at the end."""
        check_key(key, self.url)
        request: GetObjectRequestTypeDef = {"Bucket": self._options.bucket, "Key": self._root + key}
        if byte_range:
            request["Range"] = byte_range
        with self._translated(operation, key):
            reply = self._client.get_object(**request)
            try:
                yield reply
            finally:
                reply["Body"].close()

    def _extent(self, reply: "GetObjectOutputTypeDef") -> tuple[int, int, int]:
        """First byte, byte after the last one, and size of the whole object, as a reply says."""
        content_range = reply.get("ContentRange", "")
        if not content_range:  # the whole object was sent
            return 0, reply["ContentLength"], reply["ContentLength"]
        match = _CONTENT_RANGE.fullmatch(content_range)
        if match is None:
            raise StoreMisconfigured(url=self.url, problem="it answers ranges without telling the object's size")
        return int(match[1]), int(match[2]) + 1, int(match[3])

    def _check_part(self, data: bytes, start: int, end: int, wanted_start: int, wanted_end: int) -> None:
        if (start, end) != (wanted_start, wanted_end):
            problem = f"it was asked for bytes {wanted_start} to {wanted_end} and sent {start} to {end}"
            raise StoreMisconfigured(url=self.url, problem=problem)
        if len(data) != end - start:
            raise StoreUnavailable(url=self.url, problem=f"a reply broke off after {len(data)} of {end - start} bytes")

    @property
    def _client(self) -> "S3Client":
        """The boto3 client, made when it is first needed, since that takes a while and may look for credentials."""
        with self._lock:
            if self._made_client is None:
                self._made_client = _make_client(self._options)
                self._made_client.meta.events.register("before-send.s3.PutObject", _begin_sending)
            return self._made_client

    @contextmanager
    def _translated(self, operation: str, key: str) -> Iterator[None]:
        try:
            yield
        except FOREIGN as err:
            raise translate(err, url=self.url, operation=operation, key=key) from err


def _make_client(options: S3Options) -> "S3Client":
    addressing: Literal["auto", "path"] = "auto" if options.endpoint_url is None else "path"
    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        # The body is hashed once, by the caller, and that checksum is a signed
        # header; signing the body would hash it again.
        s3={"payload_signing_enabled": False, "addressing_style": addressing},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        max_pool_connections=options.pool_size,
        tcp_keepalive=True,
        user_agent_extra=f"drsync/{__version__}",
    )
    return boto3.session.Session().client(
        "s3", endpoint_url=options.endpoint_url, region_name=options.region, config=config
    )


def _begin_sending(request: "AWSPreparedRequest", **_: object) -> None:
    """What is read of the body from now on goes out on the line."""
    body: object = request.body
    if isinstance(body, BodyReader):
        body.sending = True


def _drain(reply: "GetObjectOutputTypeDef", limit_bytes: int, pace: Pace, paid_bytes: int) -> bytes | None:
    """The reply's body, or None if it is longer than `limit_bytes`; no more than that is read.

    `paid_bytes` of it are paid for already.
    """
    declared = reply.get("ContentLength", -1)
    if declared > limit_bytes:
        return None
    if pace.limit_bytes_per_s() is not None:
        return _drain_slowly(reply, limit_bytes, pace, paid_bytes)
    if declared < 0:  # not declared
        data = reply["Body"].read(limit_bytes + 1)
        return data if len(data) <= limit_bytes else None
    return reply["Body"].read()


def _drain_slowly(reply: "GetObjectOutputTypeDef", limit_bytes: int, pace: Pace, paid_bytes: int) -> bytes | None:
    """As _drain, block by block: the server can send no more than the kernel's buffer takes of what is not read.

    So what is paid for is always a buffer ahead of what is read: then it is never behind what the line carries.
    """
    declared = reply.get("ContentLength", -1)
    end = limit_bytes if declared < 0 else declared
    data = bytearray()
    while piece := reply["Body"].read(_READ_PIECE_BYTES):  # the empty one has botocore compare the length
        data += piece
        if len(data) > limit_bytes:
            return None
        due_bytes = min(end, len(data) + _AHEAD_BYTES) - paid_bytes
        if due_bytes > 0:
            pace.take(due_bytes)
            paid_bytes += due_bytes
    return bytes(data)
