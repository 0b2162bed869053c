"""What travels in a point: all that is needed to start the domain elsewhere."""

import base64
import hashlib
import io
import json
import logging
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard
from libvirt_bench import create
from libvirt_guest import LibvirtGuest, Machine, SiteDisk
from libvirt_site import LibvirtSite
from source_bench import MIB, TAG

from drsync.source import libvirt_definition
from drsync.source.libvirt_connection import LibvirtDomain
from drsync.source.libvirt_definition import describe
from drsync.source.libvirt_source import open_source
from drsync.source.libvirt_survey import LibvirtOptions
from drsync.source.libvirt_xml import read_domain

pytestmark = pytest.mark.qemu

VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")


@contextmanager
def described(site: LibvirtSite, name: str) -> Iterator[dict[str, Any]]:
    domain = LibvirtDomain(name, site.uri, name)
    try:
        xml = read_domain(domain.handle.XMLDesc(0))
        # In the site's mount namespace this is /var/lib/libvirt/swtpm.
        definition = describe(domain, xml, tpm_directory=site.path / "lib" / "swtpm")
        assert json.loads(json.dumps(definition)) == definition, "it must travel as JSON"
        yield definition
    finally:
        domain.close()


def paused(site: LibvirtSite, name: str, machine: Machine) -> LibvirtGuest:
    disk = site.images / f"{name}.qcow2"
    create(disk, MIB)
    guest = LibvirtGuest(site, name, [SiteDisk(target="vda", path=disk)], machine)
    guest.define()
    site.virsh("start", name, "--paused")
    return guest


def unpacked(file: dict[str, Any]) -> bytes:
    assert file["encoding"] == "zstd+base64"
    content = zstandard.decompress(base64.b64decode(file["data"]))
    assert (len(content), hashlib.sha256(content).hexdigest()) == (file["size_bytes"], file["sha256"])
    return content


def test_a_running_and_a_shut_off_domain_are_described(site: LibvirtSite) -> None:
    machine = Machine(
        devices=f"<graphics type='vnc' socket='{site.path}/vnc' passwd='secret'/>"
        "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>"
        "<interface type='network'><source network='lan'/><model type='virtio'/></interface>",
    )
    site.define("<network><name>lan</name><bridge name='virbr9'/></network>", kind="net")
    disk = site.images / "described.qcow2"
    create(disk, MIB)
    guest = LibvirtGuest(site, "described", [SiteDisk(target="vda", path=disk)], machine)
    guest.define()
    with described(site, "described") as definition:
        domain, host = definition["domain"], definition["host"]
        assert (domain["name"], domain["uuid"]) == ("described", machine.uuid)
        assert (domain["running"], domain["live_xml"]) == (False, None)
        assert (domain["persistent"], domain["autostart"]) == (True, False)
        assert "secret" in domain["xml"]
        assert host["machine"].startswith("pc-i440fx-")
        assert (host["arch"], host["libvirt"].count("."), host["qemu"].count(".")) == ("x86_64", 2, 2)
        assert host["cpu"].startswith("<cpu>")
        assert host["host_model"].startswith('<cpu mode="custom" match="exact">')
        assert definition["source"] == "libvirt"
        assert definition["disks"]["vda"]["source"] == str(disk)
        assert definition["excluded"] == ["sda"]
        assert "virbr9" in definition["networks"]["lan"]
        assert definition["pools"] == {}
        assert definition["files"] == []
    site.virsh("undefine", "described")
    site.virsh("net-undefine", "lan")


def test_a_running_domain_has_both_its_xmls_and_its_pool(site: LibvirtSite) -> None:
    pool = site.path / "pool"
    pool.mkdir()
    create(pool / "v.qcow2", MIB)
    site.define(f"<pool type='dir'><name>p</name><target><path>{pool}</path></target></pool>", kind="pool")
    site.virsh("pool-start", "p")
    more = (
        "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/><source pool='p' volume='v.qcow2'/>"
        "<target dev='vdb' bus='virtio'/></disk>"
    )
    guest = paused(site, "running", Machine(devices=more))
    with described(site, "running") as definition:
        assert definition["domain"]["running"] is True
        assert "<alias name=" in definition["domain"]["live_xml"]
        assert "<alias name=" not in definition["domain"]["xml"]
        assert f"<path>{pool}</path>" in definition["pools"]["p"]
        assert definition["disks"]["vdb"]["source"] == "p/v.qcow2"
    options = LibvirtOptions(vm="running", domain="running", uri=site.uri, repository_tag=TAG, layers=site.path)
    with open_source(options) as source:
        assert [survey.name for survey in source.survey(None)] == ["vda", "vdb"]
    guest.destroy()
    with open_source(options) as source:
        assert [survey.size_bytes for survey in source.survey(None)] == [MIB, MIB]
    site.virsh("undefine", "running")
    site.virsh("pool-destroy", "p")  # the site is shared: other tests list its pools
    site.virsh("pool-undefine", "p")


def test_nvram_travels(site: LibvirtSite) -> None:
    nvram = site.images / "uefi_VARS.fd"
    loader = (
        f"<loader readonly='yes' type='pflash'>{CODE}</loader>"
        f"<nvram template='{VARIABLES}'>{nvram}</nvram><boot dev='hd'/>"
    )
    guest = paused(site, "uefi", Machine(os=loader, machine="q35"))
    with described(site, "uefi") as definition:
        (file,) = definition["files"]
        assert file["role"] == "nvram"
        assert unpacked(file) == nvram.read_bytes()
        assert len(file["data"]) < 64 * 1024
    guest.destroy()
    site.virsh("undefine", "uefi", "--nvram")


def test_a_tpms_state_travels_as_a_tar(site: LibvirtSite) -> None:
    machine = Machine(devices="<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>")
    guest = paused(site, "tpm", machine)
    with described(site, "tpm") as definition:
        (file,) = definition["files"]
        assert file["role"] == "tpm"
        with tarfile.open(fileobj=io.BytesIO(unpacked(file))) as archive:
            names = archive.getnames()
        assert "tpm2/tpm2-00.permall" in names
    guest.destroy()
    site.virsh("undefine", "tpm", "--tpm")


def test_what_is_too_large_or_unreadable_is_left_out_and_told(
    site: LibvirtSite, caplog: pytest.LogCaptureFixture
) -> None:
    nvram = site.images / "large_VARS.fd"
    loader = f"<loader readonly='yes' type='pflash'>{CODE}</loader><nvram template='{VARIABLES}'>{nvram}</nvram>"
    disk = site.images / "large.qcow2"
    create(disk, MIB)
    guest = LibvirtGuest(
        site, "large", [SiteDisk(target="vda", path=disk)], Machine(os=loader, machine="q35", uuid=str(uuid.uuid4()))
    )
    guest.define()
    caplog.set_level(logging.WARNING, logger="drsync")
    with described(site, "large") as definition:
        assert definition["files"] == []
    assert "nvram is left out of the point" in caplog.text
    caplog.clear()
    subprocess.run(["truncate", "-s", str(libvirt_definition.MAX_FILE_BYTES + 1), nvram], check=True)
    with described(site, "large") as definition:
        assert definition["files"] == []
    assert f"more than {libvirt_definition.MAX_FILE_BYTES} bytes" in caplog.text
    nvram.write_bytes(bytes(0))
    site.virsh("undefine", "large", "--nvram")
