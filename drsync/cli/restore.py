"""`drsync restore`: a VM comes back."""

from datetime import datetime
from pathlib import Path

import click

from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.session import RestorePlan, RestoreRequest
from drsync.target.image import ImageFormat
from drsync.units import format_duration, format_size

FORMATS = click.Choice([image_format.value for image_format in ImageFormat])


def read_time(_ctx: click.Context, _option: click.Parameter, text: str | None) -> datetime | None:
    """A time as RFC 3339, or without a zone: then it is of this host's zone, and that is said."""
    if text is None:
        return None
    try:
        parsed = datetime.fromisoformat(text.strip())
    except ValueError:
        parsed = None
    if parsed is None or ":" not in text:  # a mere date would silently mean its first moment
        raise click.BadParameter(f'{text!r} is not a time; write "2026-11-23 10:00" or "2026-11-23T10:00:00Z"')
    if parsed.tzinfo is None:
        parsed = parsed.astimezone()
        render.note(f"{text} is taken in this host's zone: {parsed.isoformat()}")
    return parsed


@click.command("restore")
@click.argument("vm")
@click.option("--point", "number", type=click.IntRange(min=1), help="The point's number (drsync points VM).")
@click.option(
    "--at", metavar="TIME", callback=read_time, help="The newest point at or before TIME (RFC 3339, or local)."
)
@click.option("--to", type=click.Choice(["image"]), required=True, help="Where to: image = files in a directory.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="The directory.")
@click.option("--format", "image_format", type=FORMATS, default="qcow2", show_default=True, help="Of the files.")
@click.option("--disk", "disks", multiple=True, metavar="NAME", help="Just this disk; may be given again.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be written; write nothing.")
@json_option
@pass_app
def command(
    app: App,
    vm: str,
    number: int | None,
    at: datetime | None,
    to: str,
    output: Path,
    image_format: str,
    disks: tuple[str, ...],
    *,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Bring a VM back: its newest point, or the one chosen.

    Writes OUTPUT/DISK.FORMAT for every disk, and OUTPUT/VM.json with all that is
    needed to start the VM again. A file has its name only when it is complete.
    """
    if number is not None and at is not None:
        raise click.UsageError("--point and --at both choose the point: give one of them")
    request = RestoreRequest(
        vm=vm,
        output=output,
        number=number,
        at=at,
        image_format=ImageFormat(image_format),
        disks=disks,
        overwrite=overwrite,
    )
    session = app.session()
    plan = session.plan_restore(request)
    took_s: float | None = None
    if not dry_run:
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
