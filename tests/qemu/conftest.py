"""What the tests with a real QEMU share: the examples' guest, built once, and machines to break."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest import Guest, GuestDisk
from storage_daemon import DaemonDisk, StorageDaemon

MIB = 1024 * 1024


@pytest.fixture
def guest_disk(guest_image: Path, tmp_path: Path) -> Path:
    """A bootable disk of the test's own: a qcow2 image that needs no other file."""
    disk = tmp_path / "guest.qcow2"
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", guest_image, disk], check=True)
    return disk


@pytest.fixture
def guest(guest_disk: Path, tmp_path: Path) -> Iterator[Guest]:
    """A running guest on a fresh disk, block node `d0`."""
    with Guest(tmp_path / "guest", [GuestDisk(node="d0", path=guest_disk)]) as guest:
        yield guest


@pytest.fixture
def storage_daemon(tmp_path: Path) -> Iterator[StorageDaemon]:
    """A running storage daemon with a qcow2 disk `root` of 8 MiB and a raw disk `data` of 4 MiB."""
    disks = [DaemonDisk(name="root", size_bytes=8 * MIB), DaemonDisk(name="data", size_bytes=4 * MIB, format="raw")]
    with StorageDaemon(tmp_path, disks) as daemon:
        yield daemon
