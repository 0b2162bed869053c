"""A seed as the command line shows it: how far it is, that it goes on, and that what it made is whole."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Cli
from storage_daemon import DaemonDisk, StorageDaemon

from drsync.capture import Result
from drsync.capturing import Capturing
from drsync.config import load_config
from drsync.model import NoProgress, SystemClock
from drsync.session import Session
from drsync.units import MiB

pytestmark = pytest.mark.qemu

RECOVER = Path(__file__).parents[2] / "examples" / "recover.py"


@pytest.fixture
def machine(cli: Cli) -> Iterator[StorageDaemon]:
    """A running VM `web` with one disk that holds 200 MiB, which is seeded; the repository is there."""
    with StorageDaemon(cli.place, [DaemonDisk(name="root", size_bytes=256 * MiB)], free_nbd=True) as daemon:
        daemon.io("root", *(f"write -q -P {n % 250 + 1} {n}M 1M" for n in range(200)))
        cli.configure({"web": daemon.qmp_socket}, spool='stream_above = "1MiB"')
        cli.ok("init")
        yield daemon


def test_status_tells_how_far_a_seed_is_and_the_next_capture_goes_on(cli: Cli, machine: StorageDaemon) -> None:
    session = Session(load_config(cli.config), SystemClock())
    journal = session.spool.vm("web").journal_path
    outcome = Capturing(session).capture(
        "web", NoProgress(), stop=lambda: journal.read_bytes().count(b'"stretch"') >= 2
    )
    assert outcome.result is Result.SEEDING
    machine.io("root", "write -q -P 9 3M 100k", "write -q -z 5M 1M", "write -q -P 8 230M 64k")

    (status,) = cli.ok("status", "--json").json
    assert status["state"] == "seeding"
    assert status["point"] is None
    seed = status["seed"]
    assert 0 < seed["read_bytes"] < 200 * MiB <= seed["total_bytes"] < 210 * MiB
    assert seed["round"] == 1
    assert seed["stored_bytes"] > 0
    assert "% of 2" in cli.ok("status").stdout

    done = cli.ok("capture", "web")
    assert "web: point 1, full (there is no point yet)" in done.stdout
    (status,) = cli.ok("status", "--json").json
    assert (status["state"], status["seed"], status["point"]) == ("ok", None, 1)

    assert cli.ok("verify", "web", "--read-data", "--json").json[0]["problems"] == []
    output = cli.place / "recovered"
    command = [
        sys.executable,
        str(RECOVER),
        "--key",
        str(cli.key_file),
        str(cli.repository),
        "web",
        "d-root",
        str(output),
    ]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert output.read_bytes() == machine.read("root")


def test_config_check_says_that_a_vm_would_be_read_live(cli: Cli, machine: StorageDaemon) -> None:
    assert "d-root: would read live up to 20" in cli.ok("config", "check").stdout
    assert machine.execute("query-block-exports") == []


def test_the_rate_at_which_disks_are_read_holds(cli: Cli, machine: StorageDaemon) -> None:
    """200 MiB that compress to nearly nothing are read at 100 MiB/s."""
    cli.configure({"web": machine.qmp_socket}, spool='stream_above = "1MiB"', extra='[limits]\nseed_read = "100MiB"\n')
    took = cli.ok("capture", "web", "--json").json["took_seconds"]
    assert took >= 1.9


def test_a_member_of_a_group_is_seeded_when_the_others_have_their_points(cli: Cli, machine: StorageDaemon) -> None:
    place = cli.place / "db"
    place.mkdir()
    with StorageDaemon(place, [DaemonDisk(name="root", size_bytes=4 * MiB)]) as db:
        db.io("root", "write -q -P 7 0 512k")
        together = 'group = "shop"\ngroup_pause = false\n'  # a storage daemon has no processors to pause
        cli.configure({"web": machine.qmp_socket, "db": db.qmp_socket}, spool='stream_above = "1MiB"', vm=together)
        document = cli.ok("capture", "db", "--json").json
        members = {member["vm"]: member for member in document["group"]["members"]}
        assert members["db"]["result"] == members["web"]["result"] == "committed"
        assert "web took no point" in members["db"]["point"]["group"]["reason"]
        assert members["web"]["point"]["group"] is None
        assert members["web"]["point"]["time"] > members["db"]["point"]["time"]

        machine.io("root", "write -q -P 9 3M 100k")
        document = cli.ok("capture", "web", "--json").json
        assert [member["point"]["point"] for member in document["group"]["members"]] == [2, 2]
        assert "took no point" not in document["point"]["group"]["reason"]
