"""Kernel and initramfs: disks are NVMe, the network is ENA, on every current instance type."""

from collections.abc import Sequence
from typing import Final

from drsync.preflight.facts import Driver, Facts, Kernel, Linux
from drsync.preflight.findings import Finding, fails, ok, unknown, warning
from drsync.preflight.machine import Machine

_DEBIAN: Final = frozenset({"debian", "ubuntu", "linuxmint", "raspbian", "kali", "pop"})


def _systems(facts: Facts) -> list[tuple[Linux | None, Sequence[Kernel]]]:
    """The kernels of each system; those on volumes without a system count if there is no other."""
    found: list[tuple[Linux | None, Sequence[Kernel]]] = [(linux, linux.kernels) for linux in facts.linux]
    if not any(kernels for _, kernels in found):
        loose = [kernel for volume in facts.loose for kernel in volume.kernels]
        found = [(facts.linux[0] if facts.linux else None, loose)] if loose or facts.linux else []
    return found


def rebuild(linux: Linux | None, drivers: str) -> str:
    """The command that puts drivers into the initramfs."""
    or_later = "; or restore with --fix-guest ec2"
    if linux is not None and linux.id in _DEBIAN:
        words = "\\n".join(drivers.split())
        return (
            f"in the guest: printf '{words}\\n' >>/etc/initramfs-tools/modules && update-initramfs -u -k all{or_later}"
        )
    return (
        f"in the guest: echo 'add_drivers+=\" {drivers} \"' >/etc/dracut.conf.d/ec2.conf"
        f" && dracut --force --regenerate-all{or_later}"
    )


def check_kernel(_machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether there is a kernel, with an initramfs if it needs one."""
    check = "kernel"
    if facts.windows and not facts.linux:
        return []
    if not facts.reader:
        return [unknown(check, "the file systems could not be read", "see reading")]
    systems = _systems(facts)
    kernels = [kernel for _, found in systems for kernel in found]
    if not kernels and facts.linux:
        reason = "no kernel was found in /boot, nor on a volume of its own"
        return [unknown(check, reason, "if /boot could be read (see reading), install a kernel in the guest")]
    if not kernels:
        return [unknown(check, "no system was found on the disks", "see reading, encryption")]
    found: list[Finding] = []
    if not facts.linux:
        where = ", ".join(volume.volume for volume in facts.loose)
        action = "nothing, if the guest lives in its initramfs; else protect the disk with its root file system, too"
        found.append(warning(check, f"there is a kernel on {where}, but no root file system of a system", action))
    newest = kernels[0]
    name = newest.version or newest.image
    also = f", and {len(kernels) - 1} older" if len(kernels) > 1 else ""
    return [*found, ok(check, f"{name}{', with initramfs' if newest.initramfs else ', without initramfs'}{also}")]


def check_nvme(_machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether the root disk can be found: EC2's disks are NVMe."""
    return [
        _judge_nvme(linux, kernel, newest=place == 0)
        for linux, found in _systems(facts)
        for place, kernel in enumerate(found[:2])
    ]


def _judge_nvme(linux: Linux | None, kernel: Kernel, *, newest: bool) -> Finding:
    check, name = "nvme", kernel.version or kernel.image
    if kernel.nvme in {Driver.BUILT_IN, Driver.INITRAMFS}:
        where = "built into the kernel" if kernel.nvme is Driver.BUILT_IN else "in the initramfs"
        return ok(check, f"{name}: nvme is {where}")
    if kernel.problem:
        reason = f"{name}: its initramfs could not be looked into: {kernel.problem}"
        return unknown(check, reason, "in the guest: lsinitramfs or lsinitrd must show nvme.ko")
    if kernel.nvme is Driver.UNKNOWN:
        reason = f"{name}: nvme is not in the initramfs; whether the kernel has it built in is not known"
        return unknown(check, reason, "in the guest: grep BLK_DEV_NVME /boot/config-$(uname -r)")
    if kernel.nvme is Driver.MISSING:
        reason = f"{name}: it has no nvme driver at all"
        return fails(check, reason, "install the distribution's full kernel in the guest (not a -virtual or -kvm one)")
    reason = f"{name}: nvme is a module, but not in the initramfs: it would not find its root disk"
    judge = fails if newest else warning
    return judge(check, reason, rebuild(linux, "nvme ena"))


def check_ena(_machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether the network's driver is there; it need not be in the initramfs."""
    return [_judge_ena(linux, found[0]) for linux, found in _systems(facts) if found]


def _judge_ena(linux: Linux | None, kernel: Kernel) -> Finding:
    check, name = "ena", kernel.version or kernel.image
    if kernel.ena in {Driver.BUILT_IN, Driver.INITRAMFS, Driver.MODULE}:
        return ok(check, f"{name}: ena is there ({kernel.ena})")
    if kernel.ena is Driver.MISSING:
        reason = f"{name}: there is no ena driver: the instance would boot without network"
        packages = (
            "linux-image-amd64, or linux-modules-extra-* on Ubuntu"
            if linux and linux.id in _DEBIAN
            else "kernel-modules"
        )
        return fails(check, reason, f"install the distribution's full kernel in the guest ({packages})")
    reason = f"{name}: whether it has the ena driver is not known: its modules were not found"
    return unknown(check, reason, "in the guest: modinfo ena")
