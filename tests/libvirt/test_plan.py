"""`drsync restore --plan` on a real host: waves, waiting, failures, and runs that go on where another one stopped."""

import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from libvirt_points import make_point
from libvirt_site import LibvirtSite

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
VMS = ("db", "web", "shop")
WAVES = '[[wave]]\nvms = ["db"]\n[[wave]]\nvms = ["web", "shop"]\n'


@pytest.fixture(scope="module")
def host() -> Iterator[LibvirtSite]:
    """The host that takes over: a network and a pool named `default`."""
    with LibvirtSite(own_network=True) as host:
        host.define("<network><name>default</name><bridge name='virbr7'/></network>", kind="net")
        host.virsh("net-start", "default")
        pool = f"<pool type='dir'><name>default</name><target><path>{host.images}</path></target></pool>"
        host.define(pool, kind="pool")
        host.virsh("pool-start", "default")
        yield host


@pytest.fixture(scope="module")
def ports() -> Iterator[Mapping[str, int]]:
    """A free port for each VM's console, which stands for a service of its guest."""
    with ExitStack() as stack:
        servers = {vm: stack.enter_context(socket.create_server(("127.0.0.1", 0))) for vm in VMS}
        ports = {vm: server.getsockname()[1] for vm, server in servers.items()}
    yield ports


@pytest.fixture(scope="module")
def repository(host: LibvirtSite, ports: Mapping[str, int], tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Points of three VMs of 8 MiB each, which run but have nothing to boot."""
    cli = Cli(tmp_path_factory.mktemp("protected"))
    cli.ok("init")
    for vm in VMS:
        devices = (
            "<interface type='network'><source network='prod'/></interface>"
            f"<serial type='tcp'><source mode='bind' host='0.0.0.0' service='{ports[vm]}'/></serial>"
        )
        make_point(cli, host, vm, host.path / f"{vm}.img", devices)
        host.virsh("undefine", vm)
    return cli


@pytest.fixture(autouse=True)
def clean(host: LibvirtSite) -> Iterator[None]:
    """No test leaves a domain or a disk to the next."""
    yield
    for name in host.virsh("list", "--all", "--name").split():
        host.power_off(name)
        host.virsh("undefine", name)
    for path in host.images.iterdir():
        path.unlink()


class Run:
    """A plan file, and what running it says."""

    def __init__(self, repository: Cli, host: LibvirtSite, path: Path) -> None:
        self._cli = repository
        self._host = host
        self.path = path

    def write(self, waves: str = WAVES, *, top: str = "", site: str = "") -> None:
        head = f'{top}\n[site.b]\ntarget = "libvirt"\nuri = "{self._host.uri}"\n'
        self.path.write_text(f'{head}networks = {{ prod = "default" }}\n{site}\n{waves}')

    def report(self, *words: str, code: int = 0) -> Any:
        done = self._cli.run("restore", "--plan", str(self.path), "--json", *words)
        assert done.code == code, done
        return done.json

    def states(self, *words: str, code: int = 0) -> Mapping[str, str]:
        return {vm["vm"]: vm["state"] for vm in self.report(*words, code=code)["vms"]}

    def text(self, *words: str, code: int = 0) -> str:
        done = self._cli.run("restore", "--plan", str(self.path), *words)
        assert done.code == code, done
        return done.stdout + done.stderr


@pytest.fixture
def run(repository: Cli, host: LibvirtSite, tmp_path: Path) -> Run:
    return Run(repository, host, tmp_path / "plan.toml")


def errors_of(report: Any, vm: str) -> list[str]:
    (found,) = [outcome for outcome in report["vms"] if outcome["vm"] == vm]
    return [error["class"] for error in found["errors"]]


def test_a_dry_run_checks_every_vm_and_writes_nothing(run: Run, host: LibvirtSite) -> None:
    run.write()
    report = run.report("--dry-run")
    assert (report["dry_run"], report["ok"], report["site"], report["uri"]) == (True, True, "b", host.uri)
    assert [vm["state"] for vm in report["vms"]] == ["checked"] * 3
    assert list(host.images.iterdir()) == []
    run.write(WAVES.replace('"shop"', '"shop", "nobody"') + '[vm.web]\npoint = 9\nnetworks = { prod = "lan" }\n')
    report = run.report("--dry-run", code=80)
    assert errors_of(report, "nobody") == ["UnknownVm"]
    assert errors_of(report, "web") == ["UnknownPoint"]
    run.write(WAVES + '[vm.web]\nnetworks = { prod = "lan" }\n')
    (host.images / "db-vda.raw").touch()
    (host.images / "db-vda.qcow2").touch()
    report = run.report("--dry-run", code=80)
    assert errors_of(report, "web") == ["CantComeUp"]
    assert errors_of(report, "db") == ["VolumeExists"]
    text = run.text("--dry-run", code=80)
    assert "web: PROBLEM: VM web can't come up at " in text
    assert "there is no network lan here; map it: --network lan=NEW; networks here: default" in text
    assert "error: 2 of 3 VMs are not up: db, web" in text


def test_room_is_added_up_over_all_vms(run: Run, host: LibvirtSite) -> None:
    small = host.path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", small], check=True)
    try:
        run.write(site=f'disk_dir = "{small}"')
        report = run.report("--dry-run", code=80)
        assert [vm["state"] for vm in report["vms"]] == ["checked", "checked", "failed"]
        assert errors_of(report, "shop") == ["TargetFull"]
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_run_that_failed_in_part_goes_on_with_what_is_not_up(run: Run, host: LibvirtSite) -> None:
    run.write()
    precious = host.images / "web-vda.qcow2"
    precious.write_text("precious")
    report = run.report(code=80)
    assert {vm["vm"]: vm["state"] for vm in report["vms"]} == {"db": "up", "web": "failed", "shop": "up"}
    assert errors_of(report, "web") == ["VolumeExists"]
    assert precious.read_text() == "precious"
    precious.unlink()
    host.power_off("shop")
    written = {path: path.stat().st_mtime_ns for path in host.images.glob("db-*")}
    report = run.report()
    assert [(vm["vm"], vm["state"], vm["was_there"]) for vm in report["vms"]] == [
        ("db", "up", True),
        ("web", "up", False),
        ("shop", "up", True),
    ]
    assert [vm["point"] for vm in report["vms"]] == [1, 1, 1]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert {vm: host.virsh("domstate", vm).strip() for vm in VMS} == dict.fromkeys(VMS, "running")


def test_a_domain_of_the_same_name_from_elsewhere_is_not_taken_for_ours(run: Run, host: LibvirtSite) -> None:
    host.define("<domain type='qemu'><name>web</name><memory unit='MiB'>32</memory><os><type>hvm</type></os></domain>")
    host.virsh("start", "web")
    run.write()
    report = run.report(code=80)
    assert errors_of(report, "web") == ["DomainExists"]
    assert host.virsh("domstate", "web").strip() == "running"


@pytest.mark.parametrize(("on_failure", "rest"), [("continue", "up"), ("stop", "skipped")])
def test_a_failure_stops_the_others_only_when_the_plan_says_so(run: Run, on_failure: str, rest: str) -> None:
    run.write(WAVES + "[vm.db]\npoint = 9\n", top=f'on_failure = "{on_failure}"\nparallel = 1')
    assert run.states(code=80) == {"db": "failed", "web": rest, "shop": rest}


def test_a_vm_is_up_when_its_port_is_open_and_one_that_is_not_in_time_runs_on(
    run: Run, host: LibvirtSite, ports: Mapping[str, int]
) -> None:
    run.write(WAVES + f'[vm.db]\nwait = "tcp:127.0.0.1:{ports["db"]}"\ntimeout = "1s"\n')
    report = run.report(code=80)
    assert errors_of(report, "db") == ["NotUp"]
    assert f"nobody listens at port {ports['db']} of 127.0.0.1" in report["vms"][0]["errors"][0]["message"]
    assert host.virsh("domstate", "db").strip() == "running"
    with socket.create_server(("127.0.0.1", ports["db"])):  # the guest's service is there at last
        report = run.report()
    assert [(vm["state"], vm["was_there"]) for vm in report["vms"]] == [("up", True)] * 3


def test_a_guest_whose_agent_does_not_answer_is_not_up(run: Run) -> None:
    run.write(WAVES + '[vm.db]\nwait = "agent"\ntimeout = "1s"\n[vm.web]\nwait = "tcp:22"\ntimeout = "1s"\n')
    report = run.report(code=80)
    assert [error["message"].rpartition(" s ")[2] for vm in report["vms"][:2] for error in vm["errors"]] == [
        "its guest agent does not answer",
        "its address is not known (write it in the plan: tcp:HOST:PORT)",
    ]


def test_a_copy_gets_its_own_name_and_the_rpo_is_reckoned_to_the_loss(run: Run, host: LibvirtSite) -> None:
    run.write(WAVES + '[vm.db]\nname = "db-copy"\npoint = 1\n')
    point = datetime.fromisoformat(run.report("--dry-run")["vms"][0]["time"])
    lost = point + timedelta(seconds=90)
    report = run.report("--lost-at", lost.isoformat())
    assert report["vms"][0]["domain"] == "db-copy"
    assert report["vms"][0]["rpo_seconds"] == pytest.approx(90, abs=0.01)
    assert datetime.fromisoformat(report["lost"]) == lost
    assert "db-copy" in host.virsh("list", "--name")
    assert run.report()["vms"][0]["was_there"] is True


def test_the_report_is_a_table_for_people(run: Run) -> None:
    run.write()
    lines = run.text().splitlines()
    assert lines[0].split() == ["wave", "VM", "state", "domain", "point", "of", "data", "up", "after", "RPO", "what"]
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["1", "db", "up", "db"],
        ["2", "web", "up", "web"],
        ["2", "shop", "up", "shop"],
    ]
    assert any(line.startswith("db: up after ") for line in lines)


def test_the_example_runs(run: Run, host: LibvirtSite) -> None:
    """As it stands, but for the host, and for guests that have nothing to boot and so no agent and no service."""
    text = (ROOT / "examples/plan.toml").read_text()
    text = text.replace('"qemu:///system"', f'"{host.uri}"').replace('wait = "agent"', 'wait = "running"')
    run.path.write_text(text.replace('wait = "tcp:443"', 'wait = "running"'))
    assert run.states("--site", "standby", "--dry-run") == dict.fromkeys(VMS, "checked")
    assert run.states("--site", "standby") == dict.fromkeys(VMS, "up")
    assert "Unable to locate credentials" in run.text("--site", "cloud", code=101)  # those for AWS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["restore", "web", "--plan", "p"], "--plan names its VMs and site itself: give neither VM nor --to"),
        (["restore", "web", "--to", "image", "--output", "x", "--pool", "p"], "--pool belongs to --to libvirt"),
        (["restore", "web", "--to", "libvirt", "--output", "x"], "--output belongs to --to image"),
        (["restore", "web", "--to", "libvirt", "--site", "x"], "--site belongs to --plan"),
        (["restore", "--plan", "p", "--start"], "--start belongs to --to libvirt"),
        (["restore", "--plan", "p", "--point", "1"], "--point belongs to --to image or --to libvirt"),
        (["restore", "--to", "libvirt"], "missing argument 'VM'"),
        (["restore", "web"], "missing option '--to'. Choose from: image, libvirt, ec2 (or give --plan)"),
        (["restore", "web", "--to", "image"], "missing option '--output': the directory for the images"),
        (["restore", "web", "--to", "libvirt", "--pool", "p", "--disk-dir", "d"], "--pool and --disk-dir both choose"),
        (["restore", "web", "--to", "libvirt", "--network", "x"], "invalid value for '--network': 'x' is not OLD=NEW"),
        (
            ["restore", "web", "--to", "libvirt", "--network", "a=b", "--network", "a=c"],
            "invalid value for '--network': a is mapped twice",
        ),
    ],
)
def test_options_that_do_not_belong_together_are_told(repository: Cli, words: list[str], message: str) -> None:
    assert repository.refused(2, *words)[0].startswith(message)
