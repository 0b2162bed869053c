"""`drsync restore --to libvirt` on a real host: it boots, or is refused, and what fails leaves nothing behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import pytest
from command_line import Cli, Done
from libvirt_guest import Machine, SiteDisk
from libvirt_points import QmpGuest, capture, copy_disk, definition_of, file_of, make_point
from libvirt_site import LibvirtSite
from recovered_guest import RecoveredGuest

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

OVMF_CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
OVMF_VARS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
MAC = "52:54:00:11:22:33"
UUID = "6a0f3b1e-9b9f-4d0b-8a44-0f5b6f3a2c11"


@pytest.fixture(scope="module")
def repository(guest_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """The repository of a site that is gone: two points of `web`, two disks, the second point a file richer."""
    place = tmp_path_factory.mktemp("protected")
    cli = Cli(place)
    cli.ok("init")
    sockets = Path("/tmp") / f"drsync-{os.getpid()}"  # noqa: S108  short, as sockets need it
    sockets.mkdir()
    with LibvirtSite() as lost:
        data = lost.images / "data.img"
        subprocess.run(["qemu-img", "create", "-q", "-f", "raw", data, "32M"], check=True)
        disks = [
            SiteDisk(target="vda", path=copy_disk(guest_image, lost.images / "web.qcow2")),
            SiteDisk(target="vdb", path=data, format="raw"),
        ]
        machine = Machine(
            uuid=UUID, devices=f"<interface type='user'><mac address='{MAC}'/><model type='e1000'/></interface>"
        )
        with QmpGuest(lost, "web", disks, sockets, machine=machine) as guest:
            guest.define()
            lost.virsh("autostart", "web")
            guest.start()
            guest.check("echo first > /mnt/diary; echo data | dd of=/dev/vdb bs=512 seek=9 conv=fsync; sync")
            capture(cli, guest, definition_of(guest))
            guest.check("echo second >> /mnt/diary; sync")
            capture(cli, guest, definition_of(guest))
        lost.destroy()
    yield cli
    shutil.rmtree(sockets)


@pytest.fixture(scope="module")
def pool(site: LibvirtSite) -> Path:
    """The pool `default` of the site that takes over."""
    path = site.path / "default-pool"
    path.mkdir()
    site.define(f"<pool type='dir'><name>default</name><target><path>{path}</path></target></pool>", kind="pool")
    site.virsh("pool-start", "default")
    return path


@pytest.fixture(autouse=True)
def clean(site: LibvirtSite, pool: Path) -> Iterator[None]:
    """No test leaves a domain or a disk to the next."""
    yield
    for name in site.virsh("list", "--all", "--name").split():
        site.power_off(name)
        site.virsh("undefine", name, "--keep-nvram")
    for path in pool.iterdir():
        path.unlink()
    site.virsh("pool-refresh", "default")


def words(site: LibvirtSite, *more: str) -> Sequence[str]:
    return ["restore", "web", "--to", "libvirt", "--uri", site.uri, *more]


def problems(done: Done) -> list[str]:
    return [error["message"] for error in done.json["errors"]]


def test_a_vm_comes_back_as_it_was_and_boots(repository: Cli, site: LibvirtSite, pool: Path) -> None:
    done = repository.ok(*words(site, "--start", "--json")).json
    assert (done["domain"], done["uuid"], done["point"], done["autostart"]) == ("web", UUID, 2, True)
    assert [disk["path"] for disk in done["disks"]] == [str(pool / "web-vda.qcow2"), str(pool / "web-vdb.raw")]
    with RecoveredGuest(site, "web") as guest:
        assert guest.check("cat /mnt/diary") == "first\nsecond\n"
        assert guest.check("dd if=/dev/vdb bs=512 skip=9 count=1 2>/dev/null | head -n 1").startswith("data\n")
    xml = site.virsh("dumpxml", "web", "--inactive")
    assert f"<uuid>{UUID}</uuid>" in xml
    assert MAC in xml
    assert "Autostart:      enable" in site.virsh("dominfo", "web")
    listed = site.virsh("vol-list", "default")
    assert "web-vda.qcow2" in listed
    assert "web-vdb.raw" in listed
    assert {path.name for path in pool.iterdir()} == {"web-vda.qcow2", "web-vdb.raw"}
    told = " ".join(f"{note['subject']}: {note['text']}" for note in done["notes"])
    assert "serial: there is no directory for" in told  # of the console, which was the lost site's


def test_an_earlier_point_comes_back_and_is_not_started_unless_told(
    repository: Cli, site: LibvirtSite, pool: Path
) -> None:
    said = repository.ok(*words(site, "--point", "1")).stdout
    assert f"start it: virsh -c '{site.uri}' start web" in said
    assert site.virsh("domstate", "web").strip() == "shut off"
    site.virsh("start", "web")
    with RecoveredGuest(site, "web") as guest:
        assert guest.check("cat /mnt/diary") == "first\n"


def test_a_dry_run_writes_nothing_and_tells_all_that_would_fail(repository: Cli, site: LibvirtSite, pool: Path) -> None:
    done = repository.ok(*words(site, "--dry-run", "--json"))
    assert (done.json["dry_run"], done.json["errors"], done.json["took_seconds"]) == (True, [], None)
    assert repository.ok(*words(site, "--dry-run")).stdout.startswith("would restore web at point 2 of ")
    assert list(pool.iterdir()) == []
    assert site.virsh("list", "--all", "--name").strip() == ""
    (pool / "web-vda.qcow2").write_text("precious")
    site.virsh("pool-refresh", "default")
    done = repository.run(*words(site, "--dry-run", "--json", "--network", "*=nowhere"))
    assert done.code == 79
    assert problems(done) == [f"{pool}/web-vda.qcow2 exists already"]
    assert (pool / "web-vda.qcow2").read_text() == "precious"
    text = repository.run(*words(site, "--dry-run")).stdout
    assert f"PROBLEM: {pool}/web-vda.qcow2 exists already" in text
    assert "remedy: drsync restore web --to libvirt --name OTHER-NAME" in text


def test_what_is_in_the_way_is_refused_and_left(repository: Cli, site: LibvirtSite, pool: Path) -> None:
    repository.ok(*words(site, "--start"))
    error, remedy = repository.refused(75, *words(site))
    assert error == f"VM web can't come back at {site.uri}: domain web ({UUID}) is running"
    assert remedy == f"virsh -c '{site.uri}' shutdown web"
    assert repository.refused(75, *words(site, "--replace"))[0] == error
    site.power_off("web")
    error, remedy = repository.refused(75, *words(site))
    assert error.endswith(f"domain web ({UUID}) is defined there")
    assert "--replace" in remedy
    before = {path: path.stat().st_mtime_ns for path in pool.iterdir()}
    error, _ = repository.refused(75, *words(site))
    assert {path: path.stat().st_mtime_ns for path in pool.iterdir()} == before


def test_pools_that_cannot_take_the_disks_are_refused_with_those_that_are_there(
    repository: Cli, site: LibvirtSite, pool: Path
) -> None:
    error, remedy = repository.refused(78, *words(site, "--pool", "fast"))
    assert error.startswith(f"there is no pool fast; pools at {site.uri}: default (dir, ")
    assert remedy.startswith(f"virsh -c '{site.uri}' pool-list --all --details")
    site.define(
        "<pool type='iscsi'><name>san</name><source><host name='127.0.0.1'/><device path='iqn.x'/></source>"
        "<target><path>/dev/disk/by-path</path></target></pool>",
        kind="pool",
    )
    try:
        error, _ = repository.refused(78, *words(site, "--pool", "san"))
        assert error.startswith("pool san is not active; ")
    finally:
        site.virsh("pool-undefine", "san")
    small = site.path / "small"
    small.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small], check=True)
    try:
        error, _ = repository.refused(71, *words(site, "--disk-dir", str(small)))
        assert error.startswith(f"{small} needs ")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_copy_has_a_uuid_and_a_mac_of_its_own_and_runs_beside(repository: Cli, site: LibvirtSite, pool: Path) -> None:
    repository.ok(*words(site, "--start"))
    done = repository.ok(*words(site, "--name", "web-copy", "--point", "1", "--start", "--json")).json
    assert done["uuid"] != UUID
    assert done["autostart"] is False
    assert MAC not in site.virsh("dumpxml", "web-copy")
    with RecoveredGuest(site, "web-copy") as copied, RecoveredGuest(site, "web") as first:
        assert copied.check("cat /mnt/diary") == "first\n"
        assert first.check("cat /mnt/diary") == "first\nsecond\n"


def test_disks_can_go_into_a_directory(repository: Cli, site: LibvirtSite, pool: Path) -> None:
    directory = site.path / "elsewhere"
    repository.ok(*words(site, "--disk-dir", str(directory), "--format", "qcow2"))
    assert {path.name for path in directory.iterdir()} == {"web-vda.qcow2", "web-vdb.qcow2"}
    assert list(pool.iterdir()) == []
    shutil.rmtree(directory)


def test_replace_brings_a_broken_vm_back_in_its_place_and_removes_the_old_disks_when_it_runs(
    repository: Cli, site: LibvirtSite, pool: Path
) -> None:
    repository.ok(*words(site, "--disk-dir", str(pool)))
    (pool / "web-vda.qcow2").write_bytes(b"broken")
    before = set(pool.iterdir())
    said = repository.ok(*words(site, "--replace", "--point", "1")).stdout
    assert "the old disks stay: " in said
    assert before < set(pool.iterdir())
    done = repository.ok(*words(site, "--replace", "--start", "--json")).json
    assert sorted(done["replaces"]) == sorted(str(pool / f"web-{d}") for d in ("vda-2.qcow2", "vdb-2.raw"))
    with RecoveredGuest(site, "web") as guest:
        assert guest.check("cat /mnt/diary") == "first\nsecond\n"
    left = {path.name for path in pool.iterdir()}
    assert left == {"web-vda.qcow2", "web-vdb.raw", "web-vda-3.qcow2", "web-vdb-3.raw"}  # of the run without --start


def test_a_replaced_vm_that_does_not_start_is_back_as_it_was(
    guest_image: Path, repository: Cli, site: LibvirtSite, pool: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        disk = copy_disk(guest_image, pool / "shop.qcow2")
        serial = (
            f"<serial type='tcp'><source mode='bind' host='127.0.0.1' service='{port}'/><protocol type='raw'/></serial>"
        )
        make_point(repository, site, "shop", disk, serial)
        old = site.virsh("dumpxml", "shop", "--inactive")
        before = disk.read_bytes()
        error, remedy = repository.refused(83, "restore", "shop", *words(site)[2:], "--replace", "--start")
        assert "does not start: " in error
        assert error.endswith("the old one is back, on its old disks")
        assert "--name shop-restored" in remedy
        assert site.virsh("dumpxml", "shop", "--inactive") == old
        assert [path.name for path in pool.iterdir()] == ["shop.qcow2"]
        assert disk.read_bytes() == before
        site.virsh("undefine", "shop")
        error, remedy = repository.refused(81, "restore", "shop", *words(site)[2:], "--start")
        assert error.startswith("domain shop is restored, but does not start: ")
        assert remedy == f"virsh -c '{site.uri}' start shop"
    site.virsh("start", "shop")  # the port is free now


def test_what_libvirt_does_not_define_leaves_nothing(repository: Cli, site: LibvirtSite, pool: Path) -> None:
    error, _ = repository.refused(77, *words(site, "--name", "a/b"))
    assert error.startswith(f"libvirt at {site.uri} refuses defining the domain: ")
    assert list(pool.iterdir()) == []
    assert site.virsh("list", "--all", "--name").strip() == ""


def test_a_damaged_repository_stops_the_restore_and_leaves_nothing(
    repository: Cli, site: LibvirtSite, pool: Path
) -> None:
    path = repository.repository / "vm/web/log" / f"{1:016x}"
    content = path.read_bytes()
    path.chmod(0o600)
    try:
        path.write_bytes(content[:70_000] + bytes(70_000) + content[140_000:])
        error, _ = repository.refused(40, *words(site, "--start"))
        assert "is damaged" in error
    finally:
        path.write_bytes(content)
    assert list(pool.iterdir()) == []
    assert site.virsh("list", "--all", "--name").strip() == ""


def test_a_killed_restore_leaves_nothing_that_looks_finished_and_the_next_one_works(
    repository: Cli, site: LibvirtSite, pool: Path
) -> None:
    fifo_was_read = pool / "web-vda.qcow2.partial"
    command = [sys.executable, "-m", "drsync", "--config", str(repository.config), *words(site)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        while not fifo_was_read.exists() and run.poll() is None:
            pass
        run.kill()
    assert not (pool / "web-vda.qcow2").exists()
    repository.ok(*words(site))


RELAY = """
import os, socket, sys, threading
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
def out():
    while data := s.recv(65536): os.write(1, data)
    os._exit(0)
threading.Thread(target=out, daemon=True).start()
while data := os.read(0, 65536): s.sendall(data)
"""


@pytest.fixture
def remote_uri(site: LibvirtSite, tmp_path: Path) -> str:
    """The site as a machine that is reached by a program like ssh."""
    relay = tmp_path / "relay.py"
    relay.write_text(RELAY)
    script = tmp_path / "ssh"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} {relay} {site.socket}\n")
    script.chmod(0o755)
    return f"qemu+ext://far.example/system?command={script}"


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_a_vm_comes_back_on_another_machine_through_libvirts_connection(
    repository: Cli, site: LibvirtSite, pool: Path, remote_uri: str, image_format: str, tmp_path: Path
) -> None:
    words = ["restore", "web", "--to", "libvirt", "--uri", remote_uri, "--format", image_format]
    done = repository.ok(*words, "--json").json
    assert done["place"].startswith("pool default (dir, at qemu+ext://far.example/")
    repository.ok("restore", "web", "--to", "image", "--output", str(tmp_path / "here"), "--format", image_format)
    for disk in done["disks"]:
        if image_format == "qcow2":
            subprocess.run(["qemu-img", "check", disk["path"]], check=True, capture_output=True)
        here = tmp_path / "here" / f"{disk['name']}.{image_format}"
        formats = ["-f", image_format, "-F", image_format]
        subprocess.run(["qemu-img", "compare", *formats, here, disk["path"]], check=True, capture_output=True)
    site.virsh("start", "web")
    with RecoveredGuest(site, "web") as guest:
        assert guest.check("cat /mnt/diary") == "first\nsecond\n"
        assert guest.check("dd if=/dev/vdb bs=512 skip=9 count=1 2>/dev/null | head -n 1").startswith("data\n")
    sizes = {disk["path"]: disk["size_bytes"] for disk in done["disks"]}
    allocated = sum(Path(path).stat().st_blocks * 512 for path in sizes)
    assert allocated < 64 << 20, "holes were not kept"


def test_a_directory_of_this_machine_is_refused_for_another(
    repository: Cli, site: LibvirtSite, remote_uri: str
) -> None:
    error, _ = repository.refused(
        76, "restore", "web", "--to", "libvirt", "--uri", remote_uri, "--disk-dir", "/srv/vms"
    )
    assert "/srv/vms is a directory of this machine; choose a pool of that host with --pool" in error


def test_a_host_that_does_not_answer_is_told(repository: Cli) -> None:
    uri = "qemu:///system?socket=/nowhere/libvirt-sock"
    error, remedy = repository.refused(74, "restore", "web", "--to", "libvirt", "--uri", uri)
    assert error.startswith(f"can't reach libvirt at {uri}: ")
    assert remedy == f"virsh -c '{uri}' version"


def test_nvram_comes_back_beside_the_disks(guest_image: Path, repository: Cli, site: LibvirtSite, pool: Path) -> None:
    content = OVMF_VARS.read_bytes()
    disk = copy_disk(guest_image, site.images / "uefi.qcow2")
    system = f"<loader readonly='yes' type='pflash'>{OVMF_CODE}</loader><nvram>/nowhere/uefi_VARS.fd</nvram>"
    make_point(repository, site, "uefi", disk, system=system, files=[file_of("nvram", content)])
    site.virsh("undefine", "uefi", "--keep-nvram")
    done = repository.ok("restore", "uefi", *words(site)[2:], "--start", "--json").json
    assert done["nvram"] == str(pool / "uefi-nvram.fd")
    assert (pool / "uefi-nvram.fd").stat().st_size == len(content)
    xml = site.virsh("dumpxml", "uefi")
    assert f">{pool}/uefi-nvram.fd</nvram>" in xml
    assert OVMF_CODE in xml


def test_a_tpms_state_comes_back_and_the_guest_starts_with_it(
    guest_image: Path, repository: Cli, site: LibvirtSite, pool: Path
) -> None:
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    disk = copy_disk(guest_image, site.images / "vault.qcow2")
    uuid = str(uuid4())
    make_point(repository, site, "vault", disk, tpm, uuid=uuid)
    site.virsh("start", "vault")  # swtpm makes its state
    site.power_off("vault")
    state = site.path / "lib" / "swtpm" / uuid
    content = (state / "tpm2" / "tpm2-00.permall").read_bytes()
    packed = subprocess.run(["tar", "-c", "-C", state, "tpm2"], capture_output=True, check=True).stdout
    site.virsh("undefine", "vault")
    shutil.rmtree(state, ignore_errors=True)
    make_point(repository, site, "vault", disk, tpm, files=[file_of("tpm", packed)], uuid=uuid)
    site.virsh("undefine", "vault")
    shutil.rmtree(state, ignore_errors=True)
    drsync = [*site.inside, sys.executable, "-m", "drsync", "--config", str(repository.config)]
    command = [*drsync, "restore", "vault", "--to", "libvirt", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # there /var/lib/libvirt is the site's
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["tpm_state"] is True
    assert (state / "tpm2" / "tpm2-00.permall").read_bytes() == content
    site.virsh("start", "vault")
    assert site.virsh("domstate", "vault").strip() == "running"
    again = subprocess.run([*command, "--name", "vault-2"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again
    assert (state.parent / json.loads(again.stdout)["uuid"] / "tpm2" / "tpm2-00.permall").read_bytes() == content
