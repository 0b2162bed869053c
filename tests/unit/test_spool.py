"""The spool: what survives a restart, what is dropped, and that a full disk is noticed before QEMU is touched."""

import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from msgspec import json, structs

from drsync.errors import CaptureRunning, SpoolClosed, SpoolFull, SpoolUnusable
from drsync.model import CaptureId, Consistency
from drsync.spool import Spool, VmSpool, boot_id
from drsync.spooled import CaptureState, HeldGuest, SpooledCapture, SpooledDisk, VmState

MIB = 1024 * 1024
NOBODY = 65534
FIRST = CaptureId("0" * 16)
SECOND = CaptureId("1" * 16)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", reserve_bytes=0)


@pytest.fixture
def web(spool: Spool) -> VmSpool:
    vm = spool.vm("web")
    with vm.locked():
        pass
    return vm


def spooled(capture: CaptureId = FIRST) -> SpooledCapture:
    return SpooledCapture(
        capture=capture,
        base=None,
        boot_id=boot_id(),
        time="2026-01-02T03:04:05+00:00",
        consistency=Consistency.CRASH,
        send_all=False,
        disks=[SpooledDisk(name="root", size_bytes=MIB, full=True, reason="first capture", persistent_bitmap=False)],
        definition={"machine": "q35"},
    )


def take(vm: VmSpool, capture: CaptureId = FIRST) -> Path:
    """A capture that QEMU is writing."""
    path = vm.begin(capture, ["root"])["root"]
    path.write_bytes(bytes(100_000))
    return path


def test_the_id_of_a_spool_is_made_once(spool: Spool, tmp_path: Path) -> None:
    writer = spool.writer_id()
    assert len(bytes.fromhex(writer)) == 8
    assert Spool(spool.path, 0).writer_id() == writer
    assert Spool(tmp_path / "other", 0).writer_id() != writer


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff", b'{"writer": 1}', b'{"x":' + b"[" * 100_000])
def test_an_id_that_can_not_be_read_is_not_replaced_by_another_one(spool: Spool, raw: bytes) -> None:
    """Another id would be another writer: it would take its own VMs over."""
    spool.writer_id()
    (spool.path / "spool.json").write_bytes(raw)
    with pytest.raises(SpoolUnusable, match=r"spool\.json can't be used: it does not hold the id of a spool"):
        spool.writer_id()
    assert (spool.path / "spool.json").read_bytes() == raw


def test_the_directories_let_qemu_through_and_do_not_list(spool: Spool) -> None:
    before = os.umask(0o077)
    try:
        spool.writer_id()
        with spool.vm("web").locked():
            directory = spool.vm("web").begin(FIRST, ["root"])["root"].parent
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (spool.path, directory.parent, directory)]
    assert modes == [0o711] * 3


@pytest.mark.parametrize("name", ["", "..", "../web", "a/b", "Web"])
def test_f2_what_is_no_name_of_a_vm_gets_no_directory(spool: Spool, name: str) -> None:
    with pytest.raises(ValueError) as caught:
        spool.vm(name)
    assert caught.value.args == (name,)


def test_a_capture_goes_from_taking_to_captured_to_gone(web: VmSpool) -> None:
    assert web.state_of(FIRST) is CaptureState.DROPPED
    layer = take(web)
    assert layer == web.layer_path(FIRST, "root") == web.path / FIRST / "root.qcow2"
    assert web.state_of(FIRST) is CaptureState.TAKING
    web.complete(spooled())
    assert web.state_of(FIRST) is CaptureState.CAPTURED
    web.remove(FIRST)
    assert web.state_of(FIRST) is CaptureState.DROPPED
    web.remove(FIRST)


def test_a_capture_moves_forward_only() -> None:
    taking, captured, committed, dropped = CaptureState
    allowed = {(a, b) for a, b in product(CaptureState, CaptureState) if a.may_become(b)}
    assert allowed == {(taking, captured), (taking, dropped), (captured, committed), (captured, dropped)}


def test_a_complete_capture_waits_and_is_found_by_another_process(spool: Spool, web: VmSpool) -> None:
    take(web)
    web.complete(spooled())
    found = Spool(spool.path, 0).vm("web").waiting()
    assert found == spooled()
    assert web.layer_path(FIRST, "root").stat().st_size == 100_000


def test_what_is_not_complete_is_never_shipped_and_is_dropped(web: VmSpool) -> None:
    take(web)
    assert web.waiting() is None
    assert web.state_of(FIRST) is CaptureState.DROPPED


def overwrite(data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(data)

    return change


@pytest.mark.parametrize(
    "change",
    [
        overwrite(json.encode(structs.replace(spooled(), boot_id="an earlier boot"))),
        overwrite(json.encode(spooled(SECOND))),
        overwrite(json.encode(spooled()).replace(b'"root"', b'"../../x"')),
        overwrite(json.encode(spooled())[:-1]),
        overwrite(json.encode(spooled()).replace(b"q35", b"\xff")),
        overwrite(b""),
        overwrite(b'{"more":' + b"[" * 100_000),
    ],
    ids=["earlier boot", "another capture", "path as disk", "cut", "not UTF-8", "empty", "deep"],
)
def test_a_capture_that_is_not_of_this_boot_or_not_readable_is_dropped(
    web: VmSpool, change: Callable[[Path], None]
) -> None:
    take(web)
    web.complete(spooled())
    change(web.path / FIRST / "capture.json")
    assert web.waiting() is None
    assert web.state_of(FIRST) is CaptureState.DROPPED


def test_only_one_capture_waits(web: VmSpool) -> None:
    for capture in (FIRST, SECOND):
        take(web, capture)
        web.complete(spooled(capture))
    assert web.waiting() == spooled(FIRST)
    assert web.state_of(SECOND) is CaptureState.DROPPED


def test_half_a_removal_leaves_nothing_that_would_be_shipped(web: VmSpool) -> None:
    take(web)
    web.complete(spooled())
    (web.path / FIRST / "capture.json").unlink()  # how far a removal came that was killed
    assert web.state_of(FIRST) is CaptureState.TAKING
    assert web.waiting() is None


def test_what_is_not_drsyncs_is_left_alone(web: VmSpool) -> None:
    (web.path / "Notes").mkdir()
    (web.path / "notes.txt").write_text("mine")
    assert web.waiting() is None
    assert (web.path / "Notes").is_dir()
    assert (web.path / "notes.txt").is_file()


def hold(vm: VmSpool, says: Connection) -> None:
    with vm.locked():
        says.send("held")
        says.recv()


def test_one_process_captures_a_vm_and_a_dead_one_holds_nothing(spool: Spool, web: VmSpool) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(web, theirs))
    process.start()
    assert ours.recv() == "held"
    with pytest.raises(CaptureRunning) as caught, web.locked():
        pass
    assert caught.value.fields["pid"] == str(process.pid)
    with spool.vm("db").locked():
        pass  # another VM is another lock
    process.kill()
    process.join()
    with web.locked():
        pass


def test_what_is_remembered_is_read_back(spool: Spool, web: VmSpool) -> None:
    assert web.state() == VmState()
    state = VmState(wrote_seq=42, fenced_by="other", checked_at="2026-01-02T03:04:05+00:00", error="x", error_at="y")
    web.remember(state)
    assert Spool(spool.path, 0).vm("web").state() == state
    written = (web.path / "state.json").stat()
    web.remember(state)  # nothing new: nothing is written
    assert (web.path / "state.json").stat() == written


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff", b'{"wrote_seq":"1"}', b'{"fenced_by":"\xff"}', b'{"x":' + b"[" * 99_999]
)
def test_a_state_that_can_not_be_read_counts_as_none(web: VmSpool, raw: bytes) -> None:
    (web.path / "state.json").write_bytes(raw)
    assert web.state() == VmState()
    web.remember(VmState(wrote_seq=1))
    assert web.state() == VmState(wrote_seq=1)


def test_a_state_that_could_not_be_written_is_the_old_one_and_leaves_no_rubbish(web: VmSpool) -> None:
    web.remember(VmState(wrote_seq=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # stands for a disk that gets full
    try:
        with pytest.raises(SpoolUnusable, match="File too large"):
            web.remember(VmState(wrote_seq=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert web.state() == VmState(wrote_seq=1)
    assert sorted(p.name for p in web.path.iterdir()) == ["lock", "state.json"]


@pytest.mark.alone  # nobody else may free room meanwhile
def test_the_room_for_a_capture_must_be_there_beside_the_reserve(spool: Spool, web: VmSpool) -> None:
    web.check_room(0)
    free = shutil.disk_usage(spool.path).free
    with pytest.raises(SpoolFull) as caught:
        web.check_room(2 * free)
    assert caught.value.remedy.startswith(f"df -h {spool.path}")
    with pytest.raises(SpoolFull):
        Spool(spool.path, reserve_bytes=free).vm("web").check_room(0)


def test_the_room_counts_what_a_layer_takes_beside_its_blocks(spool: Spool, web: VmSpool) -> None:
    """Header, tables and refcounts of a layer that is full of blocks are less than what is reckoned."""
    from shipped_vm import write_layer

    path = spool.path / "layer"
    write_layer(path, 64 * MIB, dict.fromkeys(range(1024), b"x" * 65536))
    blocks_bytes = 64 * MIB
    assert path.stat().st_size <= blocks_bytes + blocks_bytes // 1024 + MIB


def test_used_bytes_are_those_of_the_layers(web: VmSpool) -> None:
    assert web.used_bytes() == 0
    path = take(web)
    assert web.used_bytes() == path.stat().st_blocks * 512 > 0
    web.remove(FIRST)
    assert web.used_bytes() == 0


def test_a_spool_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spool = Spool(tmp_path / "file" / "spool", 0)
    for use in (spool.writer_id, spool.free_bytes, lambda: spool.vm("web").remember(VmState(wrote_seq=1))):
        with pytest.raises(SpoolUnusable):
            use()


def test_a_spool_that_is_not_there_yet_is_told_where_it_must_be(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", 0)
    with pytest.raises(SpoolUnusable, match="No such file"):
        spool.free_bytes()
    with pytest.raises(SpoolUnusable, match="No such file"):
        spool.vm("web").begin(FIRST, ["root"])
    assert spool.vm("web").used_bytes() == 0
    assert spool.vm("web").waiting() is None


def test_a_spool_that_a_user_can_pass_through_is_passable(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents[:3]):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/tmp"):  # noqa: S108  its mode is right
            directory.chmod(directory.stat().st_mode | 0o011)
    spool = Spool(tmp_path / "spool", 0)
    spool.vm("web").check_passable(NOBODY, NOBODY)  # it is not made yet
    with spool.vm("web").locked():
        spool.vm("web").check_passable(NOBODY, NOBODY)
    (tmp_path / "spool").chmod(0o700)
    spool.vm("web").check_passable(0, 0)
    spool.vm("web").check_passable(os.geteuid(), os.getegid())
    with pytest.raises(SpoolClosed) as caught:
        spool.vm("web").check_passable(NOBODY, NOBODY)
    assert caught.value.remedy == f"chmod o+x {tmp_path / 'spool'}"
    (tmp_path / "spool").chmod(0o701)
    spool.vm("web").check_passable(NOBODY, NOBODY)


def test_one_process_at_a_time_captures_a_group(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", 0)
    with spool.group_locked("shop"):
        with pytest.raises(CaptureRunning) as caught, spool.group_locked("shop"):
            pass
        assert str(caught.value) == f"VM of group shop is being captured by process {os.getpid()}"
        with spool.group_locked("other"), spool.vm("shop").locked():
            pass
    with spool.group_locked("shop"):
        pass


def test_a_note_of_a_held_guest_is_kept_until_it_is_let_go(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", 0)
    vm = spool.vm("web")
    assert (vm.held(), spool.held_vms()) == (None, [])
    vm.let_go()
    note = HeldGuest(boot_id=boot_id(), pid=7, vm_run="1-2", paused=True, since="2026-11-25T10:00:00+00:00")
    vm.hold(note)
    assert (vm.held(), spool.held_vms(), note.what) == (note, ["web"], "frozen and paused")
    assert vm.waiting() is None, "it is not a capture"
    vm.hold(structs.replace(note, boot_id="another"))
    assert vm.held() is None
    vm.let_go()
    assert spool.held_vms() == []
