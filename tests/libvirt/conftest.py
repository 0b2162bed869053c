"""What the tests with libvirt share: a site for all of them, and a protected domain."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from libvirt_bench import LibvirtBench, LibvirtGround
from libvirt_site import LibvirtSite
from source_bench import SIZES
from source_protection import Protection


@pytest.fixture(scope="session")
def site() -> Iterator[LibvirtSite]:
    """One libvirt host that all tests share: each has domains of its own there. To lose a host, make another one."""
    with LibvirtSite() as site:
        yield site


@pytest.fixture
def bench(ground: LibvirtGround, tmp_path: Path) -> Iterator[LibvirtBench]:
    """The domain `web`, off, with disks full of ones."""
    bench = LibvirtBench(ground, tmp_path / "domain", tmp_path, pulls=True)
    try:
        for disk, size in SIZES.items():
            bench.write(disk, 0, size, 1)
        yield bench
    finally:
        bench.close()


@pytest.fixture
def protection(bench: LibvirtBench, tmp_path: Path) -> Protection:
    spool = tmp_path / "spool"
    spool.mkdir()
    return Protection(bench, spool)
