"""A real guest that writes all the time is seeded by command line; what is restored is of one instant, boots."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Cli
from guest import Guest, GuestDisk

from drsync.source.live import SAFE_VERSION

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

MARK = b"0" * 511 + b"7"
BLOCK = 65536


@pytest.fixture
def machine(guest_disk: Path, tmp_path: Path) -> Iterator[Guest]:
    """A guest with two empty data disks of 16 MiB, one qcow2, one raw."""
    disks = [GuestDisk(node="d0", path=guest_disk)]
    for node, image_format in (("d1", "qcow2"), ("d2", "raw")):
        path = tmp_path / f"{node}.img"
        subprocess.run(["qemu-img", "create", "-q", "-f", image_format, str(path), "16M"], check=True)
        disks.append(GuestDisk(node=node, path=path, format="qcow2" if image_format == "qcow2" else "raw"))
    with Guest(tmp_path / "guest", disks) as guest:
        yield guest


def marks(image: Path) -> int:
    """How many marks stand at the beginning of a disk; none may stand behind a gap."""
    content = image.read_bytes()[: 8 * 1024 * 1024]
    found = [content[at : at + 512] == MARK for at in range(0, len(content), 512)]
    count = found.index(False) if False in found else len(found)
    assert not any(found[count:])
    return count


def test_a_guest_that_writes_meanwhile_is_seeded_and_what_is_restored_is_of_one_instant(
    machine: Guest, tmp_path: Path
) -> None:
    """It writes a mark to one disk, and when it is down there, to the other: never may the other be ahead."""
    (tmp_path / "host").mkdir()
    cli = Cli(tmp_path / "host")
    disks = 'disks = { first = "d1", second = "d2", root = "d0" }\n'
    limits = '[limits]\nseed_read = "8MiB"\n'  # so that the guest writes a good deal meanwhile
    cli.configure({"web": machine.qmp_socket}, extra=disks + limits, spool='stream_above = "512KiB"')
    cli.ok("init")
    machine.check("printf %0512d 7 > /tmp/mark")
    write = "dd if=/tmp/mark of=/dev/$d bs=512 seek=$n count=1 conv=notrunc,fsync"
    noise = "dd if=/dev/urandom of=/dev/$d bs=64k seek=$((130 + n % 64)) count=1 conv=notrunc"
    loop = f"n=0; while [ ! -e /tmp/stop ]; do for d in vdb vdc; do {write}; {noise}; done; n=$((n + 1)); done"
    machine.check(f"({loop}; echo $n > /tmp/marks) >/dev/null 2>&1 &")
    machine.check("for n in 1 2 3 4 5 6; do dd if=/dev/urandom of=/mnt/file$n bs=64k count=8; done; sync")

    first = cli.ok("capture", "web", "--json").json["point"]
    assert {disk["kind"] for disk in first["disks"]} == {"full"}
    second = cli.ok("capture", "web", "--json").json["point"]
    assert {disk["kind"] for disk in second["disks"]} == {"incremental"}
    machine.check("touch /tmp/stop; while [ ! -e /tmp/marks ]; do sleep 0.1; done; sync")
    total = int(machine.check("cat /tmp/marks"))
    machine.check("md5sum /mnt/file* > /tmp/sums; cp /tmp/sums /mnt/sums; sync; umount /mnt")
    third = cli.ok("capture", "web", "--json").json["point"]
    assert machine.execute("query-block-exports") == []
    machine.poweroff()  # a kill would lose what QEMU holds of qcow2's tables

    counts = []
    for point in (first, second, third):
        output = tmp_path / str(point["point"])
        where = ["--to", "image", "--output", str(output), "--format", "raw", "--point", str(point["point"])]
        cli.ok("restore", "web", *where)
        counts.append((marks(output / "first.raw"), marks(output / "second.raw")))
    assert all(0 <= ahead - behind <= 1 for ahead, behind in counts), counts
    assert counts[0] < counts[1] <= counts[2] == (total, total)
    for disk, name in zip(machine.disks, ("root", "first", "second"), strict=True):
        restored = tmp_path / str(third["point"]) / f"{name}.raw"
        command = ["qemu-img", "compare", "-f", "raw", "-F", disk.format, str(restored), str(disk.path)]
        assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    boots_and_checks(tmp_path, tmp_path / str(first["point"]) / "root.raw", "ls /mnt")
    boots_and_checks(tmp_path, tmp_path / str(third["point"]) / "root.raw", "md5sum -c /mnt/sums")


def boots_and_checks(place: Path, image: Path, command: str) -> None:
    with Guest(place / f"again-{image.parent.name}", [GuestDisk(node="d0", path=image, format="raw")]) as again:
        again.check(command)


def test_a_guest_with_iothreads_is_not_read_live_by_an_old_qemu_and_lives(guest_disk: Path, tmp_path: Path) -> None:
    """QEMU 7.2 would end the VM when the NBD connection ends: the full goes through the spool, and the log says why."""
    (tmp_path / "host").mkdir()
    cli = Cli(tmp_path / "host")
    with Guest(tmp_path / "guest", [GuestDisk(node="d0", path=guest_disk)], iothread=True) as guest:
        if guest.execute("query-version")["qemu"]["major"] >= SAFE_VERSION:
            return  # this one may be read live, which the other tests do
        cli.configure({"web": guest.qmp_socket}, spool='stream_above = "1B"')
        cli.ok("init")
        done = cli.ok("capture", "web", "--json")
        assert done.json["point"]["kind"] == "full"
        assert "it has iothreads" in done.stderr
        guest.check("echo it lives")
