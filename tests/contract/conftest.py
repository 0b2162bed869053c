"""What the contract suites share: every implementation of a seam, made ready for a test."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from libvirt_bench import LibvirtBench
from source_bench import SIZES, DaemonBench, MemoryBench, SourceBench
from source_protection import Protection


@pytest.fixture(params=["memory", "qcow2", "raw", "libvirt", "libvirt-pull"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SourceBench]:
    with ExitStack() as stack:
        if request.param == "memory":
            bench: SourceBench = MemoryBench()
        elif request.param.startswith("libvirt"):
            ground = request.getfixturevalue("ground")
            bench = LibvirtBench(ground, tmp_path / "domain", tmp_path, pulls=request.param == "libvirt-pull")
            bench.stays_off = request.param == "libvirt-off"
        else:
            bench = DaemonBench(tmp_path / "daemon", request.param)
        stack.callback(bench.close)
        for disk, size in SIZES.items():
            bench.write(disk, 0, size, 1)
        if isinstance(bench, LibvirtBench) and bench.stays_off:
            bench.daemon.start()  # a domain that was started would have done it: it serves a disk
        yield bench


@pytest.fixture(params=["memory", "qcow2", "raw", "libvirt"])
def live_bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SourceBench]:
    """As `bench`, with disks that can be read live."""
    with ExitStack() as stack:
        if request.param == "memory":
            bench: SourceBench = MemoryBench()
        elif request.param == "libvirt":
            bench = LibvirtBench(request.getfixturevalue("ground"), tmp_path / "domain", tmp_path, pulls=True)
        else:
            bench = DaemonBench(tmp_path / "daemon", request.param, free_nbd=True)
        stack.callback(bench.close)
        for disk, size in SIZES.items():
            bench.write(disk, 0, size, 1)
        yield bench


@pytest.fixture
def protection(bench: SourceBench, tmp_path: Path) -> Protection:
    spool = tmp_path / "spool"
    spool.mkdir()
    return Protection(bench, spool)
