"""Two libvirt hosts on one machine: one is protected and lost, the other takes over by a plan, and gives back.

site A ── points ──▶ repository (a directory, or S3 in LocalStack)
   ✕ libvirtd and its QEMUs killed, its files removed
site B ◀── restore --plan --site b ── the guests boot, their files are whole
   │ protected from here at once: its log goes on with the next epoch
   ▼
site A, rebuilt ◀── restore --plan --site a ── with what was written on B
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from libvirt_guest import LibvirtGuest, Machine, SiteDisk
from libvirt_points import copy_disk
from libvirt_site import LibvirtSite
from recovered_guest import RecoveredGuest
from s3_lab import Bucket

from drsync.model import Kind
from drsync.units import MiB

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

VMS = ("db", "web")
PLAN = """
[site.a]
target = "libvirt"
uri = "{a}"
pool = "images"
networks = {{ lan = "prod" }}

[site.b]
target = "libvirt"
uri = "{b}"
networks = {{ prod = "lan" }}

[[wave]]
vms = ["db"]
wait = "agent"

[[wave]]
vms = ["web"]
delay = "1s"
"""
AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"


class Lab:
    """The two sites, the configuration, and what the guests hold. Every command is a process, as on two machines."""

    def __init__(self, place: Path, image: Path) -> None:
        self.plan = place / "plan.toml"
        self.repository_keys = f'url = "file://{place}/repository"\n'
        self._place = place
        self._config = place / "drsync.toml"
        self._image = image

    def configure(self, name: str, site: LibvirtSite) -> None:
        """The configuration on one of the sites: its own spool and libvirt, the same repository."""
        text = f'[repository]\n{self.repository_keys}key_file = "key"\n'
        text += f'[spool]\npath = "{site.path}/spool"\nreserve = "1MiB"\n[daemon]\nhost = "{name}"\n'
        for vm in VMS:
            text += f'[[vm]]\nname = "{vm}"\nsource = "libvirt"\nuri = "{site.uri}"\n'
        self._config.write_text(text)

    def drsync(self, *words: str) -> Any:
        """Run a command; its document."""
        command = [sys.executable, "-m", "drsync", "--config", str(self._config), "--json", *words]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done
        return json.loads(done.stdout)

    def write_plan(self, a: str, b: str) -> None:
        self.plan.write_text(PLAN.format(a=a, b=b))

    def build(self, site: LibvirtSite, network: str, pool: str) -> None:
        """Networks and pools, as an administrator prepares a host."""
        site.define(f"<network><name>{network}</name><bridge name='virbr7'/></network>", kind="net")
        site.virsh("net-start", network)
        xml = f"<pool type='dir'><name>{pool}</name><target><path>{site.images}</path></target></pool>"
        site.define(xml, kind="pool")
        site.virsh("pool-start", pool)

    def new_guest(self, site: LibvirtSite, name: str) -> LibvirtGuest:
        interface = "<interface type='network'><source network='prod'/><model type='virtio'/></interface>"
        disk = SiteDisk(target="vda", path=copy_disk(self._image, site.images / f"{name}.qcow2"))
        return LibvirtGuest(site, name, [disk], Machine(devices=interface + AGENT))

    def capture(self, vm: str) -> Mapping[str, Any]:
        """Capture; the point, which is the newest one if nothing has changed."""
        point: Mapping[str, Any] = self.drsync("capture", vm)["point"]
        return point


@pytest.fixture
def lab(guest_image: Path, tmp_path: Path) -> Lab:
    return Lab(tmp_path, guest_image)


def work(guest: LibvirtGuest | RecoveredGuest, note: str) -> None:
    """The guest writes: a file of random bytes, its checksum, a line in a diary."""
    script = (
        f"dd if=/dev/urandom of=$d/{note}.bin bs=64k count=16; echo {note} >> $d/diary; cd $d; sha256sum *.bin > sums"
    )
    guest.check(f"d=/mnt/work; mkdir -p $d; {script}; sync")


def check_work(guest: RecoveredGuest, *notes: str) -> None:
    assert guest.check("cat /mnt/work/diary").split() == list(notes)
    assert guest.check("cd /mnt/work; sha256sum -c sums").count(": OK") == len(notes)


def story(lab: Lab) -> None:
    """Protect, lose, take over, work on, give back."""
    with ExitStack() as stack:
        b = stack.enter_context(LibvirtSite(own_network=True))
        lab.build(b, "lan", "default")
        with LibvirtSite(own_network=True) as a:
            lab.build(a, "prod", "images")
            lab.write_plan(a.uri, b.uri)
            protect(lab, a)
        assert not a.path.exists()
        take_over(lab, b)
        work_on_b(lab, b)
        rebuilt = stack.enter_context(LibvirtSite(own_network=True))
        lab.build(rebuilt, "prod", "images")
        lab.write_plan(rebuilt.uri, b.uri)
        fail_back(lab, b, rebuilt)


def protect(lab: Lab, a: LibvirtSite) -> None:
    """Two guests work and are captured twice; what `db` writes behind that will be lost."""
    lab.configure("a", a)
    lab.drsync("init")
    with ExitStack() as stack:
        guests = [stack.enter_context(lab.new_guest(a, name)) for name in VMS]
        for guest in guests:
            guest.define()
            guest.start()
        a.virsh("autostart", "db")
        for note in ("first", "second"):
            for guest in guests:
                work(guest, note)
                lab.capture(guest.name)
        guests[0].check("echo lost >> /mnt/work/diary; sync")


def take_over(lab: Lab, b: LibvirtSite) -> None:
    lab.configure("b", b)
    words = ["restore", "--plan", str(lab.plan), "--site", "b"]
    checked = lab.drsync(*words, "--dry-run")
    assert [(vm["vm"], vm["state"]) for vm in checked["vms"]] == [("db", "checked"), ("web", "checked")]
    assert b.virsh("list", "--all", "--name").strip() == ""
    report = lab.drsync(*words)
    assert report["ok"]
    assert [(vm["vm"], vm["wave"], vm["state"], vm["point"]) for vm in report["vms"]] == [
        ("db", 1, "up", 2),
        ("web", 2, "up", 2),
    ]
    first, second = report["vms"]
    assert 0 < first["rto_seconds"] < second["rto_seconds"] - 1  # the delay between the waves
    assert all(0 < vm["rpo_seconds"] < 600 for vm in report["vms"])
    assert datetime.fromisoformat(first["up"]) < datetime.fromisoformat(second["up"])
    assert "network prod: becomes lan" in first["notes"]
    assert "Autostart:      enable" in b.virsh("dominfo", "db")
    assert "Autostart:      disable" in b.virsh("dominfo", "web")
    for name in VMS:
        with RecoveredGuest(b, name) as guest:
            check_work(guest, "first", "second")  # and not what came behind the last point: the RPO
    again = lab.drsync(*words)
    assert [(vm["state"], vm["was_there"]) for vm in again["vms"]] == [("up", True)] * 2


def work_on_b(lab: Lab, b: LibvirtSite) -> None:
    """The VMs are protected from the new host at once: the log goes on, and only differences are sent."""
    for name in VMS:
        with RecoveredGuest(b, name) as guest:
            work(guest, "on-b")
        point = lab.capture(name)
        assert (point["kind"], point["epoch"]) == (Kind.RESYNC, 2)
        assert 1 * MiB <= point["changed_bytes"] < 8 * MiB, "the first capture on the new host sends only what differs"


def fail_back(lab: Lab, b: LibvirtSite, a: LibvirtSite) -> None:
    for name in VMS:
        with RecoveredGuest(b, name) as guest:
            guest.check("umount /mnt; sync")
        assert lab.capture(name)["kind"] == Kind.INCREMENTAL
        b.power_off(name)
    lab.configure("a", a)
    report = lab.drsync("restore", "--plan", str(lab.plan), "--site", "a")
    assert report["ok"]
    for name in VMS:
        with RecoveredGuest(a, name) as guest:
            check_work(guest, "first", "second", "on-b")
            work(guest, "home")
        assert lab.capture(name)["epoch"] == 3
    assert [vm["problems"] for vm in lab.drsync("verify", "--read-data")] == [[], []]


def test_a_lost_site_comes_back_on_another_and_goes_home(lab: Lab) -> None:
    story(lab)


@pytest.mark.localstack
def test_a_lost_site_comes_back_from_s3(lab: Lab, bucket: Bucket) -> None:
    lab.repository_keys = (
        f'url = "s3://{bucket.name}/dr"\nendpoint_url = "{bucket.endpoint_url}"\nregion = "us-east-1"\n'
    )
    story(lab)
