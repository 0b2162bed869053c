"""What is read in libvirt's XML, and what is written; no libvirt needed."""

from pathlib import Path
from xml.etree import ElementTree

from drsync.source.libvirt_xml import (
    DiskCopy,
    backup_targets,
    backup_xml,
    checkpoint_sizes,
    checkpoint_xml,
    read_domain,
)

DOMAIN = """
<domain type='kvm'><name>web</name>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><nvram>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/over.qcow2' index='3'/>
      <backingStore type='file' index='1'><format type='qcow2'/><source file='/images/web.qcow2'/>
        <backingStore/></backingStore><target dev='vdb' bus='virtio'/></disk>
    <disk type='block' device='disk'><driver name='qemu' type='raw' iothread='1'/><source dev='/dev/vg/root'/>
      <target dev='vda' bus='virtio'/></disk>
    <disk type='network' device='disk'><driver name='qemu' type='qcow2'/>
      <source protocol='nbd' name='x'><host transport='unix' socket='/run/nbd'/></source><target dev='vdc'/></disk>
    <disk type='volume' device='disk'><driver name='qemu' type='qcow2'/><source pool='p' volume='v'/>
      <target dev='vdd'/></disk>
    <disk type='file' device='cdrom'><source file='/images/x.iso'/><target dev='sda'/><readonly/></disk>
    <disk type='file' device='cdrom'><target dev='sdb'/></disk>
    <disk type='file' device='disk'><source file='/images/ro.qcow2'/><target dev='vde'/><readonly/></disk>
    <disk type='file' device='disk'><source file='/images/t.qcow2'/><target dev='vdf'/><transient/></disk>
    <disk type='file' device='disk'><source file='/images/no.qcow2'/><target dev='vdg'/></disk>
    <interface type='network'><source network='lan'/></interface>
    <interface type='network'><source network='lan'/></interface>
    <interface type='bridge'><source bridge='br0'/></interface>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
  </devices>
  <seclabel type='dynamic' model='apparmor'><label>libvirt-1</label></seclabel>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+109</label></seclabel>
</domain>
"""


def test_disks_are_read_in_the_order_of_their_names() -> None:
    xml = read_domain(DOMAIN, exclude=["vdg"])
    assert [disk.target for disk in xml.disks] == ["vda", "vdb", "vdc", "vdd"]
    assert list(xml.excluded) == ["sda", "sdb", "vde", "vdf", "vdg"]
    root, data, remote, volume = xml.disks
    assert (root.top.type, root.top.source, root.top.path) == ("block", "/dev/vg/root", Path("/dev/vg/root"))
    assert not root.keeps_bitmaps
    assert [storage.source for storage in data.chain] == ["/images/over.qcow2", "/images/web.qcow2"]
    assert data.keeps_bitmaps
    assert (remote.top.source, remote.top.path) == ("nbd:x", None)
    assert remote.top.host == {"transport": "unix", "socket": "/run/nbd"}
    assert volume.top.source == "p/v"


def test_what_surrounds_the_disks_is_read() -> None:
    xml = read_domain(DOMAIN)
    assert list(xml.networks) == ["lan"]
    assert list(xml.pools) == ["p"]
    assert xml.has_iothreads
    assert xml.qemu_user == (64055, 109)
    assert xml.nvram == Path("/var/lib/libvirt/qemu/nvram/web_VARS.fd")
    assert xml.has_tpm


def test_a_bare_domain_has_nothing_of_it() -> None:
    xml = read_domain("<domain><devices/></domain>")
    assert (list(xml.disks), list(xml.excluded), xml.nvram, xml.has_tpm, xml.has_iothreads) == (
        [],
        [],
        None,
        False,
        False,
    )
    assert xml.qemu_user == (0, 0)


def test_a_backup_names_every_disk() -> None:
    copies = [
        DiskCopy(target="vda", layer=Path("/spool/a & <b>.qcow2"), incremental="c1", checkpoint=True),
        DiskCopy(target="vdb", layer=Path("/spool/b.qcow2"), incremental="", checkpoint=False),
    ]
    text = backup_xml(copies, ["sda"])
    disks = {disk.get("name"): disk for disk in ElementTree.fromstring(text).iterfind("./disks/disk")}  # noqa: S314  our own
    assert (disks["vda"].get("backupmode"), disks["vda"].get("incremental")) == ("incremental", "c1")
    assert (disks["vdb"].get("backupmode"), disks["vdb"].get("incremental")) == ("full", None)
    assert disks["sda"].get("backup") == "no"
    assert backup_targets(text) == [Path("/spool/a & <b>.qcow2"), Path("/spool/b.qcow2")]


def test_sizes_are_those_of_whole_bitmaps_alone() -> None:
    text = (
        "<domaincheckpoint><name>c</name><disks><disk name='vda' checkpoint='bitmap' bitmap='c' size='65536'/>"
        "<disk name='vdb' checkpoint='bitmap' bitmap='c'/><disk name='vdc' checkpoint='no'/></disks></domaincheckpoint>"
    )
    assert checkpoint_sizes(text) == {"vda": 65536}


def test_a_checkpoint_that_exists_is_described_with_its_domain() -> None:
    root = ElementTree.fromstring(checkpoint_xml("c", ["vda"], ["vdb"], domain=DOMAIN))  # noqa: S314  our own
    assert root.findtext("name") == "c"
    assert root.findtext("./domain/name") == "web"
    assert root.find("creationTime") is not None
    assert [disk.get("checkpoint") for disk in root.iterfind("./disks/disk")] == ["bitmap", "no"]
