"""`drsync verify`: whether everything in the repository is as it was written."""

import click

from drsync.auditing import Auditing
from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.cli.hurt import print_hurt
from drsync.units import counted, format_size
from drsync.verify import VmReport


@click.command("verify")
@click.argument("vm", required=False)
@click.option("--read-data", is_flag=True, help="Also read every object as a whole and open every frame.")
@json_option
@pass_app
@click.pass_context
def command(ctx: click.Context, app: App, vm: str | None, *, read_data: bool) -> None:
    """Check that everything is as it was written.

    Of VM, or of all VMs in the repository: the chain of the log, and every
    object's presence and size; with --read-data every frame of them. Finds all
    damage, not only the first, and names the points that it hurts, and where; what is
    damaged is recorded for the host that can heal it. The exit code is that of the first.
    """
    session = app.session()
    names = session.known_vms(vm)
    with render.progress(app.clock) as progress:
        reports = [Auditing(session).verify(name, progress, read_data=read_data) for name in names]
    if app.as_json:
        render.document([views.report(report) for report in reports])
    else:
        for report in reports:
            _print(report, read_data=read_data)
    ctx.exit(next((problem.error.code for report in reports for problem in report.problems), 0))


def _print(report: VmReport, *, read_data: bool) -> None:
    what = f"{counted(report.points, 'point')}, {counted(report.objects, 'object')}, {format_size(report.stored_bytes)}"
    if read_data:
        what += f", {counted(report.frames, 'block')} read"
    found = counted(len(report.problems), "problem") if report.problems else "all as it was written"
    render.line(f"{report.vm}: {what}: {found}")
    for problem in report.problems:
        where = f"from point {problem.point} on: " if problem.point else ""
        render.line(f"  {where}{problem.error}")
        render.line(f"    remedy: {render.as_typed(problem.error.remedy)}")
    print_hurt(report.vm, report.points, report.hurt)
