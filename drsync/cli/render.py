"""All printing: documents and tables on stdout; errors, notes and progress on stderr.

rich is loaded when a table or a bar is drawn: a capture that a script calls
every minute has no use for it.
"""

import json
import re
import shlex
import sys
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click
from click.core import ParameterSource

from drsync.cli import views
from drsync.errors import DrsyncError
from drsync.model import Clock, Progress
from drsync.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_EVERY_S: Final = 10.0
"""How often progress is a line where it can't be a bar: seldom enough for a log file."""
_IN_MEMORY_BYTES: Final = 8 * 1024 * 1024
_PIECE_CHARACTERS: Final = 1024 * 1024
_PLAIN_WIDTH: Final = 10_000
"""Columns of what is not a terminal: nothing is cut or wrapped there."""


def document(value: object) -> None:
    """Print the one JSON document of a command."""
    click.echo(json_text(value))


def documents(values: Iterable[object]) -> None:
    """Print a list as the one JSON document of a command, once all of it is known; little of it is in memory."""
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, "w+", encoding="utf-8") as file:
        before = "[\n"
        for value in values:
            file.write(before + textwrap.indent(json_text(value), "  "))
            before = ",\n"
        file.write("[]\n" if before == "[\n" else "\n]\n")
        file.seek(0)
        while piece := file.read(_PIECE_CHARACTERS):
            click.echo(piece, nl=False)


def json_text(value: object) -> str:
    """A value as JSON that people can read, too."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def line(text: str = "") -> None:
    """Print a line of a result."""
    click.echo(text)


def note(text: str) -> None:
    """Print a line that is not part of the result."""
    click.echo(text, err=True)


def error(err: DrsyncError, *, as_json: bool) -> None:
    """Print what went wrong, and what to run next."""
    _failure(views.error(err), as_json=as_json)


def as_typed(remedy: str) -> str:
    """A remedy, to be typed as it stands: with the `--config` that this command was given, if it was."""
    ctx = click.get_current_context(silent=True)
    root = ctx.find_root() if ctx is not None else None
    if root is None or root.get_parameter_source("config_path") is not ParameterSource.COMMANDLINE:
        return remedy
    commands = "|".join(root.command.list_commands(root)) if isinstance(root.command, click.Group) else ""
    given = shlex.join(["--config", str(root.params["config_path"])])
    return re.sub(rf"(?<![\w./-])drsync (?=(?:{commands})\b)", lambda _: f"drsync {given} ", remedy)


def usage_error(message: str, *, remedy: str, as_json: bool) -> None:
    """Print what is wrong with the command line."""
    text = _one_line(message[:1].lower() + message[1:].rstrip("."))
    fields = {"code": 2, "class": "UsageError", "message": text, "remedy": remedy, "retryable": False}
    _failure(fields, as_json=as_json)


def alarm(err: DrsyncError) -> None:
    """Print what will go wrong, and what to run, beside a result that was printed."""
    note(f"alarm: {_one_line(str(err))}")
    note(f"remedy: {as_typed(_one_line(err.remedy))}")


def bug(err: BaseException, *, as_json: bool) -> None:
    """Print that drsync itself is wrong, and where."""
    note("".join(traceback.format_exception(err)).rstrip())
    message = f"a bug in drsync: {type(err).__name__}: {err}"
    remedy = "drsync -vv ...   (the same again, and report what it prints)"
    _failure(
        {"code": 1, "class": type(err).__name__, "message": message, "remedy": remedy, "retryable": False},
        as_json=as_json,
    )


def _failure(fields: views.Document, *, as_json: bool) -> None:
    if as_json:
        document({"error": fields})
    note(f"error: {_one_line(str(fields['message']))}")
    note(f"remedy: {as_typed(_one_line(str(fields['remedy'])))}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print rows under their headings; the columns in `right` are numbers."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415  see the module
    from rich.console import Console  # noqa: PLC0415  see the module
    from rich.table import Table  # noqa: PLC0415  see the module
    from rich.text import Text  # noqa: PLC0415  see the module

    shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        shown.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False).print(shown)


@contextmanager
def progress(clock: Clock) -> Iterator[Progress]:
    """Where a command reports how far it is: bars on a terminal, else a line now and then."""
    with progresses(clock) as progress_of:
        yield progress_of("")


@contextmanager
def progresses(clock: Clock) -> Iterator[Callable[[str], Progress]]:
    """As `progress`, for several things at once: makes one for each name, which stands before its steps."""
    if not sys.stderr.isatty():
        yield lambda name: LineProgress(clock, name)
        return
    from rich.console import Console  # noqa: PLC0415  see the module
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn  # noqa: PLC0415
    from rich.progress import Progress as Bars  # noqa: PLC0415  see the module

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        yield lambda name: BarProgress(bars, name)


class BarProgress:
    """A bar a step."""

    def __init__(self, bars: "RichProgress", name: str = "") -> None:
        self._bars = bars
        self._before = f"{name}: " if name else ""
        self._step = ""
        self._task: TaskID | None = None

    def start(self, step: str, total_bytes: int) -> None:
        if self._task is not None and step == self._step:  # it became more
            self._bars.update(self._task, total=total_bytes, completed=0)
        else:
            self._task = self._bars.add_task(self._before + step, total=total_bytes)
        self._step = step

    def advance(self, done_bytes: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, done_bytes)


class LineProgress:
    """A line every LINE_EVERY_S with rate and time left; nothing for what is done sooner."""

    def __init__(self, clock: Clock, name: str = "") -> None:
        self._clock = clock
        self._before = f"{name}: " if name else ""
        self._lock = threading.Lock()
        self._step, self._total, self._done = "", 0, 0
        self._started_s = self._said_s = clock.monotonic_s()

    def start(self, step: str, total_bytes: int) -> None:
        with self._lock:
            self._step, self._total, self._done = self._before + step, total_bytes, 0
            self._started_s = self._said_s = self._clock.monotonic_s()

    def advance(self, done_bytes: int) -> None:
        with self._lock:
            self._done += done_bytes
            now_s = self._clock.monotonic_s()
            if now_s - self._said_s >= LINE_EVERY_S:
                self._said_s = now_s
                note(progress_line(self._step, self._done, self._total, now_s - self._started_s))


def progress_line(step: str, done_bytes: int, total_bytes: int, took_s: float) -> str:
    """How far a step is, as a line."""
    rate = done_bytes / took_s if took_s > 0 else 0.0
    left = f", {format_duration((total_bytes - done_bytes) / rate)} left" if rate and total_bytes > done_bytes else ""
    return f"{step}: {format_size(done_bytes)} of {format_size(total_bytes)}, {format_size(rate)}/s{left}"
