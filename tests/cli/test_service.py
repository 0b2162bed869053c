"""The systemd unit of the examples fits the daemon."""

import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

from drsync.config.settings import DaemonSettings, SpoolSettings
from drsync.config.table import keys_of
from drsync.errors import CaptureRunning, DrsyncError, Fenced
from drsync.units import parse_duration

UNIT = Path(__file__).parents[2] / "examples/drsync.service"


def service() -> dict[str, str]:
    unit = ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]  # systemd's keys have capitals
    unit.read_string(UNIT.read_text())
    return dict(unit["Service"])


def test_systemd_is_told_when_it_is_ready_and_watches_it() -> None:
    unit = service()
    assert unit["Type"] == "notify"
    assert parse_duration(unit["WatchdogSec"]) >= 30
    assert unit["ExecStart"].endswith("drsync daemon")
    assert unit["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert unit["KillSignal"] == "SIGTERM"


def test_the_daemon_has_its_time_to_stop_before_systemd_kills_it() -> None:
    (stop_timeout,) = [key for key in keys_of(DaemonSettings).values() if key.name == "stop_timeout"]
    assert parse_duration(service()["TimeoutStopSec"]) > parse_duration(str(stop_timeout.default))


def test_the_default_spool_can_be_written_and_passed_through_by_qemu() -> None:
    unit = service()
    (path,) = [key for key in keys_of(SpoolSettings).values() if key.name == "path"]
    assert str(path.default).removeprefix("/var/lib/") in unit["StateDirectory"].split()
    assert int(unit["UMask"], 8) & 0o011 == 0
    assert int(unit["UMask"], 8) & 0o066 == 0o066


def test_what_a_restart_does_not_mend_is_not_restarted() -> None:
    codes = {int(code) for code in re.findall(r"\d+", service()["RestartPreventExitStatus"])}
    kinds = {kind.code: kind for branch in DrsyncError.__subclasses__() for kind in branch.__subclasses__()}
    assert codes <= kinds.keys()
    assert not any(kinds[code].retryable for code in codes)
    assert {Fenced.code, CaptureRunning.code}.isdisjoint(codes)


def test_systemd_finds_the_unit_little_exposed() -> None:
    """From 0.0, shut in, to 10.0; a service without any of systemd's fences has 9.6."""
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", UNIT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert rated.returncode == 0, rated.stdout + rated.stderr
