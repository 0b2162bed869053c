"""`drsync restore VM --to libvirt`: a domain on this or another host."""

from typing import TYPE_CHECKING

import click

from drsync.cli import render, views
from drsync.cli.app import App
from drsync.recovery.recover import Recovery
from drsync.recovery.request import RecoveryPlan, RecoveryRequest
from drsync.target.image import ImageFormat
from drsync.target.libvirt_host import LibvirtHost
from drsync.units import format_duration, format_size

if TYPE_CHECKING:
    from drsync.cli.restore import Options


def restore_libvirt(app: App, options: "Options") -> None:
    """Bring a domain back, or say what that would do and what would refuse it."""
    if options.vm is None:
        raise ValueError("the command line checks that it is given")
    request = RecoveryRequest(
        vm=options.vm,
        number=options.number,
        at=options.at,
        uri=options.uri,
        name=options.name,
        pool=options.pool,
        disk_dir=options.disk_dir,
        networks=options.networks,
        keep_mac=options.keep_mac,
        image_format=ImageFormat(options.image_format) if options.image_format else None,
        start=options.start,
        replace=options.replace,
    )
    session = app.session()
    with LibvirtHost(request.uri) as host:
        recovery = Recovery(session, host)
        plan = recovery.plan(request)
        if options.dry_run:
            _show(app, plan, None)
            click.get_current_context().exit(plan.errors[0].code if plan.errors else 0)
        started_s = app.clock.monotonic_s()
        with render.progress(app.clock) as progress:
            recovery.run(plan, progress)
        _show(app, plan, app.clock.monotonic_s() - started_s)


def _show(app: App, plan: RecoveryPlan, took_s: float | None) -> None:
    if app.as_json:
        render.document(views.recovery(plan, plan.request.uri, took_s=took_s))
        return
    did = "would restore" if took_s is None else "restored"
    when = f"{plan.point.time:%Y-%m-%d %H:%M:%S}Z"
    took = "" if took_s is None else f", in {format_duration(took_s)}"
    point = f"point {plan.point.number} of {when} ({plan.point.consistency}-consistent)"
    render.line(f"{did} {plan.request.vm} at {point} as domain {plan.domain} ({plan.uuid}){took}")
    if plan.place is not None:
        render.line(f"  into {plan.place.description}")
    for disk in plan.disks:
        sizes = f"{format_size(disk.size_bytes)}, {format_size(disk.live_bytes)} of it data"
        render.line(f"  {disk.target}  {disk.path}  {disk.image_format}, {sizes}")
    _show_rest(plan, took_s)


def _show_rest(plan: RecoveryPlan, took_s: float | None) -> None:
    if plan.nvram is not None:
        render.line(f"  nvram  {plan.nvram.path}")
    for note in plan.notes:
        if note.effect != "problem":
            render.line(f"  {note.effect}: {note.subject}: {note.text}")
    for err in plan.errors:
        render.line(f"  PROBLEM: {err}")
        render.line(f"    remedy: {render.as_typed(err.remedy)}")
    if plan.replaced is not None and plan.request.replace and not plan.request.start:
        kept = ", ".join(sorted(plan.replaced.disks.values()))
        render.line(f"  the old disks stay: {kept}; remove them when the VM has started")
    if took_s is None:
        return
    virsh = f"virsh -c '{plan.request.uri}'"
    render.line(
        f"  it runs; its console: {virsh} console {plan.domain}"
        if plan.request.start
        else f"  start it: {virsh} start {plan.domain}"
    )
