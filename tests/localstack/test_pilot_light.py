"""The pilot light: the newest points wait in AWS as snapshots; then a recovery moves no data."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cloud_lab import MIB, Made, killed_when, protected, start
from command_line import Cli
from ec2_lab import BLOCK_BYTES, Cloud, wait_for
from shipped_vm import ZEROED, DiskStep, ShippedVm, Step

from drsync.config import load_config
from drsync.model import BLOCK_SIZE, SystemClock
from drsync.recovery.cloud.keeper import CloudKeeper

pytestmark = [pytest.mark.localstack, pytest.mark.timeout(300)]

CLOUD = '[[cloud]]\nname = "ireland"\nregion = "us-east-1"\ninterval = "1s"\nkeep = 2\n'


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    place = tmp_path / "cli"
    place.mkdir()
    cli = Cli(place)
    cli.configure(extra=CLOUD)
    return cli


@pytest.fixture
def vm(cli: Cli, tmp_path: Path) -> ShippedVm:
    made = protected(cli, tmp_path, disks=("root", "data"))
    made.capture(step({0: 2, 100: 4, 300: 6}))
    return made


@pytest.fixture
def made(cloud: Cloud, connect_aws: Callable[..., Any]) -> Made:
    """What is in the test's AWS account, which commands find in the environment."""
    del connect_aws
    return Made(cloud)


def step(root: dict[int, int]) -> Step:
    disks = {
        "root": DiskStep(size_bytes=40 * MIB, writes=root),
        "data": DiskStep(size_bytes=3 * MIB, writes={1: 3}),
    }
    return Step(disks=disks)


def sync(cli: Cli) -> Any:
    (outcome,) = cli.ok("cloud", "sync", "--json").json
    return outcome


def status(cli: Cli) -> Any:
    (found,) = cli.ok("cloud", "status", "--json").json
    return found


def test_points_wait_in_aws_and_a_recovery_moves_no_data(cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path) -> None:
    assert status(cli)["held"] is None
    first = sync(cli)
    assert (first["point"], first["was_there"], first["sent_bytes"]) == (1, False, 4 * BLOCK_BYTES)
    assert (sync(cli)["was_there"], status(cli)["held"]) == (True, 1)

    vm.capture(step({100: ZEROED, 301: 8}))
    assert (status(cli)["held"], status(cli)["newest"]) == (1, 2)
    assert "ireland" in cli.ok("cloud", "status").stdout
    second = sync(cli)
    assert second["sent_bytes"] == 2 * BLOCK_BYTES
    assert set(first["snapshots"].values()).isdisjoint(second["snapshots"].values())

    made.cloud.faults(rules=[{"operation": "PutSnapshotBlock", "times": 9, "error": {"code": "X", "status": 400}}])
    done = cli.ok("restore", "web", "--to", "ec2", "--skip-preflight", "--json").json
    assert done["sent_bytes"] == 0
    assert {disk["name"]: disk["snapshot"] for disk in done["disks"]} == second["snapshots"]
    assert "PutSnapshotBlock" not in made.cloud.fired()
    for name, disk in vm.points[2].items():
        held = made.content_of(done["instance"], name, tmp_path)
        assert held.blocks == {n: data.ljust(BLOCK_SIZE, b"\0") for n, data in disk.blocks.items()}


def test_only_so_many_points_stay_and_what_an_image_uses_stays_too(cli: Cli, vm: ShippedVm, made: Made) -> None:
    first = sync(cli)
    cli.ok("restore", "web", "--to", "ec2", "--skip-preflight")
    seconds = []
    for number in (2, 3, 4):
        vm.capture(step({number: number}))
        seconds.append(sync(cli))
    assert [outcome["removed"] for outcome in seconds[:2]] == [[], []]
    assert set(seconds[2]["removed"]) == set(seconds[0]["snapshots"].values())
    wanted = {*first["snapshots"].values(), *seconds[1]["snapshots"].values(), *seconds[2]["snapshots"].values()}
    assert set(made.snapshots) == wanted
    (listed,) = cli.ok("cloud", "cleanup", "--dry-run", "--json").json
    assert {one["id"] for one in listed["removed"]} == set(first["snapshots"].values())
    (cleaned,) = cli.ok("cloud", "cleanup", "--json").json
    assert (cleaned["removed"], {one["id"] for one in cleaned["kept"]}) == ([], set(first["snapshots"].values()))


def test_a_cleanup_removes_what_restores_left_and_no_instance_uses(cli: Cli, vm: ShippedVm, made: Made) -> None:
    drill = cli.ok("restore", "web", "--to", "ec2", "--skip-preflight", "--name", "drill", "--json").json
    (cleaned,) = cli.ok("cloud", "cleanup", "--restored", "--json").json
    assert cleaned["removed"] == []
    made.cloud.ec2.terminate_instances(InstanceIds=[drill["instance"]])
    assert "would remove image" in cli.ok("cloud", "cleanup", "--restored", "--dry-run").stdout
    assert made.images
    (cleaned,) = cli.ok("cloud", "cleanup", "--restored", "--json").json
    assert [one["kind"] for one in cleaned["removed"]] == ["image", "snapshot", "snapshot"]
    assert made.nothing


def test_a_sync_that_was_killed_goes_on_and_leaves_nothing_twice(cli: Cli, vm: ShippedVm, made: Made) -> None:
    made.cloud.faults(rules=[{"operation": "CompleteSnapshot", "times": 1, "delay_s": 4}])
    killed_when(made.cloud, "CompleteSnapshot", cli, "cloud", "sync")
    made.cloud.faults()
    outcome = sync(cli)
    assert set(made.snapshots) == set(outcome["snapshots"].values())
    assert set(made.snapshots.values()) == {"completed"}


def test_a_point_that_was_never_whole_goes_when_a_newer_one_is(cli: Cli, vm: ShippedVm, made: Made) -> None:
    made.cloud.faults(
        rules=[{"operation": "RegisterImage", "times": 1}, {"operation": "PutSnapshotBlock", "times": 1, "delay_s": 4}]
    )
    killed_when(made.cloud, "PutSnapshotBlock", cli, "cloud", "sync")
    made.cloud.faults()
    (abandoned,) = made.snapshots
    vm.capture(step({7: 2}))
    outcome = sync(cli)
    assert outcome["removed"] == [abandoned]
    assert set(made.snapshots) == set(outcome["snapshots"].values())


def test_without_such_a_cloud_it_says_which_there_are(cli: Cli, vm: ShippedVm) -> None:
    error, _ = cli.refused(11, "cloud", "sync", "--cloud", "mars")
    assert error.endswith("there is no [[cloud]] mars; it has ireland")


def test_the_keeper_brings_each_new_point_and_survives_failures(
    cli: Cli, vm: ShippedVm, made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "drsync")
    config = load_config(cli.config)
    keeper = CloudKeeper(lambda: config, SystemClock(), look_s=0.2, retry_s=(0.2, 0.5))
    made.cloud.faults(
        rules=[{"operation": "StartSnapshot", "times": 1, "error": {"code": "AccessDeniedException", "status": 403}}]
    )
    keeper.start()
    try:
        wait_for(lambda: caplog.text, lambda text: "works again after 1 failures" in text, 60)
        vm.capture(step({5: 4}))
        wait_for(lambda: caplog.text, lambda text: "cloud=ireland vm=web point=2" in text, 60)
    finally:
        keeper.stop(20)
    assert "failed code=101" in caplog.text
    assert status(cli)["held"] == 2


def test_the_keeper_stops_behind_the_block_that_is_on_its_way(cli: Cli, vm: ShippedVm, made: Made) -> None:
    made.cloud.faults(rules=[{"operation": "PutSnapshotBlock", "times": 3, "delay_s": 1}])
    config = load_config(cli.config)
    keeper = CloudKeeper(lambda: config, SystemClock(), look_s=0.2)
    thread = threading.Thread(target=keeper.run)
    thread.start()
    wait_for(lambda: made.cloud.fired().get("PutSnapshotBlock", 0), bool, 60)
    began_s = time.monotonic()
    keeper.stop(0)
    thread.join(20)
    assert not thread.is_alive()
    assert time.monotonic() - began_s < 15
    assert "pending" in made.snapshots.values()


def test_the_daemon_beside_the_bucket_does_nothing_else(cli: Cli, vm: ShippedVm, made: Made) -> None:
    process = start(cli, "daemon", "--role", "cloud")
    try:
        wait_for(lambda: list(made.snapshots.values()), lambda states: states == ["completed", "completed"], 60)
    finally:
        process.terminate()
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "cloud=ireland vm=web point=1 sent=2MiB" in output.replace(" MiB", "MiB")
    assert not cli.spool.exists()
