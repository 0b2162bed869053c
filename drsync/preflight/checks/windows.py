"""Windows: what files tell. VM Import with --convert-guest puts in what is missing."""

from collections.abc import Sequence
from typing import Final

from drsync.preflight.checks.boot import boot_mode
from drsync.preflight.facts import Facts, Windows
from drsync.preflight.findings import Finding, fails, ok, unknown, warning
from drsync.preflight.machine import Firmware, Machine

_NVME: Final = frozenset({"stornvme.sys", "awsnvme.sys"})
_CONVERT: Final = "restore with --via vm-import --convert-guest; or install AWS's NVMe and ENA drivers in the guest now"


def check_windows(machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Boot configuration and drivers of a Windows."""
    return [finding for system in facts.windows for finding in _windows(machine, system, facts)]


def _windows(machine: Machine, system: Windows, facts: Facts) -> Sequence[Finding]:
    found: list[Finding] = [_bcd(machine, system, facts)]
    nvme = sorted(_NVME & set(system.drivers))
    if nvme:
        reason = f"{nvme[0]} is there; whether Windows starts it at boot is in the registry, which is not read"
        found.append(warning("windows-nvme", reason, "a drill proves it; or " + _CONVERT))
    else:
        found.append(fails("windows-nvme", "there is no NVMe driver", _CONVERT))
    if "ena.sys" in system.drivers:
        found.append(ok("windows-ena", "ena.sys is there"))
    else:
        found.append(fails("windows-ena", "there is no ENA driver: the instance would have no network", _CONVERT))
    if system.hibernated:
        action = "in the guest: powercfg /h off, and shut it down once"
        found.append(warning("windows-hibernation", "the system is hibernated (or uses fast startup)", action))
    return found


def _bcd(machine: Machine, system: Windows, facts: Facts) -> Finding:
    check = "windows-bcd"
    wanted = "/EFI/Microsoft/Boot/BCD" if boot_mode(machine, facts) is Firmware.UEFI else "/Boot/BCD"
    fitting = [place for place in system.bcd if place.partition(":")[2] == wanted]
    if fitting:
        return ok(check, f"boot configuration: {fitting[0]}")
    action = "in the guest: bcdboot C:\\Windows"
    if system.bcd:
        return fails(check, f"there is a boot configuration for the other firmware only: {system.bcd[0]}", action)
    if any(v.read is False for v in facts.volumes):
        return unknown(check, "no boot configuration was found, but not all volumes could be read", "see reading")
    return fails(check, "there is no boot configuration (BCD)", action)
