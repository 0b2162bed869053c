"""Domains that are off: their state is captured once, and again when it has changed."""

import json
import subprocess
from pathlib import Path

import pytest
from libvirt_bench import LibvirtBench
from libvirt_guest import SiteDisk
from libvirt_site import LibvirtSiteFailed
from source_bench import KIB, SIZES, TAG
from source_protection import BOTH_FULL, BOTH_INCREMENTAL, Protection

from drsync.errors import CaptureFailed, SourceLost
from drsync.model import Kind, new_capture_id
from drsync.source.bitmap import Owner
from drsync.source.libvirt_offline import OfflineSource
from drsync.source.libvirt_source import open_source
from drsync.source.libvirt_survey import LibvirtOptions

pytestmark = pytest.mark.qemu

BLOCK = 64 * KIB


@pytest.fixture(autouse=True)
def off(bench: LibvirtBench) -> None:
    """Opening a domain doesn't start it; its NBD server runs."""
    bench.stays_off = True
    bench.daemon.start()


def changed(protection: Protection) -> dict[str, int]:
    return {survey.name: survey.copy_bytes for survey in protection.survey()}


def stored_bitmaps(path: Path) -> set[str]:
    said = subprocess.run(["qemu-img", "info", "-U", "--output=json", path], capture_output=True, check=True).stdout
    return {bitmap["name"] for bitmap in json.loads(said)["format-specific"]["data"].get("bitmaps", [])}


def test_the_first_point_of_a_domain_that_is_off_is_whole_and_the_next_one_is_not_needed(
    bench: LibvirtBench, protection: Protection
) -> None:
    protection.point()
    assert protection.kinds() == BOTH_FULL
    assert protection.replica.contents() == bench.contents()
    assert protection.result is not None
    assert protection.result.definition["domain"]["running"] is False  # type: ignore[index]
    for _ in range(2):
        assert changed(protection) == {"root": 0, "data": 0}
        assert {survey.kind for survey in protection.survey()} == {Kind.INCREMENTAL}


def test_looking_does_not_touch_the_image(bench: LibvirtBench, protection: Protection) -> None:
    protection.point()
    before = bench.files["data"].stat()
    changed(protection)
    after = bench.files["data"].stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_running_off_and_running_again_is_one_chain_of_increments(bench: LibvirtBench, protection: Protection) -> None:
    bench.start()
    protection.point()
    bench.write("root", 0, BLOCK, 2)
    bench.stop()
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()
    assert protection.base is not None
    name = Owner(repository=TAG, vm="web").checkpoint(protection.base.capture)
    assert stored_bitmaps(bench.files["data"]) == {name}
    assert bench.site.virsh("checkpoint-list", "web", "--name").split() == []
    bench.start()
    bench.write("data", BLOCK, BLOCK, 3)
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()


def test_a_domain_that_ran_in_between_is_noticed(bench: LibvirtBench, protection: Protection) -> None:
    protection.point()
    bench.start()
    bench.write("data", 5 * BLOCK, BLOCK, 7)
    bench.stop()
    assert changed(protection) == {"root": 0, "data": BLOCK}
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()


def test_after_a_power_cut_everything_is_read_again(bench: LibvirtBench, protection: Protection) -> None:
    protection.point()
    bench.start()
    bench.write("data", 5 * BLOCK, BLOCK, 7)
    bench.crash()
    protection.point()
    assert protection.kinds() == BOTH_FULL
    assert {s.reason for s in protection.surveys} == {"bitmap is inconsistent, QEMU did not end cleanly"}
    assert protection.replica.contents() == bench.contents()
    assert changed(protection) == {"root": 0, "data": 0}


class StartedWhileCopying(OfflineSource):
    """A session during whose copying somebody starts the domain."""

    bench: LibvirtBench

    def _copy(self, *arguments: object) -> None:
        super()._copy(*arguments)  # type: ignore[arg-type]
        self.bench.start()


def test_a_domain_can_be_started_while_it_is_copied_and_the_copy_is_dropped(
    bench: LibvirtBench, protection: Protection, tmp_path: Path
) -> None:
    protection.point()
    bench.start()
    bench.write("root", 0, BLOCK, 2)
    bench.stop()
    opened = bench.open()
    source = opened.inner  # type: ignore[attr-defined]
    source.__class__ = StartedWhileCopying
    source.bench = bench
    with opened, pytest.raises((SourceLost, CaptureFailed), match=r"started|changed"):
        protection.capture(opened)
    assert bench.guest.state == "running"
    assert sorted((tmp_path / "spool").glob("1-*")) == []
    bench.write("root", 4 * BLOCK, BLOCK, 3)
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()


def test_a_raw_disk_is_read_once_and_known_again(bench: LibvirtBench, tmp_path: Path) -> None:
    raw = tmp_path / "raw.img"
    raw.write_bytes(b"\1" * SIZES["data"])
    bench.guest.disks = [SiteDisk(target="vda", path=raw, format="raw")]
    bench.guest.define()
    options = LibvirtOptions(vm="web", domain="web", uri=bench.site.uri, repository_tag=TAG, layers=tmp_path)
    from drsync.source import Base, BaseDisk

    with open_source(options) as source:
        surveys = source.survey(None)
        assert [survey.persistent for survey in surveys] == [False]
        capture = new_capture_id()
        result = source.capture(capture, None, surveys, {"vda": tmp_path / "0.qcow2"}, timeout_s=60)
        source.release(capture)
        disks = [BaseDisk(name="vda", size_bytes=SIZES["data"])]
        base = Base(capture=capture, disks=disks, definition=result.definition)
        (again,) = source.survey(base)
        assert (again.kind, again.copy_bytes) == (Kind.INCREMENTAL, 0)
        raw.write_bytes(b"\2" * SIZES["data"])
        (again,) = source.survey(base)
        assert again.kind is Kind.FULL
        assert "libvirt keeps no bitmap of a raw image" in again.reason
    bench.site.virsh("start", "web", "--paused")
    bench._started = True
    with open_source(options) as source:
        (again,) = source.survey(base)
        assert again.kind is Kind.FULL
        assert "libvirt keeps no bitmap of a raw image" in again.reason
        layers = {"vda": tmp_path / "1.qcow2"}
        source.capture(new_capture_id(), base, [again], layers, timeout_s=60)
    copied = subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"read -P 2 0 {SIZES['data']}", layers["vda"]], check=True)
    assert copied.returncode == 0


def test_an_image_that_is_in_use_elsewhere_is_not_captured(bench: LibvirtBench, protection: Protection) -> None:
    protection.point()
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", bench.files["data"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(b"write -P 3 0 64k\n")
        other.stdin.flush()
        while b"wrote" not in other.stdout.readline():
            pass
        with bench.open() as source, pytest.raises(CaptureFailed, match="lock"):
            protection.capture(source, full=True)
        other.stdin.close()
    protection.point()
    assert protection.replica.contents() == bench.contents()


def test_nothing_keeps_the_domain_from_being_started(bench: LibvirtBench, protection: Protection) -> None:
    protection.point()
    with bench.open() as source:
        protection.capture(source, full=True)
        try:
            bench.start()
        except LibvirtSiteFailed as err:
            pytest.fail(f"an open session held the images: {err}")
