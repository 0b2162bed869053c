"""`drsync unpin`: the rules decide of a point again."""

import click

from drsync.cli.app import App, json_option, pass_app
from drsync.cli.pin import show
from drsync.upkeep import Upkeep


@click.command("unpin")
@click.argument("vm")
@click.option("--point", "number", type=click.IntRange(min=1), required=True, metavar="N", help="Which point.")
@click.option("--dry-run", is_flag=True, help="Check everything, change nothing.")
@json_option
@pass_app
def command(app: App, vm: str, number: int, *, dry_run: bool) -> None:
    """Let the rules decide of a pinned point again.

    They may drop it the next time the maintenance runs.
    """
    record = Upkeep(app.session()).unpin(vm, number, dry_run=dry_run)
    verb = "would be taken away" if dry_run else "is taken away"
    show(app, vm, record, f"the pin of point {number} {verb}; it held", dry_run=dry_run)
