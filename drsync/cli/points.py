"""`drsync points`: what can be restored."""

import logging
from collections.abc import Sequence

import click

from drsync.catalog import GroupPoint, LogSummary, Point, group_points
from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app, raise_first
from drsync.errors import DrsyncError
from drsync.overview import Overview
from drsync.packs import FAILURES
from drsync.pins import PinRecord
from drsync.session import Session
from drsync.units import format_size
from drsync.upkeep import Upkeep

_LOGGER = logging.getLogger(__name__)
SUMMARY_COLUMNS = ("VM", "segments", "oldest", "from", "newest", "of", "kind", "consistency")
COLUMNS = ("VM", "point", "time", "kind", "consistency", "group", "changed", "stored", "parent", "pinned", "reason")
GROUP_COLUMNS = ("group", "time", "skew", "points", "fit together")


@click.command("points")
@click.argument("vm", required=False)
@click.option("--group", metavar="GROUP", help="List the instants of this consistency group, with each member's point.")
@json_option
@pass_app
@click.pass_context
def command(ctx: click.Context, app: App, vm: str | None, group: str | None) -> None:
    """List the points of a VM, or of all VMs at a glance.

    Without a VM: the oldest and the newest point of each; with --json every point of every VM.
    Of a damaged log those are listed that can be read, and the exit code says so.
    """
    if vm is not None and group is not None:
        raise click.UsageError("VM and --group both choose the points: give one of them")
    session = app.session()
    if group is not None:
        _list_group(app, session, group)
        return
    names = session.known_vms(vm)
    if not app.as_json and len(names) != 1:
        _list_all(session)
        return
    damage: list[DrsyncError] = []
    if app.as_json:
        render.documents(views.point(point, pin) for name in names for point, pin in _pinned(session, name, damage))
    else:
        _list(_pinned(session, names[0], damage))
    if damage:
        raise_first(ctx, damage)


def _pinned(session: Session, vm: str, damage: list[DrsyncError]) -> list[tuple[Point, PinRecord | None]]:
    """The points of a VM, with their pins; of a damaged log those that can be read, and why there are no more."""
    pins, overview = Upkeep(session).pins(vm), Overview(session)
    try:
        found = overview.points(vm)
    except FAILURES as err:
        found = overview.readable_points(vm)
        damage.append(err)
        _LOGGER.warning("vm=%s its log is damaged, these are the points that can be read: %s", vm, err)
    return [(point, pins.of(point.number)) for point in found]


def _list(points: Sequence[tuple[Point, PinRecord | None]]) -> None:
    if not points:
        render.line("no points yet; drsync capture VM makes one")
    else:
        render.table(
            COLUMNS, [_row(point, pin) for point, pin in points], right=("point", "changed", "stored", "parent")
        )


def _list_all(session: Session) -> None:
    summaries = Overview(session).summaries()
    found = [summary for summary in summaries if summary.newest is not None]
    for summary in summaries:
        if summary.problem:
            render.note(f"{summary.vm}: {summary.problem}; remedy: {render.as_typed(f'drsync verify {summary.vm}')}")
    if not found:
        render.line("no points yet; drsync capture VM makes one")
        return
    render.table(SUMMARY_COLUMNS, [_summary_row(summary) for summary in found], right=("segments", "oldest", "newest"))
    render.note("drsync points VM lists each point of a VM")


def _summary_row(summary: LogSummary) -> tuple[str, ...]:
    oldest, newest = summary.oldest, summary.newest
    if oldest is None or newest is None:
        raise ValueError(summary)
    return (
        summary.vm,
        str(summary.segments),
        str(oldest.number),
        f"{oldest.time:%Y-%m-%d %H:%M:%S}Z",
        str(newest.number),
        f"{newest.time:%Y-%m-%d %H:%M:%S}Z",
        newest.kind,
        newest.consistency,
    )


def _list_group(app: App, session: Session, group: str) -> None:
    instants = group_points(group, (point for name in session.known_vms() for point in Overview(session).points(name)))
    if app.as_json:
        render.document([views.group_point(instant) for instant in instants])
    elif not instants:
        render.line(f"no points of a group {group} yet; drsync capture VM makes one for each of its VMs")
    else:
        render.table(GROUP_COLUMNS, [_group_row(instant) for instant in instants], right=("skew",))


def _group_row(instant: GroupPoint) -> tuple[str, ...]:
    numbers = [f"{vm}:{point.number}" for vm, point in instant.points.items()]
    return (
        instant.group,
        f"{instant.time:%Y-%m-%d %H:%M:%S}Z",
        _milliseconds(instant.skew_ms),
        " ".join([*numbers, *(f"{vm}:-" for vm in instant.missing)]),
        "yes" if instant.consistent else f"no: {instant.reason}",
    )


def _group_cell(point: Point) -> str:
    told = point.quiesce.group if point.quiesce else None
    if told is None:
        return "-"
    return f"{told.name}, {_milliseconds(told.skew_ms)}" if told.consistent else f"{told.name}, not together"


def _milliseconds(skew_ms: float) -> str:
    return f"{skew_ms:.1f} ms"


def _row(point: Point, pin: PinRecord | None) -> tuple[str, ...]:
    return (
        point.vm,
        str(point.number),
        f"{point.time:%Y-%m-%d %H:%M:%S}Z",
        point.kind,
        point.consistency,
        _group_cell(point),
        format_size(point.changed_bytes),
        format_size(point.stored_bytes),
        "-" if point.parent is None else str(point.parent),
        "-" if pin is None else "yes" if pin.until is None else f"until {pin.until:%Y-%m-%d %H:%M}Z",
        "; ".join(filter(None, (point.reason, point.quiesce.reason if point.quiesce else ""))),
    )
