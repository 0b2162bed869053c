"""`drsync points`: what can be restored."""

import click

from drsync.catalog import Point
from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.units import format_size

COLUMNS = ("VM", "point", "time", "kind", "consistency", "changed", "stored", "parent", "reason")


@click.command("points")
@click.argument("vm", required=False)
@json_option
@pass_app
def command(app: App, vm: str | None) -> None:
    """List the points of a VM, or of all VMs in the repository."""
    session = app.session()
    points = [point for name in session.known_vms(vm) for point in session.points(name)]
    if app.as_json:
        render.document([views.point(point) for point in points])
    elif not points:
        render.line("no points yet; drsync capture VM makes one")
    else:
        render.table(COLUMNS, [_row(point) for point in points], right=("point", "changed", "stored", "parent"))


def _row(point: Point) -> tuple[str, ...]:
    return (
        point.vm,
        str(point.number),
        f"{point.time:%Y-%m-%d %H:%M:%S}Z",
        point.kind,
        point.consistency,
        format_size(point.changed_bytes),
        format_size(point.stored_bytes),
        "-" if point.parent is None else str(point.parent),
        point.reason,
    )
