"""`drsync preflight` on a real QEMU block layer: a guest's disk is captured, and its point is looked into."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import Cli
from guest_disks import DebianGuest, grub_core, initramfs, make_disk, make_ext4, run
from storage_daemon import DaemonDisk, StorageDaemon

from drsync.units import MiB

pytestmark = pytest.mark.qemu

SIZE = 96 * MiB


def debian(directory: Path, disk: Path, guest: DebianGuest) -> None:
    """A Debian on one MBR partition, with GRUB's structure in front of it."""
    code, core = grub_core(bytearray(440), sector=1)
    root = make_ext4(directory / "root.ext4", 64 * MiB, guest.files())
    (directory / "core").write_bytes(core)
    table = "label: dos\nstart=2048, type=83, bootable\n"
    make_disk(disk, SIZE, table, {512: directory / "core", MiB: root}, boot_code=code)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place where point 1 of `web` boots in EC2, and point 2 does not: its fstab names /dev/vda1."""
    place, work = tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("work")
    cli, guest = Cli(place), DebianGuest(initramfs=initramfs(work / "initramfs", ["nvme/host/nvme", "virtio_blk"]))
    for number, fstab in enumerate((guest.fstab, "/dev/vda1 / ext4 defaults 0 1\n"), 1):
        guest.fstab = fstab
        (work / str(number)).mkdir()
        debian(work / str(number), place / "root.raw" if number == 1 else work / "second.raw", guest)
    with StorageDaemon(place, [DaemonDisk(name="root", size_bytes=SIZE, format="raw")]) as daemon:
        cli.configure({"web": daemon.qmp_socket})
        cli.ok("init")
        cli.ok("capture", "web")
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", work / "second.raw", daemon.nbd_uri("root"))
        cli.ok("capture", "web")
    (place / "root.raw").unlink()
    return place


@pytest.fixture
def protected(shipped: Path, tmp_path: Path) -> Cli:
    """A copy of that place."""
    place = tmp_path / "place"
    shutil.copytree(shipped, place)
    cli = Cli(place)
    cli.configure({"web": place / "nowhere"})
    return cli


def test_a_point_is_judged_by_what_its_disks_hold(protected: Cli) -> None:
    document = protected.ok("preflight", "web", "--to", "ec2", "--point", "1", "--json").json[0]
    assert (document["vm"], document["to"], document["point"]) == ("web", "ec2", 1)
    verdicts = {f["check"]: f["verdict"] for f in document["findings"]}
    assert verdicts["loader"] == verdicts["nvme"] == verdicts["ena"] == verdicts["fstab"] == verdicts["network"] == "ok"
    assert document["verdict"] == "ok", document
    assert 0 < document["read_bytes"] < 4 * MiB
    done = protected.run("preflight", "web", "--to", "ec2", "--json")
    assert done.code == 118
    (bad,) = [f for f in done.json[0]["findings"] if f["verdict"] == "fails"]
    assert bad["check"] == "fstab"
    assert "/dev/vda1" in bad["reason"]
    assert bad["action"]


def test_the_result_is_a_table_and_is_kept_for_status(protected: Cli) -> None:
    assert protected.ok("status", "--json").json[0]["preflight"] is None
    done = protected.run("preflight", "web", "--to", "ec2")
    assert done.code == 118
    lines = done.stdout.splitlines()
    assert lines[0].startswith("web at point 2 of ")
    assert lines[0].endswith("it would NOT come up in EC2")
    assert lines[1].split() == ["check", "result", "reason", "what", "to", "do"]
    told = protected.ok("status", "--json").json[0]["preflight"]
    assert (told["to"], told["point"], told["verdict"], told["fails"]) == ("ec2", 2, "fails", 1)
    assert "ec2: 1 fail (point 2)" in protected.ok("status").stdout
    protected.ok("preflight", "web", "--to", "ec2", "--point", "1")
    assert "ec2: ok (point 1)" in protected.ok("status").stdout


def test_nothing_is_restored_and_the_repository_is_only_read(protected: Cli) -> None:
    before = {p: p.stat().st_mtime_ns for p in protected.repository.rglob("*")}
    protected.run("preflight", "web", "--to", "ec2")
    assert {p: p.stat().st_mtime_ns for p in protected.repository.rglob("*")} == before
    assert [p.name for p in (protected.spool / "web").iterdir() if p.name == "preflight.json"]


def test_without_a_place_to_keep_it_the_result_is_told_all_the_same(protected: Cli) -> None:
    target = protected.spool / "web" / "preflight.json"
    target.mkdir()
    done = protected.ok("preflight", "web", "--to", "ec2", "--point", "1", "--json")
    assert done.json[0]["verdict"] == "ok"
    assert "the result is not kept" in done.stderr


def test_all_vms_are_checked_when_none_is_named(protected: Cli) -> None:
    protected.configure({"web": Path("/nowhere"), "new": Path("/nowhere2")})
    done = protected.run("preflight", "--to", "ec2", "--json")
    assert done.code == 118, done
    assert (done.code, [d["vm"] for d in done.json]) == (118, ["web"])
    assert "passed over: VM new has no point" in done.stderr
    protected.refused(13, "preflight", "new", "--to", "ec2")
    protected.refused(2, "preflight", "--to", "ec2", "--point", "1")
    protected.refused(12, "preflight", "nobody", "--to", "ec2")


def test_without_libguestfs_a_guest_is_not_prepared_and_nothing_is_restored(
    protected: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "guestfs", None)  # as if it were not installed
    output = protected.place / "out"
    words = ["restore", "web", "--to", "image", "--output", str(output), "--fix-guest", "ec2"]
    message, remedy = protected.refused(119, *words)
    assert "libguestfs can't be loaded" in message
    assert "python3-guestfs" in remedy
    assert not output.exists()
    said, _ = protected.refused(2, *words, "--disk", "d-root")
    assert said == "--fix-guest needs all disks of the VM: it can't be given with --disk or --allow-damaged"
    document = protected.ok("restore", "web", "--to", "image", "--output", str(output), "--json").json
    assert document["guest_changes"] is None


class NoSystem:
    """libguestfs, as far as it gets with disks on which there is no system."""

    def __init__(self, **_: object) -> None:
        self.closed = False

    def add_drive_opts(self, path: str, **_: object) -> None:
        assert Path(path).exists()

    def launch(self) -> None:
        if os.environ.get("NO_LAUNCH"):
            raise RuntimeError("guestfs_launch failed: no kernel")

    def inspect_os(self) -> list[str]:
        return []

    def close(self) -> None:
        self.closed = True


def test_a_guest_that_can_not_be_prepared_is_told_with_the_step(
    protected: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "guestfs", SimpleNamespace(GuestFS=NoSystem))
    output = protected.place / "out"
    words = ["restore", "web", "--to", "image", "--output", str(output), "--fix-guest", "ec2"]
    message, _ = protected.refused(120, *words)
    assert message.endswith("failed at opening the disks: no operating system was found")
    assert (output / "d-root.qcow2").exists(), "the restored copy stays"
    monkeypatch.setenv("NO_LAUNCH", "1")
    message, _ = protected.refused(119, *words, "--overwrite")
    assert message.endswith("libguestfs can't start: guestfs_launch failed: no kernel")
