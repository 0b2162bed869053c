"""`drsync lock`: the locks that keep the repository's objects from being destroyed."""

from collections.abc import Iterator

import click

from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.errors import LocksMissing
from drsync.locks import LockPass, LockState, LockStatus
from drsync.session import Session
from drsync.units import counted, parse_duration
from drsync.upkeep import Upkeep

SLICE_S = 60.0
"""How often progress is told."""


@click.group("lock")
def command() -> None:
    """Look at the locks of the repository's objects, extend them."""


@command.command("status")
@json_option
@pass_app
@click.pass_context
def status(ctx: click.Context, app: App) -> None:
    """Show how long all objects are locked.

    Exit code 89 if that is less than a quarter of `lock`, or over.
    """
    found = Upkeep(app.session()).lock_status()
    if app.as_json:
        render.document(views.locks(found))
    else:
        render.line(described(found))
    if found.state in (LockState.LAPSING, LockState.LAPSED) and found.error is not None:
        render.alarm(found.error)
        ctx.exit(found.error.code)


def described(found: LockStatus) -> str:
    """How long all objects are locked, in a line."""
    until = f"all objects are locked until {found.until:%Y-%m-%d %H:%M}Z" if found.until else ""
    match found.state:
        case LockState.OFF:
            return "no locks: [repository] has no lock"
        case LockState.UNKNOWN:
            return f"locks: not known: {found.error}"
        case LockState.LOCKED:
            return f"locks: {until}"
        case _:
            return f"locks: {found.state}"


def _read_budget(_ctx: click.Context, _option: click.Parameter, text: str | None) -> float | None:
    try:
        return None if text is None else parse_duration(text)
    except ValueError as err:
        raise click.BadParameter(str(err)) from err


@command.command("extend")
@click.option(
    "--budget", callback=_read_budget, metavar="TIME", help="Stop after so long, such as 10m; else at the end."
)
@click.option("--dry-run", is_flag=True, help="Look at every lock, extend none.")
@json_option
@pass_app
def extend(app: App, budget: float | None, *, dry_run: bool) -> None:
    """Extend the locks that end within half of `lock`.

    Of all objects that are there; needs the maintenance's rights, and no key. The maintenance role of the daemon does
    it by itself.
    """
    session = app.session()
    if session.config.repository.lock is None:
        raise LocksMissing(url=session.config.repository.url, problem="[repository] has no lock")
    found = last = None
    for found in _slices(app, session, budget, dry_run=dry_run):
        if last is not None and not found.done:
            render.note(f"{counted(found.seen, 'object')} seen, {counted(found.extended, 'lock')} extended")
        last = found
    if found is None:
        return
    if app.as_json:
        render.document(views.lock_pass(found, dry_run=dry_run))
    else:
        _print(found, dry_run=dry_run)
    if found.problem is not None:
        raise found.problem


def _slices(app: App, session: Session, budget_s: float | None, *, dry_run: bool) -> Iterator[LockPass]:
    end_s = None if budget_s is None else app.clock.monotonic_s() + budget_s
    found: LockPass | None = None
    while found is None or not found.done:
        left_s = SLICE_S if end_s is None else min(SLICE_S, end_s - app.clock.monotonic_s())
        if left_s <= 0:
            return
        found = Upkeep(session).extend_locks(budget_s=left_s, resume=found, dry_run=dry_run)
        yield found


def _print(found: LockPass, *, dry_run: bool) -> None:
    verb = "would be extended" if dry_run else "extended"
    unlocked = f", {found.unlocked} of them had none" if found.unlocked else ""
    end = "" if found.done else "; not done: the time is over, and it begins anew with the next call"
    render.line(f"{counted(found.seen, 'object')} seen, {counted(found.extended, 'lock')} {verb}{unlocked}{end}")
    if found.done and found.earliest is not None and found.problem is None and not dry_run:
        render.line(f"all objects are locked until {found.earliest:%Y-%m-%d %H:%M}Z")
    if found.failed:
        render.line(f"{found.failed} could not be extended")
