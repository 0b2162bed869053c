"""`restore --to ec2` looks into a guest first, and with --fix-guest sends it prepared; the point stays what it was.

libguestfs itself, on a real Debian, is in tests/preflight/test_fix_real.py: here a stand-in of it changes a file.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cloud_lab import MIB, Made, protected
from command_line import Cli
from ec2_lab import BLOCK_BYTES, Cloud
from shipped_vm import DiskStep, ShippedVm, Step, restored

from drsync.model import BLOCK_SIZE

pytestmark = [pytest.mark.localstack, pytest.mark.timeout(300)]

RESTORE = ("restore", "web", "--to", "ec2")
FIX = (*RESTORE, "--fix-guest")
PREPARED = b"prepared for EC2"
AT = 20 * MIB
"""Where the stand-in writes: a hole before."""


class Prepared:
    """As much of libguestfs as the steps ask of a guest with cloud-init and dracut on its first disk."""

    made: list[str] = []  # noqa: RUF012 - of the class, which each test makes anew

    def __init__(self, **_: object) -> None:
        self._paths: list[Path] = []
        self._files = {
            "/etc/fstab": b"/dev/vda1 / ext4 defaults 0 1\n",
            "/usr/bin/cloud-init": b"",
            "/sbin/dracut": b"",
        }

    def add_drive_opts(self, path: str, *, format: str, readonly: int) -> None:
        assert (format, readonly) == ("raw", 0)
        self._paths.append(Path(path))

    def inspect_os(self) -> list[str]:
        return ["/dev/sda1"]

    def inspect_get_type(self, _root: str) -> str:
        return "linux"

    def inspect_get_mountpoints(self, _root: str) -> dict[str, str]:
        return {"/": "/dev/sda1"}

    def is_file(self, path: str, **_: object) -> bool:
        return path in self._files

    exists = is_file

    def filesize(self, path: str) -> int:
        return len(self._files[path])

    def read_file(self, path: str) -> bytes:
        return self._files[path]

    def write(self, path: str, content: bytes) -> None:
        self._files[path] = content

    def ls(self, _path: str) -> list[str]:
        return []

    def list_partitions(self) -> list[str]:
        return ["/dev/sda1"]

    def list_devices(self) -> list[str]:
        return ["/dev/sda"]

    def vfs_uuid(self, _device: str) -> str:
        return "1234-5678"

    def sh(self, command: str) -> str:
        return command

    def shutdown(self) -> None:
        with self._paths[0].open("r+b") as file:
            file.seek(AT)
            file.write(PREPARED + self._files["/etc/fstab"])
        type(self).made.append(str(self._paths[0]))

    def is_dir(self, *_: object, **__: object) -> bool:
        return False

    def nothing(self, *_: object, **__: object) -> None:
        pass

    launch = close = mount = umount_all = mkdir_p = cp_a = chmod = mv = nothing


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> type[Prepared]:
    """A libguestfs that prepares whatever it is given."""
    kind = type("Prepared", (Prepared,), {"made": []})
    monkeypatch.setitem(sys.modules, "guestfs", SimpleNamespace(GuestFS=kind))
    return kind


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    place = tmp_path / "cli"
    place.mkdir()
    cli = Cli(place)
    cli.configure(extra='[[cloud]]\nname = "a"\nregion = "us-east-1"\n')
    return cli


@pytest.fixture
def vm(cli: Cli, tmp_path: Path) -> ShippedVm:
    """A VM whose disks hold no system: it would not boot."""
    made = protected(cli, tmp_path, disks=("root", "data"))
    disks = {"root": DiskStep(size_bytes=40 * MIB, writes={0: 2, 100: 4}), "data": DiskStep(size_bytes=MIB)}
    made.capture(Step(disks=disks))
    return made


@pytest.fixture
def made(cloud: Cloud, connect_aws: Callable[..., Any]) -> Made:
    """What is in the test's AWS account, which commands find in the environment."""
    del connect_aws
    return Made(cloud)


def test_what_would_not_boot_is_refused_and_can_be_brought_up_all_the_same(cli: Cli, vm: ShippedVm, made: Made) -> None:
    error, remedy = cli.refused(118, *RESTORE)
    assert "would not come up in EC2 from point 1: " in error
    assert "partition" in error
    assert remedy.startswith("drsync preflight web --to ec2 --point 1")
    assert "--fix-guest" in remedy
    assert made.nothing
    assert cli.run(*RESTORE, "--dry-run").code == 118
    assert cli.ok("status", "--json").json[0]["preflight"]["point"] == 1, "the result is kept"
    assert cli.ok(*RESTORE, "--skip-preflight", "--json").json["state"] == "running"
    assert cli.ok(*RESTORE, "--json").json["was_there"], "what is there is not asked again"


def test_what_aws_converts_may_fail_the_preflight(cli: Cli, vm: ShippedVm, made: Made) -> None:
    done = cli.ok(*RESTORE, "--convert-guest", "--dry-run", "--json").json
    assert any("AWS converts the guest" in note["text"] for note in done["notes"] if note["subject"] == "preflight")


def test_a_prepared_guest_is_sent_from_its_files_and_the_point_stays(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path, prepared: type[Prepared]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    done = cli.ok(*FIX, "--work-dir", str(work), "--json")
    found = done.json
    assert "fstab: /: /dev/vda1 is now UUID=1234-5678" in done.stderr
    assert [one["name"] for one in found["steps"]][:3] == ["fix guest", "snapshot root", "snapshot data"]
    assert prepared.made[0].startswith(f"{work}/drsync-web-")
    assert list(work.iterdir()) == []
    held = made.content_of(found["instance"], "root", tmp_path)
    fstab = b"UUID=1234-5678 / ext4 defaults 0 1\n"
    expected = dict(vm.points[1]["root"].blocks)
    expected[AT // BLOCK_SIZE] = (PREPARED + fstab).ljust(BLOCK_SIZE, b"\0")
    assert held.blocks == expected
    assert found["sent_bytes"] == 3 * BLOCK_BYTES
    assert restored(vm.log, 1)["root"].blocks == vm.points[1]["root"].blocks

    again = cli.ok(*FIX, "--json").json
    assert (again["was_there"], again["instance"], len(prepared.made)) == (True, found["instance"], 1)
    second = cli.ok(*FIX, "--name", "second", "--json").json
    assert (second["sent_bytes"], second["image"], len(prepared.made)) == (0, found["image"], 1)


def test_nobody_takes_a_prepared_guest_for_the_point(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path, prepared: type[Prepared]
) -> None:
    fixed = cli.ok(*FIX, "--json").json
    assert cli.ok("cloud", "status", "--json").json[0]["held"] is None
    plain = cli.ok(*RESTORE, "--skip-preflight", "--name", "plain", "--json").json
    snapshots = [{disk["snapshot"] for disk in one["disks"]} for one in (fixed, plain)]
    assert snapshots[0].isdisjoint(snapshots[1])
    assert made.content_of(plain["instance"], "root", tmp_path).blocks == vm.points[1]["root"].blocks

    home = cli.ok("failback", "web", "--from", "ec2", "--instance", fixed["instance"], "--json").json
    assert {disk["whole_because"] for disk in home["disks"]} == {"the guest was changed on its way into AWS"}
    held = restored(vm.log, home["point"])["root"]
    assert held.blocks == made.content_of(fixed["instance"], "root", tmp_path).blocks


def test_what_fails_on_the_way_leaves_nothing_and_is_made_anew(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path, prepared: type[Prepared]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    fatal = {"code": "ValidationException", "status": 400}
    made.cloud.faults(rules=[{"operation": "CompleteSnapshot", "times": 9, "error": fatal}])
    assert cli.run(*FIX, "--work-dir", str(work)).code in (102, 107)
    assert made.cloud.fired()["CompleteSnapshot"]
    assert made.nothing
    assert list(work.iterdir()) == []
    made.cloud.faults()
    assert cli.ok(*FIX, "--json").json["sent_bytes"] == 3 * BLOCK_BYTES
    assert len(prepared.made) == 2


def test_without_libguestfs_nothing_is_begun(
    cli: Cli, vm: ShippedVm, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "guestfs", None)  # as if it were not installed
    error, remedy = cli.refused(119, *FIX)
    assert "libguestfs can't be loaded" in error
    assert "python3-guestfs" in remedy
    assert made.nothing
    said, _ = cli.refused(2, *FIX, "--convert-guest")
    assert said == "--fix-guest and --convert-guest both change the guest: give one of them"


PLAN = """
[site.cloud]
target = "ec2"
region = "us-east-1"
convert_guest = true
[[wave]]
vms = ["web"]
[vm.web]
{own}
"""


def test_a_plan_says_how_its_vms_get_there(
    cli: Cli, vm: ShippedVm, made: Made, tmp_path: Path, prepared: type[Prepared]
) -> None:
    plan = tmp_path / "plan.toml"

    def checked(own: str, site: str = "") -> Any:
        plan.write_text(PLAN.format(own=own).replace("[[wave]]", f"{site}\n[[wave]]"))
        (outcome,) = cli.run("restore", "--plan", str(plan), "--dry-run", "--json").json["vms"]
        return outcome

    assert any("AWS converts the guest" in note for note in checked("")["notes"])
    (error,) = checked("convert_guest = false")["errors"]
    assert error["class"] == "WontBoot"
    assert checked("convert_guest = false", "preflight = false")["errors"] == []
    assert any("the guest is prepared" in note for note in checked("fix_guest = true")["notes"])
    (error,) = checked('via = "vm-import"')["errors"]
    assert "choose it with --bucket" in error["message"]
    assert checked('via = "vm-import"', 'bucket = "images"')["errors"] == []
    plan.write_text(PLAN.format(own="fix_guest = true"))
    (outcome,) = cli.ok("restore", "--plan", str(plan), "--json").json["vms"]
    assert (outcome["state"], len(prepared.made)) == ("up", 1)
