"""`drsync failback VM --from ec2`: what an instance has changed comes home, only that is read, and nothing is lost."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cloud_lab import MIB, Made, killed_when, protected
from command_line import Cli
from ec2_lab import BLOCK_BYTES, Cloud
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_lab import ROOT
from shipped_vm import ZEROED, DiskStep, ShippedVm, Step, content, read_raw, restored

from drsync.errors import Fenced
from drsync.model import BLOCK_SIZE
from drsync.units import GiB
from drsync.writer import open_writer

pytestmark = [pytest.mark.localstack, pytest.mark.timeout(300)]

SIZE = 40 * MIB
RESTORE = ("restore", "web", "--to", "ec2", "--skip-preflight")  # their disks hold no system
FAILBACK = ("failback", "web", "--from", "ec2")
ZEROS = bytes(BLOCK_BYTES)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    place = tmp_path / "cli"
    place.mkdir()
    return Cli(place)


@pytest.fixture
def vm(cli: Cli, tmp_path: Path) -> ShippedVm:
    """Two points of a VM of two disks; the size of one of them is no whole number of blocks."""
    made = protected(cli, tmp_path, disks=("root", "data"), memory_mib=1024)
    made.capture(step({0: 2, 1: 4, 100: 6, 300: 8}, {5: 2, 48: 3}))
    made.capture(step({1: 10, 100: ZEROED}, {}))
    return made


@pytest.fixture
def made(cloud: Cloud, connect_aws: Callable[..., Any]) -> Made:
    """What is in the test's AWS account, which commands find in the environment."""
    del connect_aws
    return Made(cloud)


def step(root: dict[int, int], data: dict[int, int]) -> Step:
    return Step(
        disks={
            "root": DiskStep(size_bytes=SIZE, writes=root),
            "data": DiskStep(size_bytes=3 * MIB + 512, writes=data),
        }
    )


def block_of(held: Mapping[int, int]) -> bytes:
    """512 KiB with these contents in its blocks of 64 KiB."""
    return b"".join(content(held[n], BLOCK_SIZE) if n in held else bytes(BLOCK_SIZE) for n in range(8))


def came_home(vm: ShippedVm, made: Made, instance_id: str, point: int, place: Path) -> None:
    """The point must hold what the instance's volumes do."""
    held = restored(vm.log, point)
    assert held.keys() == vm.disks.keys()
    for name, disk in held.items():
        volume = made.content_of(instance_id, name, place)
        assert disk.size_bytes == volume.size_bytes == GiB
        assert disk.blocks == volume.blocks, f"disk {name} is wrong"


def recovered(cli: Cli, disk: str, place: Path) -> Mapping[int, bytes]:
    """What examples/recover.py makes of a disk of the newest point, by docs/format.md alone."""
    script, output = ROOT / "examples/recover.py", place / f"{disk}.recovered"
    words = ["--key", str(cli.key_file), str(cli.repository), "web", disk, str(output)]
    subprocess.run([sys.executable, str(script), *words], check=True)
    return read_raw(output).blocks


def brought_up(cli: Cli, *words: str) -> str:
    return str(cli.ok(*RESTORE, *words, "--json").json["instance"])


def failed_back(cli: Cli, *words: str) -> Any:
    return cli.ok(*FAILBACK, *words, "--json").json


def test_what_an_instance_changed_comes_home_and_only_that_is_read(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path
) -> None:
    instance = brought_up(cli)
    made.write(instance, "root", {0: block_of({0: 2, 3: 9}), 37: ZEROS, 60: block_of({1: 5}), 2047: block_of({7: 3})})
    done = failed_back(cli)
    assert [(disk["compared_point"], disk["whole_because"]) for disk in done["disks"]] == [(2, None), (2, None)]
    (one,) = done["passes"]
    # Four blocks of root; of data the one in which it ended before, at no whole block.
    assert one["read_bytes"] == 5 * BLOCK_BYTES
    assert (one["point"], one["new"], one["epoch"]) == (4, True, 2)  # 3 is the fence
    assert one["changed_bytes"] == 6 * BLOCK_SIZE
    came_home(vm, made, instance, 4, tmp_path)
    assert restored(vm.log, 2)["root"].blocks == vm.points[2]["root"].blocks
    (*_, listed) = cli.ok("points", "web", "--json").json
    assert (listed["point"], listed["kind"]) == (4, "resync")
    assert f"failed back from instance {instance}" in listed["reason"]
    assert cli.ok("verify", "web", "--read-data").code == 0
    assert recovered(cli, "root", tmp_path) == restored(vm.log, 4)["root"].blocks, "another reader sees something else"
    with pytest.raises(Fenced):
        open_writer(vm.log, vm.writer_id, known_seq=2, wrote_before=True)


def test_again_only_what_changed_since_is_read_and_without_a_change_nothing(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path
) -> None:
    instance = brought_up(cli)
    made.write(instance, "root", {0: block_of({0: 7})})
    first = failed_back(cli)
    made.write(instance, "root", {9: block_of({5: 7})})
    second = failed_back(cli)
    assert [one["read_bytes"] for one in second["passes"]] == [BLOCK_BYTES]
    assert (second["passes"][0]["epoch"], second["point"]) == (2, 5)
    assert {disk["compared_with"] for disk in second["disks"]} == set(first["snapshots"]) == set(second["removed"])
    came_home(vm, made, instance, 5, tmp_path)
    third = failed_back(cli)
    assert (third["point"], third["passes"][0]["new"], third["removed"]) == (5, False, [])
    assert third["snapshots"] == second["snapshots"]
    text = cli.ok(*FAILBACK).stdout
    assert "nothing that point 5 does not have" in text
    assert "drsync restore web --to libvirt" in text
    drill = cli.ok(*RESTORE, "--name", "drill", "--json").json
    assert (drill["point"], drill["sent_bytes"]) == (5, 0)


def test_with_stop_the_last_of_it_comes_home_too(cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path) -> None:
    instance = brought_up(cli)
    made.write(instance, "data", {1: block_of({1: 5})})
    done = failed_back(cli, "--stop")
    assert [one["new"] for one in done["passes"]] == [True, False]
    assert (done["state"], made.instances) == ("stopped", {instance: "stopped"})
    came_home(vm, made, instance, done["point"], tmp_path)


def test_a_log_that_went_on_is_kept_from_and_can_be_overruled(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path
) -> None:
    instance = brought_up(cli, "--point", "1")
    made.write(instance, "root", {3: block_of({2: 8})})
    error, remedy = cli.refused(121, *FAILBACK)
    assert "point 2 is newer than point 1, from which it began" in error
    assert remedy.startswith(f"drsync failback web --from ec2 --instance {instance} --take-over")
    assert vm.log.newest() == 2
    done = failed_back(cli, "--take-over")
    assert done["passes"][0]["read_bytes"] == 4 * BLOCK_BYTES  # 3; 0 and 12, where the points differ; the end of data
    came_home(vm, made, instance, done["point"], tmp_path)


@pytest.mark.parametrize("way", ["no snapshot", "unrelated"])
def test_without_something_to_compare_with_it_is_read_whole(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path, way: str
) -> None:
    done = cli.ok(*RESTORE, "--json").json
    instance = done["instance"]
    made.write(instance, "root", {0: block_of({0: 2}), 12: ZEROS, 60: block_of({1: 5})})
    if way == "no snapshot":
        made.cloud.ec2.deregister_image(ImageId=done["image"])
        for snapshot_id in list(made.snapshots):
            made.cloud.ec2.delete_snapshot(SnapshotId=snapshot_id)
    if way == "unrelated":
        refusal = {"code": "ValidationException", "status": 400, "reason": "UNRELATED_SNAPSHOTS"}
        made.cloud.faults(rules=[{"operation": "ListChangedBlocks", "times": 2, "error": refusal}])
    home = failed_back(cli)
    if way == "unrelated":
        assert made.cloud.fired() == {"ListChangedBlocks": 2}
    assert home["passes"][0]["read_bytes"] == 6 * BLOCK_BYTES  # all that there is: 0, 12, 37, 60; of data 0 and 6
    assert home["passes"][0]["changed_bytes"] < 5 * BLOCK_SIZE
    came_home(vm, made, instance, home["point"], tmp_path)


def test_a_dry_run_makes_nothing_and_says_what_it_would_do(cli: Cli, vm: ShippedVm, made: Made) -> None:
    instance = brought_up(cli)
    before = set(made.snapshots)
    done = failed_back(cli, "--dry-run")
    assert (done["instance"], done["made_of"], done["newest"], done["dry_run"]) == (instance, 2, 2, True)
    assert (done["passes"], done["errors"]) == (None, [])
    assert "what changed since snapshot" in cli.ok(*FAILBACK, "--dry-run").stdout
    assert (set(made.snapshots), vm.log.newest()) == (before, 2)


def test_which_instance_and_volume_it_is_must_be_clear(cli: Cli, vm: ShippedVm, made: Made) -> None:
    error, remedy = cli.refused(117, *FAILBACK)
    assert "it has no instance there; there is none" in error
    assert remedy.startswith("drsync failback web --from ec2 --dry-run")
    first, second = brought_up(cli), brought_up(cli, "--name", "drill")
    assert "it has several instances" in cli.refused(117, *FAILBACK)[0]
    volume = made.volume_of(second, "data")
    made.cloud.ec2.stop_instances(InstanceIds=[second])
    device = volume["Attachments"][0]["Device"]
    made.cloud.ec2.detach_volume(VolumeId=volume["VolumeId"], InstanceId=second, Device=device)
    error, _ = cli.refused(117, *FAILBACK, "--instance", second)
    assert f"instance {second} has no volume that is disk data" in error
    assert failed_back(cli, "--instance", first, "--dry-run")["instance"] == first


def test_a_volume_that_is_no_disk_of_the_vm_stays_behind(cli: Cli, vm: ShippedVm, made: Made) -> None:
    instance = brought_up(cli)
    zone = made.instance(instance)["Placement"]["AvailabilityZone"]
    volume = made.cloud.ec2.create_volume(AvailabilityZone=zone, Size=1)["VolumeId"]
    made.cloud.ec2.attach_volume(InstanceId=instance, VolumeId=volume, Device="/dev/sdz")
    done = failed_back(cli)
    assert [note["subject"] for note in done["notes"] if note["effect"] == "lost"] == [f"volume {volume}"]
    assert len(done["snapshots"]) == 2
    found = made.cloud.ec2.describe_snapshots(Filters=[{"Name": "volume-id", "Values": [volume]}])["Snapshots"]
    assert found == []


@pytest.mark.parametrize(
    ("operation", "after", "earlier"),
    [
        ("CreateSnapshots", True, 0),
        ("GetSnapshotBlock", False, 0),
        ("CreateTags", False, 2),  # the point is committed, and not noted yet
    ],
)
def test_killed_in_the_middle_of_a_step_the_next_run_ends_it(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path, operation: str, after: bool, earlier: int
) -> None:
    instance = brought_up(cli)
    made.write(instance, "root", {index: block_of({index % 8: index}) for index in range(1, 30)})
    passed = {"operation": operation, "times": earlier, "after": after}
    made.cloud.faults(rules=[passed, {**passed, "times": 1, "delay_s": 4}])
    killed_when(made.cloud, operation, cli, *FAILBACK, count=earlier + 1)
    made.cloud.faults()
    made.write(instance, "data", {3: block_of({1: 5})})  # what is written meanwhile is not left behind
    done = failed_back(cli)
    came_home(vm, made, instance, done["point"], tmp_path)
    assert cli.ok("verify", "web").code == 0
    kept = {one["snapshot"] for one in cli.ok(*RESTORE, "--point", "2", "--json").json["disks"]}
    assert set(made.snapshots) == kept | set(done["snapshots"])
    resumed = {"CreateSnapshots": [False], "GetSnapshotBlock": [True, False], "CreateTags": [True, False]}
    assert [one["resumed"] for one in done["passes"]] == resumed[operation]


def test_what_was_sent_before_it_was_killed_is_not_read_again(cli: Cli, made: Made, tmp_path: Path) -> None:
    vm = protected(cli, tmp_path)
    vm.capture(Step(disks={"root": DiskStep(size_bytes=400 * GiB, writes={0: 2})}))
    instance = brought_up(cli)
    apart = 4 * GiB // BLOCK_BYTES  # each in a stretch of its own
    made.write(instance, "root", {number * apart + 5: block_of({1: 2 * number + 3}) for number in range(100)})
    made.cloud.faults(rules=[{"operation": "GetSnapshotBlock", "times": 1000, "delay_s": 0.1}])
    killed_when(made.cloud, "GetSnapshotBlock", cli, *FAILBACK, count=40)
    made.cloud.faults()
    done = failed_back(cli)
    assert [one["resumed"] for one in done["passes"]] == [True, False]
    assert done["passes"][0]["read_bytes"] <= 90 * BLOCK_BYTES
    assert done["passes"][0]["changed_bytes"] == 100 * BLOCK_SIZE
    held = restored(vm.log, done["point"])["root"]
    assert held.blocks == made.content_of(instance, "root", tmp_path).blocks


def test_throttled_slow_empty_and_wrong_for_a_while_it_comes_home_all_the_same(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path
) -> None:
    instance = brought_up(cli)
    made.write(instance, "root", {index: block_of({index % 8: index}) for index in range(1, 9)})
    time.sleep(1.1)  # what the restore made has been there for a while, and is seen
    made.cloud.faults(
        visibility_delay_s=1,
        completion_delay_s=1.5,
        empty_pages=True,
        corrupt_reads=2,
        rules=[
            {"operation": "GetSnapshotBlock", "times": 2, "error": "throttle"},
            {"operation": "CreateSnapshots", "times": 1, "error": "throttle"},
            {"operation": "ListChangedBlocks", "times": 1, "error": "throttle"},
        ],
    )
    done = failed_back(cli)
    fired = made.cloud.fired()
    assert fired.keys() == {
        "GetSnapshotBlock",
        "CreateSnapshots",
        "ListChangedBlocks",
        "empty_pages",
        "corrupt_reads",
        "visibility_delay_s",
    }
    assert fired["corrupt_reads"] == 2
    came_home(vm, made, instance, done["point"], tmp_path)


def test_a_block_that_stays_wrong_is_never_taken(cli: Cli, vm: ShippedVm, made: Made) -> None:
    instance = brought_up(cli)
    made.write(instance, "root", {1: block_of({1: 5})})
    made.cloud.faults(corrupt_reads=99)
    error, remedy = cli.refused(116, *FAILBACK)
    assert "do not match its SHA-256" in error
    assert remedy == "run the same command again: it goes on where it was"
    assert vm.log.newest() == 3  # the fence
    made.cloud.faults()
    assert [one["resumed"] for one in failed_back(cli)["passes"]] == [True, False]


def test_what_fails_for_good_leaves_no_snapshots(cli: Cli, vm: ShippedVm, made: Made) -> None:
    instance = brought_up(cli)
    made.write(instance, "root", {1: block_of({1: 5})})
    before = set(made.snapshots)
    denied = {"code": "AccessDeniedException", "status": 403}
    made.cloud.faults(rules=[{"operation": "GetSnapshotBlock", "times": 9, "error": denied}])
    cli.refused(101, *FAILBACK)
    assert made.cloud.fired()["GetSnapshotBlock"] > 0
    assert set(made.snapshots) == before
    assert not (cli.spool / "web/failback.journal").exists()


BLOCKS = st.integers(0, 40 * 16 - 1)
CONTENTS = st.sampled_from([ZEROED, 2, 3, 4, 5])
STATES = st.dictionaries(BLOCKS, CONTENTS, max_size=12)
WRITES = st.dictionaries(st.integers(0, 90), st.dictionaries(st.integers(0, 7), CONTENTS, max_size=3), max_size=8)


@settings(
    max_examples=60 if os.environ.get("DRSYNC_SOAK") else 4, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(first=STATES, newer=st.none() | STATES, written=WRITES, again=WRITES, odd=st.booleans(), whole=st.booleans())
def test_whatever_was_captured_and_written_the_point_is_the_volume(
    made: Made,
    tmp_path_factory: pytest.TempPathFactory,
    first: dict[int, int],
    newer: dict[int, int] | None,
    written: dict[int, dict[int, int]],
    again: dict[int, dict[int, int]],
    odd: bool,
    whole: bool,
) -> None:
    """Captured, perhaps twice, brought up from the first point; written and failed back, twice."""
    place = tmp_path_factory.mktemp("any")
    cli, size_bytes = Cli(place), SIZE + (512 if odd else 0)
    vm = protected(cli, place)
    for writes in (first, newer):
        if writes is not None:
            vm.capture(Step(disks={"root": DiskStep(size_bytes=size_bytes, writes=writes)}))
    instance = brought_up(cli, "--point", "1")
    take_over = ["--take-over"] if newer is not None else []
    for blocks, words in ((written, [*take_over, *(["--whole"] if whole else [])]), (again, [])):
        made.write(instance, "root", {index: block_of(held) for index, held in blocks.items()})
        done = failed_back(cli, "--instance", instance, *words)
        came_home(vm, made, instance, done["point"], place)
    assert cli.ok("verify", "web", "--read-data").code == 0
