"""Firmware, partition table and boot loader."""

from collections.abc import Sequence
from typing import Final

from drsync.preflight.facts import BootCode, Disk, Facts, Table, Volume
from drsync.preflight.findings import Finding, fails, ok, unknown, warning
from drsync.preflight.inside.partitions import BIOS_BOOT_TYPE
from drsync.preflight.machine import Firmware, Machine
from drsync.units import TiB, format_size

_MBR_LIMIT: Final = 2 * TiB
_REMOVABLE: Final = (
    "in the guest: grub-install --target=x86_64-efi --efi-directory=/boot/efi --removable"
    "   (Red Hat's: reinstall shim-x64; systemd-boot: bootctl install)"
)
_GRUB_INSTALL: Final = "in the guest: grub-install DISK   (the whole disk, as /dev/vda; Red Hat's: grub2-install)"


def boot_disk(machine: Machine, facts: Facts) -> Disk | None:
    """The disk that the machine boots from: the one it was told, else the first that could."""
    by_name = {disk.name: disk for disk in facts.disks}
    if machine.boot_disk in by_name:
        return by_name[machine.boot_disk]
    loaders = {v.disk for v in facts.volumes if v.esp or v.efi_files}
    able = [d for d in facts.disks if d.boot_code is not BootCode.NONE or d.name in loaders]
    return next(iter([*able, *facts.disks]), None)


def boot_mode(machine: Machine, facts: Facts) -> Firmware | None:
    """BIOS or UEFI: as the point tells; else as the disks tell, where only one is possible."""
    if machine.firmware is not None:
        return machine.firmware
    uefi = any(v.efi_files or v.esp for v in facts.volumes)
    bios = any(d.boot_code is not BootCode.NONE for d in facts.disks)
    if uefi != bios:
        return Firmware.UEFI if uefi else Firmware.BIOS
    return None


def check_boot_mode(machine: Machine, facts: Facts) -> Sequence[Finding]:
    """How EC2 has to start it."""
    check = "boot-mode"
    if machine.direct_kernel:
        action = "install a boot loader and a kernel in the guest; EC2 starts nothing but what is on the disk"
        return [fails(check, "the host gives the VM its kernel: its disk need not boot by itself", action)]
    mode = boot_mode(machine, facts)
    how = "as the point says" if machine.firmware is not None else "as its disks tell"
    if mode is None:
        action = "find out in the guest: /sys/firmware/efi exists on UEFI"
        return [warning(check, "neither the point nor the disks tell whether it boots by BIOS or UEFI", action)]
    if mode is Firmware.BIOS:
        return [ok(check, f"BIOS ({how})")]
    if machine.secure_boot:
        action = "nothing, if Secure Boot may be off there; else register the image with UefiData of your own"
        return [warning(check, "UEFI with Secure Boot: EC2 starts without its keys, so with Secure Boot off", action)]
    return [ok(check, f"UEFI ({how}); EC2 starts it on Nitro instances only")]


def check_partition_table(machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether the disks' tables are whole, and of a kind that can boot."""
    check = "partition-table"
    first = boot_disk(machine, facts)
    if first is None:
        return [unknown(check, "no disk was looked at", "drsync preflight again, with -v")]
    found: list[Finding] = []
    for disk in facts.disks:
        if disk.problem and not disk.partitions:
            found.append(
                fails(check, f"{disk.name}: {disk.problem}", "in the guest: sgdisk --verify, then repair the table")
            )
        elif disk.problem:
            found.append(
                warning(check, f"{disk.name}: {disk.problem}", "in the guest: sgdisk -e DISK writes both copies anew")
            )
    if first.table is Table.EMPTY:
        action = "check which disks are protected: drsync points VM --json lists those of the point"
        return [
            *found,
            fails(check, f"{first.name}, which it boots from, holds no partition table and nothing known", action),
        ]
    if first.table is Table.MBR and first.size_bytes > _MBR_LIMIT:
        action = "convert it to GPT, or keep what boots on a disk of its own"
        found.append(
            warning(
                check,
                f"{first.name} has an MBR: what lies behind 2 TiB of {format_size(first.size_bytes)} is out of reach",
                action,
            )
        )
    if first.table is Table.NONE:
        return found or [ok(check, f"{first.name} has no partition table: a file system on the whole disk")]
    return found or [ok(check, f"{first.name}: {first.table.upper()}, {_counted(first)}")]


def _counted(disk: Disk) -> str:
    return "1 partition" if len(disk.partitions) == 1 else f"{len(disk.partitions)} partitions"


def check_loader(machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether the firmware finds a boot loader, and that finds what it loads next."""
    if machine.direct_kernel:
        return []
    mode = boot_mode(machine, facts)
    if mode is Firmware.UEFI:
        return [_check_uefi(machine, facts)]
    disk = boot_disk(machine, facts)
    if mode is Firmware.BIOS and disk is not None:
        return [_check_bios(disk)]
    return [unknown("loader", "it is not known how it boots", "see boot-mode")]


def _check_bios(disk: Disk) -> Finding:
    check = "loader"
    if disk.boot_code is BootCode.NONE:
        return fails(check, f"{disk.name}: there is no boot code in the first sector", _GRUB_INSTALL)
    if disk.core is False:
        reason = f"{disk.name}: the boot code ({disk.boot_code}) does not find what it loads: {disk.core_place}"
        return fails(check, reason, _hint(disk))
    if disk.core is None:
        place = disk.core_place or "what it loads is not known"
        reason = f"{disk.name}: boot code of an unknown kind ({disk.boot_code}); {place}"
        return warning(check, reason, "it boots as far as can be seen; a drill on libvirt proves it")
    return ok(check, f"{disk.name}: {disk.boot_code}, {disk.core_place}")


def _hint(disk: Disk) -> str:
    has_room = disk.table is not Table.GPT or any(p.type == BIOS_BOOT_TYPE for p in disk.partitions)
    if disk.boot_code is BootCode.GRUB and not has_room:
        return "in the guest: make a BIOS boot partition (sgdisk -n 0:0:+1M -t 0:ef02 DISK), then grub-install DISK"
    return _GRUB_INSTALL if disk.boot_code is BootCode.GRUB else "install the guest's boot loader again"


def _check_uefi(machine: Machine, facts: Facts) -> Finding:
    check = "loader"
    partitions = [v for v in facts.volumes if v.esp or v.efi_files]
    if not partitions:
        if not facts.reader and any(v.kind == "vfat" for v in facts.volumes):
            return unknown(check, "the FAT volumes could not be read", "see reading")
        return fails(check, "there is no EFI system partition", "install the guest's boot loader for UEFI")
    unread = [v for v in partitions if v.read is not True]
    with_fallback = [v for v in partitions if v.fallback_machine]
    if not with_fallback:
        if unread:
            return unknown(check, f"the EFI system partition {unread[0].name} could not be read", "see reading")
        others = sorted({f for v in partitions for f in v.efi_files})
        return fails(check, _no_fallback(machine, others), _REMOVABLE)
    return _check_fallback(machine, with_fallback[0])


def _no_fallback(machine: Machine, others: Sequence[str]) -> str:
    reason = "\\EFI\\BOOT\\BOOTX64.EFI is missing, and EC2 knows of no other loader"
    if others:
        reason += f"; there is {others[0]}"
    return reason + (", which only the VM's own NVRAM names" if machine.nvram and others else "")


def _check_fallback(machine: Machine, esp: Volume) -> Finding:
    check = "loader"
    wanted = machine.architecture or "x86_64"
    if esp.fallback_machine != wanted:
        return fails(
            check, f"{esp.name}: the fallback loader is for {esp.fallback_machine}, the VM is {wanted}", _REMOVABLE
        )
    names = {f.rpartition("/")[2] for f in esp.efi_files if f.startswith("/EFI/BOOT/")}
    if esp.fallback_is_shim and not names & {"GRUBX64.EFI", "GRUBAA64.EFI", "FBX64.EFI", "FBAA64.EFI"}:
        reason = f"{esp.name}: the fallback loader is shim, but neither GRUB nor shim's fallback is beside it"
        return fails(check, reason, _REMOVABLE)
    return ok(check, f"{esp.name}: \\EFI\\BOOT has a loader for {esp.fallback_machine}")
