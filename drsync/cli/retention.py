"""`drsync retention`: which points stay, and why. Reads only: `drsync prune` deletes."""

import click

from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.units import counted
from drsync.upkeep import Retained, Upkeep

COLUMNS = ("VM", "points", "stay", "would go", "rules")
EXPLAINED = ("point", "stored at", "", "reasons")


@click.command("retention")
@click.argument("vm", required=False)
@click.option("--explain", is_flag=True, help="Every point, with all the reasons for or against it.")
@json_option
@pass_app
def command(app: App, vm: str | None, *, explain: bool) -> None:
    """Show which points the rules keep, and why.

    Of VM, or of all VMs in the repository, as [retention], the pins and the store's times say now. Never deletes
    anything: it is the dry run of what the maintenance does.
    """
    session = app.session()
    found = [Upkeep(session).retained(name) for name in session.known_vms(vm)]
    if app.as_json:
        render.document([views.retained(one, explained=explain) for one in found])
    elif explain:
        for one in found:
            _explain(one)
    else:
        rows = [(o.vm, str(len(o.points)), str(len(o.points) - o.dropped), str(o.dropped), str(o.rules)) for o in found]
        render.table(COLUMNS, rows, right=("points", "stay", "would go"))


def _explain(one: Retained) -> None:
    render.line(f"{one.vm}: {one.rules}: of {counted(len(one.points), 'point')} {one.dropped} would go")
    taken = {aged.point: aged.time for aged in one.aged}
    rows = [
        (str(v.point), f"{taken[v.point]:%Y-%m-%d %H:%M:%S}Z", "stays" if v.keep else "goes", "; ".join(v.reasons))
        for v in one.verdicts
    ]
    render.table(EXPLAINED, rows, right=("point",))
