"""What boto3 raises for EC2, EBS direct, S3, IAM and STS, in the words of drsync's error tree."""

from collections.abc import Mapping
from typing import Any, Final

from botocore import exceptions as aws
from botocore.parsers import ResponseParserError

from drsync.boto import DENIED, UNAVAILABLE, is_lasting, one_line
from drsync.errors import (
    CloudDenied,
    CloudError,
    CloudLimit,
    CloudMisconfigured,
    CloudNotFound,
    CloudRefused,
    CloudUnavailable,
)

THROTTLED: Final = frozenset(
    {
        "EC2ThrottledException",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
"""Too many requests: what botocore's retries know as well; seen here only after the last try."""

_LIMITS: Final = frozenset(
    {
        "ConcurrentLimitExceededException",
        "InsufficientAddressCapacity",
        "InsufficientCapacity",
        "InsufficientHostCapacity",
        "InsufficientInstanceCapacity",
        "InsufficientVolumeCapacity",
        "InstanceLimitExceeded",
        "MaxSpotInstanceCountExceeded",
        "PendingSnapshotLimitExceeded",
        "ResourceCountExceeded",
        "ResourceCountLimitExceeded",
        "ServiceQuotaExceededException",
        "SnapshotLimitExceeded",
        "VcpuLimitExceeded",
        "VolumeLimitExceeded",
        "VolumeTypeNotAvailableInZone",
    }
)

_DENIALS: Final = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "AuthFailure",
        "Blocked",
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidToken",
        "MissingAuthenticationToken",
        "OptInRequired",
        "PendingVerification",
        "RequestExpired",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnauthorizedOperation",
        "UnrecognizedClientException",
    }
)

_MISSING: Final = frozenset({"NoSuchEntity", "NoSuchKey", "NoSuchUpload", "ResourceNotFoundException"})
"""Besides EC2's own, which end in ".NotFound"."""


def translate(err: Exception, *, region: str, operation: str) -> CloudError:
    """The error of drsync's tree that a foreign exception means; no secret gets into its message."""
    if isinstance(err, aws.ClientError):
        return _translate_reply(err.response, region=region, operation=operation)
    problem = "the reply is not one of AWS" if isinstance(err, ResponseParserError) else _one_line(str(err))
    if isinstance(err, DENIED):
        return CloudDenied(operation=operation, region=region, problem=problem)
    if isinstance(err, UNAVAILABLE) and not is_lasting(err):
        return CloudUnavailable(operation=operation, region=region, problem=problem)
    return CloudMisconfigured(problem=f"{operation}: {problem}")


def _translate_reply(response: Mapping[str, Any], *, region: str, operation: str) -> CloudError:
    error = response.get("Error", {})
    aws_code = _one_line(str(error.get("Code", ""))) or "no code"
    message = _one_line(str(error.get("Message", ""))).rstrip(".") or "no reason is given"
    reason = _one_line(str(response.get("Reason", "")))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    fields = {
        "operation": operation,
        "region": region,
        "aws_code": aws_code,
        "reason": reason,
        "problem": f"{message} ({reason})" if reason and reason not in message else message,
    }
    return _class_of(aws_code, status)(**fields)


def _class_of(aws_code: str, status: int) -> type[CloudError]:
    """By the reply's code, else by its HTTP status."""
    if aws_code in _LIMITS:  # some are 503, and yet no retry within a minute helps
        return CloudLimit
    if aws_code in _DENIALS or status == 401:
        return CloudDenied
    if aws_code in _MISSING or aws_code.endswith((".NotFound", "NotFoundException")) or status == 404:
        return CloudNotFound
    if aws_code in THROTTLED or status in (408, 429) or status >= 500:
        return CloudUnavailable
    return CloudDenied if status == 403 else CloudRefused


def _one_line(text: str) -> str:
    return one_line(text, 400)
