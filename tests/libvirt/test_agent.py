"""A domain's agent, by way of libvirt: real labels, a group of real domains, and an agent that hangs."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from libvirt_guest import LibvirtGuest, Machine, SiteDisk
from libvirt_site import LibvirtSite

from drsync.source.agent import AgentAbsent, AgentSilent
from drsync.source.libvirt_agent import LibvirtAgent

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

CHANNEL = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"


@pytest.fixture
def guests(site: LibvirtSite, guest_image: Path, tmp_path: Path) -> Iterator[list[LibvirtGuest]]:
    """Two running domains with an agent, each with a small data disk."""
    with ExitStack() as stack:
        guests = []
        for name in ("first", "second"):
            directory = site.images / f"{tmp_path.name}-{name}"
            directory.mkdir()
            root, data = directory / "root.qcow2", directory / "data.qcow2"
            subprocess.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", "-b", guest_image, "-F", "qcow2", root], check=True
            )
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", data, "4M"], check=True)
            disks = [SiteDisk(target="vda", path=root), SiteDisk(target="vdb", path=data)]
            guest = stack.enter_context(LibvirtGuest(site, name, disks, Machine(devices=CHANNEL)))
            guest.define()
            stack.callback(forget, site, guest)
            guest.start()
            guests.append(guest)
        yield guests


def forget(site: LibvirtSite, guest: LibvirtGuest) -> None:
    """The site is shared: leave nothing of this domain there."""
    if guest.state != "shut off":
        guest.destroy()
    site.virsh("undefine", guest.name, "--checkpoints-metadata")


@pytest.fixture
def cli(site: LibvirtSite, guests: list[LibvirtGuest], tmp_path: Path) -> Cli:
    cli = Cli(tmp_path)
    text = cli.config.read_text().replace('path = "spool"', f'path = "{site.images}/{tmp_path.name}-spool"')
    for guest in guests:
        text += f'[[vm]]\nname = "{guest.name}"\nsource = "libvirt"\nuri = "{site.uri}"\nrpo = "1s"\n'
        text += 'consistency = "filesystem"\ngroup = "shop"\nexclude = ["vda"]\n'
    cli.config.write_text(text)
    cli.ok("init")
    return cli


def test_domains_of_a_group_are_frozen_paused_captured_and_let_go(
    cli: Cli, guests: list[LibvirtGuest], site: LibvirtSite
) -> None:
    checked = cli.ok("config", "check").stdout
    assert checked.count("guest agent: qemu-ga answers and can freeze file systems") == 2
    document = cli.ok("capture", "first", "--json").json
    points: list[dict[str, Any]] = [member["point"] for member in document["group"]["members"]]
    for point in points:
        assert point["consistency"] == "filesystem", point["quiesce"]
        assert point["quiesce"]["file_systems"] == 1
        assert 0 < point["quiesce"]["paused_seconds"] < point["quiesce"]["frozen_seconds"] < 10
        assert point["group"]["consistent"]
    for guest in guests:
        assert site.virsh("domstate", guest.name).strip() == "running"
        guest.check("echo x >/mnt/x; sync", timeout_s=20)
        assert guest.run("grep -q fsfreeze-freeze /tmp/qemu-ga.log").status == 0


def test_an_agent_that_hangs_costs_a_label_and_some_seconds(cli: Cli, guests: list[LibvirtGuest]) -> None:
    guests[1].check("kill -STOP $(cat /run/qemu-ga.pid)")
    started_s = time.monotonic()
    document = cli.ok("capture", "first", "--json").json
    assert time.monotonic() - started_s < 60
    first, second = (member["point"] for member in document["group"]["members"])
    assert (first["consistency"], second["consistency"]) == ("filesystem", "crash")
    assert second["quiesce"]["reason"].startswith("no answer from the guest agent: ")
    assert first["group"]["consistent"], "both were paused"
    guests[1].check("kill -CONT $(cat /run/qemu-ga.pid); sleep 1; echo x >/mnt/x; sync", timeout_s=20)
    assert guests[1].run("grep -q fsfreeze-freeze /tmp/qemu-ga.log").status == 1, "it was asked to freeze"


def test_a_domain_without_an_agent_and_one_that_is_off_are_told(site: LibvirtSite, guests: list[LibvirtGuest]) -> None:
    with closing(LibvirtAgent("first", site.uri, "first")) as agent:
        first_run = agent.vm_run
        assert agent.freeze(timeout_s=10) == 1
        assert agent.thaw(timeout_s=10) == 1
        guests[0].destroy()
        with pytest.raises(AgentAbsent):
            agent.thaw(timeout_s=10)
    with pytest.raises(AgentAbsent, match="off"):
        LibvirtAgent("first", site.uri, "first")
    with pytest.raises(AgentAbsent):
        LibvirtAgent("none", site.uri, "none")
    guests[1].check("kill $(cat /run/qemu-ga.pid)")
    with pytest.raises(AgentSilent):
        LibvirtAgent("second", site.uri, "second", timeout_s=1)
    assert first_run.startswith(site.virsh("domuuid", "first").strip())
