"""What a point tells EC2 of its VM."""

from collections.abc import Mapping

import pytest

from drsync.recovery.cloud.guest import read_guest
from drsync.target.domain.tree import NotReadable

DISKS = ("data", "root")


def definition(body: str, *, system: str = "", arch: str = "x86_64", **more: object) -> Mapping[str, object]:
    xml = (
        f"<domain type='kvm'><name>web</name><memory unit='GiB'>3</memory><vcpu current='1'>4</vcpu>"
        f"<os{system}><type arch='{arch}' machine='q35'>hvm</type></os><devices>{body}</devices></domain>"
    )
    disks = {"data": {"target": "vdb"}, "root": {"target": "vda"}}
    return {"source": "libvirt", "domain": {"name": "web", "uuid": "", "xml": xml}, "disks": disks, **more}


DEVICES = "<disk><target dev='vda'/></disk><disk><target dev='vdb'/></disk>"


def test_size_and_order_of_a_plain_domain() -> None:
    guest = read_guest(definition(DEVICES), "web", DISKS)
    assert (guest.vcpus, guest.memory_mib, guest.architecture, guest.boot_mode) == (4, 3072, "x86_64", "legacy-bios")
    assert list(guest.disks) == ["root", "data"]
    assert (guest.has_tpm, guest.secure_boot, guest.may_be_windows, guest.is_libvirt) == (False, False, False, True)


def test_the_disk_that_it_boots_from_is_first() -> None:
    body = "<disk><target dev='vda'/><boot order='2'/></disk><disk><target dev='vdb'/><boot order='1'/></disk>"
    assert list(read_guest(definition(body), "web", DISKS).disks) == ["data", "root"]


def test_a_disk_that_the_domain_does_not_list_comes_last() -> None:
    assert list(read_guest(definition("<disk><target dev='vda'/></disk>"), "web", DISKS).disks) == ["root", "data"]


@pytest.mark.parametrize(
    ("system", "arch", "mode"),
    [
        ("", "x86_64", "legacy-bios"),
        (" firmware='efi'", "x86_64", "uefi"),
        ("", "aarch64", "uefi"),
    ],
)
def test_the_boot_mode(system: str, arch: str, mode: str) -> None:
    assert read_guest(definition(DEVICES, system=system, arch=arch), "web", DISKS).boot_mode == mode


def test_a_loader_in_flash_is_uefi_and_may_be_secure() -> None:
    xml = (
        "<domain type='kvm'><name>w</name><memory>1</memory><os><type arch='x86_64'>hvm</type>"
        "<loader type='pflash' secure='yes'>/x</loader></os><devices><tpm/></devices></domain>"
    )
    known = {"source": "libvirt", "domain": {"name": "w", "uuid": "", "xml": xml}, "disks": {}}
    guest = read_guest(known, "w", ())
    assert (guest.boot_mode, guest.secure_boot, guest.has_tpm) == ("uefi", True, True)


def test_an_architecture_that_ec2_has_not_is_named() -> None:
    guest = read_guest(definition(DEVICES, arch="s390x"), "web", DISKS)
    assert (guest.architecture, guest.is_known_architecture) == ("s390x", False)


def test_addresses_come_from_leases_filters_and_ip_elements() -> None:
    interfaces = (
        "<interface type='network'><mac address='52:54:00:AA:00:01'/><source network='prod'/></interface>"
        "<interface type='bridge'><source bridge='br0'/><filterref filter='f'>"
        "<parameter name='IP' value='10.0.0.9'/><parameter name='IP' value='not one'/></filterref>"
        "<ip address='10.0.0.10'/><ip address='fd00::1'/></interface>"
    )
    network = (
        "<network><name>prod</name><ip><dhcp><host mac='52:54:00:aa:00:01' ip='10.0.0.7'/>"
        "<host mac='52:54:00:aa:00:02' ip='10.0.0.8'/></dhcp></ip></network>"
    )
    known = definition(DEVICES + interfaces, networks={"prod": network, "broken": "<network"})
    guest = read_guest(known, "web", DISKS)
    assert list(guest.addresses) == ["10.0.0.7", "10.0.0.9", "10.0.0.10"]
    assert list(guest.networks) == ["prod", "br0"]


def test_a_vm_of_qmp_has_what_qemu_told() -> None:
    known = {"machine": "pc-q35-9.0", "memory": {"base-memory": 512 * 2**20}, "cpus": {"count": 2}}
    guest = read_guest(known, "web", ("disk0", "disk1"))
    assert (guest.vcpus, guest.memory_mib, guest.is_libvirt) == (2, 512, False)
    assert list(guest.disks) == ["disk0", "disk1"]


def test_windows_is_suspected() -> None:
    body = DEVICES + "<x id='http://microsoft.com/win/2022'/>"
    assert read_guest(definition(body), "web", DISKS).may_be_windows


def test_what_drsync_did_not_write_is_refused() -> None:
    with pytest.raises(NotReadable):
        read_guest({"source": "libvirt", "domain": 3}, "web", DISKS)
