"""`drsync cloud sync | status | cleanup`: the points that wait in AWS (the pilot light)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.config import CloudSettings
from drsync.errors import ConfigInvalid
from drsync.units import format_duration, format_size

if TYPE_CHECKING:
    from drsync.recovery.cloud.pilot import Cleaned, PilotLight, PilotStatus, SyncOutcome
    from drsync.session import Session

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class _Opened:
    """One [[cloud]], and what is in it."""

    settings: CloudSettings
    session: "Session"
    light: "PilotLight"

    def vms(self, wanted: Sequence[str]) -> Sequence[str]:
        """The VMs that are asked for; without any, those that it is configured for."""
        if wanted:
            return [name for vm in wanted for name in self.session.known_vms(vm)]
        return self.settings.vms or self.session.known_vms()


def cloud_option(command: Command) -> Command:
    """Let `--cloud NAME` choose one of several."""
    return click.option("--cloud", "cloud", metavar="NAME", help="Just this [[cloud]] of the configuration; else all.")(
        command
    )


@click.command("sync")
@click.argument("vms", metavar="[VM]...", nargs=-1)
@cloud_option
@json_option
@pass_app
def sync(app: App, vms: tuple[str, ...], cloud: str | None) -> None:
    """Bring the newest points to AWS, and remove outdated ones.

    Only what AWS does not have is written: over the snapshots of the point before, what differs.
    """
    found: list[tuple[str, SyncOutcome]] = []
    for opened in _opened(app, cloud):
        with opened as one, render.progress(app.clock) as progress:
            found += [(one.settings.name, one.light.sync(vm, progress)) for vm in one.vms(vms)]
    if app.as_json:
        render.document([views.cloud_sync(name, outcome) for name, outcome in found])
        return
    for name, outcome in found:
        what = "was there already" if outcome.was_there else f"{format_size(outcome.sent_bytes)} written"
        snapshots = ", ".join(f"{disk} {snapshot}" for disk, snapshot in outcome.snapshots.items())
        render.line(
            f"{name}: {outcome.vm} point {outcome.point}: {what} in {format_duration(outcome.took_s)} ({snapshots})"
        )
        if outcome.removed:
            render.line(f"  removed: {', '.join(outcome.removed)}")


@click.command("status")
@click.argument("vms", metavar="[VM]...", nargs=-1)
@cloud_option
@json_option
@pass_app
def status(app: App, vms: tuple[str, ...], cloud: str | None) -> None:
    """Show which points wait in AWS, and how old they are."""
    found: list[tuple[str, PilotStatus]] = []
    for opened in _opened(app, cloud):
        with opened as one:
            found += [(one.settings.name, one.light.status(vm)) for vm in one.vms(vms)]
    if app.as_json:
        render.document([views.cloud_status(name, value) for name, value in found])
        return
    rows = [_row(name, value) for name, value in found]
    columns = ["cloud", "VM", "in AWS", "lag", "newest", "also there", "unfinished"]
    render.table(columns, rows, right=["in AWS", "lag", "newest", "unfinished"])


def _row(name: str, value: "PilotStatus") -> list[str]:
    others = [str(point.number) for point in value.points if point.is_whole and point.number != value.held]
    return [
        name,
        value.vm,
        "none" if value.held is None else str(value.held),
        "" if value.lag_s is None else format_duration(value.lag_s),
        str(value.newest),
        ", ".join(others),
        str(sum(not point.is_whole for point in value.points)),
    ]


@click.command("cleanup")
@click.argument("vms", metavar="[VM]...", nargs=-1)
@cloud_option
@click.option("--restored", is_flag=True, help="Also what restores, imports and failbacks made and no instance uses.")
@click.option("--bucket", metavar="NAME", help="With --restored: what killed imports left in this bucket, too.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed; remove nothing.")
@json_option
@pass_app
def cleanup(
    app: App, vms: tuple[str, ...], *, cloud: str | None, restored: bool, bucket: str | None, dry_run: bool
) -> None:
    """Remove what nobody needs in AWS.

    That is points beyond `keep`, and snapshots that were given up. Instances are never touched.
    """
    if bucket is not None and not restored:
        raise click.UsageError("--bucket belongs to --restored")
    found: list[tuple[str, Cleaned]] = []
    for opened in _opened(app, cloud):
        with opened as one:
            name, clean = one.settings.name, partial(one.light.cleanup, restored=restored, dry_run=dry_run)
            found += [(name, clean(vm, bucket=bucket)) for vm in one.vms(vms)]
    if app.as_json:
        render.document([views.cloud_cleanup(name, cleaned, dry_run=dry_run) for name, cleaned in found])
        return
    did = "would remove" if dry_run else "removed"
    for name, cleaned in found:
        for gone in cleaned.removed:
            render.line(f"{name}: {gone.vm}: {did} {gone.kind} {gone.id}: {gone.why}")
        for kept in cleaned.kept:
            render.line(f"{name}: {kept.vm}: kept {kept.kind} {kept.id}: {kept.why}")


def _opened(app: App, name: str | None) -> list[Any]:
    """The [[cloud]]s that are meant, to be entered one after the other."""
    session = app.session()
    known = ", ".join(cloud.name for cloud in session.config.clouds) or "none"
    chosen = [cloud for cloud in session.config.clouds if name is None or cloud.name == name]
    if not chosen:
        problem = f"there is no [[cloud]] {name or ''}".rstrip() + f"; it has {known}"
        raise ConfigInvalid(path=session.config.path, problem=problem, problems=(problem,))
    return [_open(app, session, cloud) for cloud in chosen]


@contextmanager
def _open(app: App, session: "Session", cloud: CloudSettings) -> Iterator[_Opened]:
    from drsync.pace import TokenBucket  # noqa: PLC0415  with the others
    from drsync.recovery.cloud.pilot import PilotLight  # noqa: PLC0415  boto3 takes a third of a second
    from drsync.target.ec2.aws import Aws, CloudOptions  # noqa: PLC0415  as above
    from drsync.target.ec2.snapshot import Snapshots  # noqa: PLC0415  as above

    with Aws(CloudOptions(region=cloud.region)) as aws:
        pace = TokenBucket(session.config.limits.cloud, app.clock)
        light = PilotLight(session, aws, Snapshots(aws, app.clock, pace=pace), keep=cloud.keep)
        yield _Opened(cloud, session, light)
