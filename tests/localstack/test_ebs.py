"""EBS direct of LocalStack: what AWS checks, and what it does to its callers."""

import hashlib
import os
import threading
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from ec2_lab import BLOCK_BYTES, Cloud, aggregate, connect, encoded, refusal, wait_for
from s3_lab import ROOT

pytestmark = pytest.mark.localstack

ZERO = bytes(BLOCK_BYTES)


def block(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest() * (BLOCK_BYTES // 32)


def test_blocks_come_back_and_a_child_has_what_it_does_not_overwrite(cloud: Cloud) -> None:
    first = cloud.snapshot(1, {0: block("a"), 7: block("b"), 2047: block("c")})
    second = cloud.snapshot(2, {7: ZERO, 4095: block("d")}, parent=first)
    assert cloud.read(first) == {0: block("a"), 7: block("b"), 2047: block("c")}
    assert cloud.read(second) == {0: block("a"), 7: ZERO, 2047: block("c"), 4095: block("d")}

    changed = cloud.ebs.list_changed_blocks(FirstSnapshotId=first, SecondSnapshotId=second)["ChangedBlocks"]
    assert [(one["BlockIndex"], "FirstBlockToken" in one, "SecondBlockToken" in one) for one in changed] == [
        (7, True, True),
        (4095, False, True),
    ]
    assert cloud.get(second, 7, changed[0]["SecondBlockToken"]) == ZERO
    assert cloud.get(first, 7, changed[0]["FirstBlockToken"]) == block("b")


def test_the_last_write_of_a_block_counts_and_the_block_is_counted_once(cloud: Cloud) -> None:
    snapshot_id = cloud.ebs.start_snapshot(VolumeSize=1)["SnapshotId"]
    cloud.put(snapshot_id, 5, block("old"))
    cloud.put(snapshot_id, 5, block("new"))
    cloud.ebs.complete_snapshot(SnapshotId=snapshot_id, ChangedBlocksCount=1)
    assert cloud.read(snapshot_id) == {5: block("new")}


def test_a_listing_has_pages_which_can_be_empty(cloud: Cloud) -> None:
    blocks = {index: block("x") for index in range(0, 250, 2)}
    snapshot_id = cloud.snapshot(1, blocks)
    cloud.faults(empty_pages=True)
    empty = cloud.ebs.list_snapshot_blocks(SnapshotId=snapshot_id, MaxResults=100)
    assert (empty["Blocks"], "NextToken" in empty) == ([], True)
    assert cloud.read(snapshot_id) == blocks
    assert cloud.fired()["empty_pages"] == 2
    cloud.faults()
    tail = cloud.ebs.list_snapshot_blocks(SnapshotId=snapshot_id, StartingBlockIndex=241)["Blocks"]
    assert [one["BlockIndex"] for one in tail] == [242, 244, 246, 248]


@pytest.mark.parametrize(
    ("index", "data", "checksum", "reason"),
    [
        (0, block("a"), hashlib.sha256(b"else").digest(), "INVALID_PARAMETER_VALUE"),
        (0, block("a")[:-1], None, "INVALID_BLOCK"),
        (2048, block("a"), None, "INVALID_BLOCK"),
    ],
    ids=["wrong checksum", "wrong size", "behind the volume's end"],
)
def test_a_wrong_block_is_refused(cloud: Cloud, index: int, data: bytes, checksum: bytes | None, reason: str) -> None:
    snapshot_id = cloud.ebs.start_snapshot(VolumeSize=1)["SnapshotId"]
    with pytest.raises(ClientError) as refused:
        cloud.put(snapshot_id, index, data, checksum)
    assert refusal(refused.value) == ("ValidationException", reason)
    cloud.ebs.complete_snapshot(SnapshotId=snapshot_id, ChangedBlocksCount=0)
    assert cloud.read(snapshot_id) == {}


def test_a_wrong_count_and_a_wrong_aggregate_checksum_are_refused_and_can_be_put_right(cloud: Cloud) -> None:
    blocks = {1: block("a"), 0: block("b")}
    snapshot_id = cloud.ebs.start_snapshot(VolumeSize=1)["SnapshotId"]
    for index, data in blocks.items():
        cloud.put(snapshot_id, index, data)
    with pytest.raises(ClientError, match="ChangedBlocksCount") as count:
        cloud.ebs.complete_snapshot(SnapshotId=snapshot_id, ChangedBlocksCount=3)
    assert refusal(count.value)[0] == "ValidationException"
    for wrong in (hashlib.sha256(block("b") + block("a")).digest(), aggregate({0: block("a"), 1: block("b")})):
        with pytest.raises(ClientError, match="checksum") as checksum:
            cloud.ebs.complete_snapshot(
                SnapshotId=snapshot_id,
                ChangedBlocksCount=2,
                Checksum=encoded(wrong),
                ChecksumAlgorithm="SHA256",
                ChecksumAggregationMethod="LINEAR",
            )
        assert refusal(checksum.value)[0] == "ValidationException"
    cloud.ebs.complete_snapshot(
        SnapshotId=snapshot_id,
        ChangedBlocksCount=2,
        Checksum=encoded(aggregate(blocks)),
        ChecksumAlgorithm="SHA256",
        ChecksumAggregationMethod="LINEAR",
    )
    assert cloud.read(snapshot_id) == blocks


def test_states_are_kept_apart(cloud: Cloud) -> None:
    cloud.faults(completion_delay_s=3600)
    snapshot_id = cloud.ebs.start_snapshot(VolumeSize=1, Description="of a test")["SnapshotId"]
    with pytest.raises(ClientError):
        cloud.ebs.list_snapshot_blocks(SnapshotId=snapshot_id)
    with pytest.raises(ClientError):
        cloud.ebs.start_snapshot(VolumeSize=1, ParentSnapshotId=snapshot_id)
    assert cloud.ebs.complete_snapshot(SnapshotId=snapshot_id, ChangedBlocksCount=0)["Status"] == "pending"
    with pytest.raises(ClientError):
        cloud.put(snapshot_id, 0, ZERO)
    (shown,) = cloud.ec2.describe_snapshots(SnapshotIds=[snapshot_id])["Snapshots"]
    assert (shown["State"], shown["Description"], shown["VolumeSize"]) == ("pending", "of a test", 1)
    cloud.advance(3601)
    (shown,) = cloud.ec2.describe_snapshots(SnapshotIds=[snapshot_id])["Snapshots"]
    assert shown["State"] == "completed"
    assert cloud.read(snapshot_id) == {}


def test_a_client_token_gives_the_same_snapshot_and_conflicts_with_other_parameters(cloud: Cloud) -> None:
    first = cloud.ebs.start_snapshot(VolumeSize=1, ClientToken="once")["SnapshotId"]
    assert cloud.ebs.start_snapshot(VolumeSize=1, ClientToken="once")["SnapshotId"] == first
    with pytest.raises(ClientError) as refused:
        cloud.ebs.start_snapshot(VolumeSize=2, ClientToken="once")
    assert refusal(refused.value)[0] == "ConflictException"
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 409
    assert len(cloud.ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]) >= 1


def test_encrypted_and_parent_exclude_each_other_and_a_child_is_not_smaller(cloud: Cloud) -> None:
    parent = cloud.snapshot(2, {})
    with pytest.raises(ClientError) as both:
        cloud.ebs.start_snapshot(VolumeSize=2, ParentSnapshotId=parent, Encrypted=True)
    assert refusal(both.value) == ("ValidationException", "INVALID_DEPENDENCY_REQUEST")
    with pytest.raises(ClientError) as smaller:
        cloud.ebs.start_snapshot(VolumeSize=1, ParentSnapshotId=parent)
    assert refusal(smaller.value) == ("ValidationException", "INVALID_VOLUME_SIZE")
    with pytest.raises(ClientError) as none:
        cloud.ebs.start_snapshot(VolumeSize=1, ParentSnapshotId="snap-0123")
    assert refusal(none.value) == ("ResourceNotFoundException", "SNAPSHOT_NOT_FOUND")


def test_a_snapshot_does_not_exist_for_a_while_after_its_start(cloud: Cloud) -> None:
    cloud.faults(visibility_delay_s=120)
    snapshot_id = cloud.ebs.start_snapshot(VolumeSize=1)["SnapshotId"]
    with pytest.raises(ClientError, match="does not exist") as put:
        cloud.put(snapshot_id, 0, block("a"))
    assert refusal(put.value) == ("ResourceNotFoundException", "SNAPSHOT_NOT_FOUND")
    with pytest.raises(ClientError) as described:
        cloud.ec2.describe_snapshots(SnapshotIds=[snapshot_id])
    assert refusal(described.value)[0] == "InvalidSnapshot.NotFound"
    assert cloud.fired() == {"visibility_delay_s": 2}
    cloud.advance(121)
    cloud.put(snapshot_id, 0, block("a"))


def test_too_many_requests_are_throttled(cloud: Cloud) -> None:
    cloud.faults(rules=[{"operation": "PutSnapshotBlock", "times": 2, "error": "throttle"}])
    snapshot_id = cloud.ebs.start_snapshot(VolumeSize=1)["SnapshotId"]
    for _ in range(2):
        with pytest.raises(ClientError) as throttled:
            cloud.put(snapshot_id, 0, block("a"))
        assert refusal(throttled.value) == ("RequestThrottledException", "ACCOUNT_THROTTLED")
    cloud.put(snapshot_id, 0, block("a"))
    assert cloud.fired() == {"PutSnapshotBlock": 2}

    cloud.faults(rates={"PutSnapshotBlock": 3})
    answers = []
    for _ in range(12):
        try:
            cloud.put(snapshot_id, 1, block("b"))
            answers.append("written")
        except ClientError as err:
            answers.append(refusal(err)[0])
    assert answers[:3] == ["written"] * 3
    assert answers.count("RequestThrottledException") == cloud.fired()["PutSnapshotBlock"] > 0


def test_ec2_throttles_with_an_error_of_its_own(cloud: Cloud) -> None:
    cloud.faults(rules=[{"operation": "RegisterImage", "times": 1, "error": "throttle"}])
    with pytest.raises(ClientError) as throttled:
        cloud.ec2.register_image(Name="some image")
    assert refusal(throttled.value)[0] == "RequestLimitExceeded"


def test_an_answer_can_be_lost_after_the_deed(cloud: Cloud) -> None:
    error = {"code": "InternalServerException", "status": 500}
    cloud.faults(rules=[{"operation": "CompleteSnapshot", "times": 1, "after": True, "error": error}])
    snapshot_id = cloud.ebs.start_snapshot(VolumeSize=1)["SnapshotId"]
    with pytest.raises(ClientError):
        cloud.ebs.complete_snapshot(SnapshotId=snapshot_id, ChangedBlocksCount=0)
    assert cloud.read(snapshot_id) == {}
    assert cloud.fired() == {"CompleteSnapshot": 1}


def test_a_request_can_stall(cloud: Cloud) -> None:
    cloud.faults(rules=[{"operation": "StartSnapshot", "times": 1, "delay_s": 0.5}])
    done = threading.Event()

    def start() -> None:
        cloud.ebs.start_snapshot(VolumeSize=1)
        done.set()

    thread = threading.Thread(target=start)
    thread.start()
    assert not done.wait(0.3)
    thread.join()
    assert cloud.fired() == {"StartSnapshot": 1}


def test_a_hundred_snapshots_may_be_pending(cloud: Cloud) -> None:
    started = [cloud.ebs.start_snapshot(VolumeSize=1)["SnapshotId"] for _ in range(100)]
    with pytest.raises(ClientError) as refused:
        cloud.ebs.start_snapshot(VolumeSize=1)
    assert refusal(refused.value)[0] == "ConcurrentLimitExceededException"
    assert cloud.fired() == {"pending_limit": 1}
    cloud.ec2.delete_snapshot(SnapshotId=started[0])
    cloud.ebs.complete_snapshot(SnapshotId=started[1], ChangedBlocksCount=0)
    for _ in range(2):
        cloud.ebs.start_snapshot(VolumeSize=1)
    with pytest.raises(ClientError):
        cloud.ebs.start_snapshot(VolumeSize=1)


def test_a_snapshot_that_gets_no_blocks_in_time_fails(cloud: Cloud) -> None:
    snapshot_id = cloud.ebs.start_snapshot(VolumeSize=1, Timeout=10)["SnapshotId"]
    cloud.advance(9 * 60)
    cloud.put(snapshot_id, 0, block("a"))
    cloud.advance(9 * 60)
    cloud.put(snapshot_id, 1, block("b"))
    cloud.advance(11 * 60)
    with pytest.raises(ClientError) as refused:
        cloud.put(snapshot_id, 2, block("c"))
    assert refusal(refused.value) == ("ValidationException", "WRITE_REQUEST_TIMEOUT")
    (shown,) = cloud.ec2.describe_snapshots(SnapshotIds=[snapshot_id])["Snapshots"]
    assert shown["State"] == "error"


def test_tokens_expire_and_fit_one_block_and_one_listing_only(cloud: Cloud) -> None:
    snapshot_id = cloud.snapshot(1, {index: block("a") for index in range(101)})
    other = cloud.snapshot(1, {0: block("a")})
    page = cloud.ebs.list_snapshot_blocks(SnapshotId=snapshot_id, MaxResults=100)
    token = page["Blocks"][0]["BlockToken"]
    for wrong in ((snapshot_id, 1, token), (other, 0, token), (snapshot_id, 0, "AAAA")):
        with pytest.raises(ClientError) as refused:
            cloud.get(*wrong)
        assert refusal(refused.value) == ("ValidationException", "INVALID_BLOCK_TOKEN")
    with pytest.raises(ClientError) as foreign:
        cloud.ebs.list_snapshot_blocks(SnapshotId=other, NextToken=page["NextToken"])
    assert refusal(foreign.value) == ("ValidationException", "INVALID_PAGE_TOKEN")

    cloud.advance(3601)
    with pytest.raises(ClientError) as late:
        cloud.ebs.list_snapshot_blocks(SnapshotId=snapshot_id, NextToken=page["NextToken"])
    assert refusal(late.value) == ("ValidationException", "INVALID_PAGE_TOKEN")
    assert cloud.get(snapshot_id, 0, token) == block("a")
    cloud.advance(7 * 24 * 3600)
    with pytest.raises(ClientError) as expired:
        cloud.get(snapshot_id, 0, token)
    assert refusal(expired.value) == ("ValidationException", "INVALID_BLOCK_TOKEN")


def test_snapshots_of_two_lineages_cannot_be_compared(cloud: Cloud) -> None:
    first, second = cloud.snapshot(1, {0: block("a")}), cloud.snapshot(1, {0: block("a")})
    with pytest.raises(ClientError) as refused:
        cloud.ebs.list_changed_blocks(FirstSnapshotId=first, SecondSnapshotId=second)
    assert refusal(refused.value) == ("ValidationException", "UNRELATED_SNAPSHOTS")


def test_another_account_sees_nothing_of_it(cloud: Cloud, localstack: str) -> None:
    snapshot_id = cloud.snapshot(1, {0: block("a")})
    other = connect(localstack, "999999999999")
    with pytest.raises(ClientError) as refused:
        other.ebs.list_snapshot_blocks(SnapshotId=snapshot_id)
    assert refusal(refused.value)[0] == "ResourceNotFoundException"
    other.close()


def test_a_deleted_parent_leaves_its_children_whole_and_gives_its_own_blocks_back(
    cloud: Cloud, own_localstack: Path
) -> None:
    before = stored(own_localstack)
    first = cloud.snapshot(1, {0: os.urandom(BLOCK_BYTES), 1: os.urandom(BLOCK_BYTES)})
    second = cloud.snapshot(1, {0: block("child")}, parent=first)
    whole = cloud.read(second)
    assert stored(own_localstack) == before + 3
    cloud.ec2.delete_snapshot(SnapshotId=first)
    assert cloud.read(second) == whole
    cloud.ec2.delete_snapshot(SnapshotId=second)
    assert stored(own_localstack) == before
    with pytest.raises(ClientError):
        cloud.ebs.list_snapshot_blocks(SnapshotId=second)


def test_a_disk_of_2_tib_costs_what_its_data_does(cloud: Cloud, own_localstack: Path) -> None:
    memory, before = resident_kib(own_localstack), stored(own_localstack)
    blocks = {index * 32768: os.urandom(BLOCK_BYTES) for index in range(128)}  # 64 MiB, spread over 2 TiB
    snapshot_id = cloud.snapshot(2048, blocks)
    image = cloud.ec2.register_image(
        Name="large",
        Architecture="x86_64",
        VirtualizationType="hvm",
        RootDeviceName="/dev/sda1",
        BlockDeviceMappings=[{"DeviceName": "/dev/sda1", "Ebs": {"SnapshotId": snapshot_id}}],
    )["ImageId"]
    run = cloud.ec2.run_instances(ImageId=image, InstanceType="t2.micro", MinCount=1, MaxCount=1)
    instance_id = run["Instances"][0]["InstanceId"]
    found = cloud.ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [instance_id]}])
    again = cloud.ec2.create_snapshot(VolumeId=found["Volumes"][0]["VolumeId"])["SnapshotId"]
    assert cloud.read(again) == blocks
    assert cloud.ebs.list_changed_blocks(FirstSnapshotId=snapshot_id, SecondSnapshotId=again)["ChangedBlocks"] == []
    assert stored(own_localstack) == before + 128
    assert resident_kib(own_localstack) - memory < 64 * 1024


@pytest.fixture
def own_localstack(localstack: str) -> Path:
    """The directory of a LocalStack that start.sh started: its process and its disk can be looked at."""
    state = ROOT / ".lab/localstack" / localstack.rsplit(":", 1)[1]
    if not state.is_dir():
        pytest.skip("a LocalStack that was given (DRSYNC_TEST_LOCALSTACK) can't be looked into")
    return state


def stored(state: Path) -> int:
    """How many blocks LocalStack has on disk."""
    return sum(path.is_file() for path in state.rglob("drsync-ebs/??/*"))


def resident_kib(state: Path) -> int:
    """The memory that LocalStack's process has."""
    status = Path(f"/proc/{(state / 'pid').read_text().strip()}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def test_it_completes_by_itself_when_the_delay_is_over(cloud: Cloud) -> None:
    cloud.faults(completion_delay_s=0.3)
    snapshot_id = cloud.snapshot(1, {})
    states = set()

    def state() -> str:
        found = cloud.ec2.describe_snapshots(SnapshotIds=[snapshot_id])["Snapshots"][0]["State"]
        states.add(found)
        return found

    wait_for(state, lambda found: found == "completed")
    assert states == {"pending", "completed"}
