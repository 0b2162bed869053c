"""How a command gets a secret: asked for at the terminal, or read from a file, an open file or stdin.

Never from an argument or the environment: other users, and what is started from here, could see those.
"""

import os
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from drsync.cli import render
from drsync.errors import KeyFileExposed, KeyFileMissing, KmsUnusable, PassphraseUnusable, UnknownSlot, WrongRecoveryKey
from drsync.format import Malformed
from drsync.format.keys import RecoveryKey
from drsync.format.ring import KMS, MIN_PASSPHRASE, PASSPHRASE, RECOVERY, Slot
from drsync.keyring import Keyring, OpenRing, Unlock, described

MAX_TYPED_CHARACTERS: Final = 1024
"""A recovery key has 69 with its dashes; more is something else."""
NOTHING_GIVEN: Final = "nothing was given, neither at a terminal nor by stdin, --secret-file or --secret-fd"
_RECOVERY_DIGITS: Final = 56

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlocking:
    """What the command line says of how the key ring is opened."""

    slot: str | None = None
    file: Path | None = None
    fd: int | None = None
    ring: int | None = None
    """An older ring than the newest."""


def unlock_options(command: Command) -> Command:
    """The options that say how the key ring is opened; they make one argument, `unlocking`."""
    for decorate in (
        click.option("--secret-fd", type=click.IntRange(min=0), help="Read the secret from this open file descriptor."),
        click.option("--secret-file", type=click.Path(path_type=Path), help="Read the secret from this file."),
        click.option(
            "--unlock", metavar="SLOT", help="Open the key ring with this slot; else KMS is tried, then asked."
        ),
    ):
        command = decorate(command)
    return command


def unlocker(keyring: Keyring, url: str, chosen: Unlocking, *, alone: bool) -> Unlock:
    """What opens the ring; asks for a secret once, when it is first called.

    `alone`: this is the only secret of the command, so that all of stdin is it.
    """
    known: list[Unlock] = []

    def unlock() -> OpenRing:
        if known:
            return known[0]()
        opening, opened = _first_opening(keyring, url, chosen, alone=alone)
        known.append(opening)
        return opened

    return unlock


def _first_opening(keyring: Keyring, url: str, chosen: Unlocking, *, alone: bool) -> tuple[Unlock, OpenRing]:
    slots = _slots(keyring, chosen)
    if chosen.file is None and chosen.fd is None and any(slot.kind == KMS for slot in slots):
        opening = _by_kms(keyring, chosen)
        try:
            return opening, opening()
        except KmsUnusable as err:
            if chosen.slot is not None:
                raise
            render.note(f"{err}; a recovery key or passphrase opens the repository, too")
    opening = _by_secret(keyring, url, chosen, slots, alone=alone)
    return opening, opening()


def _slots(keyring: Keyring, chosen: Unlocking) -> Sequence[Slot]:
    """The slots that can be used."""
    slots, _, _ = keyring.told()
    if chosen.slot is None:
        return slots
    named = [slot for slot in slots if slot.name == chosen.slot]
    if not named:
        raise UnknownSlot(slot=chosen.slot, use="to unlock with", known=described(slots))
    return named


def _by_kms(keyring: Keyring, chosen: Unlocking) -> Unlock:
    return lambda: keyring.open_with_kms(chosen.slot, number=chosen.ring)


def _by_secret(keyring: Keyring, url: str, chosen: Unlocking, slots: Sequence[Slot], *, alone: bool) -> Unlock:
    kinds = {slot.kind for slot in slots}
    words = [word for kind, word in ((RECOVERY, "recovery key"), (PASSPHRASE, "passphrase")) if kind in kinds]
    prompt = " or ".join(words) or "recovery key"
    typed = read_secret(prompt[0].upper() + prompt[1:], chosen.file, chosen.fd, alone=alone)
    if not typed.strip():
        raise WrongRecoveryKey(what=prompt, url=url, problem=NOTHING_GIVEN)
    try:
        recovery = RecoveryKey.from_text(typed)
    except Malformed as err:
        if PASSPHRASE not in kinds or (RECOVERY in kinds and _looks_like_a_recovery_key(typed)):
            raise WrongRecoveryKey(what="recovery key", url=url, problem=err) from err
        passphrase = typed.rstrip("\r\n")
        return lambda: keyring.open_with_passphrase(passphrase, number=chosen.ring)
    return lambda: keyring.open_with_recovery(recovery, number=chosen.ring)


def _looks_like_a_recovery_key(typed: str) -> bool:
    digits = "".join(typed.split()).replace("-", "")
    return len(digits) == _RECOVERY_DIGITS and digits.isascii() and digits.isalnum()


def new_passphrase(file: Path | None, fd: int | None) -> str:
    """A passphrase for a new slot; at a terminal it is asked for twice.

    Raises:
        PassphraseUnusable: it is too short, or no text.
    """
    typed = read_secret("New passphrase", file, fd, twice=True).rstrip("\r\n")
    if len(typed) < MIN_PASSPHRASE:
        problem = f"it has {len(typed)} characters, fewer than {MIN_PASSPHRASE}"
        raise PassphraseUnusable(problem=problem, least=MIN_PASSPHRASE)
    return typed


def read_secret(prompt: str, file: Path | None, fd: int | None, *, alone: bool = False, twice: bool = False) -> str:
    """A secret, from where the command line says.

    Raises:
        KeyFileExposed: others can read the file.
        KeyFileMissing: it can't be read.
    """
    if file is not None:
        return _from_file(file)
    if fd is not None:
        return _from_fd(fd, Path(f"/dev/fd/{fd}"))
    if sys.stdin.isatty():
        return str(click.prompt(prompt, hide_input=True, err=True, confirmation_prompt=twice))
    return sys.stdin.read(MAX_TYPED_CHARACTERS) if alone else sys.stdin.readline(MAX_TYPED_CHARACTERS)


def _from_file(path: Path) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise KeyFileMissing(path=path, problem=err.strerror) from err
    return _from_fd(fd, path)


def _from_fd(fd: int, path: Path) -> str:
    try:
        with os.fdopen(fd, "rb") as file:
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise KeyFileExposed(path=path, mode=oct(stat.S_IMODE(mode)))
            return file.read(MAX_TYPED_CHARACTERS).decode()
    except OSError as err:
        raise KeyFileMissing(path=path, problem=err.strerror) from err
    except UnicodeDecodeError as err:
        raise KeyFileMissing(path=path, problem="it is not UTF-8 text") from err
