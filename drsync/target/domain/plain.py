"""A domain for a VM that had none: QEMU was started by hand, or by something else than libvirt.

What QEMU told of itself (drsync/source/definition.py) is the machine type, memory,
processors and disks. What it did not tell is said in notes.
"""

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from drsync.target.domain import tree
from drsync.target.domain.values import ANY_NETWORK, Notes
from drsync.units import MiB, format_size

_DEFAULT_MEMORY_BYTES: Final = 1024 * MiB
_PREFIXES: Final = {"virtio": "vd", "scsi": "sd", "sata": "sd", "ide": "hd", "usb": "sd"}
_BUSES: Final = (("virtio", "virtio"), ("scsi", "scsi"), ("ide-", "sata"), ("usb", "usb"))


class _Text(msgspec.Struct, frozen=True, kw_only=True):
    """One field of an answer of QEMU's, under whichever of its names."""

    name: str = ""
    UUID: str = ""
    arch: str = ""


class _Memory(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    base_memory: int = 0
    plugged_memory: int = 0


class _Cpus(msgspec.Struct, frozen=True, kw_only=True):
    count: int = 1
    model: str | None = None


class _Accelerator(msgspec.Struct, frozen=True, kw_only=True):
    enabled: bool = False


class _Disk(msgspec.Struct, frozen=True, kw_only=True):
    device: str = ""


class QmpDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """What source/definition.py keeps of a VM, as far as it is used here. Everything may be missing."""

    name: _Text = _Text()
    uuid: _Text = _Text()
    target: _Text = _Text()
    machine: str = ""
    accelerator: _Accelerator = _Accelerator()
    memory: _Memory = _Memory()
    cpus: _Cpus = _Cpus()
    disks: dict[str, _Disk] = {}


def plain_domain(
    definition: Mapping[str, object], vm: str, disks: Sequence[str], networks: Mapping[str, str], notes: Notes
) -> tuple[str, Mapping[str, str]]:
    """A domain's XML, and which of its disks (vda, ...) each disk of the point is.

    Raises:
        NotReadable: the definition is none that drsync makes.
    """
    try:
        known = msgspec.convert(definition, QmpDefinition, strict=False)
    except msgspec.ValidationError as err:
        raise tree.NotReadable(f"is not what QEMU tells of a VM: {err}") from err
    domain = ET.Element("domain", {"type": "kvm" if known.accelerator.enabled else "qemu"})
    ET.SubElement(domain, "name").text = vm
    if known.uuid.UUID.strip("0-"):  # zeros: QEMU was given none
        ET.SubElement(domain, "uuid").text = known.uuid.UUID
    _add_machine(domain, known)
    _add_processors(domain, known)
    targets = _add_devices(domain, known, disks, networks, notes)
    memory = format_size(tree.size_bytes(domain.find("memory")))
    count = max(known.cpus.count, 1)
    notes.changed(
        "domain",
        f"{vm} had none: a plain one is made from what QEMU told: {known.machine or 'default machine'}, {memory}, "
        f"{count} processor{'s' if count > 1 else ''}, {len(disks)} disk{'s' if len(disks) > 1 else ''}; "
        "check it with: virsh edit",
    )
    return tree.text(domain), targets


def _add_machine(domain: ET.Element, known: QmpDefinition) -> None:
    memory = known.memory.base_memory + known.memory.plugged_memory or _DEFAULT_MEMORY_BYTES
    ET.SubElement(domain, "memory", {"unit": "KiB"}).text = str(-(-memory // 1024))
    ET.SubElement(domain, "vcpu").text = str(max(known.cpus.count, 1))
    system = ET.SubElement(domain, "os")
    attributes = {"arch": known.target.arch or "x86_64", "machine": known.machine.removesuffix("-machine")}
    ET.SubElement(system, "type", {name: text for name, text in attributes.items() if text}).text = "hvm"
    ET.SubElement(system, "boot", {"dev": "hd"})
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    if known.target.arch in ("", "x86_64", "i386"):
        ET.SubElement(features, "apic")


def _add_processors(domain: ET.Element, known: QmpDefinition) -> None:
    model = (known.cpus.model or "").removesuffix(f"-{known.target.arch or 'x86_64'}-cpu")
    match model:
        case "":
            pass
        case "host":
            ET.SubElement(domain, "cpu", {"mode": "host-passthrough"})
        case "max":
            ET.SubElement(domain, "cpu", {"mode": "maximum"})
        case _:
            cpu = ET.SubElement(domain, "cpu", {"mode": "custom", "match": "exact", "check": "partial"})
            ET.SubElement(cpu, "model", {"fallback": "allow"}).text = model


def _add_devices(
    domain: ET.Element, known: QmpDefinition, disks: Sequence[str], networks: Mapping[str, str], notes: Notes
) -> Mapping[str, str]:
    devices = ET.SubElement(domain, "devices")
    targets: dict[str, str] = {}
    for name in disks:
        model = known.disks[name].device if name in known.disks else ""
        bus = next((bus for part, bus in _BUSES if part in model), "virtio")
        if model and not any(part in model for part, _ in _BUSES):
            notes.changed(f"disk {name}", f"was behind {model}, which libvirt has no word for; it is virtio now")
        targets[name] = _free_target(bus, set(targets.values()))
        disk = ET.SubElement(devices, "disk", {"type": "file", "device": "disk"})
        ET.SubElement(disk, "target", {"dev": targets[name], "bus": bus})
    serial = ET.SubElement(devices, "serial", {"type": "pty"})
    ET.SubElement(serial, "target", {"port": "0"})
    if networks.get(ANY_NETWORK):
        interface = ET.SubElement(devices, "interface", {"type": "network"})
        ET.SubElement(interface, "source", {"network": ANY_NETWORK})
        ET.SubElement(interface, "model", {"type": "virtio"})
        notes.changed("network", f"one interface, on {networks[ANY_NETWORK]}; its MAC address is new")
    else:
        notes.lost("network", f"QEMU did not tell of its network interfaces; for one: --network '{ANY_NETWORK}=NEW'")
    return targets


def _free_target(bus: str, taken: set[str]) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = (f"{_PREFIXES[bus]}{first}{last}" for first in ("", *letters) for last in letters)
    return next(name for name in names if name not in taken)
