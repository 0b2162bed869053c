"""The lab itself: hosts that are apart, guests that boot, a host that can be lost."""

import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from libvirt_guest import LibvirtGuest, SiteDisk
from libvirt_site import LibvirtSite, LibvirtSiteFailed

pytestmark = pytest.mark.qemu


def booting_guest(site: LibvirtSite, name: str, image: Path) -> LibvirtGuest:
    disk = site.images / f"{name}.qcow2"
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", image, disk], check=True)
    return LibvirtGuest(site, name, [SiteDisk(target="vda", path=disk)])


def test_two_sites_are_two_hosts_and_losing_one_leaves_the_other(site: LibvirtSite, guest_image: Path) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(LibvirtSite())
        assert site.host_uuid in site.virsh("capabilities")
        assert other.host_uuid in other.virsh("capabilities")
        guests = [stack.enter_context(booting_guest(place, "twin", guest_image)) for place in (site, other)]
        for guest in guests:
            guest.define()
            guest.start()
            assert guest.boots == 1
            guest.check(f"echo {guest.site.host_uuid} > /mnt/where; sync")
        other.kill()
        with pytest.raises(LibvirtSiteFailed):
            other.virsh("list")
        assert other.images.exists()
        other.start()
        assert guests[1].state == "shut off"
        other.destroy()
        assert not other.path.exists()
        assert guests[0].check("cat /mnt/where") == f"{site.host_uuid}\n"
        guests[0].poweroff()
        site.virsh("undefine", "twin")


def test_a_domain_lives_on_while_libvirtd_is_restarted(guest_image: Path) -> None:
    with LibvirtSite() as site, booting_guest(site, "web", guest_image) as guest:
        guest.define()
        guest.start()
        site.stop_daemon()
        assert guest.check("echo here") == "here\n"
        site.start()
        assert guest.state == "running"
        guest.destroy()
        assert guest.state == "shut off"


def test_a_site_can_have_a_network_of_its_own() -> None:
    with LibvirtSite(own_network=True) as site:
        site.define("<network><name>lan</name><bridge name='virbr7'/></network>", kind="net")
        site.virsh("net-start", "lan")
        assert not Path("/sys/class/net/virbr7").exists()
