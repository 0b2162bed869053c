"""The QMP source on a running VM: a real guest writes, behind virtio disks that an iothread serves."""

import itertools
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest import Guest, GuestDisk
from qmp_socket import QmpSocket
from source_bench import MIB, TAG, Replica, present_blocks

from drsync.errors import CaptureFailed, SourceBusy, SourceUnreachable
from drsync.model import Kind, new_capture_id
from drsync.source import Base, BaseDisk, CaptureResult, DiskSurvey
from drsync.source.qmp import QmpOptions, QmpSource

pytestmark = pytest.mark.qemu

BLOCK = 65536


@pytest.fixture
def machine(guest_disk: Path, tmp_path: Path) -> Iterator[Guest]:
    """A guest with two empty data disks of 16 MiB, one qcow2, one raw, all served by an iothread."""
    disks = [GuestDisk(node="d0", path=guest_disk)]
    for node, image_format in (("d1", "qcow2"), ("d2", "raw")):
        path = tmp_path / f"{node}.img"
        subprocess.run(["qemu-img", "create", "-q", "-f", image_format, str(path), "16M"], check=True)
        disks.append(GuestDisk(node=node, path=path, format="qcow2" if image_format == "qcow2" else "raw"))
    with Guest(tmp_path / "guest", disks, iothread=True) as guest:
        yield guest


class Captures:
    """One capture after the other, all committed; the layers of each disk in their order."""

    def __init__(self, guest: Guest, spool: Path, disks: dict[str, str] | None = None) -> None:
        self.options = QmpOptions(vm="web", socket=guest.qmp_socket, repository_tag=TAG, disks=disks)
        self.surveys: list[DiskSurvey] = []
        self.layers: dict[str, list[Path]] = {}
        self._base: Base | None = None
        self._spool = spool

    def take(self, source: QmpSource) -> tuple[CaptureResult, dict[str, Path]]:
        capture = new_capture_id()
        self.surveys = list(source.survey(self._base))
        layers = {survey.name: self._spool / f"{capture}-{survey.name}" for survey in self.surveys}
        result = source.capture(capture, self._base, self.surveys, layers, timeout_s=60)
        for name, path in layers.items():
            self.layers.setdefault(name, []).append(path)
        source.release(capture)
        disks = [BaseDisk(name=survey.name, size_bytes=survey.size_bytes) for survey in self.surveys]
        self._base = Base(capture=capture, disks=disks)
        return result, layers


def assert_restores(layers: list[Path], disk: GuestDisk) -> None:
    """The layers, each backed by the one before, are the disk of a guest that has ended: qemu-img says so."""
    for below, layer in itertools.pairwise(layers):
        subprocess.run(["qemu-img", "rebase", "-u", "-b", str(below), "-F", "qcow2", str(layer)], check=True)
    command = ["qemu-img", "compare", "-f", "qcow2", "-F", disk.format, str(layers[-1]), str(disk.path)]
    compared = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compared.returncode == 0, compared.stdout + compared.stderr


def test_what_a_guest_writes_is_captured(machine: Guest, tmp_path: Path) -> None:
    captures = Captures(machine, tmp_path)
    with QmpSource(captures.options) as source:
        result, _ = captures.take(source)
        assert {survey.name: survey.kind for survey in captures.surveys} == dict.fromkeys(
            ["disk0", "disk1", "disk2"], Kind.FULL
        )
        assert [survey.persistent for survey in captures.surveys] == [True, True, False]
        assert result.definition["machine"] == machine.execute("qom-get", path="/machine", property="type")
        assert result.definition["memory"] == machine.execute("query-memory-size-summary")
        assert result.definition["target"] == {"arch": "x86_64"}
        assert isinstance(result.definition["cpus"], dict)
        assert result.definition["cpus"]["count"] == 1
        machine.check("echo precious > /mnt/file; sync")
        for device in ("vdb", "vdc"):
            machine.check(f"dd if=/dev/urandom of=/dev/{device} bs=64k seek=3 count=2 conv=fsync")
        _, layers = captures.take(source)
        assert {survey.kind for survey in captures.surveys} == {Kind.INCREMENTAL}
        assert present_blocks(layers["disk1"]) == present_blocks(layers["disk2"]) == {3, 4}
        machine.check("umount /mnt; dd if=/dev/zero of=/dev/vdb bs=64k seek=4 count=1 conv=fsync")
        captures.take(source)
    machine.kill()
    assert b"precious\n" in captures.layers["disk0"][1].read_bytes()
    for number, disk in enumerate(machine.disks):
        assert_restores(captures.layers[f"disk{number}"], disk)


def test_disks_are_of_one_instant_while_the_guest_writes(machine: Guest, tmp_path: Path) -> None:
    """The guest writes a mark to one disk, and when it is down there, to the other: never may the other be ahead."""
    captures = Captures(machine, tmp_path, {"first": "d1", "second": "d2"})
    machine.check("printf %0512d 7 > /tmp/mark")
    write = "dd if=/tmp/mark of=/dev/$d bs=512 seek=$n count=1 conv=notrunc,fsync"
    loop = f"n=0; while [ ! -e /tmp/stop ]; do for d in vdb vdc; do {write}; done; n=$((n + 1)); done"
    machine.check(f"({loop}; echo $n > /tmp/marks) >/dev/null 2>&1 &")
    mark = b"0" * 511 + b"7"
    replica = Replica()
    disks = replica.disks
    seen: list[tuple[int, int]] = []
    with QmpSource(captures.options) as source:
        for _ in range(8):
            _, layers = captures.take(source)
            replica.apply(captures.surveys, layers)
            seen.append((disks["first"].count(mark), disks["second"].count(mark)))
            time.sleep(0.05)  # the guest's turn: both share the processor
        machine.check("touch /tmp/stop; while [ ! -e /tmp/marks ]; do sleep 0.1; done")
        _, layers = captures.take(source)
        replica.apply(captures.surveys, layers)
    marks = int(machine.check("cat /tmp/marks"))
    assert all(second <= first <= second + 1 for first, second in seen), seen
    assert 0 < seen[0][0] < seen[-1][0], "the guest wrote nothing between the captures"
    assert disks["first"].count(mark) == disks["second"].count(mark) == marks
    machine.kill()
    assert_restores(captures.layers["first"], machine.disks[1])
    assert_restores(captures.layers["second"], machine.disks[2])


def test_a_shutdown_keeps_the_increments_of_qcow2_disks(machine: Guest, tmp_path: Path) -> None:
    captures = Captures(machine, tmp_path)
    with QmpSource(captures.options) as source:
        captures.take(source)
    machine.check("dd if=/dev/urandom of=/dev/vdb bs=64k seek=9 count=1 conv=fsync")
    machine.poweroff()
    machine.start()
    with QmpSource(captures.options) as source:
        _, layers = captures.take(source)
    assert [survey.kind for survey in captures.surveys] == [Kind.INCREMENTAL, Kind.INCREMENTAL, Kind.FULL]
    assert present_blocks(layers["disk1"]) == {9}


def test_a_vm_that_is_being_migrated_away_is_not_captured(guest: Guest, tmp_path: Path) -> None:
    captures = Captures(guest, tmp_path)
    guest.execute("migrate-set-parameters", **{"max-bandwidth": 1})
    guest.execute("migrate", uri="exec:cat > /dev/null")
    with QmpSource(captures.options) as source:
        with pytest.raises(CaptureFailed, match="is being migrated"):
            source.survey(None)
        guest.execute("migrate_cancel")
        while guest.execute("query-migrate")["status"] != "cancelled":
            time.sleep(0.01)
        captures.take(source)


def test_a_vm_that_arrives_is_not_captured() -> None:
    with tempfile.TemporaryDirectory(prefix="drsync-qmp-") as directory:
        path = Path(directory) / "qmp"
        command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-accel", "tcg", "-incoming", "defer"]
        command += ["-qmp", f"unix:{path},server=on,wait=off", "-blockdev", f"null-co,node-name=d0,size={MIB}"]
        command += ["-device", "virtio-blk-pci,drive=d0"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
            try:
                QmpSocket(path).close()  # it is up
                with QmpSource(QmpOptions(vm="web", socket=path, repository_tag=TAG)) as source:
                    with pytest.raises(CaptureFailed, match="its state is inmigrate"):
                        source.survey(None)
                    with pytest.raises(CaptureFailed, match="its state is inmigrate"):
                        survey = DiskSurvey(
                            name="d0", size_bytes=MIB, kind=Kind.FULL, reason="", copy_bytes=0, persistent=False
                        )
                        layers = {"d0": Path(directory) / "layer"}
                        source.capture(new_capture_id(), None, [survey], layers, timeout_s=5)
            finally:
                process.kill()


def test_a_vms_socket_in_use_is_busy_and_one_that_is_gone_unreachable(guest: Guest, tmp_path: Path) -> None:
    options = QmpOptions(vm="web", socket=guest.qmp_socket, repository_tag=TAG, connect_timeout_s=0.5)
    with QmpSocket(guest.qmp_socket), pytest.raises(SourceBusy, match="another program") as busy:
        QmpSource(options)
    assert str(guest.qmp_socket) in busy.value.remedy
    QmpSource(options).close()
    guest.kill()
    with pytest.raises(SourceUnreachable, match="Connection refused"):
        QmpSource(options)


def test_a_guest_can_be_paused_around_the_instant(machine: Guest, tmp_path: Path) -> None:
    """What a group of VMs does: no VM runs on until all have been captured."""
    captures = Captures(machine, tmp_path)
    machine.check("(while :; do date +%s%N >> /mnt/ticks; sync; done) >/dev/null 2>&1 &")
    with QmpSource(captures.options) as source:
        assert source.is_running()
        assert source.pause(timeout_s=10) is True
        assert machine.execute("query-status")["status"] == "paused"
        assert not source.is_running()
        assert source.pause(timeout_s=10) is False
        captures.take(source)
        assert machine.execute("query-status")["status"] == "paused"
        source.resume(timeout_s=10)
        assert machine.execute("query-status")["status"] == "running"
        before = int(machine.check("wc -l < /mnt/ticks"))
        assert int(machine.check("sleep 1; wc -l < /mnt/ticks")) > before
