"""What every command shares: the global options, the configuration, the session, the log."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeVar

import click

from drsync.config import Config, load_config
from drsync.errors import DrsyncError
from drsync.model import SystemClock

if TYPE_CHECKING:
    from drsync.session import Session

LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(message)s"
_JOURNAL_LEVELS: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

Command = TypeVar("Command", bound=Callable[..., Any])


class App:
    """One run of the command line."""

    def __init__(self, *, config_path: Path, as_json: bool, verbosity: int) -> None:
        self.config_path = config_path
        self.as_json = as_json
        self.verbosity = verbosity
        self.clock = SystemClock()

    def config(self) -> Config:
        """The configuration file's values.

        Raises:
            ConfigMissing, ConfigInvalid: it can't be used.
        """
        return load_config(self.config_path)

    def session(self) -> "Session":
        """The configuration, open for work; nothing has been reached yet."""
        from drsync.session import Session  # noqa: PLC0415  a mistake in the file is told without loading it all

        return Session(self.config(), self.clock)

    def set_up_logging(self, *, least: int = 0) -> None:
        """Log drsync's own lines to stderr: warnings, with -v what is done, with -vv everything.

        `least` is the verbosity that a command has without any -v. Other
        libraries only speak with -vv: drsync tells their failures in its own words.
        """
        verbosity = max(self.verbosity, least)
        handler = _StderrHandler()
        handler.setFormatter(_JournalFormatter() if _is_journal() else logging.Formatter(LOG_FORMAT))
        root = logging.getLogger()
        root.handlers = [handler]
        root.setLevel(logging.DEBUG if verbosity > 1 else logging.CRITICAL)
        level = {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
        logging.getLogger("drsync").setLevel(level)


class _JournalFormatter(logging.Formatter):
    """Lines for systemd's journal: it has the time itself, and takes the level as <N> (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        level = next((n for least, n in _JOURNAL_LEVELS if record.levelno >= least), 7)
        return f"<{level}>" + super().format(record).replace("\n", f"\n<{level}>")


def _is_journal() -> bool:
    """Whether stderr itself is the journal's; programs below a service inherit the variable, too."""
    try:
        stderr = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at the moment: a progress bar puts itself in between."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # the base class keeps the one of its beginning
        return sys.stderr


pass_app = click.make_pass_decorator(App)


def json_option(command: Command) -> Command:
    """Let `--json` stand behind the command's name, too."""
    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=_ask_for_json,
        help="One JSON document on stdout (docs/cli.md has its fields).",
    )(command)


def _ask_for_json(ctx: click.Context, _option: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(App).as_json = True


def raise_first(ctx: click.Context, failed: Sequence[Exception]) -> None:
    """End with the first failure: told in two lines, unless the document on stdout has it already."""
    if not ctx.ensure_object(App).as_json:
        raise failed[0]
    ctx.exit(failed[0].code if isinstance(failed[0], DrsyncError) else 1)
