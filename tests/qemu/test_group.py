"""A consistency group of two real guests: no restored state shows the second ahead of the first."""

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from guest import Guest, GuestDisk

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

NAMES = ("first", "second")
SECTOR = 512
WRITE = "printf %0511d'\\n' {} | dd of=/dev/vdb bs=512 count=1 conv=fsync 2>/dev/null"


@pytest.fixture
def guests(guest_image: Path, tmp_path: Path) -> Iterator[dict[str, Guest]]:
    """Two guests, each with a small data disk, vdb."""
    with ExitStack() as stack:
        found: dict[str, Guest] = {}
        for name in NAMES:
            directory = tmp_path / name
            directory.mkdir()
            root, data = directory / "root.qcow2", directory / "data.qcow2"
            backing = ["-b", str(guest_image), "-F", "qcow2"]
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(root)], check=True)
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(data), "4M"], check=True)
            disks = [GuestDisk(node="root", path=root), GuestDisk(node="data", path=data)]
            found[name] = stack.enter_context(Guest(directory / "guest", disks))
        yield found


def configure(cli: Cli, guests: dict[str, Guest], *, more: str = "") -> None:
    cli.configure()
    text = cli.config.read_text()
    for name, guest in guests.items():
        text += f'[[vm]]\nname = "{name}"\nsocket = "{guest.qmp_socket}"\nrpo = "1s"\ngroup = "shop"\n'
        text += f'disks = {{ data = "data" }}\nagent = "{guest.agent_socket}"\n{more}\n'
    cli.config.write_text(text)


@pytest.fixture
def cli(tmp_path: Path, guests: dict[str, Guest]) -> Cli:
    cli = Cli(tmp_path)
    configure(cli, guests)
    cli.ok("init")
    return cli


@contextmanager
def sequence(guests: dict[str, Guest]) -> Iterator[list[int]]:
    """The first guest writes n to its disk, then the second one does: the test is the channel between them."""
    stop = threading.Event()
    written = [0]
    trouble: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                written[0] += 1
                for guest in guests.values():
                    guest.check(
                        f"printf %0511d'\\n' {written[0]} | dd of=/dev/vdb bs=512 count=1 conv=fsync 2>/dev/null"
                    )
        except BaseException as err:  # noqa: BLE001 - raised again where the test sees it
            trouble.append(err)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield written
    finally:
        stop.set()
        thread.join()
    if trouble:
        raise trouble[0]


def number_of(cli: Cli, name: str, point: int) -> int:
    """What the guest had written last, as a restored point shows it."""
    output = cli.place / f"restored-{name}-{point}"
    cli.ok("restore", name, "--to", "image", "--format", "raw", "--output", str(output), "--point", str(point))
    return int((output / "data.raw").read_bytes()[:SECTOR] or b"0")


def instants(cli: Cli) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = cli.ok("points", "--group", "shop", "--json").json
    return listed


def test_at_every_instant_of_the_group_the_second_is_not_ahead_of_the_first(cli: Cli, guests: dict[str, Guest]) -> None:
    for guest in guests.values():
        guest.check(WRITE.format(0))
    with sequence(guests) as written:
        for _ in range(6):
            before = written[0]
            document = cli.ok("capture", "first", "--json").json
            assert [m["vm"] for m in document["group"]["members"]] == list(NAMES)
            while written[0] < before + 2:
                time.sleep(0.01)
    listed = instants(cli)
    assert len(listed) == 6
    assert all(i["consistent"] and i["missing"] == [] and set(i["points"]) == set(NAMES) for i in listed), listed
    numbers = [tuple(number_of(cli, name, i["points"][name]) for name in NAMES) for i in listed]
    assert all(second <= first <= second + 1 for first, second in numbers), numbers
    assert numbers[0][0] < numbers[-1][0], "the guests wrote nothing between the captures"
    for point in cli.ok("points", "--json").json:
        assert 0 < point["group"]["skew_seconds"] <= point["quiesce"]["paused_seconds"] + 0.001 < 10
    for guest in guests.values():
        assert guest.execute("query-status")["status"] == "running"


def test_frozen_and_paused_members_are_both(cli: Cli, guests: dict[str, Guest]) -> None:
    configure(cli, guests, more='consistency = "filesystem"')
    said = cli.ok("capture", "second").stdout.splitlines()
    assert said[0] == "second is in the group shop: captured at one instant: first, second"
    for name, line in zip(NAMES, said[1:], strict=True):
        assert line.startswith(f"{name}: point 1, full ")
        assert re.search(r", filesystem-consistent, with its group within [\d.]+ ms, in ", line)
    for guest in guests.values():
        guest.check("echo x >/mnt/x; sync", timeout_s=10)


def test_a_member_that_is_down_leaves_the_others_their_points(cli: Cli, guests: dict[str, Guest]) -> None:
    guests["second"].kill()
    done = cli.run("capture", "first")
    assert done.code == 50
    assert "first: point 1, full" in done.stdout
    assert "NOT together (second failed: VM second: can't connect to" in done.stdout
    assert "second: FAILED: VM second: can't connect to" in done.stdout
    document = cli.run("capture", "first", "--json")
    assert document.code == 50
    first, second = document.json["group"]["members"]
    assert (first["vm"], first["error"]) == ("first", None)
    assert (second["vm"], second["result"], second["error"]["code"]) == ("second", "failed", 50)
    (instant, *_) = instants(cli)
    assert (instant["consistent"], instant["points"]) == (False, {"first": 1})
    table = cli.ok("points", "--group", "shop").stdout
    assert "first:1" in table
    assert "no: second failed: " in table
    assert "shop, not together" in cli.ok("points", "first").stdout
