"""`drsync key`: this host's key file, and what opens the repository."""

from pathlib import Path

import click

from drsync.cli import render
from drsync.cli.app import App, json_option, pass_app
from drsync.cli.key_export import export
from drsync.cli.key_slots import add, list_slots, remove, rotate
from drsync.cli.unlocking import Unlocking, unlock_options, unlocker
from drsync.format.keys import HostKeys


@click.group("key")
def command() -> None:
    """The repository's keys, and what opens them."""


@command.command("recover")
@unlock_options
@click.option("--ring", type=click.IntRange(min=0), help="An older key ring than the newest; 0 = the one of init.")
@json_option
@pass_app
def recover(app: App, unlock: str | None, secret_file: Path | None, secret_fd: int | None, ring: int | None) -> None:
    """Write the key file again, or bring it up to date.

    From a KMS slot, the recovery key that `drsync init` printed, or a passphrase. A secret is asked for on a
    terminal, or read from stdin, a file or an open descriptor; it is never an argument, since others can see those.
    """
    session = app.session()
    settings, keys = session.config.repository, session.host_keys
    chosen = Unlocking(slot=unlock, file=secret_file, fd=secret_fd, ring=ring)
    opened = unlocker(keys.keyring(), settings.url, chosen, alone=True)()
    held = keys.recover(opened)
    if app.as_json:
        render.document(
            {"repository": settings.url, "key_file": str(settings.key_file), "generation": opened.roots.newest}
        )
        return
    what = "the keys of its VMs" if isinstance(held, HostKeys) else "the key"
    render.line(f"wrote {what} of {settings.url} to {settings.key_file}, for its owner only")


for subcommand in (list_slots, add, remove, rotate, export):
    command.add_command(subcommand)
