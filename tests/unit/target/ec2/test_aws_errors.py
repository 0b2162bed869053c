"""Every exception that botocore can raise becomes one of drsync's, and what AWS answers the right one."""

import inspect
from collections.abc import Sequence
from string import Formatter
from typing import Any

import botocore.exceptions as aws
import pytest
from botocore.parsers import ResponseParserError

from drsync.boto import FOREIGN
from drsync.errors import (
    CloudDenied,
    CloudError,
    CloudLimit,
    CloudMisconfigured,
    CloudNotFound,
    CloudRefused,
    CloudUnavailable,
)
from drsync.target.ec2.aws_errors import translate


def foreign_classes() -> Sequence[type[Exception]]:
    found = [cls for _, cls in inspect.getmembers(aws, inspect.isclass) if issubclass(cls, aws.BotoCoreError)]
    assert len(found) > 60, "the way botocore defines its exceptions has changed"
    return found


def make(cls: type[Exception]) -> Exception:
    if issubclass(cls, aws.WaiterError):
        return cls(name="snapshot_completed", reason="too many tries", last_response={})
    names = {name for _, name, _, _ in Formatter().parse(getattr(cls, "fmt", "")) if name}
    return cls(**{name.split(".")[0]: f"<{name}>" for name in names})


def told(err: Exception) -> CloudError:
    return translate(err, region="eu-north-1", operation="RunInstances")


def reply(code: str, status: int, message: str = "Some words.", **more: str) -> aws.ClientError:
    answer: Any = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status},
        **more,
    }
    return aws.ClientError(answer, "RunInstances")


@pytest.mark.parametrize("cls", foreign_classes(), ids=lambda cls: cls.__name__)
def test_every_exception_of_botocore_becomes_a_cloud_error(cls: type[Exception]) -> None:
    err = make(cls)
    assert isinstance(err, FOREIGN)
    assert isinstance(told(err), CloudError)


@pytest.mark.parametrize(
    ("code", "status", "wanted"),
    [
        ("RequestThrottledException", 400, CloudUnavailable),
        ("RequestLimitExceeded", 503, CloudUnavailable),
        ("InternalServerException", 500, CloudUnavailable),
        ("UnauthorizedOperation", 403, CloudDenied),
        ("AccessDeniedException", 403, CloudDenied),
        ("AuthFailure", 401, CloudDenied),
        ("ResourceNotFoundException", 404, CloudNotFound),
        ("InvalidSnapshot.NotFound", 400, CloudNotFound),
        ("InvalidAMIID.NotFound", 400, CloudNotFound),
        ("ConcurrentLimitExceededException", 400, CloudLimit),
        ("ServiceQuotaExceededException", 402, CloudLimit),
        ("InsufficientInstanceCapacity", 500, CloudLimit),
        ("VcpuLimitExceeded", 400, CloudLimit),
        ("InvalidAMIName.Duplicate", 400, CloudRefused),
        ("ValidationException", 400, CloudRefused),
    ],
)
def test_an_answer_of_aws_is_understood(code: str, status: int, wanted: type[CloudError]) -> None:
    assert type(told(reply(code, status))) is wanted


def test_a_refusal_carries_the_code_and_the_reason_of_aws() -> None:
    error = told(reply("ValidationException", 400, "It is not so.", Reason="INVALID_SNAPSHOT_ID"))
    assert error.fields["aws_code"] == "ValidationException"
    assert error.fields["reason"] == "INVALID_SNAPSHOT_ID"
    expected = "RunInstances was refused in eu-north-1: ValidationException: It is not so (INVALID_SNAPSHOT_ID)"
    assert str(error) == expected


def test_what_is_not_aws_is_unavailable_and_a_name_that_nobody_has_is_a_mistake() -> None:
    assert type(told(ResponseParserError("<html>"))) is CloudUnavailable
    assert type(told(aws.NoRegionError())) is CloudMisconfigured


def test_a_message_of_the_network_is_one_line() -> None:
    assert "\n" not in str(told(reply("Odd", 400, "one\ntwo\x1b[31m")))
