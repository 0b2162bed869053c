"""A label is true: a real guest with a real qemu-ga, frozen, restored, its file system looked at with e2fsprogs."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from command_line import Cli
from guest import Guest

from drsync.capture import CaptureOptions, run_cycle
from drsync.config import load_config
from drsync.errors import SourceLost
from drsync.model import NoProgress, SystemClock, new_capture_id
from drsync.quiesce import Alone, Quiesce, QuiescePolicy, Step
from drsync.session import Session
from drsync.source.agent import AgentSocket
from drsync.spool import VmSpool

pytestmark = pytest.mark.qemu

PARTITION_MIB = 49
"""Where the ext4 file system begins on the guest's disk (examples/guest/build.sh)."""
WRITER = "while :; do dd if=/dev/urandom of=/mnt/f$((i % 40)) bs=8k count=1 conv=fsync; i=$((i + 1)); done"


@pytest.fixture
def cli(tmp_path: Path, guest: Guest) -> Cli:
    """A configuration for the running guest; the repository is there."""
    cli = Cli(tmp_path)
    configure(cli, guest)
    cli.ok("init")
    return cli


def configure(cli: Cli, guest: Guest, *, consistency: str = "filesystem", more: str = "") -> None:
    extra = f'agent = "{guest.agent_socket}"\nconsistency = "{consistency}"\n{more}\n'
    cli.configure({"web": guest.qmp_socket}, extra=extra)


def captured(cli: Cli) -> dict[str, object]:
    document: dict[str, object] = cli.ok("capture", "web", "--json").json["point"]
    return document


def file_system_of(cli: Cli, point: int) -> Path:
    """The guest's ext4 file system as a point has it."""
    output = cli.place / f"restored-{point}"
    cli.ok("restore", "web", "--to", "image", "--format", "raw", "--output", str(output), "--point", str(point))
    found = output / "ext4"
    disk = next(output.glob("*.raw"))
    command = ["dd", f"if={disk}", f"of={found}", "bs=1M", f"skip={PARTITION_MIB}", "conv=sparse", "status=none"]
    subprocess.run(command, check=True)
    return found


def features(file_system: Path) -> str:
    shown = subprocess.run(["/usr/sbin/dumpe2fs", "-h", file_system], capture_output=True, text=True, check=True)
    found = re.search(r"^Filesystem features:(.*)$", shown.stdout, re.MULTILINE)
    assert found is not None
    return found[1]


@contextmanager
def writing(guest: Guest) -> Iterator[None]:
    """The guest writes files all the time."""
    guest.check(f"(echo $$ >/tmp/writer; {WRITER}) >/dev/null 2>&1 &")
    time.sleep(1)
    try:
        yield
    finally:
        guest.check("kill $(cat /tmp/writer) || true")


def test_a_frozen_point_needs_no_recovery_and_a_crash_consistent_one_does(cli: Cli, guest: Guest) -> None:
    with writing(guest):
        frozen = captured(cli)
        configure(cli, guest, consistency="crash")
        crashed = captured(cli)
        configure(cli, guest)
        frozen_again = captured(cli)
    assert [p["consistency"] for p in (frozen, crashed, frozen_again)] == ["filesystem", "crash", "filesystem"]
    quiesce = frozen["quiesce"]
    assert isinstance(quiesce, dict)
    assert (quiesce["asked"], quiesce["reached"], quiesce["reason"]) == ("filesystem", "filesystem", "")
    assert quiesce["file_systems"] == 1
    assert 0 < quiesce["frozen_seconds"] < 10
    for point in (1, 3):
        file_system = file_system_of(cli, point)
        assert "needs_recovery" not in features(file_system)
        checked = subprocess.run(["/usr/sbin/e2fsck", "-fn", file_system], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
    assert "needs_recovery" in features(file_system_of(cli, 2))
    guest.check("grep -q fsfreeze-freeze /tmp/qemu-ga.log")


def quiesce_of(cli: Cli, guest: Guest) -> tuple[Quiesce, Session, VmSpool]:
    clock = SystemClock()
    session = Session(load_config(cli.config), clock)
    (vm,) = session.config.vms
    spool = session.spool.vm("web")
    policy = QuiescePolicy(consistency=vm.consistency)
    agent: Callable[[], AgentSocket] = lambda: AgentSocket(guest.agent_socket, clock=clock)  # noqa: E731
    return Quiesce(policy, spool, agent, lambda: session.open_source(vm), clock), session, spool


def test_the_guests_writes_wait_while_it_is_frozen_and_go_on_after(cli: Cli, guest: Guest) -> None:
    now = "cut -d' ' -f1 /proc/uptime"
    guest.check(f"(while :; do a=$({now}); echo x >>/mnt/x; echo $a $({now}) >>/tmp/writes; done) >/dev/null 2>&1 &")
    quiesce, session, spool = quiesce_of(cli, guest)
    spool.remember(spool.state())
    with session.open_source(session.config.vms[0]) as source:
        with quiesce.instant(new_capture_id(), source)():
            began, _ = guest.check("cat /proc/uptime").split()
            lines = int(guest.check("sleep 0.2; wc -l </tmp/writes"))
            time.sleep(2)
            assert int(guest.check("wc -l </tmp/writes")) == lines, "a write came through"
            ended, _ = guest.check("cat /proc/uptime").split()
    guest.check("sleep 0.5")
    waits = [tuple(map(float, line.split())) for line in guest.check("cat /tmp/writes").splitlines()]
    (stalled,) = [(start, end) for start, end in waits if end - start > 1.5]
    assert stalled[0] <= float(began)
    assert stalled[1] >= float(ended)
    assert len(waits) > lines + 1, "the guest does not write any more"


def test_an_agent_that_hangs_costs_a_label_and_some_seconds(cli: Cli, guest: Guest) -> None:
    guest.check("kill -STOP $(cat /run/qemu-ga.pid)")
    point = captured(cli)
    assert point["consistency"] == "crash"
    assert isinstance(point["quiesce"], dict)
    assert point["quiesce"]["reason"] == "no answer from the guest agent: it gave no answer in time"
    configure(cli, guest, more='on_freeze_failure = "fail"')
    guest.check("echo x >/mnt/x; sync")
    problem, remedy = cli.refused(90, "capture", "web")
    assert (
        problem == "VM web: no filesystem-consistent point: no answer from the guest agent: it gave no answer in time"
    )
    assert remedy.startswith("drsync config check")
    assert "NOT USABLE" not in cli.run("config", "check").stdout
    assert cli.run("config", "check").code == 90
    configure(cli, guest)
    assert "guest agent: NOT USABLE, points will be crash-consistent: no answer" in cli.ok("config", "check").stdout
    guest.check("kill -CONT $(cat /run/qemu-ga.pid); sleep 1; echo y >/mnt/x; sync")
    assert guest.run("grep -q fsfreeze-freeze /tmp/qemu-ga.log").status == 1, "it was asked to freeze"
    assert "qemu-ga 7.2.22 answers and can freeze" in re.sub(
        r"qemu-ga [\d.]+", "qemu-ga 7.2.22", cli.ok("config", "check").stdout
    )
    assert captured(cli)["consistency"] == "filesystem"


def test_a_guest_that_is_paused_is_not_asked(cli: Cli, guest: Guest) -> None:
    guest.execute("stop")
    started_s = time.monotonic()
    point = captured(cli)
    assert time.monotonic() - started_s < 5, "it waited for the agent"
    assert isinstance(point["quiesce"], dict)
    assert point["quiesce"]["reason"] == "the guest does not run"
    assert guest.execute("query-status")["status"] == "paused"


HOLDER = """
import sys, time
from pathlib import Path
from drsync.config import load_config
from drsync.model import SystemClock, new_capture_id
from drsync.quiesce import Alone
from drsync.session import Session

session = Session(load_config(Path(sys.argv[1])), SystemClock())
(vm,) = session.config.vms

class Pausing(Alone):
    alone, pauses = False, "pause" in sys.argv

with session.spool.vm("web").locked(), session.open_source(vm) as source:
    with session.guests.quiesce(vm, Pausing()).instant(new_capture_id(), source)():
        print("held", flush=True)
        time.sleep(600)
"""


@contextmanager
def held_by_another_process(cli: Cli, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """A drsync that has come to the instant."""
    command = [sys.executable, "-c", HOLDER, str(cli.config), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def is_frozen(guest: Guest) -> bool:
    with closing(AgentSocket(guest.agent_socket, clock=SystemClock())) as agent:
        return agent.is_frozen(timeout_s=5)


def test_a_guest_whose_drsync_was_killed_is_thawed_by_the_daemons_start(cli: Cli, guest: Guest) -> None:
    configure(cli, guest, more='freeze_timeout = "10m"')
    with held_by_another_process(cli) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert is_frozen(guest)
        note = json.loads((cli.spool / "web/held.json").read_text())
        assert note["pid"] == process.pid
        command = [sys.executable, "-m", "drsync", "--config", str(cli.config), "daemon"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
            assert daemon.stderr is not None
            try:
                said = daemon.stderr.readline()
                assert f"vm=web was let go: a process held it frozen since {note['since']} and ended" in said
                guest.check("echo x >/mnt/x; sync", timeout_s=10)
            finally:
                daemon.send_signal(signal.SIGTERM)
                daemon.stderr.read()
    assert not (cli.spool / "web/held.json").exists()


def test_a_guest_whose_drsync_was_killed_is_resumed_by_the_next_capture(cli: Cli, guest: Guest) -> None:
    configure(cli, guest, more='freeze_timeout = "10m"')
    with held_by_another_process(cli, "pause") as process:
        assert guest.execute("query-status")["status"] == "paused"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert guest.execute("query-status")["status"] == "paused"
    point = captured(cli)
    assert point["consistency"] == "filesystem"
    assert guest.execute("query-status")["status"] == "running"
    assert not is_frozen(guest)
    guest.check("echo x >/mnt/x; sync", timeout_s=10)


def test_a_guest_is_let_go_although_the_repository_is_away(cli: Cli, guest: Guest) -> None:
    configure(cli, guest, more='freeze_timeout = "10m"')
    with held_by_another_process(cli, "pause") as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    cli.repository.rename(cli.place / "elsewhere")
    cli.refused(20, "capture", "web")
    assert guest.execute("query-status")["status"] == "running"
    assert not is_frozen(guest)


def test_a_paused_guest_whose_qemu_hangs_at_the_instant_is_resumed_when_it_is_back(cli: Cli, guest: Guest) -> None:
    """The session breaks, as no answer comes in time; another one resumes the guest."""

    class Hanging(Alone):
        alone, pauses = False, True

        def meet(self, step: Step, *, patience_s: float | None = None) -> None:
            if step is Step.PAUSED:
                os.kill(guest.pid, signal.SIGSTOP)
                threading.Timer(4.0, os.kill, [guest.pid, signal.SIGCONT]).start()

    clock = SystemClock()
    session = Session(load_config(cli.config), clock)
    (vm,) = session.config.vms
    spool = session.spool.vm("web")
    quiesce = Quiesce(QuiescePolicy(limit_s=2.0), spool, None, lambda: session.open_source(vm), clock, Hanging())
    options = CaptureOptions()
    with pytest.raises(SourceLost, match="no answer in"):
        run_cycle(
            session.log("web"), spool, "0" * 16, lambda: session.open_source(vm), clock, NoProgress(), options, quiesce
        )
    assert guest.execute("query-status")["status"] == "running"
    assert spool.held() is None
    assert captured(cli)["consistency"] == "filesystem"


def test_a_guest_is_thawed_by_the_watchdog_while_drsync_hangs(cli: Cli, guest: Guest) -> None:
    configure(cli, guest, more='freeze_timeout = "2s"')
    with held_by_another_process(cli):
        guest.check("echo x >/mnt/x; sync", timeout_s=10)
