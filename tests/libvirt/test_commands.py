"""The command line and the daemon with libvirt: patterns, what is missing, who may write."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Cli
from libvirt_bench import create
from libvirt_guest import LibvirtGuest, SiteDisk
from libvirt_site import LibvirtSite
from source_bench import MIB

from drsync.config import load_config
from drsync.daemon import Daemon, Request
from drsync.duties import Duties
from drsync.model import SystemClock
from drsync.session import Session
from drsync.systemd import Notifier

pytestmark = pytest.mark.qemu


def define(site: LibvirtSite, name: str) -> LibvirtGuest:
    disk = site.images / f"{name.replace(' ', '-')}.qcow2"
    disk.unlink(missing_ok=True)
    create(disk, MIB)
    guest = LibvirtGuest(site, name, [SiteDisk(target="vda", path=disk)])
    guest.define()
    return guest


@pytest.fixture
def protected(site: LibvirtSite, tmp_path: Path) -> Iterator[Cli]:
    """A configuration with a pattern; domains are there, one of them runs."""
    names = ["prod-a", "prod-B 1", "prod-test-1", "other"]
    for name in names:
        define(site, name)
    site.virsh("start", "prod-a", "--paused")
    cli = Cli(tmp_path)
    cli.configure(
        extra=f'[[protect]]\nmatch = "prod-*"\nuri = "{site.uri}"\nexclude_vms = ["prod-test*"]\nrpo = "1s"\n'
    )
    cli.ok("init")
    yield cli
    for name in site.running_domains():
        site.power_off(name)
    for name in site.virsh("list", "--all", "--name").splitlines():
        if name:
            site.virsh("undefine", name, "--checkpoints-metadata")


def test_config_check_lists_what_a_pattern_finds(protected: Cli, site: LibvirtSite) -> None:
    text = protected.ok("config", "check").stdout
    assert f"protect prod-*: 2 VMs at {site.uri}: " in text
    assert "prod-b-1-" in text
    assert "(prod-B 1)" in text
    assert "vm prod-a: vda: would capture up to" in text
    document = protected.ok("config", "check", "--json").json
    assert [check["check"] for check in document["checks"]][:2] == ["file", "protect prod-*"]
    assert len(document["checks"]) == 6


def test_a_vm_that_a_pattern_finds_is_captured_by_its_name(protected: Cli, site: LibvirtSite) -> None:
    assert protected.ok("capture", "prod-a", "--json").json["point"]["kind"] == "full"
    assert protected.ok("capture", "prod-a", "--json").json["result"] == "unchanged"
    (name,) = (vm["vm"] for vm in protected.ok("status", "--json").json if vm["vm"].startswith("prod-b"))
    assert protected.ok("capture", name, "--json").json["point"]["kind"] == "full", "a domain that is off"
    assert protected.ok("capture", name, "--json").json["result"] == "unchanged"
    error, _ = protected.refused(12, "capture", "prod-test-1")
    assert error == f"no VM named prod-test-1; there are: {name}, prod-a"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to this"
        time.sleep(0.1)


def test_the_daemon_takes_up_a_vm_that_appears_and_leaves_one_that_is_gone(
    protected: Cli, site: LibvirtSite, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="drsync")
    config, clock = load_config(protected.config), SystemClock()
    daemon = Daemon(
        config,
        load=lambda: config,
        open_captures=lambda config: Duties(Session(config, clock)),
        clock=clock,
        notifier=Notifier(""),
        look_s=0.5,
    )
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        define(site, "prod-new")
        wait_until(lambda: "vm=prod-new point=1 kind=full" in caplog.text)
        site.virsh("undefine", "prod-new", "--checkpoints-metadata")
        wait_until(lambda: "vm=prod-new is gone from libvirt" in caplog.text)
        site.virsh("start", "prod-B 1", "--paused")
        wait_until(lambda: "vm=prod-a point=1" in caplog.text)
    finally:
        daemon.ask(Request.STOP)
        thread.join(60)
    assert len(protected.ok("points", "prod-new", "--json").json) == 1


def test_libvirt_that_does_not_answer_is_told_with_what_to_run(protected: Cli, tmp_path: Path) -> None:
    uri = f"qemu:///system?socket={tmp_path}/none"
    protected.configure(extra=f'[[protect]]\nmatch = "*"\nuri = "{uri}"\n')
    done = protected.run("config", "check", "--json")
    assert done.code == 58
    error = next(check["error"] for check in done.json["checks"] if check["error"])
    assert error["remedy"] == f"virsh -c '{uri}' list --all"
    protected.configure(extra=f'[[vm]]\nname = "web"\nsource = "libvirt"\nuri = "{uri}"\n')
    assert protected.run("capture", "web").code == 58


def test_a_host_without_libvirts_binding_can_do_everything_else(protected: Cli, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "libvirt.py").write_text("raise ImportError('no module named libvirt here')\n")
    environ = {**os.environ, "PYTHONPATH": str(blocked)}

    def drsync(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "drsync", "--config", str(protected.config), *words]
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)

    refused = drsync("capture", "prod-a")
    assert refused.returncode == 57
    assert "apt install python3-libvirt (or: pip install 'drsync[libvirt]')" in " ".join(refused.stderr.split())
    assert drsync("status").returncode == 0
    assert drsync("verify").returncode == 0


def test_qemus_own_user_writes_the_layers_and_must_reach_them(tmp_path: Path) -> None:
    """As a distribution has it: QEMU is not root, libvirt gives it what it may use."""
    own = {"user": '"libvirt-qemu"', "group": '"kvm"', "dynamic_ownership": "1"}
    with LibvirtSite(qemu_conf=own) as site:
        guest = define(site, "web")
        site.virsh("start", "web", "--paused")
        place = site.path / "drsync"
        place.mkdir(mode=0o711)
        cli = Cli(place)
        cli.configure(extra=f'[[vm]]\nname = "web"\nsource = "libvirt"\nuri = "{site.uri}"\n')
        cli.ok("init")
        cli.ok("config", "check")
        assert cli.ok("capture", "web", "--json").json["point"]["kind"] == "full"
        place.chmod(0o700)
        done = cli.run("config", "check", "--json")
        assert done.code == 63
        error = done.json["checks"][-1]["error"]
        assert error["message"] == f"VM web: QEMU's user libvirt-qemu can't pass through {place} to the spool"
        subprocess.run(error["remedy"], shell=True, check=True)  # noqa: S602  the user would, too
        cli.ok("config", "check")
        guest.destroy()
