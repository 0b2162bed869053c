"""What comes between drsync and a pull-mode job: a full disk, a drsync that dies or hangs, an admin at work.

Each really happens. The guest can write all the time, and what is read is right.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from command_line import Cli
from idle_domain import IdleDomain
from libvirt_site import LibvirtSite

from drsync.config import load_config
from drsync.errors import CaptureFailed, LiveUnavailable, SourceLost
from drsync.journal import Journal
from drsync.model import BLOCK_SIZE, NoPace, SystemClock, new_capture_id
from drsync.session import Session
from drsync.source import LiveView
from drsync.source.libvirt_pull import PullOptions
from drsync.source.libvirt_scratch import ScratchLimits
from drsync.source.libvirt_source import LibvirtSource, open_source
from drsync.source.libvirt_survey import LibvirtOptions

MIB: Final = 1024 * 1024
SIZE: Final = 48 * MIB
LARGE: Final = 128 * MIB
TAG: Final = "00c0ffee"

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]


@pytest.fixture
def domain(site: LibvirtSite) -> Iterator[IdleDomain]:
    with IdleDomain(site, "troubled", {"vda": SIZE}) as domain:
        domain.io("vda", f"write -P 5 0 {SIZE}")
        yield domain


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LibvirtSite, Path]]:
    """A file system of 24 MiB, and a site that sees it: what is mounted later, a site does not."""
    place = tmp_path_factory.mktemp("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M", "drsync-test", place], check=True)
    try:
        with LibvirtSite() as site:
            yield site, place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def small(cramped: tuple[LibvirtSite, Path]) -> Iterator[Path]:
    """The file system, empty."""
    _, place = cramped
    yield place
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def cramped_domain(cramped: tuple[LibvirtSite, Path]) -> Iterator[IdleDomain]:
    with IdleDomain(cramped[0], "troubled", {"vda": SIZE}) as domain:
        domain.io("vda", f"write -P 5 0 {SIZE}")
        yield domain


def opened(domain: IdleDomain, place: Path, *, limits: ScratchLimits, slice_s: float = 20.0) -> LibvirtSource:
    pull = PullOptions(directory=place / ".live", scratch=limits, slice_s=slice_s)
    options = LibvirtOptions(
        vm="web", domain=domain.name, uri=domain.site.uri, repository_tag=TAG, layers=place, pull=pull
    )
    source = open_source(options)
    assert isinstance(source, LibvirtSource)
    return source


class Pace:
    """Something happens before every piece that is read."""

    def __init__(self, happens: Callable[[int], None]) -> None:
        self._happens = happens
        self._pieces = 0

    def take_now(self, _size_bytes: int) -> bool:
        return False

    def limit_bytes_per_s(self) -> float | None:
        return None

    def take(self, _size_bytes: int) -> None:
        self._pieces += 1
        self._happens(self._pieces)


def read_all(view: LiveView) -> bytearray:
    reader = view.reader("vda")
    content = bytearray(SIZE)
    presence = reader.presence(0, SIZE // BLOCK_SIZE)
    for numbers, raw in reader.read(np.flatnonzero(presence.holds)):
        for row, block in enumerate(numbers.tolist()):
            content[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = raw[row * BLOCK_SIZE : (row + 1) * BLOCK_SIZE]
    reader.close()
    return content


def job_numbers(view: Any) -> int:
    """How many jobs there were."""
    return int(view._slices._number)


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came to that"
        time.sleep(0.02)


FREE: Final = ScratchLimits(keep_free_bytes=4 * MIB, least_bytes=2 * MIB)


def test_scratch_space_that_nobody_watches_hurts_the_guest(cramped_domain: IdleDomain, small: Path) -> None:
    """What all of this is for: without the watch, the same writes as below fail."""
    domain = cramped_domain
    with opened(domain, small, limits=replace(FREE, keep_free_bytes=0)) as source:
        surveys = source.survey(None)
        view = source.open_live(None, surveys, pace=NoPace())
        view._slices._stopped.set()  # type: ignore[attr-defined]  # its thread watches no more
        view._slices._thread.join()  # type: ignore[attr-defined]
        with pytest.raises(AssertionError, match="No space left on device"):
            domain.io("vda", f"write -P 6 0 {SIZE}")
        view.close()


def test_a_job_ends_and_begins_anew_before_its_scratch_space_is_full(cramped_domain: IdleDomain, small: Path) -> None:
    """The guest overwrites more than the file system holds, all the time while its disk is read."""
    domain = cramped_domain
    step, written = MIB // 4, 0
    done, trouble = threading.Event(), list[BaseException]()

    def write() -> None:
        nonlocal written
        try:
            while not done.wait(0.025):
                domain.io("vda", f"write -P {written // step % 250 + 1} {written % SIZE} {step}")
                written += step
        except BaseException as err:  # noqa: BLE001 - asserted below
            trouble.append(err)

    guest = threading.Thread(target=write)
    with opened(domain, small, limits=FREE) as source:
        surveys = source.survey(None)
        source.begin_recording(new_capture_id(), surveys)
        view = source.open_live(None, surveys, pace=Pace(lambda _: time.sleep(0.15)))
        guest.start()
        try:
            reader = view.reader("vda")
            while written < 30 * MIB and not trouble:
                for _ in reader.read(np.arange(SIZE // BLOCK_SIZE // 4)):
                    pass
            reader.close()
            jobs = job_numbers(view)
        finally:
            done.set()
            guest.join()
            view.close()
    assert trouble == []
    assert jobs >= 3
    assert domain.state == "running"
    assert domain.job() == "None"


def test_when_others_fill_the_file_system_the_job_ends_and_the_guest_goes_on(
    cramped_domain: IdleDomain, small: Path
) -> None:
    domain = cramped_domain
    with opened(domain, small, limits=FREE) as source:
        view = source.open_live(None, source.survey(None), pace=NoPace())
        (small / "others").write_bytes(b"x" * 20 * MIB)
        wait_until(lambda: domain.job() == "None", timeout_s=10)
        with pytest.raises(
            LiveUnavailable, match=r"what the guest overwrites meanwhile would have .* beside the 4 MiB"
        ):
            read_all(view)
        domain.io("vda", f"write -P 6 0 {SIZE}")
        view.close()
        with pytest.raises(LiveUnavailable):
            source.open_live(None, source.survey(None), pace=NoPace())
    assert domain.state == "running"


def test_whoever_wants_a_snapshot_gets_it_between_two_jobs(domain: IdleDomain, tmp_path: Path) -> None:
    with opened(domain, tmp_path, limits=ScratchLimits(keep_free_bytes=0), slice_s=2) as source:
        surveys = source.survey(None)
        source.begin_recording(new_capture_id(), surveys)
        taken_s: list[float] = []

        def snapshot() -> None:
            began_s = time.monotonic()
            file = domain.paths["vda"].with_suffix(".snap")
            disk = f"vda,file={file}"
            domain.site.virsh("snapshot-create-as", domain.name, "--no-metadata", "--disk-only", "--diskspec", disk)
            taken_s.append(time.monotonic() - began_s)

        thread = threading.Thread(target=snapshot)
        view = source.open_live(
            None, surveys, pace=Pace(lambda piece: thread.start() if piece == 4 else time.sleep(0.1))
        )
        content = read_all(view)
        thread.join()
        view.close()
    assert len(taken_s) == 1
    assert taken_s[0] < 10
    assert content == domain.read("vda")


def test_a_job_that_somebody_else_ended_fails_the_reading(domain: IdleDomain, tmp_path: Path) -> None:
    def abort(piece: int) -> None:
        if piece == 3:
            domain.site.virsh("domjobabort", domain.name)
            wait_until(lambda: domain.job() == "None")  # it ends behind virsh's back, perhaps later than the reading

    with opened(domain, tmp_path, limits=ScratchLimits(keep_free_bytes=0)) as source:
        view = source.open_live(None, source.survey(None), pace=Pace(abort))
        with pytest.raises((SourceLost, CaptureFailed)):
            read_all(view)
        view.close()
        source.survey(None)
        view = source.open_live(None, source.survey(None), pace=NoPace())
        assert read_all(view) == domain.read("vda")
        view.close()


# A whole drsync, in a process of its own


@pytest.fixture
def large(site: LibvirtSite) -> Iterator[IdleDomain]:
    """Its disk is read for ten seconds."""
    with IdleDomain(site, "troubled", {"vda": LARGE}) as domain:
        domain.io("vda", f"write -P 5 0 {LARGE}")
        yield domain


@pytest.fixture
def cli(large: IdleDomain, tmp_path: Path) -> Cli:
    cli = Cli(tmp_path)
    configure(cli, large, rate="12MiB")
    cli.ok("init")
    return cli


def configure(cli: Cli, domain: IdleDomain, *, rate: str) -> None:
    cli.configure(
        {},
        spool='stream_above = "1MiB"',
        extra=f'[limits]\nseed_read = "{rate}"\n'
        f'[[vm]]\nname = "troubled"\nsource = "libvirt"\nuri = "{domain.site.uri}"\nrpo = "1s"\n',
    )


@contextmanager
def drsync(cli: Cli, *words: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "drsync", "--config", str(cli.config), *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()


def packs(cli: Cli) -> set[str]:
    return {path.name for path in (cli.repository / "vm" / "troubled" / "pack").glob("*")}


def journal(cli: Cli) -> Journal | None:
    return Journal.load(cli.spool / "troubled" / "seed.journal")


def restored(cli: Cli, place: Path) -> bytes:
    cli.ok("restore", "troubled", "--to", "image", "--output", str(place), "--format", "raw")
    return (place / "vda.raw").read_bytes()


def begun(cli: Cli, domain: IdleDomain) -> None:
    """Wait until a seed has sent something and reads on."""
    wait_until(lambda: bool(packs(cli)) and domain.job() != "None")


def test_a_drsync_that_is_killed_leaves_no_job_behind_and_sends_nothing_twice(
    cli: Cli, large: IdleDomain, tmp_path: Path
) -> None:
    with drsync(cli, "capture", "troubled") as process:
        begun(cli, large)
        process.kill()
        process.wait()
    wait_until(lambda: large.job() == "None", timeout_s=10)
    assert not list((cli.spool / "troubled" / ".live").glob("*/scratch*"))
    sent = packs(cli)
    large.io("vda", "write -P 9 1M 64k")
    configure(cli, large, rate="unlimited")
    done = cli.ok("capture", "troubled", "--json").json
    assert done["result"] == "committed"
    assert sent < packs(cli)
    stored_bytes = sum(path.stat().st_size for path in (cli.repository / "vm" / "troubled" / "pack").iterdir())
    assert stored_bytes < LARGE
    assert restored(cli, tmp_path / "out") == large.read("vda")


def test_a_drsync_that_hangs_does_not_let_scratch_space_run_full(
    tmp_path: Path, cramped_domain: IdleDomain, small: Path
) -> None:
    domain = cramped_domain
    cli = Cli(tmp_path)
    configure(cli, domain, rate="8MiB")
    text = cli.config.read_text().replace('path = "spool"', f'path = "{small}"').replace('"1MiB"', '"8MiB"', 1)
    cli.config.write_text(text)
    cli.ok("init")
    with drsync(cli, "capture", "troubled") as process:
        begun(cli, domain)
        process.send_signal(signal.SIGSTOP)
        try:
            for number in range(SIZE // MIB):
                domain.io("vda", f"write -P 7 {number * MIB} 1M")
                if number > 8 and domain.job() == "None":
                    break
                time.sleep(0.3)
            wait_until(lambda: domain.job() == "None", timeout_s=10)
            domain.io("vda", f"write -P 8 0 {SIZE}")
        finally:
            process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=30) in {53, 55, -signal.SIGKILL}
    assert domain.state == "running"


LETS_GO = """
import sys, time
from pathlib import Path
from drsync.source.libvirt_guard import Guard

guard = Guard("web", "qemu:///system?socket=/nowhere", "6a0f3b1e-9b9f-4d0b-8a44-0f5b6f3a2c11", Path(sys.argv[1]), 0)
guard.close()
time.sleep(3)
print("lives")
"""


def test_a_drsync_that_has_let_go_is_not_killed_while_libvirtd_is_away(tmp_path: Path) -> None:
    """Its capture has failed, as libvirtd is away; it holds nothing up, and has other VMs to protect."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-c", LETS_GO, str(scratch)]
    began_s = time.monotonic()
    with (tmp_path / "said").open("w+") as said:  # not a pipe, which the guard would keep open
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=said, text=True, check=False)
        scratch.rmdir()  # the guard has nothing to do any more, and leaves
        said.seek(0)
        assert "does not end yet" in said.read()
    assert (done.returncode, done.stdout) == (0, "lives\n")
    assert time.monotonic() - began_s > 7, "the guard has tried for longer than a job that nobody holds up takes to end"


def guards_of(pid: int) -> list[int]:
    command = ["pgrep", "--parent", str(pid), "--full", "libvirt_guard"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [int(word) for word in found.stdout.split()]


def test_a_daemon_that_starts_ends_what_a_dead_one_left_if_its_guard_died_too(cli: Cli, large: IdleDomain) -> None:
    with drsync(cli, "capture", "troubled") as process:
        begun(cli, large)
        guards = guards_of(process.pid)
        assert len(guards) == 1
        os.kill(guards[0], signal.SIGKILL)
        process.kill()
        process.wait()
    time.sleep(1.5)
    assert large.job() != "None"
    session = Session(load_config(cli.config), SystemClock())
    session.reach.end_dead_reading()
    assert large.job() == "None"
    assert not (cli.spool / "troubled" / ".live").exists()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_domain_that_ends_and_starts_again_is_compared_not_sent_again(
    cli: Cli, large: IdleDomain, tmp_path: Path, end: str
) -> None:
    with drsync(cli, "capture", "troubled") as process:
        begun(cli, large)
        getattr(large, end)()
        assert process.wait(timeout=60) in {53, 55, 59}
    sent = packs(cli)
    large.start()
    large.io("vda", "write -P 9 1M 64k")
    configure(cli, large, rate="unlimited")
    done = cli.ok("capture", "troubled", "--json").json
    assert done["result"] == "committed"
    found = journal(cli)
    assert found is None
    assert sent <= packs(cli)
    assert restored(cli, tmp_path / "out") == large.read("vda")


def test_while_libvirtd_is_restarted_the_seed_waits_and_goes_on(cli: Cli, large: IdleDomain, tmp_path: Path) -> None:
    with drsync(cli, "capture", "troubled") as process:
        begun(cli, large)
        large.site.stop_daemon()
        large.site.start()
        assert process.wait(timeout=60) == 53
    sent = packs(cli)
    configure(cli, large, rate="unlimited")
    cli.ok("capture", "troubled")
    assert sent <= packs(cli)
    assert restored(cli, tmp_path / "out") == large.read("vda")
    assert large.job() == "None"


def test_a_domain_that_migrates_meanwhile_is_protected_where_it_arrives(
    cli: Cli, large: IdleDomain, tmp_path: Path
) -> None:
    with LibvirtSite() as there, drsync(cli, "capture", "troubled") as process:
        begun(cli, large)
        large.migrate(there)
        assert process.wait(timeout=60) in {53, 55, 59}
        assert large.state == "running"
        large.io("vda", "write -P 9 1M 64k")
        configure(cli, large, rate="unlimited")
        cli.spool.rename(tmp_path / "spool of the first host")
        cli.ok("capture", "troubled")
        assert restored(cli, tmp_path / "out") == large.read("vda")
        large.close()
