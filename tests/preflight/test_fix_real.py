"""A real Debian, prepared by libguestfs: what failed is fine, and it boots from NVMe as EC2 would present it.

Only with DRSYNC_TEST_DEBIAN, an image that tests/debian_guest.sh makes: without KVM it takes a quarter of an hour.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from guest_disks import FileSource, run

from drsync.preflight.fence import look_inside
from drsync.preflight.findings import Verdict
from drsync.preflight.fix import Image
from drsync.preflight.fix.prepare import prepare
from drsync.preflight.machine import Machine
from drsync.preflight.report import judge

DEBIAN = os.environ.get("DRSYNC_TEST_DEBIAN", "")
BOOT_TIMEOUT_S = 900.0

pytestmark = [
    pytest.mark.skipif(not DEBIAN, reason="a guest to prepare is not given: tests/debian_guest.sh makes one"),
    pytest.mark.qemu,
    pytest.mark.timeout(3600),
]


def failures(raw: Path) -> set[str]:
    facts = look_inside([FileSource(raw)])
    return {f.check for f in judge(Machine(disks={"vda": 1}), facts) if f.verdict is Verdict.FAILS}


def boots_from_nvme(image: Path, console: Path) -> bool:
    """Whether the guest comes to a login on its serial console, its disk being NVMe."""
    command = [
        *("qemu-system-x86_64", "-accel", "tcg", "-m", "1024", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{console}", "-nic", "user,model=e1000"),
        *("-drive", f"file={image},if=none,id=root,format=qcow2", "-device", "nvme,drive=root,serial=vol1"),
    ]
    with subprocess.Popen(command) as machine:
        try:
            deadline_s = time.monotonic() + BOOT_TIMEOUT_S
            while time.monotonic() < deadline_s and machine.poll() is None:
                if console.exists() and b"login:" in console.read_bytes():
                    return True
                time.sleep(2)
        finally:
            machine.kill()
    return False


def test_a_debian_that_would_not_boot_in_ec2_does_when_it_was_prepared(tmp_path: Path) -> None:
    raw, image = tmp_path / "root.raw", tmp_path / "root.qcow2"
    assert failures(Path(DEBIAN)) == {"nvme", "root", "fstab", "network"}
    run("qemu-img", "convert", "-O", "qcow2", DEBIAN, image)
    told: list[str] = []
    assert prepare("web", [Image(path=image, format="qcow2")], told.append) == told
    assert {line.partition(":")[0] for line in told} == {"fstab", "network", "boot loader", "initramfs"}
    assert prepare("web", [Image(path=image, format="qcow2")], told.append) == [], "a second run changes nothing"
    run("qemu-img", "convert", "-O", "raw", image, raw)
    assert failures(raw) == set()
    shutil.copy(image, tmp_path / "boot.qcow2")
    assert boots_from_nvme(tmp_path / "boot.qcow2", tmp_path / "console")
