"""`drsync pin`: a point that stays, whatever the rules say."""

import re
from datetime import UTC, datetime, timedelta

import click

from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.pins import MAX_NOTE_CHARACTERS, PinRecord
from drsync.units import parse_duration
from drsync.upkeep import Upkeep


def _read_until(_ctx: click.Context, _option: click.Parameter, text: str | None) -> datetime | timedelta | None:
    """A time, or how long from now; a time without a zone is of this host's."""
    if text is None:
        return None
    try:
        if re.fullmatch(r"[\d.]+\s*[a-z]+", text.strip()):
            return timedelta(seconds=parse_duration(text))
        parsed = datetime.fromisoformat(text.strip())
    except (ValueError, OverflowError) as err:
        raise click.BadParameter(
            f'{text!r} is neither a time nor a duration; write "2027-01-31", "2027-01-31T10:00:00Z" or "90d"'
        ) from err
    if parsed.tzinfo is None:
        parsed = parsed.astimezone()
        render.note(f"{text} is taken in this host's zone: {parsed.isoformat()}")
    return parsed


def _read_note(_ctx: click.Context, _option: click.Parameter, text: str) -> str:
    if len(text) > MAX_NOTE_CHARACTERS:
        raise click.BadParameter(f"it has {len(text)} characters, more than {MAX_NOTE_CHARACTERS}")
    return text


@click.command("pin")
@click.argument("vm")
@click.option("--point", "number", type=click.IntRange(min=1), required=True, metavar="N", help="Which point.")
@click.option(
    "--until", callback=_read_until, metavar="TIME", help="When the pin ends; or how long, such as 90d. Else never."
)
@click.option("--note", default="", callback=_read_note, metavar="TEXT", help="Why, for those who come later.")
@click.option("--dry-run", is_flag=True, help="Check everything, pin nothing.")
@json_option
@pass_app
def command(app: App, vm: str, number: int, until: datetime | timedelta | None, note: str, *, dry_run: bool) -> None:
    """Keep a point, whatever the rules say.

    Until TIME, or until `drsync unpin`. Pinning a point again changes until when. It is the maintenance's right, not a
    host's (docs/iam.md).
    """
    now = app.clock.now()
    end = now + until if isinstance(until, timedelta) else until
    if end is not None and end <= now:
        raise click.UsageError(f"--until {end.astimezone(UTC):%Y-%m-%d %H:%M}Z is over: the pin would keep nothing")
    record = Upkeep(app.session()).pin(vm, number, until=end, note=note, dry_run=dry_run)
    show(app, vm, record, f"point {number} {'would be' if dry_run else 'is'} pinned", dry_run=dry_run)


def show(app: App, vm: str, record: PinRecord, told: str, *, dry_run: bool) -> None:
    """Say what became of a pin."""
    if app.as_json:
        render.document(
            {
                "vm": vm,
                "point": record.point,
                "until": views.instant(record.until),
                "note": record.note,
                "dry_run": dry_run,
            }
        )
        return
    until = f" until {record.until.astimezone(UTC):%Y-%m-%d %H:%M}Z" if record.until else ""
    render.line(f"{vm}: {told}{until}{f' ({record.note})' if record.note else ''}")
