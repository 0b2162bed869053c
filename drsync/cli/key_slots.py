"""`drsync key list, add, remove, rotate`: what opens the repository, and the key of what is made from now on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.cli.unlocking import Unlocking, new_passphrase, unlock_options, unlocker
from drsync.errors import KeyFileMissing
from drsync.format.ring import KMS, PASSPHRASE, RECOVERY, Slot
from drsync.keyfile import read_key_file

if TYPE_CHECKING:
    from drsync.format.keys import Keys, RecoveryKey
    from drsync.keyring import Keyring, OpenRing, Unlock
    from drsync.session import Session

COLUMNS = ("slot", "kind", "added", "opened by")
_OPENED_BY = {RECOVERY: "the recovery key", PASSPHRASE: "a passphrase"}

dry_run_option = click.option("--dry-run", is_flag=True, help="Open the key ring and say what would be done; no more.")


@click.command("list")
@json_option
@pass_app
def list_slots(app: App) -> None:
    """Show what opens the repository, and which keys are here.

    As the repository says: no secret is needed for it, so nobody vouches for it.
    """
    session = app.session()
    slots, checks, number = session.host_keys.keyring().told()
    held = _held(session)
    if app.as_json:
        render.document(views.key_slots(slots, generation=len(checks), ring=number, held=held))
        return
    render.table(COLUMNS, [(s.name, s.kind, s.added[:10], _OPENED_BY.get(s.kind, s.key)) for s in slots])
    render.line(f"the repository's key is of generation {len(checks)}")
    path = session.config.repository.key_file
    here = "can't be read" if held is None else f"has {held.described}"
    behind = "" if held is None or held.newest >= len(checks) else "; drsync key recover brings it up to date"
    render.line(f"{path} {here}{behind}")


@click.command("add")
@click.argument("kind", type=click.Choice([RECOVERY, PASSPHRASE, KMS]))
@click.option("--name", metavar="NAME", help="The slot's name; else its kind, with a number if that is taken.")
@click.option("--kms-key", metavar="ARN", help="The KMS key, for a slot of that kind.")
@click.option("--kms-region", metavar="REGION", help="Its region; else that in its ARN, or of the environment.")
@click.option("--passphrase-file", type=click.Path(path_type=Path), help="Read the new passphrase from this file.")
@click.option("--passphrase-fd", type=click.IntRange(min=0), help="Read it from this open file descriptor.")
@unlock_options
@dry_run_option
@json_option
@pass_app
def add(
    app: App,
    kind: str,
    name: str | None,
    kms_key: str | None,
    kms_region: str | None,
    passphrase_file: Path | None,
    passphrase_fd: int | None,
    unlock: str | None,
    secret_file: Path | None,
    secret_fd: int | None,
    *,
    dry_run: bool,
) -> None:
    """Let something more open the repository.

    A second recovery key (printed this one time), a passphrase, or a key in AWS KMS. The key ring has to be opened
    for it, by a slot that is there.
    """
    if (kind == KMS) != (kms_key is not None):
        raise click.UsageError("--kms-key names the key of a slot of KMS, and only of such a one")
    session = app.session()
    keyring = session.host_keys.keyring()
    name = name or _free_name(kind, keyring.told()[0])
    unlocking = Unlocking(slot=unlock, file=secret_file, fd=secret_fd)
    opening = unlocker(keyring, session.config.repository.url, unlocking, alone=kind != PASSPHRASE)
    recovery, ring = _added(
        keyring, kind, name, opening, (kms_key or "", kms_region or ""), (passphrase_file, passphrase_fd), dry_run
    )
    if app.as_json:
        document = {"slot": name, "kind": kind, "ring": ring.number, "dry_run": dry_run}
        render.document(document if recovery is None else {**document, "recovery_key": recovery.to_text()})
        return
    render.line(f"{'would add' if dry_run else 'added'} slot {name}; the repository has {_names(ring.slots)}")
    if recovery is not None:
        render.line()
        render.line("Recovery key, shown only now. Write it down and keep it away from this host:")
        render.line()
        render.line(f"    {recovery.to_text()}")


def _added(
    keyring: "Keyring",
    kind: str,
    name: str,
    opening: "Unlock",
    kms: tuple[str, str],
    passphrase: tuple[Path | None, int | None],
    dry_run: bool,
) -> "tuple[RecoveryKey | None, OpenRing]":
    if kind == RECOVERY:
        recovery, ring = keyring.add_recovery(opening, name, dry_run=dry_run)
        return None if dry_run else recovery, ring
    if kind == KMS:
        key, region = kms
        return None, keyring.add_kms(opening, name, key, region or _region_of(key), dry_run=dry_run)
    opening()  # the secret that is there is asked for before the new one
    return None, keyring.add_passphrase(opening, name, new_passphrase(*passphrase), dry_run=dry_run)


@click.command("remove")
@click.argument("slot")
@unlock_options
@dry_run_option
@json_option
@pass_app
def remove(
    app: App, slot: str, unlock: str | None, secret_file: Path | None, secret_fd: int | None, *, dry_run: bool
) -> None:
    """Let a slot open the repository no more.

    The last recovery slot stays. Who has the slot's secret and kept the old key rings can still open those: only
    `drsync key rotate` behind it shuts him out of what is made from then on.
    """
    session = app.session()
    keyring = session.host_keys.keyring()
    unlocking = Unlocking(slot=unlock, file=secret_file, fd=secret_fd)
    ring = keyring.remove(
        unlocker(keyring, session.config.repository.url, unlocking, alone=True), slot, dry_run=dry_run
    )
    if app.as_json:
        render.document({"slot": slot, "ring": ring.number, "dry_run": dry_run})
        return
    render.line(f"{'would remove' if dry_run else 'removed'} slot {slot}; the repository has {_names(ring.slots)}")
    render.line("it opens what was made until now for who has it; drsync key rotate ends that for what comes")


@click.command("rotate")
@unlock_options
@dry_run_option
@json_option
@pass_app
def rotate(app: App, unlock: str | None, secret_file: Path | None, secret_fd: int | None, *, dry_run: bool) -> None:
    """Make a new key for all points from now on.

    What is there stays under its key, and readable. All slots open the new one, too. This host's key file gets it;
    others need `drsync key recover`, or a new file of `drsync key export`, and then: systemctl reload drsync.
    """
    session = app.session()
    unlocking = Unlocking(slot=unlock, file=secret_file, fd=secret_fd)
    keys = session.host_keys
    done = keys.rotate(unlocker(keys.keyring(), session.config.repository.url, unlocking, alone=True), dry_run=dry_run)
    path = session.config.repository.key_file
    if app.as_json:
        render.document(
            {
                "generation": done.generation,
                "ring": done.ring,
                "slots": list(done.slots),
                "made": done.made,
                "by_other": done.by_other,
                "key_file": str(path),
                "dry_run": dry_run,
            }
        )
        return
    if done.made:
        verb = "would make" if dry_run else "made"
        render.line(f"{verb} the key of generation {done.generation}, opened by {', '.join(done.slots)}")
    else:
        whose = "another rotation was first" if done.by_other else "it was made before, and this host lacked it"
        render.line(f"no new key: generation {done.generation} is there ({whose})")
    render.line(f"{path} {'would get' if dry_run else 'has'} it")
    render.line("other hosts: drsync key recover or drsync key export, then systemctl reload drsync")


def _held(session: "Session") -> "Keys | None":
    try:
        return read_key_file(session.config.repository.key_file)
    except KeyFileMissing:
        return None


def _free_name(kind: str, slots: Sequence[Slot]) -> str:
    taken = {slot.name for slot in slots}
    return next(name for n in range(1, len(taken) + 2) if (name := kind if n == 1 else f"{kind}-{n}") not in taken)


def _region_of(key: str) -> str:
    """The region in an ARN (arn:aws:kms:REGION:ACCOUNT:key/ID); "" = that of the environment."""
    parts = key.split(":")
    return parts[3] if len(parts) > 5 and parts[0] == "arn" else ""


def _names(slots: Sequence[Slot]) -> str:
    return ", ".join(slot.name for slot in slots)
