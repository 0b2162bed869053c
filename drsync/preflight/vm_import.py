"""Which guests AWS's VM Import takes: AWS's own list, as dated data (vm_import.json).

The list is exact in the kernel; a release that is not on it fails with "Unsupported kernel version". The route through
EBS snapshots (`--via ebs`) does not ask for it.
"""

import re
from enum import Enum
from functools import lru_cache
from importlib import resources
from typing import Final

import msgspec


class _LinuxRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    lowest: str = msgspec.field(name="from")
    highest: str = msgspec.field(name="to")
    kernels: list[str]
    eol: bool


class _WindowsRow(msgspec.Struct, frozen=True, kw_only=True):
    build: int
    name: str
    eol: bool


class OsList(msgspec.Struct, frozen=True, kw_only=True):
    """The list, with its date and source."""

    as_of: str
    source: str
    note: str
    linux: list[_LinuxRow]
    windows: list[_WindowsRow]


class Listed(Enum):
    """How a guest stands to the list."""

    YES = "it is on VM Import's list"
    END_OF_LIFE = "it is on VM Import's list, as one that has reached its end of life and is not tested any more"
    OTHER_KERNEL = "the release is on VM Import's list, but not with this kernel"
    OTHER_RELEASE = "the distribution is on VM Import's list, but not this release"
    NO = "it is not on VM Import's list"


_NUMBER: Final = re.compile(r"\d+")


@lru_cache(maxsize=1)
def os_list() -> OsList:
    """AWS's list as this drsync knows it."""
    data = resources.files("drsync.preflight").joinpath("vm_import.json").read_bytes()
    return msgspec.json.decode(data, type=OsList)


def _key(version: str) -> list[int]:
    return [int(n) for n in _NUMBER.findall(version)[:6]]


def _within(version: str, row: _LinuxRow) -> bool:
    told, lowest, highest = _key(version), _key(row.lowest), _key(row.highest)
    return bool(told) and lowest <= told and told[: len(highest)] <= highest


def _runs(kernel: str, prefix: str) -> bool:
    return kernel == prefix or (kernel.startswith(prefix) and not kernel[len(prefix)].isdigit())


def linux_listed(distribution: str, version: str, kernel: str) -> Listed:
    """How a Linux stands to the list: its os-release ID, its version, the kernel it would boot."""
    rows = [row for row in os_list().linux if row.id == distribution]
    if not rows:
        return Listed.NO
    fitting = [row for row in rows if _within(version, row)]
    if not fitting:
        return Listed.OTHER_RELEASE
    running = [row for row in fitting if any(_runs(kernel, prefix) for prefix in row.kernels)]
    if not running:
        return Listed.OTHER_KERNEL
    return Listed.END_OF_LIFE if all(row.eol for row in running) else Listed.YES


def windows_listed(build: int) -> tuple[str, Listed]:
    """The name of a Windows by its build, and how it stands to the list."""
    row = next((row for row in os_list().windows if row.build == build), None)
    if row is None:
        return f"Windows build {build}", Listed.NO
    return row.name, Listed.END_OF_LIFE if row.eol else Listed.YES
