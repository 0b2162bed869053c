"""A key of the configuration file, and how each kind of value is read.

Every reader takes what TOML made of the value and raises ValueError with a
message that shows the value and says what is right.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from drsync.model import is_name
from drsync.pace import MINUTES_OF_DAY, UNLIMITED, Rate
from drsync.units import parse_duration, parse_size

E = TypeVar("E", bound=StrEnum)
Parser = Callable[[object], object]
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of the file, as its documentation and its reader see it."""

    name: str
    parse: Parser
    meaning: str
    default: object = None
    """As it would be written in TOML; None for a key that has no value when it is left out."""
    why: str
    """Why this default; for a key without one, why it can (or can't) be left out."""
    required: bool = False


def read_text(value: object) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{shown(value)} is not a text; write it in quotes")
    return value


def read_name(value: object) -> str:
    """A name of a VM, disk or host (see model.NAME_PATTERN)."""
    text = read_text(value)
    if not is_name(text):
        raise ValueError(f"{shown(text)} is not a name; use 1 to 63 of a-z 0-9 . _ - and start with a letter or digit")
    return text


def read_path(value: object) -> Path:
    """A path, as written; a relative one is completed by the reader of the file."""
    text = read_text(value)
    if text.startswith("~") or "\0" in text:
        raise ValueError(f"{shown(text)} is not a path that can be used; write it in full, as /home/NAME/...")
    return Path(text)


def read_size(value: object) -> int:
    """Bytes."""
    if not isinstance(value, str):
        raise ValueError(f'{shown(value)} is not a size; write it in quotes with its unit, for example "64MiB"')  # noqa: TRY004  one kind of error for every bad value
    return parse_size(value)


def read_rate(value: object) -> Rate:
    """Bytes a second: a size with or without "/s" behind it, or "unlimited"."""
    if value == "unlimited":
        return UNLIMITED
    return Rate(bytes_per_s=read_size(value.strip().removesuffix("/s") if isinstance(value, str) else value))


def read_time_zone(value: object) -> ZoneInfo | None:
    """Whose clock on the wall counts; None: this host's."""
    text = read_text(value)
    if text == "local":
        return None
    try:
        return ZoneInfo(text)
    except (ValueError, OSError, ZoneInfoNotFoundError) as err:
        problem = (
            'is no time zone that this host knows; write for example "Europe/Berlin", or "local" for the host\'s own'
        )
        raise ValueError(f"{shown(text)} {problem}") from err


def read_minute_of_day(value: object) -> int:
    """Minutes since midnight."""
    match = re.fullmatch(r"(\d{2}):(\d{2})", value) if isinstance(value, str) else None
    minutes = int(match[1]) * 60 + int(match[2]) if match is not None and int(match[2]) < 60 else -1
    if not 0 <= minutes <= MINUTES_OF_DAY:
        raise ValueError(f'{shown(value)} is not a time of day; write "08:00", from "00:00" to "24:00"')
    return minutes


def read_days(value: object) -> frozenset[int]:
    """Days of the week, 0 is Monday: single ones and ranges, with commas in between."""
    found: set[int] = set()
    for part in read_text(value).replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise ValueError(
                f'{shown(value)} are no days; write for example "mon-fri" or "sat,sun" ({", ".join(DAYS)})'
            )
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found |= {day % 7 for day in range(begin, end + 1 if end >= begin else end + 8)}
    return frozenset(found)


def read_duration(value: object) -> float:
    """Seconds."""
    if not isinstance(value, str):
        raise ValueError(f'{shown(value)} is not a time; write it in quotes with its unit, for example "5m"')  # noqa: TRY004  as in read_size
    return parse_duration(value)


def read_at_least_1s(value: object) -> float:
    """Seconds, one or more."""
    seconds = read_duration(value)
    if seconds < 1:
        raise ValueError(f"{shown(value)} is too short; 1s is the least")
    return seconds


def read_within(value: object) -> float | None:
    """Seconds, a day or more; None for "never"."""
    if value == "never":
        return None
    seconds = read_duration(value)
    if seconds < 86400:
        raise ValueError(f"{shown(value)} is too short; 1d is the least (`drsync verify --read-data` reads all now)")
    return seconds


def read_switch(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{shown(value)} is neither true nor false; write it without quotes")  # noqa: TRY004  as in read_size
    return value


def one_of(kind: type[E]) -> Parser:
    """A reader of the values of an enum."""

    def read(value: object) -> E:
        if not isinstance(value, str) or value not in list(kind):
            raise ValueError(f"{shown(value)} is not known; use {' or '.join(shown(str(known)) for known in kind)}")
        return kind(value)

    return read


def read_parallel(value: object) -> int:
    """A number of VMs at a time."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64:
        raise ValueError(f"{shown(value)} is not a whole number from 1 to 64")
    return value


def read_repository_url(value: object) -> str:
    """The URL of a directory or bucket, without a slash at its end."""
    text = read_text(value)
    match = re.fullmatch(r"file://(/[^?#]*)|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#]*)?", text)
    if match is None:
        raise ValueError(f'{shown(text)} is not a repository; write "file:///DIRECTORY" or "s3://BUCKET/PREFIX"')
    return text.rstrip("/") if match[1] != "/" else text


def read_endpoint_url(value: object) -> str:
    """The address of an S3 service."""
    text = read_text(value)
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f'{shown(text)} is not an endpoint; write for example "http://127.0.0.1:4566"')
    if parts.username or parts.password:
        raise ValueError("holds a secret; credentials come from the environment or ~/.aws, never from this file")
    return text


def read_uri(value: object) -> str:
    """How this host's libvirt is reached."""
    text = read_text(value)
    if not re.fullmatch(r"qemu(\+unix)?:///[^\s]*", text):
        raise ValueError(f'{shown(text)} is not a URI of libvirt\'s QEMU driver on this host; write "qemu:///system"')
    return text


def read_names(value: object) -> Sequence[str]:
    """A list of names of VMs; may be empty."""
    return tuple(read_name(name) for name in read_texts(value))


def read_keep(value: object) -> int:
    """How many of something are kept."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1000:
        raise ValueError(f"{shown(value)} is not a number from 1 to 1000")
    return value


def read_count(value: object) -> int:
    """How many of something stay; 0 = this is no reason to keep any."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1_000_000:
        raise ValueError(f"{shown(value)} is not a whole number from 0 to 1000000")
    return value


def read_lock(value: object) -> float:
    """Seconds that objects are locked for."""
    seconds = read_duration(value)
    if not 86400 <= seconds <= 3650 * 86400:
        raise ValueError(f"{shown(value)} is not from 1d to 3650d")
    return seconds


def read_texts(value: object) -> Sequence[str]:
    """A list of texts; may be empty."""
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f'{shown(value)} is not a list of texts; write for example ["vdb"]')
    return tuple(value)


def read_disks(value: object) -> Mapping[str, str]:
    """Disk name → block node name."""
    if not isinstance(value, dict) or not value:
        raise ValueError(
            f'{shown(value)} is not a table of disks; write for example {{ root = "d0" }}, or leave it out'
        )
    for name, node in value.items():
        read_name(name)
        if not isinstance(node, str) or not node:
            raise ValueError(f"{name} = {shown(node)} is not the name of a block node; write it in quotes")
    if len(set(value.values())) < len(value):
        raise ValueError("names one block node twice; every disk needs a node of its own")
    return dict(value)


def shown(value: object) -> str:
    """A value as TOML writes it, cut to what a message can carry."""
    if isinstance(value, bool):
        return str(value).lower()
    text = f'"{value}"' if isinstance(value, str) else str(value)
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable if len(printable) <= 80 else printable[:77] + "..."
