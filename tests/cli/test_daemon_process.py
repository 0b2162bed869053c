"""`drsync daemon` as a process: what it captures, logs and tells systemd, and how it ends."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Cli
from figures import count
from s3_lab import CREDENTIALS
from storage_daemon import StorageDaemon

from drsync.cli.app import App
from drsync.cli.daemon import wait_for_guests
from drsync.session import Session
from drsync.spool import boot_id
from drsync.spooled import HeldGuest

pytestmark = pytest.mark.qemu

DEADLINE_S = 60.0
"""The first capture comes within the RPO, here 1 s; more only helps a machine that is overloaded."""


class DaemonProcess:
    """A running `drsync daemon`, its log, and what it tells systemd."""

    def __init__(self, cli: Cli) -> None:
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.bind("")  # an abstract address, which the kernel chooses
        address = "@" + self._notified.getsockname()[1:].decode()
        self.lines: list[str] = []
        command = [sys.executable, "-m", "drsync", "--config", str(cli.config), "daemon"]
        environment = {**os.environ, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "600000"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def told_systemd(self, wanted: str) -> str:
        """The next message that starts with `wanted`; others are passed over."""
        while select.select([self._notified], [], [], DEADLINE_S)[0]:
            message = self._notified.recv(4096).decode()
            if message.startswith(wanted):
                return message
        raise AssertionError(f"systemd was not told {wanted}; log: {self.lines}")

    def logged(self, pattern: str, *, count: int = 1) -> list[str]:
        """The lines that match `pattern`, when there are `count`."""
        wait_until(lambda: len(self._matching(pattern)) >= count, lambda: f"{pattern} in {self.lines}")
        return self._matching(pattern)

    def _matching(self, pattern: str) -> list[str]:
        return [line for line in self.lines if re.search(pattern, line)]

    def ended(self) -> int:
        """Its exit code, when it has ended."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.ended()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._notified.close()


def wait_until(condition: Callable[[], bool], describe: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, describe()
        time.sleep(0.02)


@pytest.fixture
def start(cli: Cli) -> Iterator[Callable[[], DaemonProcess]]:
    """Starts daemons, and ends what is left of them."""
    started: list[DaemonProcess] = []

    def begin() -> DaemonProcess:
        started.append(DaemonProcess(cli))
        return started[-1]

    yield begin
    for daemon in started:
        daemon.close()


Start = Callable[[], DaemonProcess]


def test_it_captures_on_the_rpo_and_logs_one_line_an_outcome(cli: Cli, vm: StorageDaemon, start: Start) -> None:
    vm.io("root", "write -P 1 0 64k")
    daemon = start()
    assert daemon.told_systemd("READY=1") == f"READY=1\nSTATUS=1 VM, 2 at a time, to file://{cli.repository}"
    (line,) = daemon.logged(r"vm=web point=1 ")
    assert re.search(r"INFO vm=web point=1 kind=full changed=64KiB stored=\S+ took=\d+\.\d\ds reason=\".*\"$", line)
    vm.io("root", "write -P 2 1M 64k")
    daemon.logged(r"vm=web point=2 kind=incremental changed=64KiB stored=\S+ took=\d+\.\d\ds$")
    daemon.told_systemd("WATCHDOG=1")
    assert (cli.repository / "host").exists(), "the heartbeat is there"
    (status,) = cli.ok("status", "--json").json
    assert (status["state"], status["point"]) == ("ok", 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_cleanly(number: signal.Signals, cli: Cli, vm: StorageDaemon, start: Start) -> None:
    daemon = start()
    daemon.logged("vm=web point=1 ")
    daemon.process.send_signal(number)
    daemon.told_systemd("STOPPING=1")
    assert daemon.ended() == 0
    assert daemon.lines[-1].endswith(" INFO stopped")
    assert not [line for line in daemon.lines if "Traceback" in line]


def test_it_reads_the_file_again_on_sighup_and_keeps_the_old_one_if_it_is_bad(
    cli: Cli, vm: StorageDaemon, start: Start
) -> None:
    good = cli.config.read_text()
    daemon = start()
    daemon.told_systemd("READY=1")
    cli.config.write_text(good + "rpoo = 3\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.told_systemd("RELOADING=1\nMONOTONIC_USEC=")
    daemon.told_systemd("READY=1")
    (line,) = daemon.logged("kept the old configuration")
    assert 'unknown key "rpoo"; did you mean rpo?; remedy: edit ' in line
    vm.io("root", "write -P 1 0 64k")
    daemon.logged("vm=web point=1 ")
    cli.config.write_text(good + "[daemon]\nparallel = 3\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.logged("reloaded: 1 VM, 3 at a time")
    vm.io("root", "write -P 2 0 64k")
    daemon.logged("vm=web point=2 ")


def test_a_vm_that_is_off_is_tried_again_until_it_is_on(cli: Cli, vm: StorageDaemon, start: Start) -> None:
    vm.kill()
    daemon = start()
    (line,) = daemon.logged("vm=web failed code=50 ")
    assert "; remedy: ls -l " in line
    vm.start()
    daemon.logged("vm=web works again after ")
    daemon.logged("vm=web point=1 ")
    assert len(daemon.logged("vm=web failed")) == 1


def test_after_kill_9_the_next_daemon_goes_on(cli: Cli, vm: StorageDaemon, start: Start) -> None:
    first = start()
    first.logged("vm=web point=1 ")
    first.process.kill()
    count("crashes")
    first.ended()
    vm.io("root", "write -P 1 0 64k")
    second = start()
    second.logged("vm=web point=2 kind=incremental ")
    cli.ok("verify", "--read-data")


def test_of_two_daemons_one_is_fenced_says_so_once_and_stops_for_the_vm(
    cli: Cli, vm: StorageDaemon, start: Start, tmp_path: Path
) -> None:
    here = start()
    here.logged("vm=web point=1 ")
    (tmp_path / "there").mkdir()
    there = Cli(tmp_path / "there")
    text = cli.config.read_text().replace('path = "spool"', f'path = "{there.place}/spool"')
    there.config.write_text(text.replace('"key"', f'"{cli.key_file}"'))
    # QEMU serves one client at a time: both may have to try again.
    wait_until(lambda: there.run("capture", "web").code == 0, lambda: "the second host did not take over")
    vm.io("root", "write -P 1 0 64k")
    (line,) = here.logged("vm=web fenced: ")
    assert "drsync capture web --take-over" in line
    before = there.ok("points", "--json").json
    time.sleep(3)  # turns of the VM at which nothing must happen
    assert len(here.logged("vm=web fenced: ")) == 1
    assert there.ok("points", "--json").json == before
    there.ok("capture", "web")
    assert there.ok("points", "--json").json[-1]["epoch"] == 2
    here.process.send_signal(signal.SIGHUP)
    here.logged("vm=web fenced: ", count=2)


def test_what_can_never_work_ends_it_at_once(cli: Cli, vm: StorageDaemon, start: Start) -> None:
    cli.key_file.chmod(0o644)
    daemon = start()
    assert daemon.ended() == 26
    assert daemon.lines[-2:] == [
        f"error: key file {cli.key_file} has mode 0o644: others can read it",
        f"remedy: chmod 600 {cli.key_file}",
    ]


def test_a_store_that_is_away_does_not_keep_it_from_starting_nor_from_stopping_in_time(
    cli: Cli, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    cli.ok("init")  # for the key file
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # nobody listens there when the block has ended
    text = cli.config.read_text().replace(f"file://{cli.repository}", "s3://bucket/prefix")
    text = text.replace("key_file", f'endpoint_url = "http://127.0.0.1:{port}"\nregion = "eu-central-1"\nkey_file')
    cli.config.write_text(
        text + '[daemon]\nstop_timeout = "1s"\n[[vm]]\nname = "web"\nsocket = "none.qmp"\nrpo = "1s"\n'
    )
    daemon = start()
    daemon.told_systemd("READY=1")
    daemon.logged("WARNING store s3://bucket/prefix does not work now: .*; goes on and tries again$")
    time.sleep(2)  # the VM's first turn comes within its RPO; then its cycle waits for the store
    daemon.process.send_signal(signal.SIGTERM)
    asked_s = time.monotonic()
    assert daemon.ended() == 0
    assert time.monotonic() - asked_s < 10
    daemon.logged("stopping: waiting for web")
    daemon.logged("stopped; abandoned, to be settled by the next capture: web")


def test_a_daemon_that_leaves_its_threads_behind_waits_until_they_have_let_their_guests_go(cli: Cli) -> None:
    app = App(config_path=cli.config, as_json=False, verbosity=0)
    config = app.config()
    spool = Session(config, app.clock).spool.vm("web")

    def held_by(pid: int) -> HeldGuest:
        return HeldGuest(boot_id=boot_id(), pid=pid, vm_run="", paused=True, since="2026-11-25T10:00:00+00:00")

    spool.hold(held_by(os.getpid()))
    timer = threading.Timer(0.5, spool.let_go)
    timer.start()
    started_s = time.monotonic()
    wait_for_guests(config, app)
    assert 0.4 < time.monotonic() - started_s < 10
    timer.join()
    spool.hold(held_by(1))
    started_s = time.monotonic()
    wait_for_guests(config, app)
    assert time.monotonic() - started_s < 0.5
