"""Architecture, file systems, and AWS's list of operating systems."""

from collections.abc import Sequence
from typing import Final

from drsync.preflight.facts import Facts, Linux
from drsync.preflight.findings import Finding, fails, ok, unknown, warning
from drsync.preflight.machine import Machine
from drsync.preflight.vm_import import Listed, linux_listed, os_list, windows_listed

_EBS: Final = "restore with --via ebs, which does not ask for the list"
_VM_IMPORT_KINDS: Final = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "jfs", "vfat", "ntfs", "swap", "LVM2_member", ""}
)


def check_architecture(machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether EC2 has processors for it."""
    check = "architecture"
    found = [linux.machine for linux in facts.linux] + [windows.machine for windows in facts.windows]
    name = next(filter(None, found), machine.architecture)
    if name == "x86_64":
        return [ok(check, "x86_64")]
    if name == "aarch64":
        action = "restore with --via ebs to a Graviton type; VM Import does not take ARM64"
        return [warning(check, "aarch64", action)]
    if name in {"i386", "i686"}:
        action = "use --via ebs and a drill: VM Import has taken no 32-bit systems since April 2026"
        return [warning(check, "a 32-bit system (i386)", action)]
    if name:
        return [
            fails(check, f"EC2 has no {name}", "it can't come up in EC2; restore --to libvirt on a host that has it")
        ]
    return [unknown(check, "neither the point nor the disks tell", "x86_64 is meant unless you say otherwise")]


def check_file_systems(_machine: Machine, facts: Facts) -> Sequence[Finding]:
    """What VM Import would refuse of the volumes; the EBS route takes anything."""
    check = "file-systems"
    odd = sorted({v.kind for v in facts.volumes} - _VM_IMPORT_KINDS)
    if odd:
        reason = f"VM Import converts no {', '.join(odd)}"
        return [warning(check, reason, "restore with --via ebs, which takes the disks as they are")]
    if any(v.kind == "btrfs" for v in facts.volumes):
        reason = "there is btrfs; VM Import does not take its subvolumes"
        return [warning(check, reason, "restore with --via ebs, which takes the disks as they are")]
    kinds = sorted({v.kind for v in facts.volumes if v.kind})
    return [ok(check, ", ".join(kinds))] if kinds else []


def check_os_list(_machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether VM Import takes the system; only a warning, since the EBS route takes it anyway."""
    found = [_linux_of(linux, facts) for linux in facts.linux]
    for system in facts.windows:
        if system.build is None:
            found.append(unknown("os-list", "which Windows it is could not be read", "see AWS's list"))
            continue
        name, listed = windows_listed(system.build)
        found.append(_judge(name, listed))
    return found


def _linux_of(linux: Linux, facts: Facts) -> Finding:
    kernels = linux.kernels or tuple(k for v in facts.loose for k in v.kernels)
    kernel = kernels[0].version if kernels else ""
    name = linux.name or f"{linux.id} {linux.version}".strip() or "a Linux without os-release"
    return _judge(f"{name} with kernel {kernel or '?'}", linux_listed(linux.id, linux.version, kernel))


def _judge(name: str, listed: Listed) -> Finding:
    reason = f"{name}: {listed.value} (of {os_list().as_of})"
    if listed is Listed.YES:
        return ok("os-list", reason)
    return warning("os-list", reason, _EBS)
