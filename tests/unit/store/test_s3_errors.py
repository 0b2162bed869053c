"""Every exception that botocore can raise becomes one of drsync's, and the right one."""

import inspect
import socket
import ssl
from collections.abc import Sequence
from string import Formatter

import botocore.exceptions as aws
import pytest
import urllib3.exceptions
from botocore.parsers import ResponseParserError

from drsync.boto import FOREIGN
from drsync.errors import (
    DrsyncError,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreMisconfigured,
    StoreUnavailable,
    StoreUnsafe,
)
from drsync.store.s3_errors import translate

NETWORK = (aws.ConnectionError, aws.HTTPClientError)

KNOWN: dict[str, type[DrsyncError]] = {
    "ConnectTimeoutError": StoreUnavailable,
    "ConnectionClosedError": StoreUnavailable,
    "CredentialRetrievalError": StoreDenied,
    "EndpointConnectionError": StoreUnavailable,
    "IncompleteReadError": StoreUnavailable,
    "InvalidRegionError": StoreMisconfigured,
    "MetadataRetrievalError": StoreUnavailable,
    "NoCredentialsError": StoreDenied,
    "ParamValidationError": StoreMisconfigured,
    "PartialCredentialsError": StoreDenied,
    "ProfileNotFound": StoreMisconfigured,
    "ProxyConnectionError": StoreUnavailable,
    "ReadTimeoutError": StoreUnavailable,
    "ResponseStreamingError": StoreUnavailable,
    "SSLError": StoreUnavailable,
    "SSOTokenLoadError": StoreDenied,
    "UnauthorizedSSOTokenError": StoreDenied,
}


def foreign_classes() -> Sequence[type[Exception]]:
    found = [cls for _, cls in inspect.getmembers(aws, inspect.isclass) if issubclass(cls, aws.BotoCoreError)]
    assert len(found) > 60, "the way botocore defines its exceptions has changed"
    return found


def make(cls: type[Exception]) -> Exception:
    """An instance with something in each field of its message."""
    if issubclass(cls, aws.WaiterError):
        return cls(name="bucket_exists", reason="too many tries", last_response={})
    names = {name for _, name, _, _ in Formatter().parse(getattr(cls, "fmt", "")) if name}
    return cls(**{name.split(".")[0]: f"<{name}>" for name in names})


def reply(status: int, code: str = "", message: str = "text", **more: str) -> aws.ClientError:
    error = {"Code": code or str(status), "Message": message, **more}
    metadata = {"HTTPStatusCode": status}
    return aws.ClientError({"Error": error, "ResponseMetadata": metadata}, "PutObject")  # type: ignore[typeddict-item]


def told(err: Exception) -> DrsyncError:
    return translate(err, url="s3://bucket/prefix", operation="create", key="vm/web/log/1")


@pytest.mark.parametrize("cls", foreign_classes(), ids=lambda cls: cls.__name__)
def test_every_exception_of_botocore_becomes_a_store_error(cls: type[Exception]) -> None:
    err = make(cls)
    assert isinstance(err, FOREIGN)
    error = told(err)
    assert isinstance(error, StoreError)
    assert "s3://bucket/prefix" in str(error)
    if issubclass(cls, NETWORK):
        assert isinstance(error, StoreUnavailable)
        assert error.retryable


@pytest.mark.parametrize(("name", "expected"), KNOWN.items())
def test_the_exceptions_that_calls_are_known_to_raise(name: str, expected: type[DrsyncError]) -> None:
    assert type(told(make(getattr(aws, name)))) is expected


@pytest.mark.parametrize(
    "err",
    [
        ResponseParserError("<html>\x1b[31mlog in to the hotel's network"),
        urllib3.exceptions.ProtocolError("broken"),
        urllib3.exceptions.SSLError("bad record"),
        ConnectionResetError(104, "reset"),
        TimeoutError(),
    ],
    ids=lambda err: type(err).__name__,
)
def test_what_comes_from_below_botocore_is_worth_a_retry(err: Exception) -> None:
    assert isinstance(err, FOREIGN)
    error = told(err)
    assert isinstance(error, StoreUnavailable)
    assert "\x1b" not in str(error)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (412, "PreconditionFailed", ObjectExists),
        (412, "", ObjectExists),
        (409, "ConditionalRequestConflict", StoreUnavailable),
        (409, "OperationAborted", StoreUnavailable),
        (404, "NoSuchKey", ObjectMissing),
        (404, "", ObjectMissing),
        (404, "NoSuchBucket", StoreMisconfigured),
        (416, "InvalidRange", ObjectDamaged),
        (500, "InternalError", StoreUnavailable),
        (502, "", StoreUnavailable),
        (503, "SlowDown", StoreUnavailable),
        (503, "ServiceUnavailable", StoreUnavailable),
        (429, "TooManyRequests", StoreUnavailable),
        (400, "RequestTimeout", StoreUnavailable),
        (400, "BadDigest", StoreUnavailable),
        (400, "XAmzContentSHA256Mismatch", StoreUnavailable),
        (400, "ExpiredToken", StoreDenied),
        (400, "InvalidToken", StoreDenied),
        (401, "", StoreDenied),
        (403, "AccessDenied", StoreDenied),
        (403, "", StoreDenied),
        (403, "InvalidAccessKeyId", StoreDenied),
        (403, "SignatureDoesNotMatch", StoreDenied),
        (403, "RequestTimeTooSkewed", StoreDenied),
        (403, "InvalidObjectState", StoreMisconfigured),
        (301, "PermanentRedirect", StoreMisconfigured),
        (400, "AuthorizationHeaderMalformed", StoreMisconfigured),
        (400, "InvalidBucketName", StoreMisconfigured),
        (501, "NotImplemented", StoreUnsafe),
        (507, "XMinioStorageFull", StoreFull),
        (507, "", StoreFull),
        (418, "NeverHeardOf", StoreMisconfigured),
    ],
)
def test_error_replies_of_the_store(status: int, code: str, expected: type[DrsyncError]) -> None:
    assert type(told(reply(status, code))) is expected


def test_what_a_store_does_not_implement_is_only_unsafe_if_it_is_the_create() -> None:
    error = translate(reply(501, "NotImplemented"), url="s3://bucket", operation="replace", key="host/hv1.json")
    assert type(error) is StoreMisconfigured


def test_a_denied_message_names_what_was_refused_and_why() -> None:
    error = told(reply(400, "ExpiredToken", "The provided token has expired."))
    assert "create vm/web/log/1" in str(error)
    assert "ExpiredToken: The provided token has expired." in str(error)
    assert error.remedy.startswith("aws sts get-caller-identity")


def test_what_the_store_sends_can_neither_flood_nor_steer_a_terminal() -> None:
    error = told(reply(503, "SlowDown", "\x1b[2J\r\n" + "x" * 100_000))
    assert "\x1b" not in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 500


def test_no_secret_of_a_signature_error_is_told() -> None:
    err = reply(403, "SignatureDoesNotMatch", AWSAccessKeyId="AKIAEXAMPLE", StringToSign="secret string")
    assert "AKIAEXAMPLE" not in str(told(err))
    assert "secret string" not in str(told(err))


def test_a_name_that_nobody_has_and_a_certificate_that_nobody_trusts_are_lasting() -> None:
    for cause in (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), ssl.SSLCertVerificationError()):
        err = make(aws.EndpointConnectionError)
        err.__context__ = cause
        assert isinstance(told(err), StoreMisconfigured)


def test_a_name_server_that_does_not_answer_is_worth_a_retry() -> None:
    err = make(aws.EndpointConnectionError)
    err.__context__ = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    assert isinstance(told(err), StoreUnavailable)
