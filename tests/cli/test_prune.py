"""`drsync prune` and `drsync daemon --role maintenance`, on a directory with a repository that was captured before."""

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from command_line import Cli
from shipped_vm import DiskStep, ShippedVm, Step, read_raw

from drsync.keyfile import write_key_file
from drsync.mapping import write_map
from drsync.model import BLOCK_SIZE
from drsync.store.directory import DirectoryStore

RECOVER = Path(__file__).parents[2] / "examples" / "recover.py"
RULES = "[retention]\nlast = 2\ndaily = 1\nminimum_age = '0s'\n"


def step(number: int) -> Step:
    writes = {0: 2 * number + 2, 1: 2 * number + 60, 2: 2 * number + 120, 3 + number % 5: 2 * number + 20}
    return Step(disks={"root": DiskStep(size_bytes=10 * BLOCK_SIZE, writes=writes)})


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture
def vm(cli: Cli, tmp_path: Path) -> ShippedVm:
    layers = tmp_path / "layers"
    layers.mkdir()
    vm = ShippedVm(layers, store=DirectoryStore(cli.repository)).run(map(step, range(9)))
    write_key_file(cli.key_file, vm.root)
    cli.configure(extra=RULES)
    return vm


def age(cli: Cli, days: float) -> None:
    """Let everything in the repository be so much older."""
    for path in cli.repository.rglob("*"):
        if path.is_file():
            found = path.stat()
            os.utime(path, (found.st_atime - days * 86400, found.st_mtime - days * 86400))


def check_restores(cli: Cli, vm: ShippedVm, point: int, tmp_path: Path) -> None:
    output = tmp_path / f"restored-{point}-{time.monotonic_ns()}"
    cli.ok("restore", "web", "--to", "image", "--output", str(output), "--format", "raw", "--point", str(point))
    assert read_raw(output / "root.raw") == vm.points[point]["root"]
    recovered = output / "recovered"
    where = [str(cli.repository), "web", "root", str(recovered), "--key", str(cli.key_file), "--point", str(point)]
    subprocess.run([sys.executable, str(RECOVER), *where], check=True, timeout=60)
    assert read_raw(recovered) == vm.points[point]["root"]


def test_points_go_at_once_and_objects_a_grace_time_later(cli: Cli, vm: ShippedVm, tmp_path: Path) -> None:
    (told,) = cli.ok("prune", "--dry-run", "--json").json["vms"]
    (done,) = cli.ok("prune", "--json").json["vms"]
    assert [v["point"] for v in told["dropped"]] == [v["point"] for v in done["dropped"]] == [7, 6, 5, 4, 3, 2]
    assert done["dropped"][0]["reasons"]
    assert (done["kept"], done["horizon"], done["deleted_objects"]) == (3, 1, 0)
    assert done["waiting_objects"] > 0
    until = datetime.fromisoformat(done["waiting_until"])
    assert timedelta(hours=23) < until - datetime.now(UTC) < timedelta(hours=25)
    assert [p["point"] for p in cli.ok("points", "web", "--json").json] == [1, 8, 9]
    for point in (1, 8, 9):
        check_restores(cli, vm, point, tmp_path)
    (waiting,) = cli.ok("prune", "--json").json["vms"]
    assert (waiting["dropped"], waiting["waiting_objects"]) == ([], done["waiting_objects"])
    age(cli, 1.5)
    before = {p: p.stat().st_size for p in cli.repository.rglob("*") if p.is_file()}
    (later,) = cli.ok("prune", "--json").json["vms"]
    assert later["deleted_objects"] == done["waiting_objects"]
    assert later["deleted_bytes"] == sum(size for p, size in before.items() if not p.exists()) > 0
    for point in (1, 8, 9):
        check_restores(cli, vm, point, tmp_path)
    (report,) = cli.ok("verify", "--read-data", "--json").json
    assert (report["points"], report["problems"]) == (3, [])


def test_a_point_that_was_pruned_says_so(cli: Cli, vm: ShippedVm, tmp_path: Path) -> None:
    cli.ok("prune")
    where = ("--to", "image", "--output", str(tmp_path / "out"))
    error, remedy = cli.refused(84, "restore", "web", *where, "--point", "4")
    assert error.startswith("point 4 of VM web was pruned; there are 1 (")
    assert remedy == "drsync points web"
    assert cli.run("restore", "web", *where, "--point", "44").code != 84
    recovered = [sys.executable, str(RECOVER), str(cli.repository), "web", "root", str(tmp_path / "x")]
    done = subprocess.run(
        [*recovered, "--key", str(cli.key_file), "--point", "4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "point 4 was pruned" in done.stderr


def test_points_are_found_in_front_of_a_block_map_and_behind_it(cli: Cli, vm: ShippedVm, tmp_path: Path) -> None:
    write_map(vm.log, 5, present=set())
    write_map(vm.log, 9, present=set())
    cli.ok("prune")
    for number in (20, 21):
        vm.capture(step(number))
    for point in (1, 8, 9, 10, 11):
        check_restores(cli, vm, point, tmp_path)
    where = ("--to", "image", "--output", str(tmp_path / "out"))
    error, _ = cli.refused(13, "restore", "web", *where, "--at", "2020-01-01 00:00")
    assert "it has 1 (" in error
    assert "to 11 (" in error


def test_a_table_for_people_says_what_goes_and_why(cli: Cli, vm: ShippedVm) -> None:
    told = cli.ok("prune", "--dry-run").stdout
    assert "nothing was written" in told
    assert "last: not among the newest 2" in told
    assert "web" in cli.ok("prune").stdout
    assert "drop" in told


def test_without_rules_nothing_is_dropped(cli: Cli, vm: ShippedVm) -> None:
    cli.configure()
    (done,) = cli.ok("prune", "--json").json["vms"]
    assert (done["dropped"], done["horizon"]) == ([], 0)


def test_a_log_that_is_not_whole_is_not_pruned_and_is_told(cli: Cli, vm: ShippedVm) -> None:
    (cli.repository / "vm/web/log" / f"{4:016x}").unlink()
    done = cli.run("prune", "--json")
    assert done.code == 86
    (one,) = done.json["vms"]
    assert one["error"]["class"] == "PruneRefused"
    assert "remedy: drsync verify web" in done.stderr
    assert len(list((cli.repository / "vm/web/log").iterdir())) == 8


def test_the_maintenance_role_prunes_and_stops_when_asked(cli: Cli, vm: ShippedVm) -> None:
    command = [sys.executable, "-m", "drsync", "--config", str(cli.config), "daemon", "--role", "maintenance"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            horizon = cli.repository / "vm/web/horizon" / f"{1:016x}"
            deadline = time.monotonic() + 60
            while not horizon.exists():
                assert daemon.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            daemon.send_signal(signal.SIGTERM)
            said = daemon.communicate(timeout=60)[1]
        finally:
            daemon.kill()
    assert daemon.returncode == 0
    assert "vm=web pruned kept=3 dropped=6" in said
    assert [p["point"] for p in cli.ok("points", "web", "--json").json] == [1, 8, 9]
