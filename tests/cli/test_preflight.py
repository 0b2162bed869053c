"""`drsync preflight` on a real QEMU block layer: a guest's disk is captured, and its point is looked into."""

from pathlib import Path

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


@pytest.fixture
def protected(cli: Cli, tmp_path: Path) -> Cli:
    """Point 1 of `web` boots in EC2, point 2 does not: its fstab names /dev/vda1."""
    work = tmp_path / "work"
    guest = DebianGuest(initramfs=initramfs(work / "initramfs", ["nvme/host/nvme", "virtio_blk"]))
    for number, fstab in enumerate((guest.fstab, "/dev/vda1 / ext4 defaults 0 1\n"), 1):
        guest.fstab = fstab
        (work / str(number)).mkdir()
        debian(work / str(number), tmp_path / "root.raw" if number == 1 else work / "second.raw", guest)
    with StorageDaemon(tmp_path, [DaemonDisk(name="root", size_bytes=SIZE, format="raw")]) as daemon:
        cli.configure({"web": daemon.qmp_socket})
        cli.ok("init")
        cli.ok("capture", "web")
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", work / "second.raw", daemon.nbd_uri("root"))
        cli.ok("capture", "web")
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
    assert [d["vm"] for d in protected.run("preflight", "--to", "ec2", "--json").json] == ["web"]
    protected.refused(2, "preflight", "--to", "ec2", "--point", "1")
    protected.refused(12, "preflight", "nobody", "--to", "ec2")
