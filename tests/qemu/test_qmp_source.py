"""What only a real QEMU block layer can show of the QMP source: the rules are in tests/contract/test_source.py."""

import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_bench import MIB, SIZES, TAG, DaemonBench, Replica, layer_map, present_blocks
from storage_daemon import DaemonDisk, StorageDaemon

from drsync.errors import CaptureFailed, DiskMissing, NotQmp, SourceBusy
from drsync.model import Kind, new_capture_id
from drsync.source import Base, BaseDisk, DiskSurvey
from drsync.source.backup import identity, make_layer
from drsync.source.bitmap import Owner
from drsync.source.qmp import QmpOptions, QmpSource
from drsync.source.unix_socket import Peer

pytestmark = pytest.mark.qemu

BLOCK = 65536
TIB = 2**40
NOBODY = 65534


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[DaemonBench]:
    bench = DaemonBench(tmp_path / "daemon", "qcow2")
    try:
        for disk, size in SIZES.items():
            bench.write(disk, 0, size, 1)
        yield bench
    finally:
        bench.close()


def options(daemon: StorageDaemon, disks: dict[str, str] | None = None) -> QmpOptions:
    return QmpOptions(vm="web", socket=daemon.qmp_socket, repository_tag=TAG, disks=disks)


def capture(source: QmpSource, base: Base | None, spool: Path) -> tuple[Base, list[DiskSurvey], dict[str, Path]]:
    """Survey and capture; the point is as good as committed."""
    surveys = list(source.survey(base))
    made_by = new_capture_id()
    layers = {survey.name: spool / f"{made_by}-{survey.name}.qcow2" for survey in surveys}
    source.capture(made_by, base, surveys, layers, timeout_s=60)
    disks = [BaseDisk(name=survey.name, size_bytes=survey.size_bytes) for survey in surveys]
    return Base(capture=made_by, disks=disks), surveys, layers


def test_the_disks_of_a_daemon_are_those_that_it_exports(storage_daemon: StorageDaemon) -> None:
    storage_daemon.execute("blockdev-add", **{"node-name": "spare"}, driver="null-co")
    with QmpSource(options(storage_daemon)) as source:
        assert [survey.name for survey in source.survey(None)] == ["d-data", "d-root"]


def test_a_process_without_any_disk_is_told(tmp_path: Path) -> None:
    with StorageDaemon(tmp_path, []) as daemon, QmpSource(options(daemon)) as source:
        with pytest.raises(DiskMissing, match="there are: none"):
            source.survey(None)
        source.release(new_capture_id())


def test_another_programs_job_on_a_disk_fails_the_capture_and_goes_on(bench: DaemonBench, tmp_path: Path) -> None:
    bench.daemon.execute("blockdev-add", **{"node-name": "copy"}, driver="null-co", size=SIZES["root"])
    job = {"job-id": "theirs", "sync": "full"}
    bench.daemon.execute("blockdev-mirror", **job, device="d-root", target="copy")
    with QmpSource(options(bench.daemon)) as source:
        with pytest.raises(CaptureFailed, match="transaction") as caught:
            capture(source, None, tmp_path)
        assert "theirs" in str(caught.value) or "mirror" in str(caught.value)
        assert bench.bitmaps() == set()
        assert "job theirs" in bench.things()
        bench.daemon.execute("block-job-cancel", device="theirs", force=True)
        while "job theirs" in bench.things():
            pass
        capture(source, None, tmp_path)


def test_a_capture_that_is_interrupted_is_undone(bench: DaemonBench, tmp_path: Path) -> None:
    with QmpSource(options(bench.daemon)) as source:
        things = bench.things()
        with (
            bench.while_copying(lambda: os.kill(os.getpid(), signal.SIGINT)),
            pytest.raises(KeyboardInterrupt),
        ):
            capture(source, None, tmp_path)
        assert bench.things() == things
        assert list(tmp_path.glob("*.qcow2")) == []
        capture(source, None, tmp_path)


def test_a_bitmap_that_another_program_uses_makes_a_full(
    bench: DaemonBench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with QmpSource(options(bench.daemon)) as source:
        base, _, _ = capture(source, None, tmp_path)
        name = Owner(repository=TAG, vm="web").bitmap(base.capture, "d-root")
        busy = {"type": "nbd", "id": "theirs", "node-name": "d-root", "name": "theirs", "writable": True}
        bench.daemon.execute("block-export-add", **busy, bitmaps=[name])
        newer, surveys, _ = capture(source, base, tmp_path)
        assert [(survey.kind, survey.reason) for survey in surveys] == [
            (Kind.INCREMENTAL, ""),
            (Kind.FULL, "bitmap is in use by another job or export"),
        ]
        with caplog.at_level(logging.WARNING):
            source.release(newer.capture)
        assert f"bitmap={name} stays for now" in caplog.text
        bench.daemon.execute("block-export-del", id="theirs", mode="hard")
        base, surveys, _ = capture(source, newer, tmp_path)
        assert {survey.kind for survey in surveys} == {Kind.INCREMENTAL}
        assert not any(name in bitmap for bitmap in bench.bitmaps()), "the survey removes it as soon as it can"


def test_a_snapshot_makes_a_full_and_the_bitmap_below_it_harms_nobody(bench: DaemonBench, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(overlay), str(SIZES["root"])], check=True)
    replica = Replica()
    with QmpSource(options(bench.daemon)) as source:
        base, surveys, layers = capture(source, None, tmp_path)
        replica.apply(surveys, layers)
        file = {"driver": "file", "filename": str(overlay)}
        bench.daemon.execute(
            "blockdev-add", **{"node-name": "overlay"}, driver="qcow2", file=file, backing=None, discard="unmap"
        )
        bench.daemon.execute("blockdev-snapshot", node="d-root", overlay="overlay")
        bench.write("root", 0, BLOCK, 7)
        for kind in (Kind.FULL, Kind.INCREMENTAL):
            base, surveys, layers = capture(source, base, tmp_path)
            assert {survey.name: survey.kind for survey in surveys} == {"d-data": Kind.INCREMENTAL, "overlay": kind}
            replica.apply(surveys, layers)
        assert bytes(replica.disks["overlay"]) == bench.content("root")
    with QmpSource(options(bench.daemon, {"root": "d-root"})) as source, pytest.raises(DiskMissing, match="overlay"):
        source.survey(base)


def test_a_full_of_a_huge_sparse_disk_is_as_small_as_what_was_written(tmp_path: Path) -> None:
    with StorageDaemon(tmp_path, [DaemonDisk(name="root", size_bytes=2 * TIB)]) as daemon:
        daemon.io("root", "write -P 1 1T 1M", "write -P 2 100k 512")
        with QmpSource(options(daemon)) as source:
            base, (survey,), layers = capture(source, None, tmp_path)
            assert survey.copy_bytes < 4 * MIB
            assert layers["d-root"].stat().st_blocks * 512 < 4 * MIB
            assert present_blocks(layers["d-root"]) == {1, *range(2**24, 2**24 + 16)}
            daemon.io("root", "write -P 3 1T 1M")
            _, (survey,), layers = capture(source, base, tmp_path)
            assert (survey.kind, survey.copy_bytes) == (Kind.INCREMENTAL, MIB)
            assert layers["d-root"].stat().st_blocks * 512 < 4 * MIB
            assert present_blocks(layers["d-root"]) == set(range(2**24, 2**24 + 16))


def test_a_full_holds_the_whole_backing_chain(tmp_path: Path) -> None:
    below = tmp_path / "below.qcow2"
    for command in (
        ["qemu-img", "create", "-q", "-f", "qcow2", str(below), "4M"],
        ["qemu-io", "-f", "qcow2", "-c", "write -P 5 0 2M", str(below)],
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(below), "-F", "qcow2", str(tmp_path / "root.qcow2")],
    ):
        subprocess.run(command, check=True, capture_output=True)
    with StorageDaemon(tmp_path, [DaemonDisk(name="root", size_bytes=4 * MIB)]) as daemon:
        daemon.io("root", "write -P 6 1M 64k", "write -z 0 64k")
        with QmpSource(options(daemon)) as source:
            _, surveys, layers = capture(source, None, tmp_path)
        assert surveys[0].copy_bytes >= 2 * MIB + 2 * BLOCK
        replica = Replica()
        replica.apply(surveys, layers)
        assert bytes(replica.disks["d-root"]) == daemon.read("root")


def test_an_image_of_qcow2_version_2_is_captured_like_a_raw_one(tmp_path: Path) -> None:
    image = str(tmp_path / "root.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", image, "4M"], check=True)
    with (
        StorageDaemon(tmp_path, [DaemonDisk(name="root", size_bytes=4 * MIB)]) as daemon,
        QmpSource(options(daemon)) as source,
    ):
        base, (survey,), _ = capture(source, None, tmp_path)
        assert not survey.persistent
        daemon.io("root", "write -P 1 0 64k")
        _, (survey,), layers = capture(source, base, tmp_path)
        assert survey.kind is Kind.INCREMENTAL
        assert present_blocks(layers["d-root"]) == {0}


def test_a_raw_disk_whose_size_is_not_a_whole_sector_is_captured_as_qemu_sees_it(tmp_path: Path) -> None:
    size = 2 * MIB + 100
    (tmp_path / "root.raw").write_bytes(b"\1" * size)
    with (
        StorageDaemon(tmp_path, [DaemonDisk(name="root", size_bytes=size, format="raw")]) as daemon,
        QmpSource(options(daemon)) as source,
    ):
        base, (survey,), layers = capture(source, None, tmp_path)
        assert survey.size_bytes == 2 * MIB + 512
        replica = Replica()
        replica.apply([survey], layers)
        assert bytes(replica.disks["d-root"]) == b"\1" * size + bytes(412)
        daemon.io("root", "write -P 9 2M 512")
        _, surveys, layers = capture(source, base, tmp_path)
        replica.apply(surveys, layers)
        assert bytes(replica.disks["d-root"]) == b"\1" * 2 * MIB + b"\x09" * 512


def test_zeros_of_a_raw_disks_full_need_no_room_for_data(tmp_path: Path) -> None:
    with (
        StorageDaemon(tmp_path, [DaemonDisk(name="root", size_bytes=64 * MIB, format="raw")]) as daemon,
        QmpSource(options(daemon)) as source,
    ):
        daemon.io("root", "write -P 1 0 64k")
        _, (survey,), layers = capture(source, None, tmp_path)
        assert survey.copy_bytes <= 3 * BLOCK
        data = [extent for extent in layer_map(layers["d-root"]) if extent["data"]]
        assert sum(extent["length"] for extent in data) == BLOCK


def test_a_layer_belongs_to_the_user_that_qemu_runs_as(tmp_path: Path) -> None:
    """As root it is handed over; anybody else shares the user with QEMU, or QEMU says that it can't open it."""
    user = NOBODY if os.geteuid() == 0 else os.geteuid()
    extra = {"user": NOBODY, "group": NOBODY} if os.geteuid() == 0 else {}
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, **extra) as process:  # type: ignore[call-overload] # user and group
        make_layer(tmp_path / "layer.qcow2", MIB, identity(Peer(pid=process.pid, uid=0, gid=0)))
        process.communicate()
    assert (tmp_path / "layer.qcow2").stat().st_uid == user
    assert (tmp_path / "layer.qcow2").stat().st_mode & 0o777 == 0o600


def test_a_socket_that_is_in_use_is_busy(storage_daemon: StorageDaemon) -> None:
    with QmpSource(options(storage_daemon)):
        waiting = QmpOptions(vm="web", socket=storage_daemon.qmp_socket, repository_tag=TAG, connect_timeout_s=0.3)
        with pytest.raises(SourceBusy):
            QmpSource(waiting)
    QmpSource(options(storage_daemon)).close()


def test_an_nbd_socket_is_not_qmp(storage_daemon: StorageDaemon) -> None:
    path = Path(storage_daemon.nbd_uri("root").partition("socket=")[2])
    with pytest.raises(NotQmp):
        QmpSource(QmpOptions(vm="web", socket=path, repository_tag=TAG))
