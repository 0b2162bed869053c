"""`drsync repair`: block maps made anew, and what the points have lost."""

import click

from drsync.auditing import Auditing
from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.cli.hurt import print_hurt
from drsync.errors import PointsHurt
from drsync.repair import RepairReport
from drsync.units import counted


@click.command("repair")
@click.argument("vm", required=False)
@click.option("--read-data", is_flag=True, help="Read every object first, instead of relying on what is known.")
@click.option("--dry-run", is_flag=True, help="Say what would be made anew and what is lost; write nothing.")
@json_option
@pass_app
@click.pass_context
def command(ctx: click.Context, app: App, vm: str | None, *, read_data: bool, dry_run: bool) -> None:
    """Make block maps anew and say what is lost.

    Of VM, or of all VMs in the repository: a map that is missing, stale or damaged is
    made from the log, and says the same then. What no map can bring back is named: per
    point, disk and range of bytes. Deletes nothing. The exit code is 96 if points have lost something.
    """
    session = app.session()
    names = session.known_vms(vm)
    with render.progress(app.clock) as progress:
        reports = [Auditing(session).repair(name, progress, dry_run=dry_run, read_data=read_data) for name in names]
    if app.as_json:
        render.document([views.repair(report, dry_run=dry_run) for report in reports])
    else:
        for report in reports:
            _print(report, dry_run=dry_run)
    ctx.exit(_code(reports))


def _code(reports: list[RepairReport]) -> int:
    """That of points that have lost something; else that of a map that could not be written."""
    if any(report.hurt for report in reports):
        return PointsHurt.code
    errors = [made.error for report in reports for made in report.repairs if made.error is not None]
    return errors[0].code if errors else 0


def _print(report: RepairReport, *, dry_run: bool) -> None:
    made = [repair for repair in report.repairs if repair.error is None]
    did = "would be made" if dry_run else "made"
    state = f"{len(made)} block maps {did}" if made else "block maps are as they should be"
    render.line(f"{report.vm}: {counted(report.points, 'point')}: {state}")
    for repair in report.repairs:
        render.line(f"  point {repair.point}: {repair.reason}")
        if repair.error is not None:
            render.line(f"    {repair.error}")
    for name in report.useless:
        render.line(f"  {name} is of no use: nobody reads it, and it can be deleted")
    print_hurt(report.vm, report.points, report.hurt)
    if report.hurt:
        numbers = ", ".join(str(point.point) for point in report.hurt[:10])
        hurt = PointsHurt(hurt=len(report.hurt), total=report.points, vm=report.vm, points=numbers)
        render.line(f"  remedy: {render.as_typed(hurt.remedy)}")
