"""`drsync key`: the key file of this host."""

import sys

import click

from drsync.cli import render
from drsync.cli.app import App, json_option, pass_app
from drsync.errors import KeyFileExists, WrongRecoveryKey
from drsync.format import Malformed
from drsync.format.keys import RecoveryKey

MAX_TYPED_CHARACTERS = 1024
"""A recovery key has 69 with its dashes; more is something else."""


@click.group("key")
def command() -> None:
    """Write the repository's key file again."""


@command.command("recover")
@json_option
@pass_app
def recover(app: App) -> None:
    """Write the key file again, from the recovery key.

    That is what `drsync init` printed. It is asked for on a terminal, or read from stdin; it is never
    an argument, since other users can see those.
    """
    session = app.session()
    settings = session.config.repository
    if settings.key_file.exists():
        raise KeyFileExists(path=settings.key_file)
    try:
        recovery = RecoveryKey.from_text(_typed())
    except Malformed as err:
        raise WrongRecoveryKey(url=settings.url, problem=err) from err
    path = session.recover_key(recovery)
    if app.as_json:
        render.document({"repository": settings.url, "key_file": str(path)})
    else:
        render.line(f"wrote the key of {settings.url} to {path}, for its owner only")


def _typed() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Recovery key", hide_input=True, err=True))
    return sys.stdin.read(MAX_TYPED_CHARACTERS)
