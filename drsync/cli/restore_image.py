"""`drsync restore VM --to image`: the disks as files."""

from typing import TYPE_CHECKING

from drsync.cli import render, views
from drsync.cli.app import App
from drsync.session import RestorePlan, RestoreRequest
from drsync.target.image import ImageFormat
from drsync.units import format_duration, format_size

if TYPE_CHECKING:
    from drsync.cli.restore import Options


def restore_image(app: App, options: "Options") -> None:
    """Restore into files, or say what that would write."""
    if options.vm is None or options.output is None:
        raise ValueError("the command line checks that they are given")
    request = RestoreRequest(
        vm=options.vm,
        output=options.output,
        number=options.number,
        at=options.at,
        image_format=ImageFormat(options.image_format or ImageFormat.QCOW2),
        disks=options.disks,
        overwrite=options.overwrite,
    )
    session = app.session()
    plan = session.plan_restore(request)
    took_s: float | None = None
    if not options.dry_run:
        started_s = app.clock.monotonic_s()
        with render.progress(app.clock) as progress:
            session.restore(request, plan, progress)
        took_s = app.clock.monotonic_s() - started_s
    if app.as_json:
        render.document(views.restore(request, plan, took_s=took_s))
    else:
        _print(request, plan, took_s)


def _print(request: RestoreRequest, plan: RestorePlan, took_s: float | None) -> None:
    did = "would restore" if took_s is None else "restored"
    point = plan.point
    when = f"{point.time:%Y-%m-%d %H:%M:%S}Z"
    took = "" if took_s is None else f", in {format_duration(took_s)}"
    render.line(f"{did} {request.vm} at point {point.number} of {when} ({point.consistency}-consistent){took}")
    for disk in plan.disks:
        render.line(f"  {disk.path}  {format_size(disk.size_bytes)}, {format_size(disk.live_bytes)} of it data")
    render.line(f"  {plan.definition_path}  what is needed to start it")
