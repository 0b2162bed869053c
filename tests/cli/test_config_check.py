"""`config check`: everything that is wrong, and what would be captured."""

import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import Cli
from storage_daemon import StorageDaemon

from drsync.units import KiB, MiB


def names_and_codes(document: dict[str, list[dict[str, dict[str, int]]]]) -> list[tuple[object, int | None]]:
    return [(check["check"], check["error"]["code"] if check["error"] else None) for check in document["checks"]]


def test_every_problem_of_the_file_is_listed(cli: Cli) -> None:
    cli.configure(extra='[daemon]\nparalel = 2\n[[vm]]\nname = "Web"\n')
    done = cli.run("config", "check", "--json")
    assert done.code == 11
    assert done.json["ok"] is False
    assert [check["error"]["message"] for check in done.json["checks"]] == [
        f'{cli.config}: [daemon]: unknown key "paralel"; did you mean parallel?',
        f'{cli.config}: [[vm]] "Web": socket is missing',
        f'{cli.config}: [[vm]] "Web": name: "Web" is not a name; use 1 to 63 of a-z 0-9 . _ - and start with a '
        "letter or digit",
    ]
    assert cli.run("config", "check").stdout.count("PROBLEM: ") == 3


def test_before_init_it_says_that_there_is_no_repository(cli: Cli, tmp_path: Path) -> None:
    cli.configure({"web": tmp_path / "web.qmp"})
    done = cli.run("config", "check", "--json")
    assert done.code in {20, 24}
    assert [(check["check"], check["ok"]) for check in done.json["checks"]] == [
        ("file", True),
        ("repository", False),
        ("spool", True),
        ("vm web", None),
    ]


@pytest.mark.qemu
def test_it_says_what_would_be_captured_and_why(cli: Cli, vm: StorageDaemon) -> None:
    vm.io("data", "write -P 1 0 1M")
    document = cli.ok("config", "check", "--json").json
    assert document["ok"] is True
    data, root = document["checks"][3]["disks"]
    assert (data["name"], data["size_bytes"], data["kind"]) == ("d-data", 8 * MiB, "full")
    assert data["reason"] == "there is no point yet"
    assert data["copy_bytes"] >= 1 * MiB
    assert (data["persistent_bitmap"], root["persistent_bitmap"]) == (False, True)
    cli.ok("capture", "web")
    vm.io("root", "write -P 2 0 64k")
    text = cli.ok("config", "check").stdout
    assert "vm web: d-root: would capture up to 64 KiB of 16 MiB, incremental" in text
    assert f"repository: file://{cli.repository}: the key opens it, and it refuses to overwrite" in text
    assert f"spool: {cli.spool}: " in text


@pytest.mark.qemu
def test_it_makes_no_point_and_costs_no_bitmap(cli: Cli, vm: StorageDaemon) -> None:
    cli.ok("capture", "web")
    vm.io("root", "write -P 2 0 64k")
    for _ in range(2):
        cli.ok("config", "check")
    assert len(cli.ok("points", "--json").json) == 1
    point = cli.ok("capture", "web", "--json").json["point"]
    assert (point["kind"], point["changed_bytes"]) == ("incremental", 64 * KiB)


@contextmanager
def answering(path: Path, greeting: bytes) -> Iterator[None]:
    """A program at a socket that is not QEMU."""
    with socket.create_server(str(path), family=socket.AF_UNIX) as server:

        def serve() -> None:
            with server.accept()[0] as client:
                client.sendall(greeting)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(30)
        assert not thread.is_alive(), "nobody came"


@pytest.mark.qemu
def test_all_that_is_wrong_is_listed_and_the_first_decides_the_exit_code(cli: Cli, vm: StorageDaemon) -> None:
    # A QMP socket's path has 107 bytes at most, so these have a short directory.
    with tempfile.TemporaryDirectory() as short, answering(Path(short, "ssh"), b"SSH-2.0-OpenSSH\r\n"):
        sockets = {"ssh": Path(short, "ssh"), "off": Path(short, "none"), "web": vm.qmp_socket}
        cli.configure(sockets)
        done = cli.run("config", "check", "--json")
    assert done.code == 51
    assert names_and_codes(done.json) == [
        ("file", None),
        ("repository", None),
        ("spool", None),
        ("vm ssh", 51),
        ("vm off", 50),
        ("vm web", None),
    ]


@pytest.mark.qemu
def test_a_spool_without_room_is_told_per_vm(cli: Cli, vm: StorageDaemon) -> None:
    text = cli.config.read_text().replace('reserve = "1MiB"', 'reserve = "9999TiB"')
    cli.config.write_text(text)
    done = cli.run("config", "check", "--json")
    assert done.code == 60
    assert names_and_codes(done.json)[-1] == ("vm web", 60)


def test_a_repository_that_cannot_be_read_is_a_problem_not_a_trace(cli: Cli) -> None:
    cli.ok("init")
    (cli.repository / "repo.json").unlink()
    assert cli.run("config", "check", "--json").json["checks"][1]["error"]["class"] == "RepositoryMissing"
    (cli.repository / "repo.json").write_text("{}")
    assert cli.run("config", "check", "--json").json["checks"][1]["error"]["class"] == "ObjectDamaged"


def test_a_spool_that_is_a_file_is_a_problem(cli: Cli) -> None:
    cli.ok("init")
    cli.spool.write_text("")
    done = cli.run("config", "check", "--json")
    assert done.code == 61
    assert names_and_codes(done.json)[2] == ("spool", 61)


def test_the_remedy_of_an_unusable_spool_works(cli: Cli) -> None:
    cli.ok("init")
    cli.spool.write_text("")
    done = cli.run("config", "check", "--json")
    cli.spool.unlink()
    subprocess.run(done.json["checks"][2]["error"]["remedy"], shell=True, check=True)  # noqa: S602  the user would, too
    cli.ok("config", "check")
