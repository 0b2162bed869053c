"""`drsync restore VM --to ec2`: an instance in AWS."""

from typing import TYPE_CHECKING

import click

from drsync.cli import render, views
from drsync.cli.app import App
from drsync.pace import TokenBucket
from drsync.recovery.cloud.cost import Cost
from drsync.recovery.cloud.recover import CloudRecovery
from drsync.recovery.cloud.request import CloudOutcome, CloudPlan, CloudRequest, Via
from drsync.target.ec2.aws import Aws, CloudOptions
from drsync.target.ec2.sizing import FAMILIES
from drsync.target.ec2.snapshot import Snapshots
from drsync.units import format_duration, format_size

if TYPE_CHECKING:
    from drsync.cli.restore import Options


def restore_ec2(app: App, options: "Options") -> None:
    """Bring an instance up, or say what that would do and what would refuse it."""
    started_s = app.clock.monotonic_s()
    request = _request(options)
    session = app.session()
    with Aws(CloudOptions(region=options.region)) as aws:
        pace = TokenBucket(session.config.limits.cloud, app.clock)
        recovery = CloudRecovery(session, aws, Snapshots(aws, app.clock, pace=pace), say=render.note)
        plan = recovery.plan(request)
        if options.dry_run:
            _show(app, plan, None)
            click.get_current_context().exit(plan.errors[0].code if plan.errors else 0)
        with render.progress(app.clock) as progress:
            outcome = recovery.run(plan, progress, started_s=started_s)
        _show(app, plan, outcome)


def _request(options: "Options") -> CloudRequest:
    if options.vm is None:
        raise ValueError("the command line checks that it is given")
    return CloudRequest(
        vm=options.vm,
        number=options.number,
        at=options.at,
        via=Via(options.via),
        import_bucket=options.bucket,
        import_role=options.import_role,
        convert_guest=options.convert_guest,
        fix_guest=options.fix_guest is not None,
        work_dir=options.work_dir,
        skip_preflight=options.skip_preflight,
        name=options.name,
        subnet=options.subnet,
        security_groups=options.security_groups,
        instance_type=options.instance_type,
        families=options.families or FAMILIES,
        boot_mode=options.boot_mode,
        private_ip=options.private_ip,
        keep_ip=options.keep_ip,
        tags=options.tags,
        start=not options.stopped,
        wait=options.wait,
        keep_on_error=options.keep_on_error,
        lost_at=options.lost_at,
    )


def _show(app: App, plan: CloudPlan, outcome: CloudOutcome | None) -> None:
    if app.as_json:
        render.document(views.cloud_recovery(plan, outcome))
        return
    did = "would restore" if outcome is None else "found" if outcome.was_there else "restored"
    when = f"{plan.point.time:%Y-%m-%d %H:%M:%S}Z"
    point = f"point {plan.point.number} of {when} ({plan.point.consistency}-consistent)"
    kind = plan.instance_type.name if plan.instance_type is not None else "no type"
    instance = "" if outcome is None else f" {outcome.instance.id}"
    render.line(f"{did} {plan.request.vm} at {point} as instance{instance} ({kind}, {plan.boot_mode}) in {plan.region}")
    for disk in plan.disks:
        render.line(f"  {disk.name}  {disk.volume_gib} GiB volume; {_source(plan, disk.name, outcome)}")
    for note in plan.notes:
        render.line(f"  {note.effect}: {note.subject}: {note.text}")
    for err in plan.errors:
        render.line(f"  PROBLEM: {err}")
        render.line(f"    remedy: {render.as_typed(err.remedy)}")
    if outcome is not None:
        _show_outcome(outcome)
    _show_cost(plan.cost if outcome is None else outcome.cost)


def _source(plan: CloudPlan, name: str, outcome: CloudOutcome | None) -> str:
    """Where a disk's bytes come from."""
    disk = next(disk for disk in plan.disks if disk.name == name)
    snapshot = "" if outcome is None or name not in outcome.snapshots else f"snapshot {outcome.snapshots[name]}, "
    if disk.existing is not None:
        return f"{snapshot}snapshot {disk.existing.id} has it already" if not snapshot else f"{snapshot}was there"
    over = f" over snapshot {disk.parent.id}" if disk.parent is not None else ""
    did = "to write" if outcome is None else "of blocks"
    return f"{snapshot}{format_size(disk.put_bytes)} {did}{over}"


def _show_outcome(outcome: CloudOutcome) -> None:
    instance = outcome.instance
    addresses = ", ".join(filter(None, (instance.private_ip, instance.public_ip))) or "none"
    render.line(f"  instance {instance.id}: {instance.state}; addresses: {addresses}; zone {instance.zone}")
    render.line(f"  image {outcome.image_id}; it and the snapshots stay, for another instance and for the way back")
    steps = ", ".join(f"{step.name} {format_duration(step.took_s)}" for step in outcome.steps)
    if steps:
        render.line(f"  steps: {steps}")
    render.line(f"  RTO {format_duration(outcome.rto_s)}, RPO {format_duration(outcome.rpo_s)}")


def _show_cost(cost: Cost) -> None:
    items = ", ".join(f"{item.amount:g} {item.unit} {item.what}" for item in cost.items)
    render.line(
        f"  cost: about {cost.once_usd:.2f} USD once and {cost.monthly_usd:.2f} USD a month ({items}; prices of "
        f"{cost.prices_where}, {cost.prices_of}; without the instance itself)"
    )
