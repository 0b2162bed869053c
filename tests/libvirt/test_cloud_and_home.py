"""A libvirt host is lost, its VM goes on in EC2, and comes home to a rebuilt host with what it wrote in the cloud.

site A ── points ──▶ bucket in LocalStack ── restore --to ec2 ──▶ instance: boots by NVMe, works
   ✕ lost                    ▲                                         │
                             └──────────── failback --from ec2 ◀───────┘
site A, rebuilt ◀── restore --to libvirt --start ── the guest boots, all its files are whole
   └── capture --take-over: only what differs is sent
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cloud_lab import Made
from command_line import Cli
from drsync_localstack import volume_files
from ec2_lab import BLOCK_BYTES, Cloud
from guest import Guest, GuestDisk
from libvirt_guest import LibvirtGuest, SiteDisk
from libvirt_points import copy_disk
from libvirt_site import LibvirtSite
from recovered_guest import RecoveredGuest

from drsync.units import MiB

pytestmark = [pytest.mark.qemu, pytest.mark.localstack, pytest.mark.timeout(900)]

CHECK = "(cd /mnt/work && sha256sum -c sums >/dev/null && cat diary)"


def work(note: str) -> str:
    """What the guest is told to write: a file, a line in a diary, and the sums of both."""
    file = f"dd if=/dev/urandom of={note}.bin bs=64k count=8"
    return (
        f"mkdir -p /mnt/work && (cd /mnt/work && {file} && echo {note} >> diary && sha256sum diary *.bin > sums; sync)"
    )


def configure(cli: Cli, cloud: Cloud, place: Path, uri: str) -> None:
    """The configuration of a machine: its own spool, its own libvirt, the same bucket."""
    cli.config.write_text(
        f'[repository]\nurl = "s3://drsync-home-{cloud.account}/dr"\nendpoint_url = "{cloud.endpoint_url}"\n'
        f'region = "us-east-1"\nkey_file = "key"\n[spool]\npath = "{place}/spool"\nreserve = "1MiB"\n'
        f'[[vm]]\nname = "web"\nsource = "libvirt"\nuri = "{uri}"\nrpo = "1m"\n'
    )


@pytest.fixture
def cli(cloud: Cloud, connect_aws: Callable[..., Any], tmp_path: Path) -> Cli:
    """Commands that find the account in their environment, and a bucket of it."""
    del connect_aws  # it has set the environment
    cloud.s3.create_bucket(Bucket=f"drsync-home-{cloud.account}")
    place = tmp_path / "cli"
    place.mkdir()
    return Cli(place)


def protect(cli: Cli, site: LibvirtSite, image: Path) -> None:
    """The guest works and is captured twice."""
    disk = SiteDisk(target="vda", path=copy_disk(image, site.images / "web.qcow2"))
    with LibvirtGuest(site, "web", [disk]) as guest:
        guest.define()
        guest.start()
        for note in ("first", "second"):
            guest.check(work(note))
            cli.ok("capture", "web")


def in_the_cloud(cli: Cli, cloud: Cloud, place: Path) -> str:
    """Bring it up as an instance, and let that work as EC2 presents its volumes; the instance."""
    made = Made(cloud)
    instance: str = cli.ok("restore", "web", "--to", "ec2", "--wait", "--json").json["instance"]
    volume = made.volume_of(instance, "vda")["VolumeId"]
    raw = place / "volume.raw"
    volume_files.get(cloud.endpoint_url, volume, raw)
    with Guest(place / "instance", [GuestDisk(node="d0", path=raw, format="raw")], controller="nvme") as guest:
        assert guest.check(CHECK).split() == ["first", "second"]
        guest.check(work("cloud"))
        guest.poweroff()
    assert volume_files.put(cloud.endpoint_url, volume, raw) * BLOCK_BYTES < 16 * MiB
    return instance


def test_a_libvirt_domain_goes_on_in_ec2_and_comes_home(
    cli: Cli, cloud: Cloud, guest_image: Path, tmp_path: Path
) -> None:
    with LibvirtSite() as site:
        configure(cli, cloud, site.path, site.uri)
        cli.ok("init")
        protect(cli, site, guest_image)
    configure(cli, cloud, tmp_path / "recovery", "qemu:///system")
    instance = in_the_cloud(cli, cloud, tmp_path)
    with LibvirtSite() as rebuilt:
        configure(cli, cloud, rebuilt.path, rebuilt.uri)
        home = cli.ok("failback", "web", "--from", "ec2", "--instance", instance, "--stop", "--json").json
        assert home["passes"][0]["changed_bytes"] < 8 * MiB
        assert home["disks"][0]["whole_because"] is None
        where = ["--uri", rebuilt.uri, "--disk-dir", str(rebuilt.images)]
        cli.ok("restore", "web", "--to", "libvirt", *where, "--start")
        with RecoveredGuest(rebuilt, "web") as guest:
            assert guest.check(CHECK).split() == ["first", "second", "cloud"]
            cli.ok("capture", "web", "--take-over")
            guest.check(work("home"))
        cli.ok("capture", "web")
        *_, from_cloud, taken_over, newest = cli.ok("points", "web", "--json").json
        assert [point["kind"] for point in (from_cloud, taken_over, newest)] == ["resync", "resync", "incremental"]
        assert from_cloud["point"] == home["point"]
        assert taken_over["changed_bytes"] < 8 * MiB
        assert cli.ok("verify", "web", "--read-data").code == 0
