"""Everything that comes between drsync and its bitmaps: each time a resync with its reason, or a right increment.

What disks held is compared with what layers say, read with qemu-img (source_bench.Replica).
"""

import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from libvirt_bench import LibvirtBench, create, is_of
from libvirt_guest import SiteDisk
from source_bench import KIB, MIB, SIZES, TAG
from source_protection import BOTH_FULL, BOTH_INCREMENTAL, Protection

from drsync.errors import CaptureFailed, DomainMissing, LibvirtUnreachable, SourceLost
from drsync.model import Kind, new_capture_id
from drsync.source import Base, BaseDisk
from drsync.source.bitmap import Owner
from drsync.source.libvirt_source import open_source
from drsync.source.libvirt_survey import BROKEN_REASON, LibvirtOptions
from drsync.source.libvirt_xml import checkpoint_xml

pytestmark = pytest.mark.qemu

BLOCK = 64 * KIB


def checkpoint_of(protection: Protection) -> str:
    assert protection.base is not None
    return Owner(repository=TAG, vm="web").checkpoint(protection.base.capture)


def test_a_bitmap_without_a_checkpoint_is_taken_up_again(bench: LibvirtBench, protection: Protection) -> None:
    """As after a migration: libvirt lost its record, the bitmaps are there."""
    protection.point()
    bench.write("root", 3 * BLOCK, BLOCK, 2)
    bench.site.virsh("checkpoint-delete", "web", checkpoint_of(protection), "--metadata")
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()


def test_a_checkpoint_without_its_bitmaps_makes_fulls(bench: LibvirtBench, protection: Protection) -> None:
    protection.point()
    name = checkpoint_of(protection)
    bench.site.virsh("checkpoint-delete", "web", name)
    file = bench.site.path / "forged.xml"
    file.write_text(checkpoint_xml(name, ["vda", "vdb"], [], domain=bench.site.virsh("dumpxml", "web")))
    bench.site.virsh("checkpoint-create", "web", file, "--redefine")
    bench.write("root", 0, BLOCK, 2)
    protection.point()
    assert protection.kinds() == BOTH_FULL
    assert {survey.reason for survey in protection.surveys} == {BROKEN_REASON}
    assert protection.replica.contents() == bench.contents()
    assert name not in bench.site.virsh("checkpoint-list", "web")
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL


def test_a_bitmap_that_libvirt_forgot_in_the_midst_of_a_copy_is_not_in_the_way(
    bench: LibvirtBench, protection: Protection
) -> None:
    """libvirtd ends while it copies: drsync's note of it stays, and the bitmap by which it copied may stay, too."""
    protection.point()
    bench.write("root", 0, 4 * MIB, 2)
    note = bench.layers / "copying"

    def restart() -> None:
        assert note.exists()
        bench.site.stop_daemon()
        bench.site.start()

    with bench.open() as source, bench.while_copying(restart), pytest.raises(SourceLost):
        protection.capture(source)
    assert note.exists()
    if not any("backup-vda" in name for name in bench.bitmaps()):
        node = next(n["node-name"] for n in bench.execute("query-named-block-nodes") if is_of(n, "nbd"))
        bench.execute("block-dirty-bitmap-add", node=node, name="backup-vda")
    bench.write("root", 0, BLOCK, 3)
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()
    assert not any("backup-" in name for name in bench.bitmaps())
    assert not note.exists()


def test_a_domain_that_is_defined_anew_goes_on(bench: LibvirtBench, protection: Protection) -> None:
    protection.point()
    bench.write("data", 0, BLOCK, 2)
    bench.stop()
    bench.site.virsh("undefine", "web", "--checkpoints-metadata")
    bench.guest.define()
    bench.start()
    bench.write("root", BLOCK, BLOCK, 3)
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()


def test_a_domain_whose_disks_changed_places_is_read_again(bench: LibvirtBench, protection: Protection) -> None:
    """Both images have the right bitmap, but each disk is another image now."""
    bench.stays_off = True
    for disk in SIZES:
        subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", bench.files[disk], "6M"], check=True)
    bench.start()
    protection.point()
    bench.stop()
    root, data = bench.guest.disks
    root_xml, data_xml = root.xml().replace("'vda'", "'vdb'"), data.xml().replace("'vdb'", "'vda'")
    xml = bench.guest.xml().replace(root.xml(), root_xml).replace(data.xml(), data_xml)
    bench.site.define(xml)
    bench.site.virsh("start", "web", "--paused")
    bench._started = True
    with open_source(options(bench)) as source:
        surveys = source.survey(by_target(protection.base))
    assert [survey.kind for survey in surveys] == [Kind.FULL, Kind.FULL]
    assert all("disk is another image than in the newest point" in survey.reason for survey in surveys)


def options(bench: LibvirtBench, **other: object) -> LibvirtOptions:
    values = {"vm": "web", "domain": "web", "uri": bench.site.uri, "repository_tag": TAG, "layers": bench.layers}
    return LibvirtOptions(**(values | other))  # type: ignore[arg-type]  # values of several types


def by_target(base: Base | None) -> Base:
    assert base is not None
    names = {"root": "vda", "data": "vdb"}
    disks = [BaseDisk(name=names[disk.name], size_bytes=disk.size_bytes) for disk in base.disks]
    return Base(capture=base.capture, disks=disks, definition=base.definition)


def test_a_transient_domain_is_protected_too(bench: LibvirtBench, protection: Protection) -> None:
    protection.point()
    bench.site.virsh("undefine", "web", "--checkpoints-metadata")
    bench.write("root", 0, BLOCK, 4)
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.result is not None
    assert protection.result.definition["domain"]["persistent"] is False  # type: ignore[index]
    bench.write("data", 0, BLOCK, 5)
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()
    bench.guest.define()


def test_a_hot_added_disk_starts_with_a_full_and_the_others_go_on(bench: LibvirtBench, tmp_path: Path) -> None:
    bench.start()
    base = None
    for number in range(3):
        if number == 1:
            create(tmp_path / "more.qcow2", MIB)
            disk = bench.site.path / "disk.xml"
            disk.write_text(SiteDisk(target="vdc", path=tmp_path / "more.qcow2").xml())
            bench.site.virsh("attach-device", "web", disk, "--live")
        with open_source(options(bench)) as source:
            surveys = source.survey(base)
            layers = {s.name: tmp_path / f"{number}-{s.name}.qcow2" for s in surveys}
            capture = new_capture_id()
            result = source.capture(capture, base, surveys, layers, timeout_s=60)
            source.release(capture)
        kinds = {s.name: s.kind for s in surveys}
        assert (
            kinds
            == {
                0: {"vda": Kind.FULL, "vdb": Kind.FULL},
                1: {"vda": Kind.INCREMENTAL, "vdb": Kind.INCREMENTAL, "vdc": Kind.FULL},
                2: dict.fromkeys(("vda", "vdb", "vdc"), Kind.INCREMENTAL),
            }[number]
        )
        disks = [BaseDisk(name=s.name, size_bytes=s.size_bytes) for s in surveys]
        base = Base(capture=capture, disks=disks, definition=result.definition)
    bench.site.virsh("detach-disk", "web", "vdc", "--live")


def test_an_external_snapshot_and_its_commit_leave_increments(bench: LibvirtBench, protection: Protection) -> None:
    """The admin's own snapshot: libvirt carries the bitmaps into the overlay and back."""
    protection.point()
    bench.write("data", 0, BLOCK, 2)
    overlay = bench.files["data"].with_name("overlay.qcow2")
    where = ["--diskspec", f"vdb,file={overlay}", "--diskspec", "vda,snapshot=no"]
    bench.site.virsh("snapshot-create-as", "web", "s1", "--disk-only", "--no-metadata", "--atomic", *where)
    bench.write("data", 2 * BLOCK, BLOCK, 3)
    base_file, bench.files["data"] = bench.files["data"], overlay
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()
    bench.write("data", 4 * BLOCK, BLOCK, 4)
    bench.site.virsh("blockcommit", "web", "vdb", "--active", "--pivot", "--wait")
    bench.files["data"] = base_file
    bench.write("data", 6 * BLOCK, BLOCK, 5)
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()


def test_a_snapshot_that_splits_a_bitmap_of_a_domain_that_is_off_makes_a_full(
    bench: LibvirtBench, protection: Protection
) -> None:
    protection.point()
    bench.write("data", 0, BLOCK, 2)
    overlay = bench.files["data"].with_name("overlay.qcow2")
    where = ["--diskspec", f"vdb,file={overlay}", "--diskspec", "vda,snapshot=no"]
    bench.site.virsh("snapshot-create-as", "web", "s1", "--disk-only", "--no-metadata", "--atomic", *where)
    bench.write("data", 2 * BLOCK, BLOCK, 3)
    bench.files["data"] = overlay
    bench.stop()
    bench.stays_off = True
    protection.point()
    assert protection.kinds() == {"root": Kind.INCREMENTAL, "data": Kind.FULL}
    assert "a snapshot was taken" in protection.surveys[0].reason
    assert protection.replica.contents() == bench.contents()
    assert {survey.copy_bytes for survey in protection.survey()} == {0}


def test_images_put_back_to_an_older_state_are_read_again(bench: LibvirtBench, protection: Protection) -> None:
    protection.point()
    bench.write("data", 0, BLOCK, 2)
    bench.stop()
    kept = bench.files["data"].with_name("kept.qcow2")
    shutil.copy(bench.files["data"], kept)
    bench.start()
    bench.write("data", BLOCK, BLOCK, 3)
    protection.point()
    bench.stop()
    shutil.copy(kept, bench.files["data"])
    bench.start()
    bench.write("data", 3 * BLOCK, BLOCK, 4)
    protection.point()
    assert protection.kinds() == {"root": Kind.INCREMENTAL, "data": Kind.FULL}
    assert protection.surveys[0].reason == BROKEN_REASON
    assert protection.replica.contents() == bench.contents()
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL


def test_somebody_elses_backup_is_waited_for_and_never_ended(bench: LibvirtBench, protection: Protection) -> None:
    protection.point()
    scratch, backup = bench.site.images / "scratch.qcow2", bench.site.path / "backup.xml"
    backup.write_text(
        f"<domainbackup mode='pull'><server transport='unix' socket='{bench.site.path}/nbd'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><scratch file='{scratch}'/></disk></disks></domainbackup>"
    )
    bench.site.virsh("backup-begin", "web", backup)
    with bench.open() as source, pytest.raises(CaptureFailed, match="somebody else's backup of the domain") as caught:
        protection.capture(source)
    assert caught.value.retryable
    assert "Backup" in bench.site.virsh("domjobinfo", "web")
    bench.site.virsh("domjobabort", "web")
    bench.write("root", 0, BLOCK, 2)
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()


def test_a_domain_destroyed_while_it_is_copied_is_told_and_the_next_point_is_right(
    bench: LibvirtBench, protection: Protection
) -> None:
    protection.point()
    bench.write("root", 0, 2 * MIB, 2)
    with bench.open() as source:
        with bench.while_copying(bench.stop), pytest.raises((SourceLost, CaptureFailed)):
            protection.capture(source, full=True)
    bench.start()
    bench.write("root", 3 * MIB, BLOCK, 3)
    protection.point()
    assert protection.replica.contents() == bench.contents()


def test_bitmaps_that_libvirt_forgot_are_found_in_the_image_and_removed(
    bench: LibvirtBench, protection: Protection
) -> None:
    dead = bench.bitmap("data", new_capture_id())
    bench.start()
    protection.point()
    bench.add_bitmap("data", dead)
    bench.site.virsh("checkpoint-delete", "web", dead, "--metadata")
    bench.restart()
    assert f"data/{dead}" in bench.bitmaps()
    protection.point()
    assert f"data/{dead}" not in bench.bitmaps()
    assert protection.kinds() == BOTH_INCREMENTAL


def test_libvirtd_that_is_restarted_ends_the_session_alone(bench: LibvirtBench, protection: Protection) -> None:
    protection.point()
    source = bench.open()
    bench.site.stop_daemon()
    with pytest.raises(SourceLost) as caught:
        source.survey(protection.base)
    assert caught.value.retryable
    source.close()
    with pytest.raises(LibvirtUnreachable) as unreachable:
        bench.open()
    assert bench.site.uri in unreachable.value.remedy
    bench.site.start()
    bench.write("root", 0, BLOCK, 2)
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()


def test_a_domain_that_is_not_there_is_told_with_those_that_are(bench: LibvirtBench) -> None:
    bench.daemon.start()
    with pytest.raises(DomainMissing, match="has no domain wbe to capture: there are: web"):
        open_source(options(bench, domain="wbe"))
    uuid = bench.guest.machine.uuid
    with open_source(options(bench, domain=uuid)) as source:
        assert source.survey(None)


def test_disks_are_excluded_and_a_domain_needs_one_that_is_not(bench: LibvirtBench, protection: Protection) -> None:
    bench.start()
    with open_source(options(bench, exclude=["vdb"])) as source:
        surveys = source.survey(None)
        assert [survey.name for survey in surveys] == ["vda"]
        layers = {"vda": bench.layers / "vda.qcow2"}
        result = source.capture(new_capture_id(), None, surveys, layers, timeout_s=60)
        assert result.definition["excluded"] == ["vdb"]


def test_a_guest_with_iothreads_stands_still_for_the_instant_and_goes_on(
    bench: LibvirtBench, protection: Protection
) -> None:
    bench.guest.machine.top = "<iothreads>1</iothreads>"
    seen: list[str] = []
    try:
        bench.guest.disks[1] = SiteDisk(target="vdb", path=bench.files["data"], driver="iothread='1'")
        bench.guest.define()
        bench.daemon.start()
        bench.site.virsh("start", "web")
        bench._started = True
        watcher = subprocess.Popen(
            ["virsh", "-c", bench.site.uri, "event", "web", "--event", "lifecycle", "--loop"],
            stdout=subprocess.PIPE,
            text=True,
        )
        reader = threading.Thread(target=lambda: seen.extend(watcher.stdout or ()))
        reader.start()
        protection.point()
        assert bench.guest.state == "running"
        watcher.terminate()
        reader.join()
        watcher.communicate()
    finally:
        bench.guest.machine.top = ""
    assert [word for line in seen for word in ("Suspended", "Resumed") if word in line] == ["Suspended", "Resumed"]


def test_a_guest_that_a_crashed_drsync_left_paused_goes_on(bench: LibvirtBench, protection: Protection) -> None:
    protection.point()
    run_id = bench.site.virsh("domid", "web").strip()
    mark = bench.layers / "paused-by-drsync"
    mark.write_text(f"{bench.guest.machine.uuid} {run_id}")
    bench.site.virsh("suspend", "web")
    protection.survey()
    assert bench.guest.state == "running"
    assert not mark.exists()
    bench.site.virsh("suspend", "web")
    protection.survey()
    assert bench.guest.state == "paused", "an admin's pause is the admin's"
    bench.site.virsh("resume", "web")


def test_a_qemu_that_cant_serve_its_disks_copies_by_itself_from_the_next_capture_on(
    bench: LibvirtBench, protection: Protection, tmp_path: Path
) -> None:
    protection.point()
    bench.write("root", 0, BLOCK, 2)
    theirs = {"type": "unix", "data": {"path": str(bench.site.path / "theirs")}}
    bench.execute("nbd-server-start", addr=theirs)
    with pytest.raises(CaptureFailed, match="nbd-server-start") as caught:
        protection.point()
    assert caught.value.retryable
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()
    assert not (tmp_path / ".live").exists()
    assert (tmp_path / "unserved").exists()


def test_a_guest_that_overwrites_more_than_there_is_room_for_costs_the_capture_not_the_guest(
    bench: LibvirtBench, protection: Protection
) -> None:
    protection.point()
    things = bench.things()
    bench.write("root", 0, 4 * MIB, 2)
    bench.limit_scratch(256 * KIB)
    with (
        pytest.raises(CaptureFailed, match="the guest overwrites more during the copy"),
        bench.while_copying(lambda: bench.write("root", 0, 4 * MIB, 3)),
    ):
        protection.point()
    assert bench.things() == things
    bench.limit_scratch(64 * MIB)
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()
