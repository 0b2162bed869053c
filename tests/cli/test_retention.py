"""Which points stay, and pins: by the command line, on a directory whose files have the ages that tests give them."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from command_line import Cli
from shipped_vm import DiskStep, ShippedVm, Step

from drsync.errors import NotPinned, UnknownPoint
from drsync.format import names
from drsync.keyfile import read_key_file
from drsync.model import BLOCK_SIZE
from drsync.repository import open_repository
from drsync.store.directory import DirectoryStore

DAYS = "[retention]\ndaily = 2\nminimum_age = '1d'\n"


def age(cli: Cli, number: int, days: float) -> None:
    """Let the store have taken a point so long ago."""
    taken = (datetime.now(UTC) - timedelta(days=days)).timestamp()
    os.utime(cli.repository / names.segment("web", number), (taken, taken))


@pytest.fixture
def points(cli: Cli, tmp_path: Path) -> Cli:
    """A VM with points of 10, 5, 3 and 0 days; the host says of all of them that they are of January 2026."""
    cli.configure(extra=DAYS)
    cli.ok("init")
    repository = open_repository(DirectoryStore(cli.repository), read_key_file(cli.key_file), cli.key_file)
    vm = ShippedVm(tmp_path, repository=repository)
    for number, days in enumerate((10, 5, 3, 0), 1):
        vm.capture(Step(disks={"root": DiskStep(size_bytes=BLOCK_SIZE, writes={0: number})}))
        age(cli, number, days)
    return cli


def stay(cli: Cli) -> list[int]:
    (document,) = cli.ok("retention", "web", "--explain", "--json").json
    return [point["point"] for point in document["points"] if point["keep"]]


def test_the_rules_are_told_with_a_reason_for_each_point(points: Cli) -> None:
    said = points.ok("retention", "web", "--explain").stdout
    assert "web: daily 2, younger than 1 day: of 4 points 2 would go" in said
    assert "daily: its day is not among the newest 2" in said
    assert stay(points) == [4, 3]
    table = points.ok("retention").stdout
    assert "daily 2, younger than 1 day" in table


def test_the_json_is_what_the_contract_says(points: Cli) -> None:
    (document,) = points.ok("retention", "--json").json
    assert (document["vm"], document["kept"], document["dropped"], document["points"]) == ("web", 2, 2, None)
    assert document["rules"]["daily"] == 2
    assert document["rules"]["minimum_age_seconds"] == 86400
    (explained,) = points.ok("retention", "--explain", "--json").json
    assert {tuple(sorted(point)) for point in explained["points"]} == {("keep", "point", "reasons", "stored_at")}
    assert explained["points"][0]["stored_at"].endswith("Z")


def test_without_rules_everything_stays(points: Cli) -> None:
    points.configure()
    assert stay(points) == [4, 3, 2, 1]
    (document,) = points.ok("retention", "--json").json
    assert document["rules"] is None


def test_f43_what_a_host_says_of_its_time_is_not_asked(points: Cli) -> None:
    """All four say the same time; only the store's ages decide."""
    told = {point["time"] for point in points.ok("points", "--json").json}
    assert len(told) == 1
    for number in (1, 2, 3):
        age(points, number, 0.5)
    assert stay(points) == [4, 3, 2, 1], "they are young, by the store"


def test_a_pinned_point_stays_until_its_time_and_is_shown(points: Cli) -> None:
    said = points.ok("pin", "web", "--point", "1", "--until", "90d", "--note", "before the migration").stdout
    assert said.startswith("web: point 1 is pinned until ")
    assert "(before the migration)" in said
    assert stay(points) == [4, 3, 1]
    pinned = {point["point"]: point["pin"] for point in points.ok("points", "--json").json}
    assert pinned[1]["note"] == "before the migration"
    assert [number for number, pin in pinned.items() if pin] == [1]
    assert "until " in points.ok("points").stdout
    (reasons,) = [
        point["reasons"]
        for point in points.ok("retention", "--explain", "--json").json[0]["points"]
        if point["point"] == 1
    ]
    assert reasons[0].startswith("pinned until ")
    taken = points.ok("unpin", "web", "--point", "1").stdout
    assert "the pin of point 1 is taken away; it held until " in taken
    assert stay(points) == [4, 3]


def test_a_dry_run_pins_nothing(points: Cli) -> None:
    document = points.ok("pin", "web", "--point", "1", "--dry-run", "--json").json
    assert document == {"vm": "web", "point": 1, "until": None, "note": "", "dry_run": True}
    assert stay(points) == [4, 3]
    points.ok("pin", "web", "--point", "1")
    assert "would be taken away" in points.ok("unpin", "web", "--point", "1", "--dry-run").stdout
    assert stay(points) == [4, 3, 1]


def test_what_cant_be_pinned_or_unpinned_is_refused(points: Cli) -> None:
    assert "no point 9" in points.refused(UnknownPoint.code, "pin", "web", "--point", "9")[0]
    assert points.refused(NotPinned.code, "unpin", "web", "--point", "2") == (
        "point 2 of VM web is not pinned",
        "drsync points web (shows what is)",
    )
    assert "is over" in points.refused(2, "pin", "web", "--point", "1", "--until", "2020-01-01T00:00:00Z")[0]
    for wrong in ("tomorrow", "9x", "99999999999d", "2027-13-01"):
        assert "is neither a time nor" in points.refused(2, "pin", "web", "--point", "1", "--until", wrong)[0]
    assert "characters" in points.refused(2, "pin", "web", "--point", "1", "--note", "x" * 201)[0]
    assert not (points.repository / "vm/web/pin").exists()


def test_a_directory_has_no_locks_and_says_so(points: Cli) -> None:
    assert points.ok("lock", "status", "--json").json == {"state": "off", "until": None, "error": None}
    said = points.refused(88, "lock", "extend")
    assert "has no lock" in said[0]
    assert points.ok("status", "--json").json[0]["locks"]["state"] == "off"
