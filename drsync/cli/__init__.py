"""The command line: one module a command, loaded when it is called.

Here are the group, the global options, and what an error becomes: two lines on
stderr (what happened, what to run next), and the error's code as exit code.
docs/cli.md states the contract, JSON included.
"""

import importlib
import os
import resource
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import click

from drsync import __version__
from drsync.cli import render
from drsync.cli.app import App
from drsync.config import DEFAULT_PATH
from drsync.errors import DrsyncError

COMMANDS: Final = {
    "init": "drsync.cli.init",
    "config": "drsync.cli.config",
    "capture": "drsync.cli.capture",
    "points": "drsync.cli.points",
    "retention": "drsync.cli.retention",
    "pin": "drsync.cli.pin",
    "unpin": "drsync.cli.unpin",
    "restore": "drsync.cli.restore",
    "verify": "drsync.cli.verify",
    "repair": "drsync.cli.repair",
    "prune": "drsync.cli.prune",
    "preflight": "drsync.cli.preflight",
    "failback": "drsync.cli.failback",
    "status": "drsync.cli.status",
    "lock": "drsync.cli.lock",
    "daemon": "drsync.cli.daemon",
    "cloud": "drsync.cli.cloud",
    "key": "drsync.cli.key",
}
"""The commands, in the order of `drsync --help`, and the module that has each as `command`."""

USAGE_CODE: Final = 2
INTERRUPTED_CODE: Final = 130
"""128 + SIGINT, as shells have it."""
BROKEN_PIPE_CODE: Final = 141
"""128 + SIGPIPE: who read stdout has gone, as in `drsync points | head -1`."""
BUG_CODE: Final = 1


class Commands(click.Group):
    """A group that loads a command's module when it is called, and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name]).command
        return command if isinstance(command, click.Command) else None

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any) -> Any:
        """Run the command line; ends the process with the exit code."""
        if not extra.get("standalone_mode", True) or "_DRSYNC_COMPLETE" in os.environ:
            return super().main(args, prog_name, **extra)
        words = list(sys.argv[1:] if args is None else args)
        sys.exit(self._run(words))

    def _run(self, words: Sequence[str]) -> int:
        """Run the command line; the exit code."""
        ctx: click.Context | None = None
        try:
            with self.make_context("drsync", list(words)) as ctx:
                self.invoke(ctx)
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as err:  # noqa: BLE001  every way to end has an answer
            with ctx.scope(cleanup=False) if ctx is not None else nullcontext():  # it says what was typed
                return _answer(err, as_json="--json" in words)
        return 0


def _answer(err: BaseException, *, as_json: bool) -> int:
    """Say what went wrong, in the way that fits it; the exit code."""
    match err:
        case click.exceptions.Exit():
            code = err.exit_code
        case DrsyncError():
            render.error(err, as_json=as_json)
            code = err.code
        case click.exceptions.NoArgsIsHelpError() if not as_json:  # the name of a group alone
            render.note(err.format_message())
            code = USAGE_CODE
        case click.ClickException():
            code = _usage(err, as_json=as_json)
        case KeyboardInterrupt() | click.Abort():
            code = INTERRUPTED_CODE
        case BrokenPipeError():
            # What is still buffered can't be written, so the interpreter must not try at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = BROKEN_PIPE_CODE
        case _:
            render.bug(err, as_json=as_json)
            code = BUG_CODE
    return code


def _usage(err: click.ClickException, *, as_json: bool) -> int:
    path = err.ctx.command_path if isinstance(err, click.UsageError) and err.ctx else "drsync"
    message = "missing command" if isinstance(err, click.exceptions.NoArgsIsHelpError) else err.format_message()
    render.usage_error(message, remedy=f"{path} --help", as_json=as_json)
    return USAGE_CODE


def _leave_no_core() -> None:
    """Write no memory to a disk when the process is killed by its own fault: the repository's key is in it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    envvar="DRSYNC_CONFIG",
    default=DEFAULT_PATH,
    show_default=True,
    help="The configuration file; DRSYNC_CONFIG in the environment does the same.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout (docs/cli.md has its fields).")
@click.option("-v", "--verbose", "verbosity", count=True, help="Log more on stderr; -vv logs everything.")
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context, config_path: Path, *, as_json: bool, verbosity: int) -> None:
    """Disaster recovery for KVM/QEMU virtual machines.

    Captures incremental points of running VMs into a repository (S3 or a
    directory), encrypted, and brings a VM back from any of them.
    """
    _leave_no_core()
    ctx.obj = App(config_path=config_path, as_json=as_json, verbosity=verbosity)
    ctx.obj.set_up_logging()
