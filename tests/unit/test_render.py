"""What commands print: documents, failures, tables, progress without a terminal, and lines for the journal."""

import json
import logging
import os
from collections.abc import Iterator

import pytest
from command_line import logging_as_before
from fake_clock import FakeClock

from drsync.cli import render
from drsync.cli.app import App
from drsync.cli.render import LINE_EVERY_S, LineProgress, progress_line
from drsync.config import DEFAULT_PATH
from drsync.errors import UnknownVm
from drsync.units import GiB, MiB

Captured = pytest.CaptureFixture[str]


def test_an_error_is_two_lines_on_stderr(capsys: Captured) -> None:
    render.error(UnknownVm(vm="wbe", known="web"), as_json=False)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "error: no VM named wbe; there are: web\nremedy: drsync config check\n"


def test_a_message_with_line_breaks_stays_one_line(capsys: Captured) -> None:
    render.error(UnknownVm(vm="a\nb\x0b", known="web"), as_json=False)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_an_error_as_json_is_a_document_beside_the_two_lines(capsys: Captured) -> None:
    render.error(UnknownVm(vm="wbe", known="web"), as_json=True)
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["class"] == "UnknownVm"
    assert len(said.err.splitlines()) == 2


def test_a_table_that_is_no_terminal_is_neither_cut_nor_wrapped(capsys: Captured) -> None:
    render.table(["name", "size"], [["x" * 500, "1 B"], ["[red]y[/red]", "22 B"]], right=["size"])
    heading, _, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "size"]
    assert first.split() == ["x" * 500, "1", "B"]
    assert second.startswith("[red]y[/red]"), "a name is text, not markup"
    assert second.endswith("22 B")


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys: Captured) -> None:
    clock = FakeClock()
    progress = LineProgress(clock)
    progress.start("ship", 4 * GiB)
    for _ in range(30):
        clock.advance(LINE_EVERY_S / 10)
        progress.advance(64 * MiB)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ship: 640 MiB of 4 GiB, 64 MiB/s, 54 s left"
    assert len(lines) == 3


def test_what_is_done_soon_says_nothing(capsys: Captured) -> None:
    clock = FakeClock()
    progress = LineProgress(clock)
    progress.start("ship", MiB)
    clock.advance(1)
    progress.advance(MiB)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("done", "total", "took_s", "line"),
    [
        (0, MiB, 0.0, "ship: 0 B of 1 MiB, 0 B/s"),
        (MiB, MiB, 1.0, "ship: 1 MiB of 1 MiB, 1 MiB/s"),
        (2 * MiB, MiB, 1.0, "ship: 2 MiB of 1 MiB, 2 MiB/s"),
    ],
)
def test_time_left_is_only_told_when_it_is_known(done: int, total: int, took_s: float, line: str) -> None:
    assert progress_line("ship", done, total, took_s) == line


@pytest.fixture
def quiet_logging() -> Iterator[None]:
    with logging_as_before():
        yield


@pytest.mark.usefixtures("quiet_logging")
@pytest.mark.parametrize(
    ("verbosity", "least", "shown"),
    [
        (0, 0, ["WARNING"]),
        (1, 0, ["INFO", "WARNING"]),
        (0, 1, ["INFO", "WARNING"]),
        (2, 0, ["DEBUG", "INFO", "WARNING", "DEBUG"]),
    ],
)
def test_the_log_is_as_talkative_as_asked_for(verbosity: int, least: int, shown: list[str], capsys: Captured) -> None:
    App(config_path=DEFAULT_PATH, as_json=False, verbosity=verbosity).set_up_logging(least=least)
    own, other = logging.getLogger("drsync.capture"), logging.getLogger("botocore")
    own.debug("d")
    own.info("i")
    own.warning("w")
    other.debug("d")
    other.error("e") if verbosity < 2 else None
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split()[2] for line in said.err.splitlines()] == shown


@pytest.mark.usefixtures("quiet_logging")
def test_lines_for_the_journal_have_a_level_and_no_time(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    stderr = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
    App(config_path=DEFAULT_PATH, as_json=False, verbosity=1).set_up_logging()
    log = logging.getLogger("drsync.daemon")
    log.info("vm=web point=1")
    log.error("two\nlines")
    assert capsys.readouterr().err == "<6>vm=web point=1\n<3>two\n<3>lines\n"
