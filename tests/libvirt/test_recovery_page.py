"""docs/recovery.md, followed as it is written: every command of it, in order, on a host that has nothing yet."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Cli
from libvirt_points import make_point
from libvirt_site import LibvirtSite

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/recovery.md").read_text()
PLAN = """
[site.here]
target = "libvirt"
networks = { prod = "default" }

[[wave]]
vms = ["db"]

[[wave]]
vms = ["web"]
"""


@pytest.fixture(scope="module")
def host() -> Iterator[LibvirtSite]:
    """A fresh host: it has its network `default`, and no pool."""
    with LibvirtSite(own_network=True) as host:
        host.define("<network><name>default</name><bridge name='virbr7'/></network>", kind="net")
        host.virsh("net-start", "default")
        yield host


def commands() -> list[str]:
    """The page's commands, a block each; what is indented only can't be run by a test (it installs packages)."""
    return re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_is_followed(host: LibvirtSite, tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    recovery_key = cli.ok("init", "--json").json["recovery_key"]
    for vm in ("web", "db"):
        interface = "<interface type='network'><source network='prod'/></interface>"
        make_point(cli, host, vm, host.path / f"{vm}.img", interface)
        host.virsh("undefine", vm)
    directory = tmp_path / "nothing-else"
    directory.mkdir()
    shutil.move(cli.config, directory / "drsync.toml")
    (directory / "plan.toml").write_text(PLAN)
    said = [follow(host, directory, script, recovery_key) for script in commands()]
    assert len(said) == 10
    assert "wrote" in said[0]
    assert "web" in said[1]
    assert "running" in said[5]
    assert re.search(r"1 +db +up", said[7])
    assert re.search(r"2 +web +up .* was there already", said[7])
    assert "web: point 3, resync" in said[8]
    assert host.virsh("list", "--name").split() == ["db", "web"]


def follow(host: LibvirtSite, directory: Path, script: str, recovery_key: str) -> str:
    """Run one block of the page on the host, as an administrator at its terminal."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"DRSYNC_CONFIG": str(directory / "drsync.toml")}
    done = subprocess.run(
        [*host.inside, "bash", "-e", "-c", f"cd {directory}\n{script}"],
        env=environment,
        input=recovery_key,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)", PAGE))))
def test_every_link_of_the_page_leads_somewhere(link: str) -> None:
    assert (ROOT / "docs" / link).exists()


def test_every_message_in_the_table_is_one_of_drsyncs() -> None:
    source = "".join(path.read_text() for path in (ROOT / "drsync").rglob("*.py"))
    table = PAGE[PAGE.index("## When something is in the way") :].split("\n## ")[0]
    for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        for message in re.findall(r"`([^`]+)`", cell):
            for part in re.split(r"…", message):
                assert part.strip(" ,/") in source, message
