"""Damage on a real QEMU block layer: named, refused, done without, healed by the next capture; maps mended."""

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Cli
from damaging import flipped
from storage_daemon import DaemonDisk, StorageDaemon

from drsync.errors import ObjectDamaged, PointDamaged, PointsHurt, RestoredInPart
from drsync.restore import lost_mark
from drsync.units import KiB, MiB

pytestmark = pytest.mark.qemu
BLOCK = 64 * KiB


@pytest.fixture
def live(cli: Cli) -> Iterator[StorageDaemon]:
    """A running VM `web` whose disks can be read live, with three points."""
    disks = [DaemonDisk(name="root", size_bytes=16 * MiB), DaemonDisk(name="data", size_bytes=8 * MiB, format="raw")]
    with StorageDaemon(cli.place, disks, free_nbd=True) as daemon:
        cli.configure({"web": daemon.qmp_socket})
        cli.ok("init")
        daemon.io("root", "write -P 1 0 1M", "write -P 2 1M 64k")
        daemon.io("data", "write -P 3 0 256k")
        cli.ok("capture", "web")
        daemon.io("root", "write -P 4 128k 64k")
        cli.ok("capture", "web")
        yield daemon


def content_of(image: Path) -> bytes:
    """What an image reads as, according to QEMU."""
    raw = image.with_suffix(".content")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)
    return raw.read_bytes()


def damage(cli: Cli, seq: int = 1) -> None:
    """Flip a bit in the first frame of a segment: a block of disk d-data."""
    path = cli.repository / "vm" / "web" / "log" / f"{seq:016x}"
    path.write_bytes(flipped(path.read_bytes(), 20))


def restored(cli: Cli, name: str, *words: str) -> Path:
    output = cli.place / name
    cli.ok("restore", "web", "--to", "image", "--output", str(output), *words)
    return output


def test_damage_is_named_refused_done_without_and_healed(cli: Cli, live: StorageDaemon) -> None:
    held = {name: live.read(name) for name in ("root", "data")}
    damage(cli)
    done = cli.run("verify", "web", "--read-data", "--json")
    assert done.code == ObjectDamaged.code
    (report,) = done.json
    lost = [{"first_block": 0, "blocks": 1, "offset_bytes": 0, "size_bytes": BLOCK}]
    disk = {
        "name": "d-data",
        "size_bytes": 8 * MiB,
        "lost_blocks": 1,
        "lost": lost,
        "objects": ["vm/web/log/" + 15 * "0" + "1"],
    }
    assert report["hurt"] == [{"point": n, "broken": None, "disks": [disk]} for n in (1, 2)]
    assert "1-2" in cli.run("verify", "web", "--read-data").stdout
    (status,) = cli.ok("status", "--json").json
    assert (status["damage"]["points"], status["damage"]["newest_is_hurt"], status["damage"]["lost_blocks"]) == (
        [1, 2],
        True,
        1,
    )
    assert "2 points, the newest" in cli.ok("status").stdout

    words = ["restore", "web", "--to", "image", "--output", str(cli.place / "refused")]
    told = cli.refused(PointDamaged.code, *words)
    assert "disk d-data has lost 1 block, from block 0 on, with vm/web/log/0000000000000001" in told[0]
    assert not (cli.place / "refused").exists()

    output = cli.place / "in part"
    done = cli.run(*words[:-1], str(output), "--allow-damaged")
    assert done.code == RestoredInPart.code
    assert done.stdout.startswith("restored web at point 2 of ")
    assert "without 1 block of disk d-data: " in done.stderr
    data = content_of(output / "d-data.damaged.qcow2")
    assert data == lost_mark("d-data", 0, BLOCK) + held["data"][BLOCK:]
    assert content_of(output / "d-root.damaged.qcow2") == held["root"]
    listed = json.loads((output / "web.lost.json").read_text())
    assert [(d["name"], d["lost_blocks"], [r["offset_bytes"] for r in d["lost"]]) for d in listed["disks"]] == [
        ("d-data", 1, [0]),
        ("d-root", 0, []),
    ]
    assert json.loads((output / "web.json").read_text())["damaged"] == {"lost_blocks": 1, "list": "web.lost.json"}

    cli.ok("capture", "web")  # nothing has changed but what is lost
    assert [p["point"] for p in cli.ok("points", "web", "--json").json] == [1, 2, 3]
    assert cli.ok("status", "--json").json[0]["damage"]["points"] == []
    for number in ("2", "3"):  # the older one has the same bytes from the newer one
        output = restored(cli, f"healed-{number}", "--point", number)
        assert {name: content_of(output / f"d-{name}.qcow2") for name in held} == held
    assert cli.ok("capture", "web").stdout == "web: nothing changed since point 3\n"


def test_what_the_guest_has_changed_since_stays_lost_in_older_points(cli: Cli, live: StorageDaemon) -> None:
    damage(cli)
    cli.run("verify", "--read-data")
    live.io("data", "write -P 9 0 4k")
    cli.ok("capture", "web")
    (status,) = cli.ok("status", "--json").json
    assert (status["damage"], status["point"]) == (None, 3) or status["damage"]["points"] == [1, 2]
    done = cli.run("repair", "web", "--json")
    assert done.code == PointsHurt.code
    (report,) = done.json
    assert [point["point"] for point in report["hurt"]] == [1, 2]
    text = cli.run("repair", "web", "--dry-run").stdout
    assert "web: 2 of 3 points do not restore as they were captured:" in text
    output = restored(cli, "newest")
    assert content_of(output / "d-data.qcow2") == live.read("data")
    told = cli.refused(PointDamaged.code, "restore", "web", "--to", "image", "--output", str(output), "--point", "1")
    assert "--point 3" in told[1]


def test_repair_of_a_repository_that_is_whole_does_nothing(cli: Cli, live: StorageDaemon) -> None:
    assert cli.ok("repair").stdout == "web: 2 points: block maps are as they should be\n"
    (report,) = cli.ok("repair", "--json", "--read-data").json
    assert (report["vm"], report["dry_run"], report["points"], report["maps"]) == ("web", False, 2, 0)
    assert report["made"] == report["useless"] == report["hurt"] == []


def test_real_live_reading_heals_a_disk_that_is_written_to(cli: Cli, live: StorageDaemon) -> None:
    chance = random.Random(5)
    for seq in (1, 2):
        damage(cli, seq)
    cli.run("verify", "--read-data")
    for _ in range(20):
        live.io("root", f"write -P {chance.randrange(1, 255)} {chance.randrange(200) * 4}k 4k")
    cli.ok("capture", "web")
    output = restored(cli, "newest")
    for name in ("root", "data"):
        assert content_of(output / f"d-{name}.qcow2") == live.read(name)
    assert live.execute("query-block-exports") == []


def test_behind_its_newest_segment_a_host_goes_on_although_that_is_damaged(cli: Cli, live: StorageDaemon) -> None:
    path = cli.repository / "vm" / "web" / "log" / f"{2:016x}"
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size - 100))
    live.io("root", "write -P 5 2M 64k")
    held = {name: live.read(name) for name in ("root", "data")}
    done = cli.ok("capture", "web")
    assert "sends everything: its newest segment can't be read: object vm/web/log/0000000000000002 is damaged" in (
        done.stderr
    )
    assert "point 3, full" in done.stdout
    live.io("root", "write -P 6 3M 64k")
    cli.ok("capture", "web")
    for name in ("root", "data"):
        image = restored(cli, f"{name}-3", "--point", "3", "--disk", f"d-{name}") / f"d-{name}.qcow2"
        assert content_of(image) == held[name]
    restored(cli, "newest")
    (report,) = cli.run("verify", "web", "--read-data", "--json").json
    assert [hurt["point"] for hurt in report["hurt"]] == [2]
    listed = cli.run("points", "web")
    assert listed.code == ObjectDamaged.code
    assert [line.split()[1] for line in listed.stdout.splitlines() if line.startswith("web")] == ["1", "3", "4"]
    assert listed.stderr.splitlines()[-1].startswith("remedy: drsync verify")
    as_json = cli.run("points", "--json")
    assert (as_json.code, [point["point"] for point in as_json.json]) == (ObjectDamaged.code, [1, 3, 4])
