"""A protected guest that moves to another host while it runs, and comes back: protection goes on."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from command_line import Cli
from libvirt_guest import LibvirtGuest, Machine, SiteDisk
from libvirt_site import LibvirtSite

pytestmark = pytest.mark.qemu

IMAGE = Path("/var/lib/libvirt/images/web.qcow2")
"""The same path on both hosts: in a site's mount namespace it is the site's own file."""


class MovingGuest(LibvirtGuest):
    """A guest with nothing in its definition that names its host."""

    @property
    def image(self) -> Path:
        return self.site.path / "lib" / "images" / "web.qcow2"

    @property
    def console_socket(self) -> Path:
        return self.site.path / "lib" / "web.console"

    @property
    def console_log(self) -> Path:
        return self.site.path / "lib" / "web.log"

    def xml(self) -> str:
        return super().xml().replace(f"{self.site.path}/lib/", "/var/lib/libvirt/")

    def make_room(self, size_bytes: int) -> None:
        """An empty image for a guest that arrives: a fresh one, as an old one's bitmaps would be in the way."""
        self.image.parent.mkdir(exist_ok=True)
        self.image.unlink(missing_ok=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", self.image, str(size_bytes)], check=True)

    def move(self, there: "MovingGuest") -> None:
        there.make_room(2048 * 1024 * 1024)
        self.disconnect()
        sockets = [f"unix://{there.site.path}/{name}" for name in ("memory", "disks")]
        self.site.virsh(
            *("migrate", "--live", "--persistent", "--undefinesource", "--copy-storage-all", "web"),
            *(there.site.uri, "--migrateuri", sockets[0], "--disks-uri", sockets[1]),
        )
        there.connect()


@pytest.fixture
def guests(guest_image: Path) -> Iterator[tuple[MovingGuest, MovingGuest]]:
    """The guest at site A, running, and where it would be at site B."""
    with ExitStack() as stack:
        sites = [stack.enter_context(LibvirtSite()) for _ in range(2)]
        disks, machine = [SiteDisk(target="vda", path=IMAGE)], Machine()
        here, there = (stack.enter_context(MovingGuest(site, "web", disks, machine)) for site in sites)
        here.image.parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "--sparse=always", guest_image, here.image], check=True)
        here.define()
        here.start()
        yield here, there


def drsync_at(guest: MovingGuest, place: Path, first: Cli | None = None) -> Cli:
    place.mkdir()
    cli = Cli(place)
    if first is not None:
        cli.repository = first.repository
    vm = f'[[vm]]\nname = "web"\nsource = "libvirt"\nuri = "{guest.site.uri}"\n[daemon]\nhost = "{place.name}"\n'
    cli.configure(extra=vm)
    if first is not None:
        shutil.copy(first.key_file, cli.key_file)
    return cli


def test_protection_follows_a_guest_to_another_host_and_back(
    guests: tuple[MovingGuest, MovingGuest], tmp_path: Path
) -> None:
    here, there = guests
    alpha = drsync_at(here, tmp_path / "alpha")
    alpha.ok("init")
    beta = drsync_at(there, tmp_path / "beta", alpha)
    alpha.ok("capture", "web")
    here.check("echo before > /mnt/before; sync")
    here.move(there)
    there.check("cat /mnt/before && echo after > /mnt/after && sync")
    assert alpha.refused(59, "capture", "web")
    point = beta.ok("capture", "web", "--json").json["point"]
    assert (point["kind"], point["reason"]) == ("incremental", "")
    there.move(here)
    here.check("cat /mnt/after && echo back > /mnt/back && sync")
    _, remedy = alpha.refused(45, "capture", "web")
    assert remedy.startswith("drsync capture web --take-over")
    point = alpha.ok("capture", "web", "--take-over", "--json").json["point"]
    assert (point["kind"], point["reason"]) == ("incremental", "")
    here.site.virsh("suspend", "web")
    alpha.ok("capture", "web")
    here.site.power_off("web", "--graceful")
    alpha.ok("restore", "web", "--to", "image", "--output", str(tmp_path / "restored"))
    compared = subprocess.run(
        ["qemu-img", "compare", tmp_path / "restored" / "vda.qcow2", here.image],
        capture_output=True,
        text=True,
        check=False,
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
