"""`drsync restore --plan FILE`: all VMs of a plan, wave by wave."""

from typing import TYPE_CHECKING

import click

from drsync.cli import render, views
from drsync.cli.app import App
from drsync.config.plan import load_plan
from drsync.errors import PlanFailed
from drsync.recovery.report import PlanReport, VmOutcome
from drsync.recovery.waves import PlanRun
from drsync.units import format_duration, format_size

if TYPE_CHECKING:
    from drsync.cli.restore import Options


def restore_plan(app: App, options: "Options") -> None:
    """Run a plan, or check it; the exit code is 80 if not all VMs are (or would come) up."""
    path = options.plan_path
    if path is None:
        raise ValueError("the command line checks that it is given")
    run = PlanRun(load_plan(path), options.site, app.session(), lost_at=options.lost_at, say=render.note)
    if options.dry_run:
        report = run.check()
    else:
        with render.progress(app.clock) as progress:
            report = run.run(progress)
    if app.as_json:
        render.document(views.plan_report(report))
    else:
        _show(report)
    if report.failed:
        names = ", ".join(outcome.vm for outcome in report.failed)
        err = PlanFailed(failed=len(report.failed), total=len(report.vms), names=names, path=path)
        if not app.as_json:
            render.error(err, as_json=False)
        click.get_current_context().exit(err.code)


def _show(report: PlanReport) -> None:
    columns = ["wave", "VM", "state", "domain", "point", "of", "data", "up after", "RPO", "what"]
    rows = [_row(outcome) for outcome in report.vms]
    render.table(columns, rows, right=["wave", "point", "data", "up after", "RPO"])
    for outcome in report.vms:
        for note in outcome.notes:
            render.line(f"{outcome.vm}: {note}")
        for err in outcome.errors:
            render.line(f"{outcome.vm}: PROBLEM: {err}")
            render.line(f"    remedy: {render.as_typed(err.remedy)}")
    did = "checked" if report.dry_run else "done"
    render.line(f"site {report.site} ({report.uri}): {did} in {format_duration(report.took_s)}")


def _row(outcome: VmOutcome) -> list[str]:
    return [
        str(outcome.wave),
        outcome.vm,
        outcome.came,
        outcome.domain,
        "" if outcome.point is None else str(outcome.point),
        "" if outcome.point_time is None else f"{outcome.point_time:%Y-%m-%d %H:%M:%S}Z",
        format_size(outcome.live_bytes) if outcome.live_bytes else "",
        "" if outcome.rto_s is None else format_duration(outcome.rto_s),
        "" if outcome.rpo_s is None else format_duration(outcome.rpo_s),
        "was there already" if outcome.was_there else outcome.errors[0].__class__.__name__ if outcome.errors else "",
    ]
