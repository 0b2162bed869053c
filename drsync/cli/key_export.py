"""`drsync key export`: a key file for a host that shall read its own VMs alone."""

from pathlib import Path

import click

from drsync.cli import render
from drsync.cli.app import App, json_option, pass_app
from drsync.model import is_name


@click.command("export")
@click.argument("vms", metavar="VM...", nargs=-1, required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file to write, mode 0600.")
@click.option("--dry-run", is_flag=True, help="Say what would be written; no more.")
@json_option
@pass_app
def export(app: App, vms: tuple[str, ...], output: Path, *, dry_run: bool) -> None:
    """Write a key file with the keys of some VMs alone.

    A host that has it can capture, restore and verify these VMs, and read no others. It holds their keys of all
    generations. After `drsync key rotate` it is due again.
    """
    for vm in vms:
        if not is_name(vm):
            raise click.UsageError(f"{vm!r} is no name of a VM: 1 to 63 of a-z 0-9 . _ -")
    session = app.session()
    keys = session.host_keys.export(vms, output, dry_run=dry_run)
    new = sorted(set(keys.vms) - set(session.repository.vm_names()))
    if new:
        render.note(f"note: nothing of {', '.join(new)} is in the repository yet")
    if app.as_json:
        render.document(
            {"key_file": str(output), "vms": sorted(keys.vms), "generation": keys.newest, "dry_run": dry_run}
        )
        return
    verb = "would write" if dry_run else "wrote"
    render.line(f"{verb} {keys.described}, of generation 1 to {keys.newest}, to {output}, for its owner only")
