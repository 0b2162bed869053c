"""The session with AWS: one retry layer, timeouts, errors translated, each request told once."""

import time
from collections.abc import Callable

import pytest
from ec2_lab import Cloud
from s3_lab import REGION

from drsync.errors import CloudMisconfigured, CloudNotFound, CloudRefused, CloudUnavailable
from drsync.target.ec2.aws import ATTEMPTS, Aws, Call, CloudOptions

pytestmark = pytest.mark.localstack

Connect = Callable[..., Aws]


def test_a_region_must_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CloudMisconfigured, match="no region"):
        _ = Aws().ec2
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert Aws().region == "eu-north-1"
    assert Aws(CloudOptions(region="eu-west-1")).region == "eu-west-1"


def test_what_is_throttled_or_breaks_is_repeated_and_told_once(cloud: Cloud, aws: Aws, calls: list[Call]) -> None:
    cloud.faults(
        rules=[
            {"operation": "StartSnapshot", "times": 2, "error": "throttle"},
            {"operation": "StartSnapshot", "times": 1, "error": {"code": "InternalServerException", "status": 500}},
        ]
    )
    with aws.translated("StartSnapshot"):
        aws.ebs.start_snapshot(VolumeSize=1)
    assert cloud.fired()["StartSnapshot"] == 3
    assert [(call.service, call.operation) for call in calls] == [("ebs", "StartSnapshot")]
    assert calls[0].parameters["VolumeSize"] == 1


def test_what_is_throttled_for_good_is_unavailable(cloud: Cloud, aws: Aws) -> None:
    cloud.faults(rules=[{"operation": "RegisterImage", "times": 99, "error": {"code": "Unavailable", "status": 503}}])
    with pytest.raises(CloudUnavailable, match=f"RegisterImage does not work now in {REGION}"):
        with aws.translated("RegisterImage"):
            aws.ec2.register_image(Name="abc")
    assert cloud.fired()["RegisterImage"] == ATTEMPTS


def test_a_request_that_stalls_is_given_up_and_sent_again(cloud: Cloud, connect_aws: Connect) -> None:
    aws = connect_aws(read_timeout_s=1.0)
    snapshot_id = aws.ebs.start_snapshot(VolumeSize=1)["SnapshotId"]
    cloud.faults(rules=[{"operation": "CompleteSnapshot", "times": 1, "delay_s": 4.0}])
    began = time.monotonic()
    with aws.translated("CompleteSnapshot"):
        aws.ebs.complete_snapshot(SnapshotId=snapshot_id, ChangedBlocksCount=0)
    assert time.monotonic() - began < 4.0
    assert cloud.fired()["CompleteSnapshot"] == 1


def test_refusals_are_told_apart(aws: Aws) -> None:
    with pytest.raises(CloudNotFound):
        with aws.translated("DescribeSnapshots"):
            aws.ec2.describe_snapshots(SnapshotIds=["snap-0123456789abcdef0"])
    with pytest.raises(CloudRefused) as caught:
        with aws.translated("StartSnapshot"):
            aws.ebs.start_snapshot(VolumeSize=70000)
    assert caught.value.fields["aws_code"] == "ValidationException"
