"""`drsync preflight`: whether a VM would come up elsewhere, asked before the disaster."""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Final

import click

from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.cli.restore import read_time
from drsync.errors import PointPruned, UnknownPoint, WontBoot
from drsync.preflight.findings import Verdict
from drsync.preflight.report import Report
from drsync.preflighting import Preflighting
from drsync.units import format_duration, format_size

COLUMNS: Final = ("check", "result", "reason", "what to do")
_WORDS: Final = {
    Verdict.OK: "it would come up in EC2, as far as can be seen",
    Verdict.WARNING: "it would come up in EC2, but see the warnings",
    Verdict.UNKNOWN: "whether it would come up in EC2 is not known in full",
    Verdict.FAILS: "it would NOT come up in EC2",
}


@click.command("preflight")
@click.argument("vm", required=False)
@click.option("--to", type=click.Choice(["ec2"]), required=True, help="Where it would come back.")
@click.option("--point", "number", type=click.IntRange(min=1), help="The point's number (drsync points VM).")
@click.option(
    "--at", metavar="TIME", callback=read_time, help="The newest point at or before TIME (RFC 3339, or local)."
)
@click.option(
    "--reader",
    type=click.Choice(["dissect", "libguestfs"]),
    help="What reads file systems; else the first of these that is installed.",
)
@json_option
@pass_app
@click.pass_context
def command(
    ctx: click.Context,
    app: App,
    vm: str | None,
    *,
    to: str,
    number: int | None,
    at: datetime | None,
    reader: str | None,
) -> None:
    """Say, before the disaster, whether a VM would come up in EC2.

    Looks into the disks of a point (the newest, or the one chosen; of VM, or of each VM), straight from the repository:
    nothing is restored, nothing is written but the result, which `drsync status` shows. The exit code is 118 if one
    would not come up.
    """
    if vm is None and number is not None:
        raise click.UsageError("--point belongs to one VM", ctx)
    session = app.session()
    check = partial(Preflighting(session).preflight, number=number, at=at, reader=reader or "")
    reports = list(_reports(check, session.known_vms(vm), alone=vm is not None))
    if app.as_json:
        render.document([views.preflight(report) for report in reports])
    else:
        for report in reports:
            _print(report)
    ctx.exit(WontBoot.code if any(report.verdict is Verdict.FAILS for report in reports) else 0)


def _reports(check: Callable[[str], Report], names: Sequence[str], *, alone: bool) -> Iterator[Report]:
    """A report of each VM; among several, one without such a point is passed over, and that is said."""
    for name in names:
        try:
            yield check(name)
        except (UnknownPoint, PointPruned) as err:
            if alone:
                raise
            render.note(f"passed over: {err}")


def _print(report: Report) -> None:
    when = f"{report.point_time:%Y-%m-%d %H:%M:%S}Z"
    render.line(f"{report.vm} at point {report.point} of {when}: {_WORDS[report.verdict]}")
    render.table(COLUMNS, [(f.check, f.verdict, f.reason, f.action) for f in report.findings])
    render.line(f"  read {format_size(report.read_bytes)} of the repository, in {format_duration(report.took_s)}")
