"""The whole way of a real guest: protected into a bucket, its site lost, up again as an instance, by BIOS and by UEFI;
and home again, with what it wrote meanwhile.

The instance's volumes are taken out of LocalStack and started in QEMU behind NVMe, as EC2 presents them.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cloud_lab import Made
from command_line import Cli
from drsync_localstack import volume_files
from ec2_lab import BLOCK_BYTES, Cloud
from guest import Guest, GuestDisk

pytestmark = [pytest.mark.localstack, pytest.mark.qemu, pytest.mark.timeout(900)]

OVMF = Path("/usr/share/ovmf/OVMF.fd")
SYSLINUX_EFI = Path("/usr/lib/SYSLINUX.EFI/efi64/syslinux.efi")
LDLINUX = Path("/usr/lib/syslinux/modules/efi64/ldlinux.e64")


@pytest.fixture
def guest_raw(guest_image: Path, tmp_path: Path) -> Path:
    """The examples' guest, which boots by BIOS, with what UEFI boots from beside it."""
    raw = tmp_path / "guest.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", guest_image, raw], check=True)
    boot = f"{raw}@@1M"
    config = tmp_path / "syslinux.cfg"
    subprocess.run(["mcopy", "-i", boot, "::/syslinux.cfg", config], check=True)
    subprocess.run(["mmd", "-i", boot, "::/EFI", "::/EFI/BOOT"], check=True)
    for source, name in ((SYSLINUX_EFI, "BOOTX64.EFI"), (LDLINUX, "LDLINUX.E64"), (config, "SYSLINUX.CFG")):
        subprocess.run(["mcopy", "-i", boot, source, f"::/EFI/BOOT/{name}"], check=True)
    return raw


@pytest.fixture
def cli(cloud: Cloud, connect_aws: Callable[..., Any], tmp_path: Path) -> Cli:
    """A configuration whose repository is a bucket of the account."""
    del connect_aws  # it has set the environment
    bucket = f"drsync-guest-{cloud.account}"
    cloud.s3.create_bucket(Bucket=bucket)
    place = tmp_path / "cli"
    place.mkdir()
    cli = Cli(place)
    cli.repository = Path(f"s3://{bucket}/dr")
    return cli


def configure(cli: Cli, cloud: Cloud, socket: Path) -> None:
    bucket = f"drsync-guest-{cloud.account}"
    cli.config.write_text(
        f'[repository]\nurl = "s3://{bucket}/dr"\nendpoint_url = "{cloud.endpoint_url}"\nregion = "us-east-1"\n'
        f'key_file = "key"\n[spool]\npath = "spool"\nreserve = "1MiB"\n'
        f'[[vm]]\nname = "web"\nsocket = "{socket}"\nrpo = "1m"\n'
    )


def taken_out(cloud: Cloud, made: Made, instance_id: str, path: Path) -> GuestDisk:
    volume_files.get(cloud.endpoint_url, made.volume_of(instance_id, "disk0")["VolumeId"], path)
    return GuestDisk(node="d0", path=path, format="raw")


def goes_home(cli: Cli, cloud: Cloud, made: Made, instance_id: str, disk: Path, place: Path) -> None:
    """What the instance wrote on its disk comes home, boots there, and is protected from there on."""
    written = volume_files.put(cloud.endpoint_url, made.volume_of(instance_id, "disk0")["VolumeId"], disk)
    home = cli.ok("failback", "web", "--from", "ec2", "--instance", instance_id, "--json").json
    (one,) = home["passes"]
    assert (one["read_bytes"], home["disks"][0]["whole_because"]) == (written * BLOCK_BYTES, None)
    assert 0 < one["changed_bytes"] < 8 * 1024 * 1024
    output = place / "home"
    cli.ok("restore", "web", "--to", "image", "--output", str(output))
    disks = [GuestDisk(node="d0", path=output / "disk0.qcow2", format="qcow2")]
    with Guest(place / "home-guest", disks) as guest:
        assert (
            guest.check("cd / && cat /mnt/diary && md5sum -c /mnt/diary.md5")
            .replace("\r", "")
            .startswith("first\nsecond\nthird")
        )
        configure(cli, cloud, guest.qmp_socket)
        cli.refused(45, "capture", "web")
        cli.ok("capture", "web", "--take-over")
    *_, before, newest = cli.ok("points", "web", "--json").json
    assert (before["point"], before["kind"], newest["kind"]) == (home["point"], "resync", "resync")
    assert newest["epoch"] == before["epoch"] + 1
    assert newest["changed_bytes"] < 8 * 1024 * 1024
    assert cli.ok("verify", "web", "--read-data").code == 0


def test_a_guest_that_lost_its_site_boots_as_an_instance_by_bios_and_by_uefi(
    cli: Cli, cloud: Cloud, guest_raw: Path, tmp_path: Path
) -> None:
    made = Made(cloud)
    with Guest(tmp_path / "site", [GuestDisk(node="d0", path=guest_raw, format="raw")]) as guest:
        configure(cli, cloud, guest.qmp_socket)
        cli.ok("init")
        guest.check("echo first > /mnt/diary; sync")
        cli.ok("capture", "web")
        guest.check("echo second >> /mnt/diary; sync; md5sum /mnt/diary > /mnt/diary.md5; sync")
        cli.ok("capture", "web")
        guest.kill()

    first = cli.ok("restore", "web", "--to", "ec2", "--point", "1", "--json").json
    done = cli.ok("restore", "web", "--to", "ec2", "--wait", "--json").json
    assert done["disks"][0]["parent"] == first["disks"][0]["snapshot"]
    assert 0 < done["sent_bytes"] < first["sent_bytes"] / 2
    uefi = cli.ok("restore", "web", "--to", "ec2", "--boot-mode", "uefi", "--name", "web-uefi", "--json").json
    assert (uefi["sent_bytes"], uefi["boot_mode"]) == (0, "uefi")
    assert made.instance(uefi["instance"])["BootMode"] == "uefi"

    cloud.make_role()
    converted = cli.ok("restore", "web", "--to", "ec2", "--convert-guest", "--name", "web-converted", "--json").json
    assert (converted["sent_bytes"], converted["image"] in (done["image"], uefi["image"])) == (0, False)
    assert made.volume_of(converted["instance"], "disk0")["Size"] == 2

    disk = taken_out(cloud, made, done["instance"], tmp_path / "bios.raw")
    with Guest(tmp_path / "bios", [disk], controller="nvme") as instance:
        assert instance.check("cd / && cat /mnt/diary && md5sum -c /mnt/diary.md5").startswith("first\nsecond")
        assert "/dev/nvme0n1p2 on /mnt" in instance.check("mount").replace("\r", "")
        instance.check("cd / && echo third >> /mnt/diary && md5sum /mnt/diary > /mnt/diary.md5 && sync")
        instance.poweroff()
    goes_home(cli, cloud, made, done["instance"], disk.path, tmp_path)
    disk = taken_out(cloud, made, uefi["instance"], tmp_path / "uefi.raw")
    with Guest(tmp_path / "uefi", [disk], controller="nvme", firmware=OVMF, memory_mib=512) as instance:
        assert "second" in instance.check("test -d /sys/firmware/efi && cat /mnt/diary")
