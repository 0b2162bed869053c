"""The test bench itself: the guest boots, does what it is told, and can be lost."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from guest import Guest, GuestDisk, GuestFailed, GuestTimeout
from qmp_socket import QmpSocket

pytestmark = pytest.mark.qemu


def test_commands_give_status_and_output(guest: Guest) -> None:
    assert guest.boots == 1
    assert guest.run("echo one; echo two >&2; exit 3") == (3, "one\ntwo\n")
    assert guest.run("true") == (0, "")
    assert guest.run("printf 'no newline'") == (0, "no newline")
    assert guest.run("echo \"$HOME\" `echo x` '$y' \\\\; cat <<E\ntext\nE") == (0, "/ x $y \\\ntext\n")
    assert guest.run("read answer; echo \"got '$answer'\"") == (0, "got ''\n")


def test_long_commands_and_long_output_come_through_whole(guest: Guest) -> None:
    words = " ".join(str(number) for number in range(3000))
    assert guest.run(f"echo {words}") == (0, words + "\n")
    assert guest.check("seq 1 20000") == "".join(f"{number}\n" for number in range(1, 20001))
    assert guest.check("head -c 4096 /dev/urandom | tee /tmp/r; sync")  # not text: must not upset the console
    assert guest.check("wc -c < /tmp/r") == "4096\n"


def test_a_command_over_its_time_limit_is_interrupted_and_the_guest_stays_usable(guest: Guest) -> None:
    started = time.monotonic()
    with pytest.raises(GuestTimeout, match="sleep 1000"):
        guest.run("sleep 1000", timeout_s=2)
    assert guest.run("echo here") == (0, "here\n")
    assert time.monotonic() - started < 30


def test_a_failed_check_says_what_failed(guest: Guest) -> None:
    with pytest.raises(GuestFailed, match=r"status 1: .*No such file"):
        guest.check("cat /mnt/nothing")


def test_what_was_synced_survives_a_kill_and_the_boots_are_counted(guest: Guest) -> None:
    guest.check("echo precious > /mnt/file; sync")
    guest.kill()
    assert not guest.running
    guest.start()
    assert guest.boots == 2
    assert guest.check("cat /mnt/file") == "precious\n"


def test_poweroff_ends_qemu_in_good_order_and_keeps_persistent_bitmaps(guest: Guest) -> None:
    guest.execute("block-dirty-bitmap-add", node="d0", name="test", persistent=True)
    guest.check("echo more > /mnt/file")
    guest.poweroff()
    assert not guest.running
    guest.start()
    (node,) = (node for node in guest.execute("query-named-block-nodes") if node["node-name"] == "d0")
    assert [(bitmap["name"], bitmap["recording"]) for bitmap in node["dirty-bitmaps"]] == [("test", True)]


def test_drsync_has_a_monitor_of_its_own(guest: Guest) -> None:
    with QmpSocket(guest.qmp_socket) as monitor:
        assert monitor.execute("query-status")["running"] is True


def test_the_same_disk_boots_behind_nvme(guest_disk: Path, tmp_path: Path) -> None:
    with Guest(tmp_path, [GuestDisk(node="d0", path=guest_disk)], controller="nvme") as guest:
        assert "/dev/nvme0n1p2 on /mnt type ext4" in guest.check("mount")


def test_a_guest_can_have_a_raw_data_disk_and_an_iothread(guest_disk: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.raw"
    data.write_bytes(bytes(4 * 1024 * 1024))
    disks = [GuestDisk(node="d0", path=guest_disk), GuestDisk(node="d1", path=data, format="raw")]
    with Guest(tmp_path, disks, iothread=True) as guest:
        guest.check("echo data > /dev/vdb; sync")
    assert data.read_bytes()[:5] == b"data\n"


def test_a_disk_that_does_not_boot_is_told_with_the_consoles_last_lines(tmp_path: Path) -> None:
    disk = tmp_path / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    guest = Guest(tmp_path, [GuestDisk(node="d0", path=disk)])
    try:
        with pytest.raises(GuestFailed, match=r"not up in 5 s\nconsole: .*"):
            guest.start(timeout_s=5)
        assert not guest.running
    finally:
        guest.close()


def test_a_qemu_that_ends_while_the_guest_boots_is_told_with_its_status(guest_disk: Path, tmp_path: Path) -> None:
    guest = Guest(tmp_path, [GuestDisk(node="d0", path=guest_disk)])

    def kill_it() -> None:
        while not (guest.console_log.exists() and guest.console_log.stat().st_size):
            time.sleep(0.01)
        os.kill(guest.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_it)
    killer.start()
    try:
        with pytest.raises(GuestFailed, match=r"QEMU ended before the guest was up, with status -9\nconsole: "):
            guest.start()
    finally:
        killer.join()
        guest.close()


def test_a_missing_disk_is_told_in_qemus_own_words(tmp_path: Path) -> None:
    guest = Guest(tmp_path, [GuestDisk(node="d0", path=tmp_path / "gone.qcow2")])
    try:
        with pytest.raises(GuestFailed, match="No such file"):
            guest.start()
    finally:
        guest.close()
