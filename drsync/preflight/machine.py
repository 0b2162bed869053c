"""What is known of the VM beside its disks: from the point's definition, which is sealed and not the guest's word."""

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from drsync.target.domain import tree
from drsync.target.domain.definition import is_libvirt, read_definition


class Firmware(StrEnum):
    """What starts the machine."""

    BIOS = "bios"
    UEFI = "uefi"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A VM as it was captured."""

    disks: Mapping[str, int]
    """Size in bytes by name, in the order of the point."""
    firmware: Firmware | None = None
    """None: the point does not tell."""
    secure_boot: bool = False
    nvram: bool = False
    """Whether the point has the UEFI's variables."""
    tpm: bool = False
    architecture: str = ""
    nics: int | None = None
    boot_disk: str = ""
    """The disk that the VM was told to boot from; empty: it is not told."""
    direct_kernel: bool = False
    """Whether the host gives it the kernel."""
    passed_through: int = 0
    """Devices of the host's that it has."""


def read_machine(definition: Mapping[str, object], disks: Mapping[str, int]) -> Machine:
    """The machine of a point. What the definition does not tell, or tells in a way that is not known, stays unknown."""
    if not is_libvirt(definition):
        target = definition.get("target")
        told = target.get("arch") if isinstance(target, dict) else None
        return Machine(disks=disks, architecture=told if isinstance(told, str) else "")
    try:
        known = read_definition(definition)
        domain = tree.parse(known.domain.xml or known.domain.live_xml or "", "domain")
        nvram = known.file("nvram") is not None
    except tree.NotReadable:
        return Machine(disks=disks)
    targets = {disk.target or name: name for name, disk in known.disks.items()}
    return Machine(
        disks=disks,
        firmware=_firmware(domain),
        secure_boot=_secure_boot(domain),
        nvram=nvram,
        tpm=domain.find("./devices/tpm") is not None,
        architecture=tree.attribute(domain, "os/type", "arch"),
        nics=len(domain.findall("./devices/interface")),
        boot_disk=_boot_disk(domain, targets),
        direct_kernel=bool(tree.value(domain, "os/kernel")),
        passed_through=len(domain.findall("./devices/hostdev")),
    )


def _firmware(domain: ET.Element) -> Firmware:
    efi = tree.attribute(domain, "os", "firmware") == "efi" or tree.attribute(domain, "os/loader", "type") == "pflash"
    return Firmware.UEFI if efi else Firmware.BIOS


def _secure_boot(domain: ET.Element) -> bool:
    features = domain.findall("./os/firmware/feature")
    named = any(f.get("name") == "secure-boot" and f.get("enabled") == "yes" for f in features)
    return named or tree.attribute(domain, "os/loader", "secure") == "yes"


def _boot_disk(domain: ET.Element, targets: Mapping[str, str]) -> str:
    """The disk with the lowest boot order; else the first hard disk, which BIOS and OVMF begin with."""
    ordered: list[tuple[int, str]] = []
    for place, disk in enumerate(domain.findall("./devices/disk")):
        name = targets.get(tree.attribute(disk, "target", "dev"))
        if name is not None and disk.get("device", "disk") == "disk":
            order = tree.attribute(disk, "boot", "order")
            ordered.append((int(order) if order.isdigit() else 10_000 + place, name))
    return min(ordered)[1] if ordered else ""
