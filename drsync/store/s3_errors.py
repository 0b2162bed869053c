"""What botocore raises, in the words of drsync's error tree: the one place where the two meet."""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

from botocore import exceptions as aws
from botocore.parsers import ResponseParserError

from drsync.boto import DENIED, UNAVAILABLE, is_lasting, one_line
from drsync.errors import (
    DrsyncError,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    StoreDenied,
    StoreFull,
    StoreMisconfigured,
    StoreUnavailable,
    StoreUnsafe,
)


class _Meaning(Enum):
    EXISTS = auto()
    MISSING = auto()
    OUTSIDE = auto()
    FULL = auto()
    DENIED = auto()
    UNAVAILABLE = auto()
    MISCONFIGURED = auto()
    UNSUPPORTED = auto()


_BY_CODE = {
    "PreconditionFailed": _Meaning.EXISTS,
    "NoSuchKey": _Meaning.MISSING,
    "NoSuchUpload": _Meaning.MISSING,
    "InvalidRange": _Meaning.OUTSIDE,
    "XMinioStorageFull": _Meaning.FULL,
    "QuotaExceeded": _Meaning.FULL,
    "ExpiredToken": _Meaning.DENIED,
    "ExpiredTokenException": _Meaning.DENIED,
    "InvalidToken": _Meaning.DENIED,
    "TokenRefreshRequired": _Meaning.DENIED,
    # The bytes were changed on the way, or in memory: sending them again tells.
    "BadDigest": _Meaning.UNAVAILABLE,
    "XAmzContentSHA256Mismatch": _Meaning.UNAVAILABLE,
    "IncompleteBody": _Meaning.UNAVAILABLE,
    "RequestTimeout": _Meaning.UNAVAILABLE,
    # What is wrong will stay wrong, although the status (404, 403, 501) speaks of other things.
    "NoSuchBucket": _Meaning.MISCONFIGURED,
    "InvalidObjectState": _Meaning.MISCONFIGURED,
    "NotImplemented": _Meaning.UNSUPPORTED,
}
"""Only what its HTTP status would not tell as well."""

_BY_STATUS = {
    401: _Meaning.DENIED,
    403: _Meaning.DENIED,
    404: _Meaning.MISSING,
    408: _Meaning.UNAVAILABLE,
    409: _Meaning.UNAVAILABLE,  # another conditional write of this key is under way
    412: _Meaning.EXISTS,
    416: _Meaning.OUTSIDE,
    429: _Meaning.UNAVAILABLE,
    507: _Meaning.FULL,
}


def translate(err: Exception, *, url: str, operation: str, key: str) -> DrsyncError:
    """The error of drsync's tree that a foreign exception means; no secret gets into its message."""
    if isinstance(err, aws.ClientError):
        return _translate_reply(err.response, url=url, operation=operation, key=key)
    problem = "the reply is not one of S3" if isinstance(err, ResponseParserError) else _one_line(str(err))
    if isinstance(err, DENIED):
        return StoreDenied(url=url, operation=f"{operation} {key}", problem=problem)
    if isinstance(err, UNAVAILABLE) and not is_lasting(err):
        return StoreUnavailable(url=url, problem=problem)
    return StoreMisconfigured(url=url, problem=problem)


def is_lock_missing(err: Exception) -> bool:
    """Whether a bucket says that it has no Object Lock (S3 API reference, "PutObject", "GetObjectRetention")."""
    if not isinstance(err, aws.ClientError):
        return False
    error = err.response.get("Error", {})
    code, message = error.get("Code", ""), error.get("Message", "")
    return code == "ObjectLockConfigurationNotFoundError" or (
        code == "InvalidRequest" and "ObjectLockConfiguration" in message.replace(" ", "")
    )


def is_without_lock(err: Exception) -> bool:
    """Whether a bucket says that this object has no lock ("GetObjectRetention")."""
    return isinstance(err, aws.ClientError) and (
        err.response.get("Error", {}).get("Code", "") == "NoSuchObjectLockConfiguration"
    )


def _translate_reply(response: Mapping[str, Any], *, url: str, operation: str, key: str) -> DrsyncError:
    error = response.get("Error", {})
    code = str(error.get("Code", ""))
    problem = _one_line(f"{code}: {error.get('Message', '')}")
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    result: DrsyncError
    match _meaning(code, status):
        case _Meaning.EXISTS:
            result = ObjectExists(key=key, url=url)
        case _Meaning.MISSING:
            result = ObjectMissing(key=key, url=url)
        case _Meaning.OUTSIDE:
            result = ObjectDamaged(key=key, problem="it ends before the bytes that were asked for")
        case _Meaning.FULL:
            result = StoreFull(url=url, problem=problem, path=url)
        case _Meaning.DENIED:
            result = StoreDenied(url=url, operation=f"{operation} {key}", problem=problem)
        case _Meaning.UNAVAILABLE:
            result = StoreUnavailable(url=url, problem=problem)
        case _Meaning.UNSUPPORTED if operation == "create":
            # How stores without conditional writes refuse If-None-Match (Backblaze B2, Alibaba OSS).
            result = StoreUnsafe(url=url)
        case _Meaning.MISCONFIGURED | _Meaning.UNSUPPORTED:
            result = StoreMisconfigured(url=url, problem=problem)
    return result


def _meaning(code: str, status: int) -> _Meaning:
    """By the reply's code, else by its HTTP status: the reply to a HEAD has no code of its own."""
    otherwise = _Meaning.UNAVAILABLE if status >= 500 else _Meaning.MISCONFIGURED
    return _BY_CODE.get(code) or _BY_STATUS.get(status, otherwise)


def _one_line(text: str) -> str:
    return one_line(text, 300)
