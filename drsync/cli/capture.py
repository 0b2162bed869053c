"""`drsync capture`: one point of one VM, now."""

import logging

import click

from drsync.capture import Outcome, Result
from drsync.catalog import Point, point_of
from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.errors import DrsyncError
from drsync.log import Segment
from drsync.session import Session
from drsync.units import format_duration, format_size

_LOGGER = logging.getLogger(__name__)


@click.command("capture")
@click.argument("vm")
@click.option("--full", is_flag=True, help="Send every disk whole, whatever the bitmaps say.")
@click.option("--take-over", is_flag=True, help="Write this VM's log although another drsync does: that one stops.")
@json_option
@pass_app
def command(app: App, vm: str, *, full: bool, take_over: bool) -> None:
    """Capture VM now: take a point, ship it, commit it.

    What an earlier capture left waiting in the spool is shipped first. When
    nothing has changed since the newest point, no new one is made. A full that is
    too large for the spool is read live; stopped in the middle, the next capture goes on.
    """
    session = app.session()
    started_s = app.clock.monotonic_s()
    with render.progress(app.clock) as progress:
        outcome = session.capture(vm, progress, full=full, take_over=take_over)
    took_s = app.clock.monotonic_s() - started_s
    _beat(session)
    if app.as_json:
        render.document(_document(outcome, took_s))
        return
    if shipped := _point(outcome.shipped_before):
        render.line(f"{_line(shipped)} (had waited in the spool)")
    point = _point(outcome.segment)
    if outcome.result is Result.SEEDING:
        render.line(f"{vm}: the seed was stopped; the next capture goes on with it")
    elif outcome.result is Result.UNCHANGED:
        render.line(f"{vm}: nothing changed since point {point.number if point else '?'}")
    elif point:
        render.line(f"{_line(point)}, in {format_duration(took_s)}")


def _beat(session: Session) -> None:
    try:
        session.beat()
    except DrsyncError as err:
        _LOGGER.warning("the point is safe, but the heartbeat was not written: %s", err)


def _point(segment: Segment | None) -> Point | None:
    if segment is None:
        return None
    return point_of(segment, segment.seq - 1 or None)


def _line(point: Point) -> str:
    sizes = f"{format_size(point.changed_bytes)} changed, {format_size(point.stored_bytes)} stored"
    reason = f" ({point.reason})" if point.reason else ""
    return f"{point.vm}: point {point.number}, {point.kind}{reason}, {sizes}"


def _document(outcome: Outcome, took_s: float) -> views.Document:
    point, shipped = _point(outcome.segment), _point(outcome.shipped_before)
    return {
        "vm": outcome.vm,
        "result": outcome.result,
        "point": views.point(point) if point else None,
        "shipped_before": views.point(shipped) if shipped else None,
        "checked_at": views.instant(outcome.checked_at),
        "took_seconds": round(took_s, 3),
    }
