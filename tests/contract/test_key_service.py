"""What wraps the key ring for a slot of KMS: one suite for AWS's (in LocalStack) and for its twin in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from key_service import MemoryKms
from s3_lab import CREDENTIALS, REGION
from s3_stub import Reply, StubS3

from drsync.errors import KmsUnusable
from drsync.format.ring import Slot
from drsync.keyring import KeyService
from drsync.kms import AwsKms

if TYPE_CHECKING:
    from mypy_boto3_kms import KMSClient

PLAIN = bytes(range(32))
NEVER = f"arn:aws:kms:{REGION}:000000000000:key/0b7d9b3c-0000-0000-0000-000000000000"
CONTEXT = {"drsync:repository": "ab" * 16}


@dataclass(frozen=True, slots=True)
class Lab:
    """A KMS, and what its owner does to keys in it."""

    kms: KeyService
    make_key: Callable[[], str]
    delete_key: Callable[[str], object]
    rotate_key: Callable[[str], object]

    def slot(self) -> Slot:
        return slot_of(self.make_key())


def slot_of(key: str) -> Slot:
    return Slot(name="aws", kind="kms", added="2026", key=key, region=REGION)


@pytest.fixture(params=["memory", pytest.param("localstack", marks=pytest.mark.localstack)])
def lab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    if request.param == "memory":
        twin = MemoryKms()
        yield Lab(twin, twin.make_key, twin.keys.pop, lambda _: None)
        return
    endpoint_url = request.getfixturevalue("localstack")
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", endpoint_url)
    client = kms_client(endpoint_url)
    yield Lab(
        AwsKms(),
        lambda: client.create_key()["KeyMetadata"]["Arn"],
        lambda key: client.schedule_key_deletion(KeyId=key, PendingWindowInDays=7),
        lambda key: client.rotate_key_on_demand(KeyId=key),
    )
    client.close()


def kms_client(endpoint_url: str) -> "KMSClient":
    import boto3

    session = boto3.session.Session(
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=REGION,
    )
    return session.client("kms", endpoint_url=endpoint_url)


def test_what_was_wrapped_comes_back(lab: Lab) -> None:
    slot = lab.slot()
    wrapped = lab.kms.wrap(slot, PLAIN, CONTEXT)
    assert PLAIN not in wrapped
    assert lab.kms.unwrap(slot, wrapped, CONTEXT) == PLAIN
    assert lab.kms.wrap(slot, PLAIN, CONTEXT) != wrapped


def test_it_opens_for_its_own_repository_and_with_its_own_key_only(lab: Lab) -> None:
    slot = lab.slot()
    wrapped = lab.kms.wrap(slot, PLAIN, CONTEXT)
    with pytest.raises(KmsUnusable):
        lab.kms.unwrap(slot, wrapped, {"drsync:repository": "cd" * 16})
    with pytest.raises(KmsUnusable, match="it was wrapped by another key"):
        lab.kms.unwrap(lab.slot(), wrapped, CONTEXT)
    with pytest.raises(KmsUnusable):
        lab.kms.unwrap(slot, wrapped[:-1] + bytes([wrapped[-1] ^ 1]), CONTEXT)


def test_a_key_that_is_deleted_is_named_with_its_slot(lab: Lab) -> None:
    slot = lab.slot()
    wrapped = lab.kms.wrap(slot, PLAIN, CONTEXT)
    lab.delete_key(slot.key)
    with pytest.raises(KmsUnusable, match=r"key is deleted|no such key") as caught:
        lab.kms.unwrap(slot, wrapped, CONTEXT)
    assert str(caught.value).startswith(f"slot aws: KMS can't decrypt with key {slot.key}: ")
    with pytest.raises(KmsUnusable, match="can't encrypt"):
        lab.kms.wrap(slot, PLAIN, CONTEXT)


def test_a_key_that_never_was_is_told(lab: Lab) -> None:
    with pytest.raises(KmsUnusable, match="no such key"):
        lab.kms.wrap(slot_of(NEVER), PLAIN, CONTEXT)


def test_what_was_wrapped_opens_after_kms_has_rotated_its_key(lab: Lab) -> None:
    """Rule 25."""
    slot = lab.slot()
    wrapped = lab.kms.wrap(slot, PLAIN, CONTEXT)
    lab.rotate_key(slot.key)
    assert lab.kms.unwrap(slot, wrapped, CONTEXT) == PLAIN
    assert lab.kms.unwrap(slot, lab.kms.wrap(slot, PLAIN, CONTEXT), CONTEXT) == PLAIN


ARN = "arn:aws:kms:us-east-1:000000000000:key/1"
JSON = {"Content-Type": "application/x-amz-json-1.1"}


def refusal(code: str, message: str = "text", status: int = 400) -> Reply:
    """An error as the KMS API reference documents it."""
    body = f'{{"__type":"{code}","message":"{message}"}}'
    return Reply(status=status, body=body.encode(), headers=JSON)


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (refusal("AccessDeniedException", "User: arn:x is not authorized"), "these credentials may not (AccessDenied"),
        (refusal("DisabledException"), "the key is disabled (DisabledException: text)"),
        (refusal("KMSInvalidStateException"), "the key is deleted, or waits to be (KMS"),
        (refusal("InvalidCiphertextException"), "for another repository, or was changed"),
        (refusal("ValidationException", "a\\nb"), "ValidationException: a b"),
        (Reply(status=200, body=b"{}", headers=JSON), "the reply is not one of KMS"),
        (Reply(status=200, body=b'{"Plaintext":"AAAA"}', headers=JSON), "it holds something else"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_aws_answers_is_said_in_plain_words(reply: Reply, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with StubS3(reply) as stub:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", stub.endpoint_url)
        with pytest.raises(KmsUnusable) as caught:
            AwsKms().unwrap(slot_of(ARN), b"wrapped", CONTEXT)
        assert problem in str(caught.value)
        assert len(stub.requests) == 1
        assert b'"KeyId"' in stub.requests[0].body


def test_without_credentials_or_a_server_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:9")
    with pytest.raises(KmsUnusable, match="credentials"):
        AwsKms().wrap(slot_of(ARN), PLAIN, CONTEXT)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KmsUnusable, match="Could not connect"):
        AwsKms().wrap(slot_of(ARN), PLAIN, CONTEXT)
