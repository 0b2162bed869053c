"""`drsync prune`: drops what retention drops, and deletes it a grace time later."""

import click

from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.prune.report import Pruned, VmPruned
from drsync.pruning import Pruning
from drsync.units import format_size

COLUMNS = ("VM", "stay", "dropped", "deleted", "wait", "copied", "will free", "costs", "saves a month", "until")
DROPPED = ("VM", "point", "why it is dropped")
_NUMBERS = ("stay", "dropped", "deleted", "wait", "copied", "will free", "costs", "saves a month")


@click.command("prune")
@click.argument("vm", required=False)
@click.option("--dry-run", is_flag=True, help="Show what would be dropped, copied and deleted; write nothing.")
@json_option
@pass_app
@click.pass_context
def command(ctx: click.Context, app: App, vm: str | None, *, dry_run: bool) -> None:
    """Drop points by [retention], delete what nothing needs.

    Of VM, or of all VMs in the repository. First a horizon is written: from then on the dropped points are none any
    more. What they alone needed is deleted by a later run, when the grace time ([prune] grace) is over; blocks that
    others need are copied forward where that pays. May be ended at any moment; the next run goes on.
    """
    session = app.session()
    with render.progresses(app.clock) as progress_of:
        done = Pruning(session).prune(vm, lambda _: progress_of(""), dry_run=dry_run)
    if app.as_json:
        render.document(views.pruned(done))
    else:
        _print(done)
    for one in done.vms:
        if one.error is not None:
            render.error(one.error, as_json=False)
    ctx.exit(next((one.error.code for one in done.vms if one.error is not None), 0))


def _print(done: Pruned) -> None:
    rows = [(one.vm, str(v.point), "; ".join(v.reasons)) for one in done.vms for v in one.dropped]
    if rows:
        render.table(DROPPED, rows, right=("point",))
        render.line()
    render.table(COLUMNS, [_row(one) for one in done.vms if one.error is None], right=_NUMBERS)
    orphans = sum(one.orphans for one in done.vms)
    denied = sum(one.denied_objects for one in done.vms)
    if orphans:
        render.line(f"{orphans} objects that no point lists were taken out of use, too")
    if denied:
        render.line(f"{denied} objects could not be deleted yet: they are locked, or the credentials may not")
    if done.abandoned_uploads:
        render.line(f"{done.abandoned_uploads} unfinished uploads abandoned")
    if done.dry_run:
        render.line("nothing was written: it was a dry run")


def _row(one: VmPruned) -> tuple[str, ...]:
    return (
        one.vm,
        str(one.kept),
        str(len(one.dropped)),
        _objects(one.deleted_objects, one.deleted_bytes),
        _objects(one.waiting_objects, one.waiting_bytes),
        format_size(one.copied_bytes) if one.copied_bytes else "-",
        format_size(one.freed_bytes) if one.freed_bytes > 0 else "-",
        _dollars(one.cost_dollars),
        _dollars(one.saved_dollars_month),
        f"{one.waiting_until:%Y-%m-%d %H:%M}Z" if one.waiting_until else "",
    )


def _objects(count: int, size_bytes: int) -> str:
    return f"{count} ({format_size(size_bytes)})" if count else "-"


def _dollars(value: float) -> str:
    return f"${value:.4f}" if value else "-"
