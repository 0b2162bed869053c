"""`drsync capture`: one point of one VM, now."""

import logging
from collections.abc import Mapping

import click

from drsync.beating import Beating
from drsync.capture import Outcome, Result
from drsync.capturing import Capturing
from drsync.catalog import Point
from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app, raise_first
from drsync.errors import DrsyncError
from drsync.log import Segment
from drsync.overview import Overview
from drsync.session import Session
from drsync.units import format_duration, format_size

_LOGGER = logging.getLogger(__name__)


@click.command("capture")
@click.argument("vm")
@click.option("--full", is_flag=True, help="Send every disk whole, whatever the bitmaps say.")
@click.option("--take-over", is_flag=True, help="Write this VM's log although another drsync does: that one stops.")
@json_option
@pass_app
@click.pass_context
def command(ctx: click.Context, app: App, vm: str, *, full: bool, take_over: bool) -> None:
    """Capture VM now: take a point, ship it, commit it.

    What an earlier capture left waiting in the spool is shipped first. When
    nothing has changed since the newest point, no new one is made. A full that is
    too large for the spool is read live; stopped in the middle, the next capture goes on.
    A VM of a group is captured with all of its group, at one instant.
    """
    session = app.session()
    capturing = Capturing(session)
    together = capturing.together(vm)
    names, group = [member.name for member in together], together[0].group
    started_s = app.clock.monotonic_s()
    with render.progresses(app.clock) as progress_of:
        results: Mapping[str, Outcome | Exception] = (
            {vm: capturing.capture(vm, progress_of(""), full=full, take_over=take_over)}
            if group is None
            else capturing.capture_together(names, progress_of, full=full, take_over=take_over)
        )
    took_s = app.clock.monotonic_s() - started_s
    _beat(session)
    own = results[vm]
    if isinstance(own, Exception) and (app.as_json or len(results) == 1):
        raise own  # with --json it is the document; what became of the others, `drsync points --group` tells
    if app.as_json and isinstance(own, Outcome):
        members = [_member(session, name, results[name], took_s) for name in names] if group else None
        told = {"name": group, "members": members} if group else None
        render.document({**_document(session, own, took_s), "group": told})
    else:
        if group:
            render.line(f"{vm} is in the group {group}: captured at one instant: {', '.join(names)}")
        for name in names:
            _print(session, name, results[name], took_s)
    if failed := [result for result in results.values() if isinstance(result, Exception)]:
        raise_first(ctx, failed)


def _print(session: Session, name: str, outcome: Outcome | Exception, took_s: float) -> None:
    if isinstance(outcome, Exception):
        render.line(f"{name}: FAILED: {outcome}")
        return
    if shipped := _point(session, outcome.vm, outcome.shipped_before):
        render.line(f"{_line(shipped)} (had waited in the spool)")
    point = _point(session, outcome.vm, outcome.segment)
    if outcome.result is Result.SEEDING:
        render.line(f"{name}: the seed was stopped; the next capture goes on with it")
    elif outcome.result is Result.UNCHANGED:
        render.line(f"{name}: nothing changed since point {point.number if point else '?'}")
    elif point:
        render.line(f"{_line(point)}, in {format_duration(took_s)}")


def _member(session: Session, name: str, outcome: Outcome | Exception, took_s: float) -> views.Document:
    if isinstance(outcome, Outcome):
        return {**_document(session, outcome, took_s), "error": None}
    if isinstance(outcome, DrsyncError):
        return {"vm": name, "result": "failed", "error": views.error(outcome)}
    raise outcome  # a bug


def _beat(session: Session) -> None:
    try:
        Beating(session).beat()
    except DrsyncError as err:
        _LOGGER.warning("the point is safe, but the heartbeat was not written: %s", err)


def _point(session: Session, vm: str, segment: Segment | None) -> Point | None:
    return None if segment is None else Overview(session).point_of(vm, segment)


def _line(point: Point) -> str:
    sizes = f"{format_size(point.changed_bytes)} changed, {format_size(point.stored_bytes)} stored"
    reason = f" ({point.reason})" if point.reason else ""
    return f"{point.vm}: point {point.number}, {point.kind}{reason}, {sizes}{_quiesced(point)}"


def _quiesced(point: Point) -> str:
    """What was reached, if more than a crash-consistent point of this VM alone was asked for."""
    told = point.quiesce
    if told is None:
        return ""
    words = f", {point.consistency}-consistent"
    if told.reason:
        words += f" ({told.reason})"
    if told.group is not None:
        words += f", with its group within {told.group.skew_ms:.1f} ms"
        words += "" if told.group.consistent else f", NOT together ({told.group.reason})"
    return words


def _document(session: Session, outcome: Outcome, took_s: float) -> views.Document:
    point, shipped = _point(session, outcome.vm, outcome.segment), _point(session, outcome.vm, outcome.shipped_before)
    return {
        "vm": outcome.vm,
        "result": outcome.result,
        "point": views.point(point) if point else None,
        "shipped_before": views.point(shipped) if shipped else None,
        "checked_at": views.instant(outcome.checked_at),
        "took_seconds": round(took_s, 3),
    }
