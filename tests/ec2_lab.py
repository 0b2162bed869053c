"""EC2, EBS direct and VM Import of LocalStack, with every answer checked against botocore's model."""

import base64
import hashlib
import http.client
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator
from s3_lab import CREDENTIALS, REGION

if TYPE_CHECKING:
    from mypy_boto3_ebs import EBSClient
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ec2.type_defs import ImportImageTaskTypeDef, SnapshotTaskDetailTypeDef
    from mypy_boto3_iam import IAMClient
    from mypy_boto3_s3 import S3Client

BLOCK_BYTES = 512 * 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloud:
    """An AWS account of one test: nothing of another test's is seen."""

    endpoint_url: str
    account: str
    ebs: "EBSClient"
    ec2: "EC2Client"
    s3: "S3Client"
    iam: "IAMClient"

    def control(self, method: str, path: str, document: object = None) -> dict[str, Any]:
        """A request to the plug-in's own endpoints."""
        parts = urlsplit(self.endpoint_url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        connection.request(method, f"/_drsync/{path}", None if document is None else json.dumps(document))
        answer = connection.getresponse()
        found: dict[str, Any] = json.loads(answer.read())
        assert answer.status == 200, found
        connection.close()
        return found

    def faults(self, **settings: object) -> None:
        """Switch faults on; those that are not named are off."""
        self.control("PUT", "faults", settings)

    def fired(self) -> dict[str, int]:
        """How often each fault has hit."""
        found: dict[str, int] = self.control("GET", "faults")["fired"]
        return found

    def advance(self, seconds: float) -> None:
        """Let time pass for LocalStack's snapshots, tokens and tasks."""
        self.control("POST", "clock", {"advance_s": seconds})

    def put(self, snapshot_id: str, index: int, data: bytes, checksum: bytes | None = None) -> None:
        """PutSnapshotBlock."""
        self.ebs.put_snapshot_block(
            SnapshotId=snapshot_id,
            BlockIndex=index,
            BlockData=data,
            DataLength=len(data),
            Checksum=encoded(checksum or hashlib.sha256(data).digest()),
            ChecksumAlgorithm="SHA256",
        )

    def snapshot(self, size_gib: int, blocks: Mapping[int, bytes], parent: str = "") -> str:
        """A completed snapshot with these blocks."""
        more: dict[str, Any] = {"ParentSnapshotId": parent} if parent else {}
        snapshot_id = self.ebs.start_snapshot(VolumeSize=size_gib, **more)["SnapshotId"]
        for index, data in blocks.items():
            self.put(snapshot_id, index, data)
        self.ebs.complete_snapshot(
            SnapshotId=snapshot_id,
            ChangedBlocksCount=len(blocks),
            Checksum=encoded(aggregate(blocks)),
            ChecksumAlgorithm="SHA256",
            ChecksumAggregationMethod="LINEAR",
        )
        return snapshot_id

    def read(self, snapshot_id: str) -> dict[int, bytes]:
        """All blocks of a snapshot, by ListSnapshotBlocks and GetSnapshotBlock."""
        found: dict[int, bytes] = {}
        more: dict[str, Any] = {}
        while True:
            page = self.ebs.list_snapshot_blocks(SnapshotId=snapshot_id, MaxResults=100, **more)
            for block in page["Blocks"]:
                found[block["BlockIndex"]] = self.get(snapshot_id, block["BlockIndex"], block["BlockToken"])
            if "NextToken" not in page:
                return found
            more = {"NextToken": page["NextToken"]}

    def get(self, snapshot_id: str, index: int, token: str) -> bytes:
        """GetSnapshotBlock, with its checksum checked."""
        answer = self.ebs.get_snapshot_block(SnapshotId=snapshot_id, BlockIndex=index, BlockToken=token)
        data = answer["BlockData"].read()
        assert answer["Checksum"] == encoded(hashlib.sha256(data).digest())
        assert len(data) == answer["DataLength"] == BLOCK_BYTES
        return data

    def make_role(self, name: str = "vmimport", service: str = "vmie.amazonaws.com") -> None:
        """The role that VM Import takes on."""
        trust = {"Effect": "Allow", "Principal": {"Service": service}, "Action": "sts:AssumeRole"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        self.iam.create_role(RoleName=name, AssumeRolePolicyDocument=document)

    def snapshot_task(self, task_id: str) -> "SnapshotTaskDetailTypeDef":
        """The detail of a task of ImportSnapshot."""
        (task,) = self.ec2.describe_import_snapshot_tasks(ImportTaskIds=[task_id])["ImportSnapshotTasks"]
        return task["SnapshotTaskDetail"]

    def image_task(self, task_id: str) -> "ImportImageTaskTypeDef":
        """A task of ImportImage."""
        (task,) = self.ec2.describe_import_image_tasks(ImportTaskIds=[task_id])["ImportImageTasks"]
        return task

    def close(self) -> None:
        for client in (self.ebs, self.ec2, self.s3, self.iam):
            client.close()


def connect(endpoint_url: str, account: str) -> Cloud:
    """The clients of an account. They don't retry: a test sees each answer."""
    config = Config(retries={"total_max_attempts": 1})
    made: dict[str, Any] = {
        name: _session().client(
            name,
            aws_access_key_id=account,
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region_name=REGION,
            endpoint_url=endpoint_url,
            config=config,
        )
        for name in ("ebs", "ec2", "s3", "iam")
    }
    for name in ("ebs", "ec2"):
        made[name].meta.events.register(f"after-call.{name}", _check_answer)
    return Cloud(endpoint_url=endpoint_url, account=account, **made)


@cache
def _session() -> "boto3.session.Session":
    """One for all accounts: EC2's model takes a second to read."""
    return boto3.session.Session()


def wait_for(look: Callable[[], T], until: Callable[[T], bool], timeout_s: float = 30.0) -> T:
    """What `look` gives once it is as wanted."""
    deadline = time.monotonic() + timeout_s
    while not until(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def refusal(error: ClientError) -> tuple[str, str]:
    """The code and the reason with which a request was refused."""
    return error.response["Error"]["Code"], str(error.response.get("Reason", ""))


def encoded(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def aggregate(blocks: Mapping[int, bytes]) -> bytes:
    """The checksum of CompleteSnapshot."""
    return hashlib.sha256(b"".join(hashlib.sha256(blocks[index]).digest() for index in sorted(blocks))).digest()


def _check_answer(model: Any, parsed: dict[str, Any], **_: object) -> None:
    """Fail when an answer is none that AWS could give: a wrong type, no enumerated value, not of the pattern."""
    if "Error" in parsed or model.output_shape is None:
        return
    answer = {name: value for name, value in parsed.items() if name != "ResponseMetadata"}
    report = ParamValidator().validate(_without_streams(model.output_shape, answer), model.output_shape)
    assert not report.has_errors(), f"{model.name}: {report.generate_report()}"
    wrong = list(_wrong_strings(model.output_shape, answer, model.name))
    assert not wrong, wrong


def _without_streams(shape: Any, answer: dict[str, Any]) -> dict[str, Any]:
    return {name: b"" if shape.members[name].type_name == "blob" else value for name, value in answer.items()}


def _wrong_strings(shape: Any, value: Any, where: str) -> Iterable[str]:
    if shape.type_name == "structure":
        for name, member in value.items():
            yield from _wrong_strings(shape.members[name], member, f"{where}.{name}")
    elif shape.type_name == "list":
        for member in value:
            yield from _wrong_strings(shape.member, member, where)
    elif shape.type_name == "string":
        if shape.enum and value not in shape.enum:
            yield f"{where}: {value!r} is none of {shape.enum}"
        pattern = shape.metadata.get("pattern")
        if pattern and not re.search(pattern, value):
            yield f"{where}: {value!r} is not {pattern}"
