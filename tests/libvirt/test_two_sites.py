"""Two libvirt hosts on one machine: one is protected and lost, the other takes over by a plan, and gives back.

site A ── points ──▶ repository (a directory, or S3 in LocalStack)
   ✕ libvirtd and its QEMUs killed, its files removed
site B ◀── restore --plan --site b ── the guests boot, their files are whole
   │ protected from here at once: its log goes on with the next epoch
   ▼
site A, rebuilt ◀── restore --plan --site a ── with what was written on B
"""

import gc
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest
from command_line import Cli
from libvirt_guest import Machine, SiteDisk
from libvirt_points import QmpGuest, capture, copy_disk, definition_of
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

[[wave]]
vms = ["web"]
delay = "1s"
"""


class Lab:
    """The two sites, the configuration, and what the guests hold."""

    def __init__(self, place: Path, image: Path, sockets: Path) -> None:
        self.cli = Cli(place)
        self.plan = place / "plan.toml"
        self.repository_keys = f'url = "file://{self.cli.repository}"\n'
        self._image = image
        self._sockets = sockets

    def configure(self, site: str) -> None:
        """The configuration on one of the sites: its own spool, the same repository."""
        self.cli.config.write_text(
            f'[repository]\n{self.repository_keys}key_file = "key"\n[spool]\npath = "spool-{site}"\nreserve = "1MiB"\n'
        )

    def write_plan(self, a: str, b: str) -> None:
        self.plan.write_text(PLAN.format(a=a, b=b))

    def build(self, site: LibvirtSite, network: str, pool: str) -> None:
        """Networks and pools, as an administrator prepares a host."""
        site.define(f"<network><name>{network}</name><bridge name='virbr7'/></network>", kind="net")
        site.virsh("net-start", network)
        xml = f"<pool type='dir'><name>{pool}</name><target><path>{site.images}</path></target></pool>"
        site.define(xml, kind="pool")
        site.virsh("pool-start", pool)

    def new_guest(self, site: LibvirtSite, name: str) -> QmpGuest:
        interface = "<interface type='network'><source network='prod'/><model type='virtio'/></interface>"
        disk = SiteDisk(target="vda", path=copy_disk(self._image, site.images / f"{name}.qcow2"))
        return QmpGuest(site, name, [disk], self._sockets, machine=Machine(devices=interface))

    def came_back(self, site: LibvirtSite, name: str, uuid: str) -> QmpGuest:
        """The guest of that name as the site has it now."""
        disk = SiteDisk(target="vda", path=site.images / f"{name}-vda.qcow2")
        return QmpGuest(site, name, [disk], self._sockets, machine=Machine(uuid=uuid))

    def capture(self, guest: QmpGuest) -> None:
        capture(self.cli, guest, definition_of(guest))

    def points(self, vm: str) -> Sequence[Mapping[str, object]]:
        points: Sequence[Mapping[str, object]] = self.cli.ok("points", vm, "--json").json
        return points


@pytest.fixture
def lab(guest_image: Path, tmp_path: Path) -> Iterator[Lab]:
    sockets = Path("/tmp") / f"drsync-two-{os.getpid()}"  # noqa: S108  short, as sockets need it
    sockets.mkdir()
    yield Lab(tmp_path, guest_image, sockets)
    shutil.rmtree(sockets)


@pytest.fixture(autouse=True)
def connections_end() -> Iterator[None]:
    """A command's connections to S3 end with its process; here that is the test's, so they end with the test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def work(guest: QmpGuest | RecoveredGuest, note: str) -> None:
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
    lab.configure("a")
    lab.cli.ok("init")
    with ExitStack() as stack:
        b = stack.enter_context(LibvirtSite(own_network=True))
        lab.build(b, "lan", "default")
        with LibvirtSite(own_network=True) as a:
            lab.build(a, "prod", "images")
            uuids = protect(lab, a)
            lab.write_plan(a.uri, b.uri)
        assert not a.path.exists()
        take_over(lab, b)
        work_on_b(lab, b, uuids)
        rebuilt = stack.enter_context(LibvirtSite(own_network=True))
        lab.build(rebuilt, "prod", "images")
        lab.write_plan(rebuilt.uri, b.uri)
        fail_back(lab, b, rebuilt, uuids)


def protect(lab: Lab, a: LibvirtSite) -> Mapping[str, str]:
    """Two guests work and are captured twice; what `db` writes behind that will be lost."""
    with ExitStack() as stack:
        guests = [stack.enter_context(lab.new_guest(a, name)) for name in VMS]
        for guest in guests:
            guest.define()
            guest.start()
        for note in ("first", "second"):
            for guest in guests:
                work(guest, note)
                lab.capture(guest)
        guests[0].check("echo lost >> /mnt/work/diary; sync")
        return {guest.name: guest.machine.uuid for guest in guests}


def take_over(lab: Lab, b: LibvirtSite) -> None:
    lab.configure("b")
    words = ["restore", "--plan", str(lab.plan), "--site", "b"]
    checked = lab.cli.ok(*words, "--dry-run", "--json").json
    assert [(vm["vm"], vm["state"]) for vm in checked["vms"]] == [("db", "checked"), ("web", "checked")]
    assert b.virsh("list", "--all", "--name").strip() == ""
    report = lab.cli.ok(*words, "--json").json
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
    for name in VMS:
        with RecoveredGuest(b, name) as guest:
            check_work(guest, "first", "second")  # and not what came behind the last point: the RPO
    again = lab.cli.ok(*words, "--json").json
    assert [(vm["state"], vm["was_there"]) for vm in again["vms"]] == [("up", True)] * 2


def work_on_b(lab: Lab, b: LibvirtSite, uuids: Mapping[str, str]) -> None:
    """The VMs are protected from the new host at once: the log goes on, and only differences are sent."""
    for name in VMS:
        with RecoveredGuest(b, name) as guest:
            work(guest, "on-b")
        lab.capture(lab.came_back(b, name, uuids[name]))
        before, point = lab.points(name)[-2:]
        assert (point["kind"], point["epoch"]) == (Kind.RESYNC, 2)
        assert before["epoch"] == 1
        changed = point["changed_bytes"]
        assert isinstance(changed, int)
        assert 1 * MiB <= changed < 8 * MiB, "the first capture on the new host sends only what differs"


def fail_back(lab: Lab, b: LibvirtSite, a: LibvirtSite, uuids: Mapping[str, str]) -> None:
    for name in VMS:
        with RecoveredGuest(b, name) as guest:
            guest.check("umount /mnt; sync")
        lab.capture(lab.came_back(b, name, uuids[name]))
        b.virsh("destroy", name)
    lab.configure("a-rebuilt")
    report = lab.cli.ok("restore", "--plan", str(lab.plan), "--site", "a", "--json").json
    assert report["ok"]
    for name in VMS:
        with RecoveredGuest(a, name) as guest:
            check_work(guest, "first", "second", "on-b")
            work(guest, "home")
        lab.capture(lab.came_back(a, name, uuids[name]))
        assert lab.points(name)[-1]["epoch"] == 3
    lab.cli.ok("verify", "--read-data")


def test_a_lost_site_comes_back_on_another_and_goes_home(lab: Lab) -> None:
    story(lab)


@pytest.mark.localstack
def test_a_lost_site_comes_back_from_s3(lab: Lab, bucket: Bucket) -> None:
    lab.repository_keys = (
        f'url = "s3://{bucket.name}/dr"\nendpoint_url = "{bucket.endpoint_url}"\nregion = "us-east-1"\n'
    )
    story(lab)
