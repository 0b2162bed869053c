"""`drsync restore`: a VM comes back, or all VMs of a plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import click

from drsync.cli import render
from drsync.cli.app import App, json_option, pass_app
from drsync.cli.restore_image import restore_image
from drsync.target.image import ImageFormat

FORMATS: Final = click.Choice([image_format.value for image_format in ImageFormat])
_TARGETS: Final = ("image", "libvirt", "ec2")
_OWNERS: Final[Mapping[str, tuple[str, ...]]] = {
    "--output": ("image",),
    "--disk": ("image",),
    "--overwrite": ("image",),
    "--fix-guest": ("image", "ec2"),
    "--work-dir": ("ec2",),
    "--skip-preflight": ("ec2",),
    "--allow-damaged": ("image",),
    "--format": ("image", "libvirt"),
    "--point": _TARGETS,
    "--at": _TARGETS,
    "--uri": ("libvirt",),
    "--name": ("libvirt", "ec2"),
    "--pool": ("libvirt",),
    "--disk-dir": ("libvirt",),
    "--network": ("libvirt",),
    "--keep-mac": ("libvirt",),
    "--start": ("libvirt", "ec2"),
    "--replace": ("libvirt",),
    "--site": ("plan",),
    "--lost-at": ("ec2", "plan"),
    "--via": ("ec2",),
    "--bucket": ("ec2",),
    "--import-role": ("ec2",),
    "--convert-guest": ("ec2",),
    "--region": ("ec2",),
    "--subnet": ("ec2",),
    "--security-group": ("ec2",),
    "--instance-type": ("ec2",),
    "--family": ("ec2",),
    "--boot-mode": ("ec2",),
    "--private-ip": ("ec2",),
    "--keep-ip": ("ec2",),
    "--tag": ("ec2",),
    "--stopped": ("ec2",),
    "--wait": ("ec2",),
    "--keep-on-error": ("ec2",),
}
"""Which way of restoring each option belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line, parsed."""

    vm: str | None
    number: int | None
    at: datetime | None
    to: str | None
    output: Path | None
    image_format: str | None
    disks: tuple[str, ...]
    overwrite: bool
    fix_guest: str | None
    allow_damaged: bool
    work_dir: Path | None
    skip_preflight: bool
    uri: str
    name: str | None
    pool: str | None
    disk_dir: Path | None
    networks: Mapping[str, str]
    keep_mac: bool | None
    start: bool
    replace: bool
    plan_path: Path | None
    site: str | None
    lost_at: datetime | None
    dry_run: bool
    via: str
    bucket: str | None
    import_role: str
    convert_guest: bool
    region: str | None
    subnet: str | None
    security_groups: tuple[str, ...]
    instance_type: str | None
    families: tuple[str, ...]
    boot_mode: str | None
    private_ip: str | None
    keep_ip: bool
    tags: Mapping[str, str]
    stopped: bool
    wait: bool
    keep_on_error: bool


def read_time(_ctx: click.Context, _option: click.Parameter, text: str | None) -> datetime | None:
    """A time as RFC 3339, or without a zone: then it is of this host's zone, and that is said."""
    if text is None:
        return None
    try:
        parsed = datetime.fromisoformat(text.strip())
    except ValueError:
        parsed = None
    if parsed is None or ":" not in text:  # a mere date would silently mean its first moment
        raise click.BadParameter(f'{text!r} is not a time; write "2026-11-23 10:00" or "2026-11-23T10:00:00Z"')
    if parsed.tzinfo is None:
        parsed = parsed.astimezone()
        render.note(f"{text} is taken in this host's zone: {parsed.isoformat()}")
    return parsed


def read_networks(_ctx: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> Mapping[str, str]:
    """OLD=NEW, each OLD once."""
    networks: dict[str, str] = {}
    for text in texts:
        old, _, new = text.rpartition("=")
        if not old or not new:
            raise click.BadParameter(f"{text!r} is not OLD=NEW; --dry-run shows which networks the VM had")
        if old in networks:
            raise click.BadParameter(f"{old} is mapped twice")
        networks[old] = new
    return networks


def read_tags(_ctx: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> Mapping[str, str]:
    """KEY=VALUE, each KEY once; AWS's and drsync's own are not for users."""
    tags: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise click.BadParameter(f"{text!r} is not KEY=VALUE")
        if key.lower().startswith(("aws:", "drsync:")) or key == "Name":
            raise click.BadParameter(f"{key} is kept for others; --name sets the Name")
        if len(key) > 128 or len(value) > 256:
            raise click.BadParameter(f"{key}: a key has up to 128 characters, a value up to 256")
        if key in tags:
            raise click.BadParameter(f"{key} is given twice")
        tags[key] = value
    return tags


@click.command("restore")
@click.argument("vm", required=False)
@click.option("--point", "number", type=click.IntRange(min=1), help="The point's number (drsync points VM).")
@click.option(
    "--at", metavar="TIME", callback=read_time, help="The newest point at or before TIME (RFC 3339, or local)."
)
@click.option(
    "--to", type=click.Choice(_TARGETS), help="image = files in a directory; libvirt = a domain; ec2 = an instance."
)
@click.option("--format", "image_format", type=FORMATS, help="Of the disks; else qcow2, as domains: as they were.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="image: the directory.")
@click.option("--disk", "disks", multiple=True, metavar="NAME", help="image: just this disk; may be given again.")
@click.option("--overwrite", is_flag=True, help="image: replace files that exist.")
@click.option(
    "--fix-guest",
    type=click.Choice(["ec2"]),
    is_flag=False,
    flag_value="ec2",
    help="image, ec2: prepare the guest for EC2 on the way: initramfs, fstab, network, console (docs/preflight.md).",
)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="ec2: for --fix-guest, where the disks are files meanwhile; else /var/tmp.",
)
@click.option(
    "--skip-preflight", is_flag=True, help="ec2: bring it up although it would not boot, as far as can be seen."
)
@click.option(
    "--allow-damaged",
    is_flag=True,
    help="image: also of a point that has lost something: the rest, with a list of what is missing.",
)
@click.option("--uri", default="qemu:///system", show_default=True, help="libvirt: the host.")
@click.option("--name", metavar="NEW", help="Another name; a domain is then a copy, with a uuid of its own.")
@click.option("--pool", help="libvirt: the storage pool for the disks; else the VM's own, else `default`.")
@click.option(
    "--disk-dir", type=click.Path(path_type=Path, file_okay=False), help="libvirt: a directory, instead of a pool."
)
@click.option(
    "--network",
    "networks",
    multiple=True,
    metavar="OLD=NEW",
    callback=read_networks,
    help="libvirt: a network, bridge or device = network here, or bridge:NAME; OLD * = all others; may be given again.",
)
@click.option("--keep-mac/--new-mac", default=None, help="libvirt: the MAC addresses; kept, unless it is a copy.")
@click.option("--start", is_flag=True, help="libvirt: start it; an instance starts anyway.")
@click.option(
    "--replace", is_flag=True, help="libvirt: put it in place of the domain that is there, which must be off."
)
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="All VMs of a plan (docs/plan.md).")
@click.option("--site", metavar="NAME", help="plan: the site; needed if the plan has several.")
@click.option(
    "--lost-at", metavar="TIME", callback=read_time, help="ec2, plan: when the site was lost, for the RPO reached."
)
@click.option(
    "--via", type=click.Choice(["ebs", "vm-import"]), default="ebs", show_default=True, help="ec2: the way in."
)
@click.option("--bucket", help="ec2: where images lie while VM Import reads them (drsync cloud setup).")
@click.option("--import-role", default="vmimport", show_default=True, help="ec2: the role that VM Import takes on.")
@click.option(
    "--convert-guest", is_flag=True, help="ec2: let AWS change drivers, network and boot loader (ImportImage)."
)
@click.option("--region", help="ec2: the AWS region; else that of the environment.")
@click.option("--subnet", metavar="ID", help="ec2: the subnet; else the default VPC's.")
@click.option("--security-group", "security_groups", multiple=True, metavar="ID", help="ec2: may be given again.")
@click.option("--instance-type", metavar="TYPE", help="ec2: else the cheapest that has the VM's processors and memory.")
@click.option(
    "--family", "families", multiple=True, metavar="NAME", help="ec2: choose among these; may be given again."
)
@click.option("--boot-mode", type=click.Choice(["legacy-bios", "uefi"]), help="ec2: else as the point tells.")
@click.option("--private-ip", metavar="IP", help="ec2: the instance's address in the subnet.")
@click.option("--keep-ip", is_flag=True, help="ec2: the address that the VM's definition gave it.")
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="K=V",
    callback=read_tags,
    help="ec2: on all that is made; may be given again.",
)
@click.option("--stopped", is_flag=True, help="ec2: stop the instance as soon as it runs.")
@click.option("--wait", is_flag=True, help="ec2: until EC2's status checks have passed.")
@click.option("--keep-on-error", is_flag=True, help="ec2: remove nothing if it fails; the next run goes on with it.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; write nothing.")
@json_option
@pass_app
@click.pass_context
def command(ctx: click.Context, app: App, /, **words: object) -> None:
    """Bring a VM back: its newest point, or the one chosen.

    As files: OUTPUT/DISK.FORMAT for every disk, and OUTPUT/VM.json with all that is
    needed to start the VM. As a libvirt domain: its disks in a pool, its XML
    rewritten for the host. As an EC2 instance: its disks as EBS snapshots. Or, with
    --plan, all VMs of a plan, wave by wave.
    """
    options = Options(**words)  # type: ignore[arg-type]  # click made each of them as its option says
    way = "plan" if options.plan_path is not None else options.to or ""
    _check_way(ctx, options, way)
    if way == "image":
        restore_image(app, options)
    elif way == "libvirt":
        from drsync.cli.restore_libvirt import restore_libvirt  # noqa: PLC0415  images need no libvirt

        restore_libvirt(app, options)
    elif way == "ec2":
        from drsync.cli.restore_ec2 import restore_ec2  # noqa: PLC0415  the others need no AWS

        restore_ec2(app, options)
    else:
        from drsync.cli.restore_plan import restore_plan  # noqa: PLC0415  as above

        restore_plan(app, options)


def _check_way(ctx: click.Context, options: Options, way: str) -> None:
    """Every option that was given must belong to the way that was chosen."""
    if way != "plan" and options.vm is None:
        raise click.UsageError("Missing argument 'VM'", ctx)
    if not way:
        raise click.UsageError(f"Missing option '--to'. Choose from: {', '.join(_TARGETS)} (or give --plan)", ctx)
    if way == "plan" and (options.vm is not None or options.to is not None):
        raise click.UsageError("--plan names its VMs and site itself: give neither VM nor --to", ctx)
    if way == "image" and options.output is None:
        raise click.UsageError("Missing option '--output': the directory for the images", ctx)
    default = click.core.ParameterSource.DEFAULT
    for option in (p for p in ctx.command.params if p.opts and p.opts[0] in _OWNERS):
        owners = _OWNERS[option.opts[0]]
        if way not in owners and ctx.get_parameter_source(option.name or "") is not default:
            belongs = " or ".join("--plan" if owner == "plan" else f"--to {owner}" for owner in owners)
            raise click.UsageError(f"{option.opts[0]} belongs to {belongs}", ctx)
    _check_choices(options)


def _check_choices(options: Options) -> None:
    """What excludes each other must not be given together."""
    exclusive = (
        (
            options.number is not None,
            options.at is not None,
            "--point and --at both choose the point: give one of them",
        ),
        (options.start, options.stopped, "--start and --stopped contradict each other"),
        (
            options.private_ip is not None,
            options.keep_ip,
            "--private-ip and --keep-ip both choose the address: give one of them",
        ),
        (
            options.instance_type is not None,
            bool(options.families),
            "--instance-type and --family both choose the type: give one of them",
        ),
        (
            options.fix_guest is not None,
            bool(options.disks) or options.allow_damaged,
            "--fix-guest needs all disks of the VM: it can't be given with --disk or --allow-damaged",
        ),
        (
            options.fix_guest is not None,
            options.convert_guest,
            "--fix-guest and --convert-guest both change the guest: give one of them",
        ),
        (options.work_dir is not None, options.fix_guest is None, "--work-dir belongs to --fix-guest"),
        (
            options.pool is not None,
            options.disk_dir is not None,
            "--pool and --disk-dir both choose the place: give one of them",
        ),
    )
    for one, other, problem in exclusive:
        if one and other:
            raise click.UsageError(problem)
