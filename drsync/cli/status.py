"""`drsync status`: how well each VM is protected."""

import click

from drsync.catalog import DamageState, PreflightTold, VerifyState, VmStatus
from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.cli.lock import described
from drsync.journal import SeedProgress
from drsync.locks import LockState
from drsync.overview import Overview
from drsync.units import format_duration, format_size
from drsync.upkeep import Upkeep

_PROTECTION = ("VM", "state", "point", "time", "lag", "RPO", "spool", "seed")
COLUMNS = (*_PROTECTION, "preflight", "verified", "damage", "last error")


@click.command("status")
@json_option
@pass_app
@click.pass_context
def command(ctx: click.Context, app: App) -> None:
    """Show how well each VM is protected.

    Its newest point, the lag of that against the RPO, its spool, how far its seed is, what its last preflight came to,
    how far its objects are read again, which points are damaged, its last error. With
    `lock` in [repository] also how long all objects are locked; if that is less than a quarter of `lock`, the exit
    code is 89.
    """
    session = app.session()
    found, locked = Overview(session).status(), Upkeep(session).lock_status()
    if app.as_json:
        render.document([views.status(status, locked) for status in found])
    else:
        render.table(COLUMNS, [_row(status) for status in found], right=("point", "lag", "RPO", "spool"))
        if locked.state is not LockState.OFF:
            render.line(described(locked))
    if locked.state in (LockState.LAPSING, LockState.LAPSED) and locked.error is not None:
        render.alarm(locked.error)
        ctx.exit(locked.error.code)


def _row(status: VmStatus) -> tuple[str, ...]:
    return (
        status.vm,
        status.state,
        "-" if status.point is None else str(status.point),
        "-" if status.time is None else f"{status.time:%Y-%m-%d %H:%M:%S}Z",
        "-" if status.lag_s is None else format_duration(status.lag_s),
        "-" if status.rpo_s is None else format_duration(status.rpo_s),
        format_size(status.spool_bytes),
        "-" if status.seed is None else _seed(status.seed),
        "-" if status.preflight is None else _preflight(status.preflight),
        "-" if status.verified is None else _verified(status.verified),
        "-" if status.damage is None else _damage(status.damage),
        status.error,
    )


def _verified(state: VerifyState) -> str:
    """How far the present pass is, and when the one before it had read everything."""
    ended = "" if state.ended_at is None else f", all on {state.ended_at:%Y-%m-%d}"
    return f"{100 * state.done:.0f} %{ended}"


def _damage(state: DamageState) -> str:
    """Which points are hurt; above all whether the newest one is."""
    if not state.points:
        return "healed"
    newest = "the newest" if state.newest_is_hurt else "not the newest"
    return f"{len(state.points)} {'point' if len(state.points) == 1 else 'points'}, {newest}"


def _preflight(told: PreflightTold) -> str:
    """What the last check came to, and of which point."""
    found = [
        f"{n} {word}" for n, word in ((told.fails, "fail"), (told.unknown, "unknown"), (told.warnings, "warn")) if n
    ]
    return f"{told.target}: {', '.join(found) or 'ok'} (point {told.point})"


def _seed(seed: SeedProgress) -> str:
    """How much of the present round is read."""
    percent = 100 * seed.read_bytes // seed.total_bytes if seed.total_bytes else 0
    again = f", round {seed.round_number}" if seed.round_number > 1 else ""
    return f"{min(percent, 100)} % of {format_size(seed.total_bytes)}{again}"
