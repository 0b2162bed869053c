"""Sizes and times as people write them: "64MiB", "5m"; and back. And numbers of things."""

import re

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

_SIZE_UNITS = {"B": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": TiB}
_TIME_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NUMBER = r"(\d{1,15}(?:\.\d{1,6})?)"


def parse_size(text: str) -> int:
    """Bytes of a size such as "64MiB", "1.5GiB" or "512B".

    Only binary units are taken: "MB" is refused, because half of its readers
    mean 10^6 and the other half 2^20.

    Raises:
        ValueError: not a number with one of the units; the message lists them.
    """
    match = re.fullmatch(_NUMBER + r"\s*([A-Za-z]+)", text.strip())
    if match is None or match[2] not in _SIZE_UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 64MiB (units: {', '.join(_SIZE_UNITS)})")
    return round(float(match[1]) * _SIZE_UNITS[match[2]])


def parse_duration(text: str) -> float:
    """Seconds of a time such as "30s", "5m", "2h" or "1d".

    Raises:
        ValueError: not a number with one of the units; the message lists them.
    """
    match = re.fullmatch(_NUMBER + r"\s*([a-z]+)", text.strip())
    if match is None or match[2] not in _TIME_UNITS:
        raise ValueError(f"{text!r} is not a time; write for example 5m (units: {', '.join(_TIME_UNITS)})")
    return float(match[1]) * _TIME_UNITS[match[2]]


def format_size(size_bytes: float) -> str:
    """A size for people, three digits at most: "1.50 GiB", "64 KiB", "0 B"."""
    if abs(size_bytes) < KiB:
        return f"{size_bytes:.0f} B"
    for unit, factor in reversed(_SIZE_UNITS.items()):
        if abs(size_bytes) >= factor:
            return (
                f"{size_bytes / factor:.3g} {unit}"
                if size_bytes < 1000 * factor
                else f"{size_bytes / factor:.0f} {unit}"
            )
    return f"{size_bytes:.0f} B"


def format_duration(seconds: float) -> str:
    """A time for people: "0.4 s", "38 s", "5 min 3 s", "2 h 10 min", "3 d 4 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for (unit, size), (small_unit, small_size) in (
        (("d", 86400), ("h", 3600)),
        (("h", 3600), ("min", 60)),
        (("min", 60), ("s", 1)),
    ):
        if whole >= size:
            rest = whole % size // small_size
            return f"{whole // size} {unit} {rest} {small_unit}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def counted(number: int, noun: str) -> str:
    """A number of things: "1 point", "2 points"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
