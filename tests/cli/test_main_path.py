"""The main path through the command line, on a real QEMU block layer: capture, list, restore, verify."""

import json
import os
import pty
import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from command_line import Cli
from storage_daemon import StorageDaemon

from drsync.units import KiB, MiB

pytestmark = pytest.mark.qemu


def content_of(image: Path) -> bytes:
    """What an image reads as, according to QEMU."""
    raw = image.with_suffix(".content")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)
    return raw.read_bytes()


def test_points_restore_to_what_the_disks_held(cli: Cli, vm: StorageDaemon) -> None:
    vm.io("root", "write -P 1 0 1M")
    vm.io("data", "write -P 2 1M 1M")
    first = {name: vm.read(name) for name in ("root", "data")}
    assert re.fullmatch(
        r"web: point 1, full \(.*there is no point yet.*\), 2 MiB changed, .* stored, in .* s\n",
        cli.ok("capture", "web").stdout,
    )
    vm.io("root", "write -P 3 2M 64k", "write -z 0 64k")
    second = {name: vm.read(name) for name in ("root", "data")}
    assert cli.ok("capture", "web").stdout.startswith("web: point 2, incremental, 128 KiB changed, ")
    assert cli.ok("capture", "web").stdout == "web: nothing changed since point 2\n"

    for number, expected in [("1", first), ("2", second)]:
        for image_format in ("qcow2", "raw"):
            output = cli.place / f"{number}-{image_format}"
            words = ["restore", "web", "--to", "image", "--output", str(output), "--format", image_format]
            cli.ok(*words, "--point", number)
            for name, content in expected.items():
                assert content_of(output / f"d-{name}.{image_format}") == content


def test_capture_as_json_has_the_point_and_how_it_came(cli: Cli, vm: StorageDaemon) -> None:
    vm.io("root", "write -P 1 0 64k")
    document = cli.ok("capture", "web", "--json").json
    assert set(document) == {"vm", "result", "point", "shipped_before", "checked_at", "took_seconds", "group"}
    assert (document["vm"], document["result"], document["shipped_before"]) == ("web", "committed", None)
    assert document["group"] is document["point"]["group"] is document["point"]["quiesce"] is None
    assert document["point"] == cli.ok("points", "web", "--json").json[0]
    unchanged = cli.ok("capture", "web", "--json").json
    assert (unchanged["result"], unchanged["point"]["point"]) == ("unchanged", 1)
    assert unchanged["checked_at"] > document["checked_at"]


def test_points_as_json_have_what_the_contract_says(cli: Cli, vm: StorageDaemon) -> None:
    vm.io("root", "write -P 1 0 1M")
    cli.ok("capture", "web")
    vm.io("root", "write -P 2 1M 64k")
    cli.ok("capture", "web")
    cli.ok("capture", "web", "--full")
    full, increment, again = cli.ok("points", "--json").json
    assert [p["point"] for p in (full, increment, again)] == [1, 2, 3]
    assert [p["kind"] for p in (full, increment, again)] == ["full", "incremental", "full"]
    assert [p["parent"] for p in (full, increment, again)] == [None, 1, None]
    assert "there is no point yet" in full["reason"]
    assert increment["reason"] == ""
    assert "a full was asked for" in again["reason"]
    assert increment["changed_bytes"] == 64 * KiB
    assert increment["disks"] == [
        {"name": "d-data", "size_bytes": 8 * MiB, "changed_bytes": 0, "kind": "incremental", "reason": ""},
        {"name": "d-root", "size_bytes": 16 * MiB, "changed_bytes": 64 * KiB, "kind": "incremental", "reason": ""},
    ]
    for point in (full, increment, again):
        assert (point["vm"], point["consistency"], point["epoch"]) == ("web", "crash", 1)
        assert point["time"].endswith("Z")
        assert datetime.fromisoformat(point["time"]).utcoffset() == timedelta(0)
        assert point["stored_bytes"] > 0
        assert re.fullmatch("[0-9a-f]{16}", point["capture"])


def test_the_table_of_points_has_a_line_each_and_nothing_is_cut(cli: Cli, vm: StorageDaemon) -> None:
    assert cli.ok("points").stdout == "no points yet; drsync capture VM makes one\n"
    cli.ok("capture", "web")
    heading, _, line = cli.ok("points").stdout.splitlines()
    assert heading.split()[:3] == ["VM", "point", "time"]
    assert line.split()[:2] == ["web", "1"]
    assert line.rstrip().endswith("there is no point yet")


def test_status_tells_state_lag_and_error(cli: Cli, vm: StorageDaemon) -> None:
    (status,) = cli.ok("status", "--json").json
    assert (status["vm"], status["state"], status["point"], status["lag_seconds"]) == ("web", "unprotected", None, None)
    cli.ok("capture", "web")
    (status,) = cli.ok("status", "--json").json
    assert set(status) == {
        "vm",
        "state",
        "point",
        "time",
        "lag_seconds",
        "rpo_seconds",
        "spool_bytes",
        "seed",
        "preflight",
        "error",
        "error_time",
        "locks",
        "damage",
        "verified",
    }
    assert (status["point"], status["rpo_seconds"], status["spool_bytes"], status["error"]) == (1, 1.0, 0, None)
    assert 0 <= status["lag_seconds"] < 60
    vm.kill()
    cli.refused(50, "capture", "web")
    (status,) = cli.ok("status", "--json").json
    assert status["error"].startswith(f"VM web: can't connect to {vm.qmp_socket}: ")
    assert status["error_time"].endswith("Z")
    assert "can't connect" in cli.ok("status").stdout


def test_restore_chooses_the_newest_point_at_or_before_a_time(cli: Cli, vm: StorageDaemon) -> None:
    for number in (1, 2):
        vm.io("root", f"write -P {number} 0 64k")
        cli.ok("capture", "web")
    times = [datetime.fromisoformat(point["time"]) for point in cli.ok("points", "--json").json]
    words = ["restore", "web", "--to", "image", "--output", str(cli.place / "out"), "--dry-run", "--json", "--at"]
    assert cli.ok(*words, times[0].isoformat()).json["point"] == 1
    assert cli.ok(*words, (times[1] - timedelta(microseconds=1)).isoformat()).json["point"] == 1
    assert cli.ok(*words, times[1].isoformat()).json["point"] == 2
    assert cli.ok(*words, "2999-01-01T00:00:00Z").json["point"] == 2
    local = (times[0] + timedelta(milliseconds=1)).astimezone().replace(tzinfo=None)
    done = cli.ok(*words, local.isoformat(" "))
    assert done.json["point"] == 1
    zone = local.astimezone().isoformat()
    assert done.stderr == f"{local.isoformat(' ')} is taken in this host's zone: {zone}\n"
    code = cli.run(*words, (times[0] - timedelta(seconds=1)).isoformat()).code
    assert code == 13


def test_restore_says_what_it_wrote(cli: Cli, vm: StorageDaemon) -> None:
    vm.io("root", "write -P 1 0 128k")
    cli.ok("capture", "web")
    output = cli.place / "out"
    words = ["restore", "web", "--to", "image", "--output", str(output)]
    planned = cli.ok(*words, "--dry-run", "--json").json
    assert (planned["dry_run"], planned["took_seconds"]) == (True, None)
    assert not output.exists()
    assert cli.ok(*words, "--dry-run").stdout.startswith("would restore web at point 1 of ")
    done = cli.ok(*words, "--json").json
    assert {**done, "dry_run": True, "took_seconds": None} == planned
    assert done["took_seconds"] >= 0
    assert [disk["path"] for disk in done["disks"]] == [str(output / f"d-{name}.qcow2") for name in ("data", "root")]
    assert done["disks"][1]["live_bytes"] == 128 * KiB
    assert sorted(path.name for path in output.iterdir()) == ["d-data.qcow2", "d-root.qcow2", "web.json"]
    assert json.loads(Path(done["definition"]).read_text())["vm"] == "web"


def test_restore_of_one_disk_leaves_the_others(cli: Cli, vm: StorageDaemon) -> None:
    cli.ok("capture", "web")
    words = ["restore", "web", "--to", "image", "--output", str(cli.place / "out")]
    error, _ = cli.refused(14, *words, "--disk", "root")
    assert error == "point 1 of VM web has no disk root; it has d-data, d-root"
    assert not (cli.place / "out").exists()
    cli.ok(*words, "--disk", "d-root")
    assert sorted(path.name for path in (cli.place / "out").iterdir()) == ["d-root.qcow2", "web.json"]


def test_restore_refuses_existing_files_unless_told_to_overwrite(cli: Cli, vm: StorageDaemon) -> None:
    cli.ok("capture", "web")
    output = cli.place / "out"
    output.mkdir()
    (output / "d-root.qcow2").write_text("precious")
    words = ["restore", "web", "--to", "image", "--output", str(output)]
    error, _ = cli.refused(70, *words)
    assert error == f"{output}/d-root.qcow2 exists already"
    assert [path.name for path in output.iterdir()] == ["d-root.qcow2"]
    assert (output / "d-root.qcow2").read_text() == "precious"
    cli.ok(*words, "--overwrite")
    assert content_of(output / "d-root.qcow2") == vm.read("root")


def test_a_vm_can_be_restored_where_it_is_not_configured(cli: Cli, vm: StorageDaemon) -> None:
    cli.ok("capture", "web")
    cli.configure()
    assert [point["vm"] for point in cli.ok("points", "--json").json] == ["web"]
    cli.ok("restore", "web", "--to", "image", "--output", str(cli.place / "out"))
    (status,) = cli.ok("status", "--json").json
    assert (status["vm"], status["rpo_seconds"]) == ("web", None)
    error, _ = cli.refused(12, "capture", "web")
    assert error == "no VM named web; there are: none"


def test_what_does_not_exist_is_answered_with_what_does(cli: Cli, vm: StorageDaemon) -> None:
    cli.ok("capture", "web")
    assert cli.refused(12, "points", "wbe")[0] == "no VM named wbe; there are: web"
    words = ["restore", "web", "--to", "image", "--output", str(cli.place / "out")]
    error, remedy = cli.refused(13, *words, "--point", "7")
    assert error.startswith("VM web has no point 7; it has 1 (")
    assert remedy == "drsync points web"


def test_verify_finds_all_damage_and_ends_with_the_code_of_the_first(cli: Cli, vm: StorageDaemon) -> None:
    for number in (1, 2, 3):
        vm.io("root", f"write -P {number} {number}M 64k")
        cli.ok("capture", "web")
    assert cli.ok("verify", "--read-data").stdout.startswith("web: 3 points, 3 objects, ")
    clean = cli.ok("verify", "web", "--json").json
    assert [(report["vm"], report["points"], report["problems"]) for report in clean] == [("web", 3, [])]
    log = cli.repository / "vm/web/log"
    for number in (2, 3):
        path = log / f"{number:016x}"
        path.chmod(0o600)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    done = cli.run("verify", "web", "--json")
    assert done.code == 40
    (report,) = done.json
    assert [(problem["class"], problem["point"]) for problem in report["problems"]] == [
        ("ObjectDamaged", 2),
        ("ObjectDamaged", 3),
    ]
    text = cli.run("verify", "web").stdout
    assert "2 problems" in text
    assert "remedy: drsync verify --read-data" in text


def test_another_host_takes_over_only_when_asked_to_and_the_first_is_told(cli: Cli, vm: StorageDaemon) -> None:
    vm.io("root", "write -P 1 0 64k")
    cli.ok("capture", "web")
    here, there = cli.spool, cli.place / "spool-there"
    here.rename(cli.place / "spool-here")
    there.mkdir(mode=0o711)
    there.rename(here)
    cli.ok("capture", "web")  # a spool that never wrote this VM takes it over
    here.rename(there)
    (cli.place / "spool-here").rename(here)
    vm.io("root", "write -P 2 0 64k")
    error, remedy = cli.refused(45, "capture", "web")
    assert error.startswith("VM web is protected by another drsync (")
    assert remedy.startswith("drsync capture web --take-over")
    (status,) = cli.ok("status", "--json").json
    assert status["state"] == "fenced"
    document = cli.ok("capture", "web", "--take-over", "--json").json
    assert document["point"]["epoch"] == 3
    points = cli.ok("points", "web", "--json").json
    assert document["point"] == points[-1], "its parent is the point before, not the fence in between"
    cli.ok("capture", "web")


def test_at_a_terminal_a_bar_shows_how_far_it_is(cli: Cli, vm: StorageDaemon) -> None:
    vm.io("root", "write -P 1 0 8M")
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "drsync", "--config", str(cli.config), "capture", "web", "--json"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=its, env=environment, check=True)
    os.close(its)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert json.loads(done.stdout)["result"] == "committed"
    assert "ship" in shown
    assert "MiB" in shown


def test_named_disks_are_captured_under_their_names_and_no_others(cli: Cli, vm: StorageDaemon) -> None:
    cli.configure({"web": vm.qmp_socket}, extra='disks = { system = "d-root" }\n')
    vm.io("root", "write -P 1 0 64k")
    (disk,) = cli.ok("capture", "web", "--json").json["point"]["disks"]
    assert (disk["name"], disk["size_bytes"]) == ("system", 16 * MiB)
    cli.configure({"web": vm.qmp_socket}, extra='disks = { system = "nothere" }\n')
    error, _ = cli.refused(54, "capture", "web")
    assert error.startswith("VM web: no writable block node nothere; there are: ")
