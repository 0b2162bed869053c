"""What the tests with libvirt share: a site for all of them, and the examples' guest."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from libvirt_site import LibvirtSite

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def site() -> Iterator[LibvirtSite]:
    """One libvirt host that all tests share: each has domains of its own there. To lose a host, make another one."""
    with LibvirtSite() as site:
        yield site


@pytest.fixture(scope="session")
def guest_image() -> Path:
    """The guest's disk, to be copied or used as a backing file: never boot it itself."""
    built = subprocess.run(
        ["bash", ROOT / "examples/guest/build.sh"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode != 0:
        pytest.fail(f"the guest can't be built: {built.stdout}{built.stderr}")
    return Path(built.stdout.splitlines()[-1])
