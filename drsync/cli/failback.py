"""`drsync failback VM --from ec2`: what an instance has changed comes home, as a new point."""

import click

from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.pace import TokenBucket
from drsync.recovery.cloud.cost import Cost
from drsync.recovery.failback.request import FailbackDisk, FailbackOutcome, FailbackPlan, FailbackRequest, Pass
from drsync.units import format_duration, format_size


@click.command("failback")
@click.argument("vm")
@click.option("--from", "source", type=click.Choice(["ec2"]), required=True, help="Where the VM runs now.")
@click.option("--region", help="The AWS region; else that of the environment.")
@click.option("--instance", metavar="ID", help="The instance; needed if the VM has several.")
@click.option(
    "--stop", is_flag=True, help="Stop the instance after a first pass, then bring home what was written since."
)
@click.option("--whole", is_flag=True, help="Read the volumes whole, whatever AWS says has changed.")
@click.option(
    "--take-over", is_flag=True, help="Although the log went on without the instance; its points stay, behind this one."
)
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; make nothing.")
@json_option
@pass_app
@click.pass_context
def command(
    ctx: click.Context,
    app: App,
    vm: str,
    *,
    source: str,
    region: str | None,
    instance: str | None,
    stop: bool,
    whole: bool,
    take_over: bool,
    dry_run: bool,
) -> None:
    """Bring home what an instance has changed, as a new point.

    Takes snapshots of the instance's volumes, reads only the blocks that changed since the recovery point, and appends
    them to the log, which is fenced first: a daemon that still protects the VM stops for it. Then `drsync restore VM
    --to libvirt` goes home.
    """
    from drsync.recovery.failback.run import Failback  # noqa: PLC0415  boto3 takes a third of a second
    from drsync.target.ec2.aws import Aws, CloudOptions  # noqa: PLC0415  as above
    from drsync.target.ec2.snapshot import Snapshots  # noqa: PLC0415  as above

    del source  # there is one so far
    request = FailbackRequest(vm=vm, instance=instance, whole=whole, take_over=take_over, stop=stop)
    session = app.session()
    with Aws(CloudOptions(region=region)) as aws:
        pace = TokenBucket(session.config.limits.cloud, app.clock)
        failback = Failback(session, aws, Snapshots(aws, app.clock), pace=pace, say=render.note)
        plan = failback.plan(request)
        if dry_run:
            _show_plan(app, plan)
            ctx.exit(plan.errors[0].code if plan.errors else 0)
        with render.progress(app.clock) as progress:
            outcome = failback.run(plan, progress)
    _show(app, outcome)


def _show_plan(app: App, plan: FailbackPlan) -> None:
    if app.as_json:
        render.document(views.failback(plan, None))
        return
    began = "a point that the log has not any more" if plan.origin is None else f"point {plan.origin.number}"
    render.line(
        f"would bring {plan.request.vm} home from instance {plan.instance.id} in {plan.region}, made of {began}"
    )
    render.line(f"  it would be the point behind {plan.head.number} of {plan.head.time:%Y-%m-%d %H:%M:%S}Z")
    _show_parts(plan)
    for err in plan.errors:
        render.line(f"  PROBLEM: {err}")
        render.line(f"    remedy: {render.as_typed(err.remedy)}")


def _show_parts(plan: FailbackPlan) -> None:
    for disk in plan.disks:
        render.line(f"  {disk.name}  {format_size(disk.size_bytes)}, volume {disk.volume_id}: {_how(disk)}")
    for note in plan.notes:
        render.line(f"  {note.effect}: {note.subject}: {note.text}")


def _how(disk: FailbackDisk) -> str:
    if disk.reference is None:
        return f"read as a whole, since {disk.reason}"
    return f"what changed since snapshot {disk.reference.snapshot.id} of point {disk.reference.point}"


def _show(app: App, outcome: FailbackOutcome) -> None:
    if app.as_json:
        render.document(views.failback(outcome.plan, outcome))
        return
    plan, last = outcome.plan, outcome.passes[-1]
    render.line(f"{plan.request.vm} came home from instance {outcome.instance.id}: point {last.point}")
    for number, one in enumerate(outcome.passes, 1):
        render.line(f"  pass {number}: {_of_pass(one)}")
    _show_parts(plan)
    if outcome.removed:
        render.line(f"  removed snapshots of earlier passes: {', '.join(outcome.removed)}")
    if outcome.snapshots:
        render.line(f"  snapshots {', '.join(outcome.snapshots)} stay: the next failback compares with them")
    _show_cost(outcome.cost)
    render.line(f"  instance {outcome.instance.id} is {outcome.instance.state}, and was left so")
    render.line(f"  next: drsync restore {plan.request.vm} --to libvirt --start")
    render.line(f"  then, where it is protected again: drsync capture {plan.request.vm} --take-over")


def _of_pass(one: Pass) -> str:
    when = f"the volumes of {one.time:%Y-%m-%d %H:%M:%S}Z"
    resumed = ", begun by an earlier run" if one.was_resumed else ""
    read = f"{format_size(one.read_bytes)} read in {format_duration(one.took_s)}"
    if not one.is_new:
        return f"{when}{resumed}: nothing that point {one.point} does not have ({read})"
    changed = f"{format_size(one.changed_bytes)} changed, {format_size(one.stored_bytes)} stored"
    return f"point {one.point} (epoch {one.epoch}), {when}{resumed}: {read}, {changed}"


def _show_cost(cost: Cost) -> None:
    items = ", ".join(f"{item.amount:g} {item.unit} {item.what}" for item in cost.items)
    render.line(
        f"  cost: about {cost.once_usd:.4f} USD once and {cost.monthly_usd:.2f} USD a month ({items}; prices of "
        f"{cost.prices_where}, {cost.prices_of}; without traffic out of AWS)"
    )
