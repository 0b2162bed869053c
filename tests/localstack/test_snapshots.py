"""drsync's EBS snapshots: what they hold, and that nothing that AWS does to its callers makes them wrong."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from ec2_lab import BLOCK_BYTES, Cloud

from drsync.errors import CloudLimit, CloudNotFound, CloudUnavailable, SnapshotFailed
from drsync.model import SystemClock
from drsync.pace import Rate, TokenBucket
from drsync.target.ec2 import tags
from drsync.target.ec2.aws import Aws, Call
from drsync.target.ec2.snapshot import GIB, SnapshotJob, Snapshots

pytestmark = pytest.mark.localstack

OF = tags.PointTags(repository="ab" * 16, vm="web", capture="0123456789abcdef", point=7)


def block(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK_BYTES)


def job_of(blocks: Mapping[int, bytes], size_bytes: int = 2 * GIB, **more: Any) -> SnapshotJob:
    return SnapshotJob(of=OF, disk="root", size_bytes=size_bytes, blocks=np.array(sorted(blocks), np.uint32), **more)


def snapshots_of(aws: Aws, **more: Any) -> Snapshots:
    return Snapshots(aws, SystemClock(), **{"workers": 4, **more})


def write(snapshots: Snapshots, job: SnapshotJob, blocks: Mapping[int, bytes], *, until: int | None = None) -> str:
    """Write a snapshot; killed before block number `until` of the list, if that is given."""
    with snapshots.open(job) as writer:
        if not writer.is_complete:
            for number, index in enumerate(sorted(blocks)):
                if number == until:
                    raise KeyboardInterrupt
                writer.put(index, blocks[index])
        writer.finish()
        return writer.id


def operations(calls: list[Call]) -> list[str]:
    return [call.operation for call in calls]


BLOCKS = {index: block(index) for index in (0, 1, 5, 6, 7, 100, 2047, 4095)}


def test_a_snapshot_holds_the_blocks_and_says_whose_it_is(cloud: Cloud, aws: Aws) -> None:
    snapshot_id = write(snapshots_of(aws), job_of(BLOCKS, own_tags={"team": "dr"}), BLOCKS)
    assert cloud.read(snapshot_id) == BLOCKS
    (found,) = snapshots_of(aws).find(OF.identity())
    assert (found.id, found.state, found.volume_gib) == (snapshot_id, "completed", 2)
    assert {
        "team": "dr",
        tags.DISK: "root",
        tags.POINT: "7",
        tags.NAME: "web root point 7",
    }.items() <= found.tags.items()


def test_what_is_there_already_is_used_and_nothing_is_sent(cloud: Cloud, aws: Aws, calls: list[Call]) -> None:
    snapshot_id = write(snapshots_of(aws), job_of(BLOCKS), BLOCKS)
    calls.clear()
    assert write(snapshots_of(aws), job_of({1: b""}), BLOCKS) == snapshot_id
    assert operations(calls) == ["DescribeSnapshots"]


def test_a_child_has_its_parents_blocks_and_zeros_replace_them(cloud: Cloud, aws: Aws) -> None:
    parent = write(snapshots_of(aws), job_of(BLOCKS), BLOCKS)
    change = {1: block(11), 5: bytes(BLOCK_BYTES), 6000: block(12)}
    later = tags.PointTags(repository=OF.repository, vm="web", capture="f" * 16, point=8)
    job = SnapshotJob(
        of=later, disk="root", size_bytes=3 * GIB, blocks=np.array(sorted(change), np.uint32), parent=parent
    )
    child = write(snapshots_of(aws), job, change)
    assert cloud.read(child) == BLOCKS | change


def test_an_empty_disk_is_a_snapshot_without_blocks(cloud: Cloud, aws: Aws) -> None:
    assert cloud.read(write(snapshots_of(aws), job_of({}, 1), {})) == {}


def test_throttling_and_breakage_are_waited_out_by_one_layer(cloud: Cloud, aws: Aws, calls: list[Call]) -> None:
    broken = {"code": "InternalServerException", "status": 500}
    cloud.faults(
        rules=[
            {"operation": "PutSnapshotBlock", "times": 3, "error": "throttle"},
            {"operation": "PutSnapshotBlock", "times": 2, "error": broken},
            {"operation": "StartSnapshot", "times": 1, "after": True, "error": broken},
        ]
    )
    snapshot_id = write(snapshots_of(aws), job_of(BLOCKS), BLOCKS)
    assert cloud.fired() == {"PutSnapshotBlock": 5, "StartSnapshot": 1}
    assert operations(calls).count("PutSnapshotBlock") == len(BLOCKS)
    assert cloud.read(snapshot_id) == BLOCKS
    assert len(snapshots_of(aws).find(OF.owner())) == 1


def test_a_rate_that_aws_enforces_is_kept(cloud: Cloud, aws: Aws) -> None:
    cloud.faults(rates={"PutSnapshotBlock": 20})
    blocks = {index: bytes([index]) * BLOCK_BYTES for index in range(1, 61)}
    snapshot_id = write(snapshots_of(aws, workers=16), job_of(blocks), blocks)
    assert cloud.fired()["PutSnapshotBlock"] > 0
    assert cloud.read(snapshot_id) == blocks


def test_a_snapshot_that_does_not_exist_for_a_while_is_waited_for(cloud: Cloud, aws: Aws) -> None:
    cloud.faults(visibility_delay_s=2.0, completion_delay_s=0.5)
    snapshot_id = write(snapshots_of(aws), job_of(BLOCKS), BLOCKS)
    assert cloud.fired()["visibility_delay_s"] > 0
    assert cloud.read(snapshot_id) == BLOCKS


def test_a_snapshot_that_never_appears_is_given_up(cloud: Cloud, aws: Aws) -> None:
    cloud.faults(visibility_delay_s=3600)
    with pytest.raises((SnapshotFailed, CloudNotFound)):
        write(snapshots_of(aws, visible_within_s=0.5), job_of(BLOCKS), BLOCKS)
    assert cloud.fired()["visibility_delay_s"] > 0


def test_a_block_that_stalls_is_sent_again(cloud: Cloud, connect_aws: Callable[..., Aws]) -> None:
    cloud.faults(rules=[{"operation": "PutSnapshotBlock", "times": 2, "delay_s": 6}])
    snapshot_id = write(snapshots_of(connect_aws(read_timeout_s=1.0)), job_of(BLOCKS), BLOCKS)
    assert cloud.fired()["PutSnapshotBlock"] == 2
    assert cloud.read(snapshot_id) == BLOCKS


def test_with_100_pending_snapshots_it_waits_until_one_is_done(cloud: Cloud, aws: Aws) -> None:
    other = cloud.ebs.start_snapshot(VolumeSize=1)["SnapshotId"]
    cloud.faults(pending_limit=1)

    def sleep(_seconds: float) -> None:
        cloud.ec2.delete_snapshot(SnapshotId=other)

    assert cloud.read(write(snapshots_of(aws, sleep=sleep), job_of(BLOCKS), BLOCKS)) == BLOCKS
    assert cloud.fired()["pending_limit"] == 1


def test_with_100_pending_snapshots_for_too_long_it_says_so(cloud: Cloud, aws: Aws) -> None:
    cloud.ebs.start_snapshot(VolumeSize=1)
    cloud.faults(pending_limit=1)
    with pytest.raises(CloudLimit, match="ConcurrentLimitExceededException"):
        write(snapshots_of(aws, pending_wait_s=0.0), job_of(BLOCKS), BLOCKS)


def test_a_lost_answer_to_complete_snapshot_is_no_failure(cloud: Cloud, aws: Aws) -> None:
    broken = {"code": "InternalServerException", "status": 500}
    cloud.faults(rules=[{"operation": "CompleteSnapshot", "times": 1, "after": True, "error": broken}])
    assert cloud.read(write(snapshots_of(aws), job_of(BLOCKS), BLOCKS)) == BLOCKS
    assert cloud.fired()["CompleteSnapshot"] == 1


def test_a_run_that_was_killed_goes_on_where_it_was(cloud: Cloud, aws: Aws, calls: list[Call]) -> None:
    blocks = {index: bytes([index]) * BLOCK_BYTES for index in range(1, 41)}
    with pytest.raises(KeyboardInterrupt):
        write(snapshots_of(aws, tag_every_s=0.0), job_of(blocks), blocks, until=30)
    (found,) = snapshots_of(aws).find(OF.identity())
    assert (found.state, 15 < found.written <= 30) == ("pending", True)
    calls.clear()
    assert write(snapshots_of(aws), job_of(blocks), blocks) == found.id
    assert operations(calls).count("PutSnapshotBlock") == 40 - found.written
    assert "StartSnapshot" not in operations(calls)
    assert cloud.read(found.id) == blocks


def test_killed_before_the_snapshot_was_visible_the_token_finds_it(cloud: Cloud, aws: Aws) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(snapshots_of(aws), job_of(BLOCKS), BLOCKS, until=0)
    (first,) = snapshots_of(aws).find(OF.owner())
    cloud.faults(visibility_delay_s=3.0)
    assert write(snapshots_of(aws), job_of(BLOCKS), BLOCKS) == first.id
    assert cloud.read(first.id) == BLOCKS


def test_a_pending_snapshot_of_another_list_of_blocks_is_made_anew(cloud: Cloud, aws: Aws) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(snapshots_of(aws), job_of(BLOCKS), BLOCKS, until=4)
    fewer = {index: BLOCKS[index] for index in (0, 1)}
    snapshot_id = write(snapshots_of(aws), job_of(fewer), fewer)
    assert [found.id for found in snapshots_of(aws).find(OF.owner())] == [snapshot_id]
    assert cloud.read(snapshot_id) == fewer


def test_a_snapshot_that_aws_gave_up_is_made_anew(cloud: Cloud, aws: Aws) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(snapshots_of(aws), job_of(BLOCKS), BLOCKS, until=4)
    (old,) = snapshots_of(aws).find(OF.owner())
    cloud.advance(25 * 3600)
    snapshot_id = write(snapshots_of(aws), job_of(BLOCKS), BLOCKS)
    assert snapshot_id != old.id
    assert cloud.read(snapshot_id) == BLOCKS


def test_what_somebody_else_wrote_in_between_is_found_out(cloud: Cloud, aws: Aws) -> None:
    snapshots = snapshots_of(aws)
    with snapshots.open(job_of(BLOCKS)) as writer:
        for index, data in BLOCKS.items():
            writer.put(index, data)
        cloud.put(writer.id, 5, block(99))
        with pytest.raises(SnapshotFailed, match="not that of all blocks"):
            writer.finish()


def test_a_block_that_is_not_the_next_one_is_refused(cloud: Cloud, aws: Aws) -> None:
    with snapshots_of(aws).open(job_of(BLOCKS)) as writer:
        with pytest.raises(ValueError, match="block 5"):
            writer.put(5, BLOCKS[5])


def test_aws_that_stays_away_ends_the_write_and_leaves_the_snapshot(cloud: Cloud, aws: Aws) -> None:
    broken = {"code": "InternalServerException", "status": 500}
    cloud.faults(rules=[{"operation": "PutSnapshotBlock", "times": 999, "error": broken}])
    with pytest.raises(CloudUnavailable, match="PutSnapshotBlock"):
        write(snapshots_of(aws), job_of(BLOCKS), BLOCKS)
    assert [found.state for found in snapshots_of(aws).find(OF.identity())] == ["pending"]


def test_what_is_sent_keeps_to_a_rate_of_its_own(cloud: Cloud, aws: Aws) -> None:
    clock = SystemClock()
    pace = TokenBucket(Rate(bytes_per_s=8 * BLOCK_BYTES), clock)
    began_s = clock.monotonic_s()
    write(snapshots_of(aws, pace=pace), job_of(BLOCKS), BLOCKS)
    assert clock.monotonic_s() - began_s > 0.8


def test_two_tebibytes_with_little_data_take_few_requests(cloud: Cloud, aws: Aws, calls: list[Call]) -> None:
    last = 2 * 2**40 // BLOCK_BYTES - 1
    blocks = {0: block(1), last: block(2)}
    snapshot_id = write(snapshots_of(aws), job_of(blocks, 2 * 2**40), blocks)
    assert cloud.read(snapshot_id) == blocks
    assert operations(calls).count("PutSnapshotBlock") == 2
    assert len(calls) < 12
