"""`drsync restore VM --to ec2`: it comes up as it was, or is refused, and what fails leaves nothing behind."""

import json
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cloud_lab import MIB, Made, killed_when, protected, start
from command_line import Cli
from ec2_lab import BLOCK_BYTES, Cloud, wait_for
from shipped_vm import ZEROED, DiskStep, ShippedVm, Step
from soak import SOAK

from drsync.model import BLOCK_SIZE
from drsync.target.ec2.uefi import uefi_data
from drsync.units import TiB

pytestmark = [pytest.mark.localstack, pytest.mark.timeout(300)]

SIZE = 40 * MIB
RESTORE = ("restore", "web", "--to", "ec2", "--skip-preflight")  # their disks hold no system


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    place = tmp_path / "cli"
    place.mkdir()
    return Cli(place)


@pytest.fixture
def vm(cli: Cli, tmp_path: Path) -> ShippedVm:
    """Two points of a VM of two disks."""
    made = protected(cli, tmp_path, disks=("root", "data"), memory_mib=5000, vcpus=2)
    made.capture(step({0: 2, 1: 4, 100: 6, 300: 8}, {5: 2}))
    made.capture(step({1: 10, 100: ZEROED}, {}))
    return made


@pytest.fixture
def made(cloud: Cloud, connect_aws: Callable[..., Any]) -> Made:
    """What is in the test's AWS account, which commands find in the environment."""
    del connect_aws
    return Made(cloud)


def step(root: dict[int, int], data: dict[int, int], size_bytes: int = SIZE) -> Step:
    return Step(
        disks={
            "root": DiskStep(size_bytes=size_bytes, writes=root),
            "data": DiskStep(size_bytes=3 * MIB, writes=data),
        }
    )


def check(made: Made, vm: ShippedVm, point: int, instance_id: str, place: Path) -> None:
    """The instance's volumes must hold what the point's disks did."""
    for name, disk in vm.points[point].items():
        held = made.content_of(instance_id, name, place)
        assert held.blocks == {number: data.ljust(BLOCK_SIZE, b"\0") for number, data in disk.blocks.items()}, (
            f"disk {name} is wrong"
        )


def test_a_vm_comes_up_with_its_disks_its_size_and_its_marks(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path
) -> None:
    done = cli.ok(*RESTORE, "--tag", "team=dr", "--wait", "--json").json
    instance_id = done["instance"]
    assert made.instances == {instance_id: "running"}
    check(made, vm, 2, instance_id, tmp_path)
    instance = made.instance(instance_id)
    assert instance["InstanceType"] == done["instance_type"] == "m7i.large"
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    assert instance["RootDeviceName"] == "/dev/sda1"
    tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
    assert {"Name": "web", "team": "dr", "drsync:vm": "web", "drsync:point": "2"}.items() <= tags.items()
    root = made.volume_of(instance_id, "root")
    assert root["Attachments"][0]["Device"] == "/dev/sda1"
    assert (root["Size"], root["VolumeType"]) == (1, "gp3")
    assert {"Key": "team", "Value": "dr"} in root["Tags"]
    (image,) = made.cloud.ec2.describe_images(ImageIds=[done["image"]])["Images"]
    wanted = {"Architecture": "x86_64", "BootMode": "legacy-bios", "EnaSupport": True, "ImdsSupport": "v2.0"}
    assert wanted.items() <= image.items()
    assert done["private_ip"] == instance["PrivateIpAddress"]
    assert [one["name"] for one in done["steps"]] == ["snapshot root", "snapshot data", "image", "instance", "checks"]
    assert done["sent_bytes"] == 3 * BLOCK_BYTES
    assert done["rpo_seconds"] > 0 < done["rto_seconds"]
    assert done["cost"]["once_usd"] == round(3 * 0.006 / 1000, 4)


def test_the_same_command_again_finds_what_is_there(cli: Cli, vm: ShippedVm, made: Made) -> None:
    first = cli.ok(*RESTORE, "--json").json
    again = cli.ok(*RESTORE, "--json").json
    assert (again["instance"], again["was_there"], again["sent_bytes"]) == (first["instance"], True, 0)
    other = cli.ok(*RESTORE, "--name", "drill", "--json").json
    assert (other["was_there"], other["sent_bytes"], other["image"]) == (False, 0, first["image"])
    assert len(made.instances) == 2
    assert len(made.snapshots) == 2
    assert "is there already" in cli.ok(*RESTORE).stderr


def test_a_later_point_is_written_over_the_snapshot_of_an_earlier_one(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path
) -> None:
    first = cli.ok(*RESTORE, "--point", "1", "--json").json
    check(made, vm, 1, first["instance"], tmp_path)
    vm.capture(step({7: 3}, {6: 5}))
    later = cli.ok(*RESTORE, "--json").json
    snapshots = {disk["name"]: disk["snapshot"] for disk in first["disks"]}
    assert {disk["name"]: disk["parent"] for disk in later["disks"]} == snapshots
    assert later["sent_bytes"] == 3 * BLOCK_BYTES  # of root, the blocks of 0..7 and of 100 (zeros by now); one of data
    check(made, vm, 3, later["instance"], tmp_path)


def test_a_disk_that_grew_is_a_larger_volume(cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path) -> None:
    cli.ok(*RESTORE, "--point", "1")
    vm.capture(step({}, {}, size_bytes=1500 * MIB))
    later = cli.ok(*RESTORE, "--json").json
    assert made.volume_of(later["instance"], "root")["Size"] == 2
    check(made, vm, 3, later["instance"], tmp_path)


def test_a_dry_run_makes_nothing_and_says_what_it_would_do(cli: Cli, vm: ShippedVm, made: Made) -> None:
    done = cli.ok(*RESTORE, "--dry-run", "--json").json
    assert (done["dry_run"], done["instance"], done["errors"]) == (True, None, [])
    assert done["instance_type"] == "m7i.large"
    assert [disk["put_bytes"] for disk in done["disks"]] == [2 * BLOCK_BYTES, BLOCK_BYTES]
    text = cli.ok(*RESTORE, "--dry-run").stdout
    assert "would restore web at point 2" in text
    assert "USD" in text
    assert made.nothing


def test_a_stopped_instance_is_stopped(cli: Cli, vm: ShippedVm, made: Made) -> None:
    done = cli.ok(*RESTORE, "--stopped", "--json").json
    assert (done["state"], made.instances) == ("stopped", {done["instance"]: "stopped"})
    assert cli.ok(*RESTORE, "--json").json["state"] == "running"


def test_an_address_and_a_security_group_are_honoured(cli: Cli, vm: ShippedVm, made: Made) -> None:
    subnet = made.cloud.ec2.describe_subnets()["Subnets"][0]
    group = made.cloud.ec2.create_security_group(GroupName="web", Description="web", VpcId=subnet["VpcId"])["GroupId"]
    address = subnet["CidrBlock"].rpartition(".")[0] + ".77"
    words = ("--subnet", subnet["SubnetId"], "--security-group", group, "--private-ip", address)
    done = cli.ok(*RESTORE, *words, "--json").json
    instance = made.instance(done["instance"])
    assert (instance["SubnetId"], instance["PrivateIpAddress"]) == (subnet["SubnetId"], address)
    assert [one["GroupId"] for one in instance["NetworkInterfaces"][0]["Groups"]] == [group]
    refused = cli.run(*RESTORE, *words, "--name", "other", "--dry-run", "--json")
    assert refused.code == 106
    assert f"address {address} is in use by {done['instance']}" in refused.json["errors"][0]["message"]


def test_the_address_of_its_definition_is_kept(cli: Cli, made: Made, tmp_path: Path) -> None:
    subnet = made.cloud.ec2.describe_subnets()["Subnets"][0]
    address = subnet["CidrBlock"].rpartition(".")[0] + ".99"
    devices = f"<interface type='network'><filterref filter='x'><parameter name='IP' value='{address}'/></filterref>"
    vm = protected(cli, tmp_path, devices=devices + "</interface>")
    vm.capture(Step(disks={"root": DiskStep(size_bytes=SIZE, writes={0: 2})}))
    done = cli.ok(*RESTORE, "--keep-ip", "--subnet", subnet["SubnetId"], "--json").json
    assert done["private_ip"] == address


def test_a_dry_run_lists_every_problem(cli: Cli, vm: ShippedVm, made: Made) -> None:
    words = ("--security-group", "sg-0123456789abcdef0", "--instance-type", "z9.huge", "--keep-ip")
    listed = cli.run(*RESTORE, *words, "--dry-run", "--json")
    assert listed.code == 106
    text = " ".join(err["message"] for err in listed.json["errors"])
    for problem in ("no security group sg-", "no instance type z9.huge", "which address it had"):
        assert problem in text


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--subnet", "subnet-0123456789abcdef0"), "there is no subnet"),
        (("--security-group", "sg-0123456789abcdef0", "--instance-type", "z9.huge"), "there is no security group"),
        (("--instance-type", "t2.micro", "--boot-mode", "uefi"), "can't boot by uefi"),
        (("--family", "z9"), "no type of z9 has 2 vCPUs"),
        (("--keep-ip",), "does not tell which address it had"),
        (("--private-ip", "10.0.0.9"), "needs a subnet"),
    ],
)
def test_what_can_not_be_is_told_before_anything_is_made(
    cli: Cli, vm: ShippedVm, made: Made, words: tuple[str, ...], problem: str
) -> None:
    error, remedy = cli.refused(106, *RESTORE, *words)
    assert "can't come up in us-east-1" in error
    assert problem in error
    assert remedy.startswith("drsync restore web --to ec2 --dry-run")
    assert made.nothing


def test_a_uefi_guest_with_a_tpm_gets_a_type_and_an_image_that_can(cli: Cli, made: Made, tmp_path: Path) -> None:
    nvram = Path("/usr/share/OVMF/OVMF_VARS_4M.fd").read_bytes()
    vm = protected(cli, tmp_path, firmware=" firmware='efi'", devices="<tpm model='tpm-crb'/>", nvram=nvram)
    vm.capture(Step(disks={"root": DiskStep(size_bytes=SIZE, writes={0: 2})}))
    done = cli.ok(*RESTORE, "--json").json
    (image,) = made.cloud.ec2.describe_images(ImageIds=[done["image"]])["Images"]
    assert (image["BootMode"], image["TpmSupport"]) == ("uefi", "v2.0")
    assert [note["subject"] for note in done["notes"] if note["effect"] == "lost"] == ["tpm"]
    kept = made.cloud.ec2.describe_image_attribute(ImageId=done["image"], Attribute="uefiData")["UefiData"]["Value"]
    assert kept == uefi_data(nvram)


@pytest.fixture
def bucket(made: Made) -> str:
    """Where images lie while VM Import reads them, and the role that it reads them as."""
    name = f"import-{made.cloud.account}"
    made.cloud.s3.create_bucket(Bucket=name)
    made.cloud.make_role()
    return name


def test_by_vm_import_the_disks_are_the_same(cli: Cli, made: Made, bucket: str, tmp_path: Path) -> None:
    vm = protected(cli, tmp_path)
    vm.capture(Step(disks={"root": DiskStep(size_bytes=SIZE + 512, writes={0: 2, 100: 4, 640: 6})}))
    done = cli.ok(*RESTORE, "--via", "vm-import", "--bucket", bucket, "--json").json
    held = made.content_of(done["instance"], "root", tmp_path)
    assert held.blocks == {n: data.ljust(BLOCK_SIZE, b"\0") for n, data in vm.disks["root"].blocks.items()}
    assert (done["via"], done["sent_bytes"]) == ("vm-import", 0)
    assert "Contents" not in made.cloud.s3.list_objects_v2(Bucket=bucket)
    again = cli.ok(*RESTORE, "--via", "vm-import", "--bucket", bucket, "--name", "second", "--json").json
    assert again["disks"][0]["snapshot"] == done["disks"][0]["snapshot"]
    error, _ = cli.refused(106, *RESTORE, "--via", "vm-import")
    assert "choose it with --bucket" in error


def test_what_killed_imports_left_is_cleaned_up(cli: Cli, made: Made, bucket: str, tmp_path: Path) -> None:
    cli.configure(extra='[[cloud]]\nname = "a"\nregion = "us-east-1"\n')
    vm = protected(cli, tmp_path)
    vm.capture(Step(disks={"root": DiskStep(size_bytes=SIZE, writes={0: 2})}))
    rules = [{"operation": "CreateTags", "times": 1, "delay_s": 4}]
    made.cloud.faults(rules=rules)
    killed_when(made.cloud, "CreateTags", cli, *RESTORE, "--via", "vm-import", "--bucket", bucket)
    made.cloud.faults()
    other = made.cloud.s3
    repository = vm.repository.id.hex()[:8]
    foreign = [f"drsync-import/{repository}-web-2-{'0' * 16}-disk-root.vmdk", "drsync-import/mine.vmdk"]
    for key in foreign:
        other.put_object(Bucket=bucket, Key=key, Body=b"somebody else's")
    (listed,) = cli.ok("cloud", "cleanup", "--restored", "--bucket", bucket, "--dry-run", "--json").json
    kinds = sorted(one["kind"] for one in listed["removed"])
    assert kinds == ["imported result", "uploaded image"]
    (cleaned,) = cli.ok("cloud", "cleanup", "--restored", "--bucket", bucket, "--json").json
    assert cleaned["removed"] == listed["removed"]
    (result,) = [one["id"] for one in cleaned["removed"] if one["kind"] == "imported result"]
    mine: Any = [{"Name": "snapshot-id", "Values": [result]}]
    assert made.cloud.ec2.describe_snapshots(Filters=mine)["Snapshots"] == []
    assert sorted(one["Key"] for one in other.list_objects_v2(Bucket=bucket)["Contents"]) == sorted(foreign)
    (again,) = cli.ok("cloud", "cleanup", "--restored", "--bucket", bucket, "--json").json
    assert again["removed"] == []


def test_a_failed_import_says_what_aws_says_and_leaves_nothing(
    cli: Cli, made: Made, bucket: str, tmp_path: Path
) -> None:
    vm = protected(cli, tmp_path)
    vm.capture(Step(disks={"root": DiskStep(size_bytes=SIZE, writes={0: 2})}))
    made.cloud.faults(import_failures=["ClientError: Disk validation failed [We do not have access]"])
    done = cli.run(*RESTORE, "--via", "vm-import", "--bucket", bucket)
    assert 110 <= done.code <= 117
    assert "Disk validation failed" in done.stderr
    assert made.nothing
    assert "Contents" not in made.cloud.s3.list_objects_v2(Bucket=bucket)


BY_IMPORT = (*RESTORE, "--via", "vm-import", "--bucket")


@pytest.mark.parametrize(
    ("operation", "after"),
    [
        ("ImportSnapshot", True),
        ("CreateTags", False),  # the task is done, and its result is nobody's yet
        ("RunInstances", True),
    ],
)
def test_an_import_that_was_killed_in_the_middle_of_a_step_is_ended_by_the_next_run(
    cli: Cli, made: Made, bucket: str, tmp_path: Path, operation: str, after: bool
) -> None:
    vm = protected(cli, tmp_path)
    vm.capture(Step(disks={"root": DiskStep(size_bytes=SIZE, writes={0: 2, 100: 4, 600: 6})}))
    made.cloud.faults(import_step_s=0.2, rules=[{"operation": operation, "times": 1, "delay_s": 4, "after": after}])
    killed_when(made.cloud, operation, cli, *BY_IMPORT, bucket)
    made.cloud.faults()
    done = cli.ok(*BY_IMPORT, bucket, "--json").json
    assert made.instances == {done["instance"]: "running"}
    assert (made.images, list(made.snapshots)) == ([done["image"]], [done["disks"][0]["snapshot"]])
    assert len(made.cloud.ec2.describe_import_snapshot_tasks()["ImportSnapshotTasks"]) == 1
    assert "Contents" not in made.cloud.s3.list_objects_v2(Bucket=bucket)
    held = made.content_of(done["instance"], "root", tmp_path)
    assert held.blocks == vm.points[1]["root"].blocks


def test_an_upload_that_was_killed_goes_on(cli: Cli, made: Made, bucket: str, tmp_path: Path) -> None:
    vm = protected(cli, tmp_path)
    vm.capture(Step(disks={"root": DiskStep(size_bytes=100 * MIB, writes={n: 2 * n + 2 for n in range(1000)})}))
    process = start(cli, *BY_IMPORT, bucket)
    uploads = partial(made.cloud.s3.list_multipart_uploads, Bucket=bucket)
    wait_for(lambda: "Uploads" in uploads() or process.poll() is not None, bool, 60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(uploads()["Uploads"]) == 1
    done = cli.ok(*BY_IMPORT, bucket, "--json").json
    assert "Uploads" not in uploads()
    assert "Contents" not in made.cloud.s3.list_objects_v2(Bucket=bucket)
    assert made.content_of(done["instance"], "root", tmp_path).blocks == vm.points[1]["root"].blocks


FATAL = {"code": "ValidationException", "status": 400}


@pytest.mark.parametrize("operation", ["PutSnapshotBlock", "CompleteSnapshot", "RunInstances"])
def test_what_fails_leaves_nothing_behind(cli: Cli, vm: ShippedVm, made: Made, operation: str) -> None:
    made.cloud.faults(rules=[{"operation": operation, "times": 9, "error": FATAL}])
    done = cli.run(*RESTORE)
    assert done.code in (102, 107), done
    assert made.cloud.fired()[operation] > 0
    assert made.nothing


def test_what_fails_can_be_kept_and_the_next_run_goes_on_with_it(cli: Cli, vm: ShippedVm, made: Made) -> None:
    made.cloud.faults(rules=[{"operation": "RunInstances", "times": 1, "error": FATAL}])
    done = cli.run(*RESTORE, "--keep-on-error")
    assert done.code == 102
    assert done.stderr.count("aws ec2 delete-snapshot") == 2
    assert len(made.snapshots) == 2
    assert len(made.images) == 1
    again = cli.ok(*RESTORE, "--json").json
    assert (again["sent_bytes"], again["image"]) == (0, made.images[0])


def test_what_can_not_be_removed_is_listed_with_the_commands(cli: Cli, vm: ShippedVm, made: Made) -> None:
    broken = {"code": "UnauthorizedOperation", "status": 403}
    made.cloud.faults(
        rules=[
            {"operation": "RegisterImage", "times": 1, "error": FATAL},
            {"operation": "DeleteSnapshot", "times": 1, "error": broken},
        ]
    )
    error, remedy = cli.refused(109, *RESTORE)
    (left,) = made.snapshots
    assert f"left behind in us-east-1: snapshot {left}" in error
    assert remedy == f"aws ec2 delete-snapshot --region us-east-1 --snapshot-id {left}"


@pytest.mark.parametrize(
    ("operation", "after"),
    [
        ("StartSnapshot", True),
        ("PutSnapshotBlock", False),
        ("CompleteSnapshot", True),
        ("RegisterImage", False),
        ("RegisterImage", True),
        ("RunInstances", True),
    ],
)
def test_killed_in_the_middle_of_a_step_the_next_run_ends_it(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path, operation: str, after: bool
) -> None:
    made.cloud.faults(rules=[{"operation": operation, "times": 1, "delay_s": 4, "after": after}])
    killed_when(made.cloud, operation, cli, *RESTORE)
    made.cloud.faults()
    done = cli.ok(*RESTORE, "--json").json
    assert made.instances == {done["instance"]: "running"}
    assert made.images == [done["image"]]
    assert sorted(made.snapshots) == sorted(disk["snapshot"] for disk in done["disks"])
    check(made, vm, 2, done["instance"], tmp_path)


def test_throttled_and_blind_for_a_while_it_comes_up_all_the_same(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path
) -> None:
    made.cloud.faults(
        visibility_delay_s=1.5,
        completion_delay_s=0.5,
        rules=[
            {"operation": "PutSnapshotBlock", "times": 2, "error": "throttle"},
            {"operation": "RunInstances", "times": 1, "error": "throttle"},
            {"operation": "DescribeSnapshots", "times": 1, "error": "throttle"},
        ],
    )
    done = cli.ok(*RESTORE, "--json").json
    assert made.cloud.fired().keys() == {
        "PutSnapshotBlock",
        "RunInstances",
        "DescribeSnapshots",
        "visibility_delay_s",
    }
    check(made, vm, 2, done["instance"], tmp_path)


def test_interrupted_it_removes_what_it_made(cli: Cli, vm: ShippedVm, made: Made) -> None:
    made.cloud.faults(rules=[{"operation": "RegisterImage", "times": 1, "delay_s": 3}])
    process = start(cli, *RESTORE)
    wait_for(lambda: made.cloud.fired().get("RegisterImage", 0), bool, 60)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert not made.snapshots
    assert not made.instances


def test_a_gib_of_data_on_two_tib_costs_a_gib(cli: Cli, made: Made, tmp_path: Path) -> None:
    """Neither requests nor memory are in proportion to the disk's size. A GiB in a soak; else an eighth of it."""
    vm = protected(cli, tmp_path)
    groups = 2048 if SOAK else 256  # of 512 KiB each, spread over all of the disk
    apart = 4194304 // groups  # in EBS blocks
    writes = {group * apart * 8 + at: 3 + 2 * (group % 100) for group in range(groups) for at in range(8)}
    vm.capture(Step(disks={"root": DiskStep(size_bytes=2 * TiB, writes=writes)}))
    process, peak_kib = start(cli, *RESTORE, "--json"), 0
    while process.poll() is None:
        peak_kib = max(peak_kib, _peak_kib(process.pid))
        time.sleep(0.05)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    done = json.loads(output[output.index("{") :])
    assert done["sent_bytes"] == groups * BLOCK_BYTES
    assert made.volume_of(done["instance"], "root")["Size"] == 2048
    assert 0 < peak_kib < 400 * 1024
    pages = made.cloud.ebs.list_snapshot_blocks(SnapshotId=done["disks"][0]["snapshot"])["Blocks"]
    assert [one["BlockIndex"] for one in pages] == [group * apart for group in range(groups)]
    for one in pages[:: groups // 3]:
        index = one["BlockIndex"]
        data = made.cloud.get(done["disks"][0]["snapshot"], index, one["BlockToken"])
        assert data == b"".join(vm.points[1]["root"].blocks[index * 8 + at] for at in range(8))


def _peak_kib(pid: int) -> int:
    """What a process had in memory at most, so far; 0 if it is gone."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


PLAN = """
[site.b]
target = "libvirt"
[site.cloud]
target = "ec2"
region = "us-east-1"
preflight = false
tags = {{ team = "dr" }}
networks = {{ prod = "{subnet}" }}
families = ["m5"]
[[wave]]
vms = ["web"]
wait = "agent"
[vm.web]
private_ip = "{address}"
"""


def test_a_plan_brings_its_vms_up_in_a_region_and_again_finds_them(cli: Cli, made: Made, tmp_path: Path) -> None:
    devices = "<interface type='network'><source network='prod'/></interface>"
    vm = protected(cli, tmp_path, devices=devices)
    vm.capture(Step(disks={"root": DiskStep(size_bytes=SIZE, writes={0: 2})}))
    subnet = made.cloud.ec2.describe_subnets()["Subnets"][0]
    address = subnet["CidrBlock"].rpartition(".")[0] + ".88"
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(subnet=subnet["SubnetId"], address=address))
    words = ("restore", "--plan", str(plan), "--site", "cloud", "--json")

    (checked,) = cli.ok(*words, "--dry-run").json["vms"]
    assert (checked["state"], checked["domain"], made.nothing) == ("checked", "web", True)
    report = cli.ok(*words).json
    (outcome,) = report["vms"]
    assert (report["uri"], outcome["state"], outcome["point"]) == ("ec2:us-east-1", "up", 1)
    instance = made.instance(outcome["domain"])
    assert (instance["PrivateIpAddress"], instance["InstanceType"]) == (address, "m5.large")
    assert {"Key": "team", "Value": "dr"} in instance["Tags"]
    made.cloud.ec2.stop_instances(InstanceIds=[outcome["domain"]])
    (again,) = cli.ok(*words).json["vms"]
    assert (again["domain"], again["was_there"]) == (outcome["domain"], True)
    assert made.instances == {outcome["domain"]: "running"}


def test_a_plan_tells_what_would_refuse_an_instance(cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(subnet="subnet-1", address="10.0.0.8").replace("prod", '"*"'))
    done = cli.run("restore", "--plan", str(plan), "--site", "cloud", "--dry-run", "--json")
    assert done.code == 80
    (outcome,) = done.json["vms"]
    assert [err["class"] for err in outcome["errors"]] == ["CantRunInCloud"]
