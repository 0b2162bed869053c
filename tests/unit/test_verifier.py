"""Who reads slices: the daemon's thread, and the maintenance's chore."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli
from shipped_vm import DiskStep, ShippedVm, Step

from drsync.agenda import chores_of
from drsync.auditing import Auditing
from drsync.config import load_config
from drsync.errors import StoreUnavailable
from drsync.keyfile import write_key_file
from drsync.model import BLOCK_SIZE, SystemClock
from drsync.scrub import STATE_NAME, ScrubState
from drsync.session import Session
from drsync.store.directory import DirectoryStore
from drsync.verifier import Verifier


class Scrubs:
    """Slices that end as a test says."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.failure: Exception | None = None

    def __call__(self, vm: str, /, *, stop: Callable[[], bool]) -> None:
        self.read.append(vm)
        if self.failure is not None:
            raise self.failure


def test_every_vm_has_its_turn_until_it_is_stopped() -> None:
    scrubs, stopped = Scrubs(), threading.Event()
    Verifier(lambda: ["db", "web"], scrubs, stopped, every_s=0.01).start()
    deadline = time.monotonic() + 20
    while len(scrubs.read) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped.set()
    assert scrubs.read[:6] == ["db", "web"] * 3


def test_a_failure_is_logged_once_until_it_works_again(caplog: pytest.LogCaptureFixture) -> None:
    scrubs = Scrubs()
    verifier = Verifier(list, scrubs, threading.Event())
    failures = [StoreUnavailable(url="s3://b", problem="503"), ValueError("a bug")]
    with caplog.at_level(logging.WARNING):
        for failure in (failures[0], failures[0], None, failures[0], failures[1], failures[1]):
            scrubs.failure = failure
            verifier.read("web")
    told = [record.getMessage() for record in caplog.records]
    assert [("is not verified now" in line, "a bug in drsync" in line) for line in told] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    assert "remedy: " in told[0]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A machine without VMs, and a repository with one."""
    cli = Cli(tmp_path)
    cli.repository.mkdir()
    layers = tmp_path / "layers"
    layers.mkdir()
    vm = ShippedVm(layers, store=DirectoryStore(cli.repository))
    vm.capture(Step(disks={"root": DiskStep(size_bytes=4 * BLOCK_SIZE, writes={0: 3, 2: 5})}))
    write_key_file(cli.key_file, vm.root)
    return Session(load_config(cli.config), SystemClock())


def test_the_maintenance_reads_what_all_hosts_wrote(session: Session) -> None:
    (chore,) = [chore for chore in chores_of(session) if chore.name == "verify"]
    for _ in range(2):
        assert chore.run(60.0) == ""
    state = session.spool.vm("web").noted(STATE_NAME, ScrubState)
    assert state is not None
    assert state.total_bytes > 0
    assert (state.seq, state.pack) != (1, -1)  # the first object is due at once


def test_with_never_nobody_reads(tmp_path: Path, session: Session) -> None:
    cli = Cli(tmp_path)
    cli.configure(extra='[verify]\nwithin = "never"\n')
    idle = Session(load_config(cli.config), SystemClock())
    assert [chore.name for chore in chores_of(idle)] == ["prune"]
    assert Auditing(idle).scrub("web") is None
