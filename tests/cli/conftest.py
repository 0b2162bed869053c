"""A command line, and a VM to work on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Cli
from storage_daemon import DaemonDisk, StorageDaemon

from drsync.units import MiB


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """A configuration without VMs; its repository does not exist yet."""
    return Cli(tmp_path)


@pytest.fixture
def vm(cli: Cli) -> Iterator[StorageDaemon]:
    """A running VM `web` with the disks d-root and d-data, configured; the repository is there."""
    disks = [DaemonDisk(name="root", size_bytes=16 * MiB), DaemonDisk(name="data", size_bytes=8 * MiB, format="raw")]
    with StorageDaemon(cli.place, disks) as daemon:
        cli.configure({"web": daemon.qmp_socket})
        cli.ok("init")
        yield daemon
