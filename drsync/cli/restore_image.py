"""`drsync restore VM --to image`: the disks as files."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from drsync.cli import render, views
from drsync.cli.app import App
from drsync.cli.hurt import print_hurt
from drsync.errors import RestoredInPart
from drsync.preflight.fix import Image
from drsync.preflight.fix.prepare import check_available, prepare
from drsync.restore import Salvage
from drsync.restoring import RestorePlan, RestoreRequest, Restoring
from drsync.target.image import ImageFormat
from drsync.units import counted, format_duration, format_size

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
        allow_damaged=options.allow_damaged,
    )
    restoring = Restoring(app.session())
    plan = restoring.plan_restore(request)
    if options.fix_guest is not None:
        check_available(plan.disks[0].path)
    took_s: float | None = None
    salvage = Salvage()
    changes: Sequence[str] = ()
    if not options.dry_run:
        started_s = app.clock.monotonic_s()
        with render.progress(app.clock) as progress:
            salvage = restoring.restore(request, plan, progress)
        if options.fix_guest is not None:
            changes = _fix(request, plan)
        took_s = app.clock.monotonic_s() - started_s
    if app.as_json:
        document = {
            **views.restore(request, plan, took_s=took_s),
            "guest_changes": list(changes) if options.fix_guest and took_s else None,
            **views.salvage(plan, salvage, done=took_s is not None),
        }
        render.document(document)
    else:
        _print(request, plan, took_s)
    _tell_lost(request, plan, salvage, as_json=app.as_json)


def _tell_lost(request: RestoreRequest, plan: RestorePlan, salvage: Salvage, *, as_json: bool) -> None:
    """Say what had to be done without, and end as no whole restore does."""
    if not salvage.lost:
        if plan.hurt is not None and not as_json:
            print_hurt(request.vm, 1, [plan.hurt])
        return
    lost = ", ".join(f"{counted(len(blocks), 'block')} of disk {name}" for name, blocks in sorted(salvage.lost.items()))
    err = RestoredInPart(point=plan.point.number, vm=request.vm, lost=lost, path=plan.lost_path)
    if as_json:  # the document has told
        click.get_current_context().exit(err.code)
    raise err


def _fix(request: RestoreRequest, plan: RestorePlan) -> Sequence[str]:
    """Prepare the restored guest for EC2; what was changed is told as it happens."""
    images = [Image(path=disk.path, format=request.image_format) for disk in plan.disks]
    render.note("preparing the guest for EC2, in a small VM of its own (minutes, if this host has no KVM)")
    return prepare(request.vm, images, render.note)


def _print(request: RestoreRequest, plan: RestorePlan, took_s: float | None) -> None:
    did = "would restore" if took_s is None else "restored"
    point = plan.point
    when = f"{point.time:%Y-%m-%d %H:%M:%S}Z"
    took = "" if took_s is None else f", in {format_duration(took_s)}"
    render.line(f"{did} {request.vm} at point {point.number} of {when} ({point.consistency}-consistent){took}")
    for disk in plan.disks:
        render.line(f"  {disk.path}  {format_size(disk.size_bytes)}, {format_size(disk.live_bytes)} of it data")
    render.line(f"  {plan.definition_path}  what is needed to start it")
