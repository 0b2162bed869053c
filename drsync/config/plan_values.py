"""What the values of a recovery plan mean: its words, lists and instants, and what is said of those that are none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from drsync.config.key import read_name, read_text, shown

WAYS: Final = ("ebs", "vm-import")
BOOT_MODES: Final = ("legacy-bios", "uefi")


class OnFailure(StrEnum):
    """What a VM that fails means for the others."""

    CONTINUE = "continue"
    STOP = "stop"


class WaitFor(StrEnum):
    """When a VM counts as up."""

    RUNNING = "running"
    AGENT = "agent"
    TCP = "tcp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """What is waited for."""

    what: WaitFor
    host: str = ""
    """Empty: the guest's own address, as libvirt knows it."""
    port: int = 0

    def __str__(self) -> str:
        return ":".join(filter(None, (self.what, self.host and _bracketed(self.host), str(self.port or ""))))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def read_wait(value: object) -> Wait:
    """ "running", "agent", "tcp:PORT" or "tcp:HOST:PORT"."""
    text = read_text(value)
    kind, _, rest = text.partition(":")
    host, _, port = rest.rpartition(":")
    if kind == WaitFor.TCP and port.isascii() and port.isdecimal() and 0 < int(port) < 65536:
        return Wait(what=WaitFor.TCP, host=host.strip("[]"), port=int(port))
    if text in (WaitFor.RUNNING, WaitFor.AGENT):
        return Wait(what=WaitFor(text))
    raise ValueError(f'{shown(text)} is nothing to wait for; write "running", "agent", "tcp:PORT" or "tcp:HOST:PORT"')


def read_names(value: object) -> Sequence[str]:
    """Names of VMs, each once."""
    if not isinstance(value, list) or not value:
        raise ValueError(f'{shown(value)} is not a list of VMs; write for example ["db", "web"]')
    names = [read_name(name) for name in value]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names {', '.join(twice)} twice")
    return tuple(names)


def read_networks(value: object) -> Mapping[str, str]:
    """Old network, bridge or device → new network."""
    if not isinstance(value, dict):
        raise ValueError(f'{shown(value)} is not a table; write for example {{ prod = "default" }}')  # noqa: TRY004  one kind of error for every bad value
    for old, new in value.items():
        if not isinstance(new, str) or not new:
            raise ValueError(f"{old} = {shown(new)} is not the name of a network; write it in quotes")
    return dict(value)


def read_tag_table(value: object) -> Mapping[str, str]:
    """Tags of a user's own."""
    if not isinstance(value, dict):
        raise ValueError(f'{shown(value)} is not a table; write for example {{ team = "dr" }}')  # noqa: TRY004  one kind of error for every bad value
    for key, text in value.items():
        if not isinstance(text, str):
            raise ValueError(f"{key} = {shown(text)} is not a tag; write its value in quotes")  # noqa: TRY004  as above
        if key.lower().startswith(("aws:", "drsync:")) or key == "Name":
            raise ValueError(f"the tag {key} is kept for others")
    return dict(value)


def read_boot_mode(value: object) -> str:
    """How an instance boots, in EC2's words."""
    if value not in BOOT_MODES:
        raise ValueError(f"{shown(value)} is not a boot mode; use {' or '.join(map(shown, BOOT_MODES))}")
    return str(value)


def read_way(value: object) -> str:
    """How disks get into AWS."""
    if value not in WAYS:
        raise ValueError(f"{shown(value)} is no way into AWS; use {' or '.join(map(shown, WAYS))}")
    return str(value)


def read_point(value: object) -> int:
    """A point's number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{shown(value)} is not a point's number (drsync points VM lists them)")
    return value


def read_instant(value: object) -> datetime:
    """An instant with its zone: the plan means the same on every machine."""
    try:
        parsed = value if isinstance(value, datetime) else datetime.fromisoformat(read_text(value))
    except ValueError:
        parsed = None
    if parsed is None or parsed.tzinfo is None:
        raise ValueError(f"{shown(value)} is not a time with its zone; write for example 2026-11-23T10:00:00Z")
    return parsed


def read_flag(value: object) -> bool:
    """Yes or no."""
    if not isinstance(value, bool):
        raise ValueError(f"{shown(value)} is not true or false")  # noqa: TRY004  one kind of error for every bad value
    return value


def read_on_failure(value: object) -> OnFailure:
    """Continue or stop."""
    if value not in list(OnFailure):
        raise ValueError(f'{shown(value)} is neither "continue" nor "stop"')
    return OnFailure(str(value))
