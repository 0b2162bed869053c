"""What EC2 has to know of a VM, as far as its point tells."""

import ipaddress
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from drsync.recovery.origin import Origin, read_origin
from drsync.target.domain import tree
from drsync.target.domain.values import ANY_NETWORK
from drsync.units import MiB

_ARCHITECTURES: Final = {"x86_64": "x86_64", "aarch64": "arm64"}
_WINDOWS: Final = ("microsoft.com/win", "<hyperv")
LEGACY_BIOS: Final = "legacy-bios"
UEFI: Final = "uefi"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A VM as EC2 sees it."""

    vcpus: int
    memory_mib: int
    architecture: str
    """As EC2 names it; what EC2 has not, as the domain names it."""
    boot_mode: str
    secure_boot: bool
    has_tpm: bool
    nvram: bytes | None
    disks: Sequence[str]
    """The point's disks, the one that it boots from first."""
    interfaces: int
    networks: Sequence[str]
    """The network, bridge or device of each interface, in their order."""
    addresses: Sequence[str]
    """The IPv4 addresses that its definition gives it; mostly none: guests have them by DHCP or of their own."""
    may_be_windows: bool
    is_libvirt: bool

    @property
    def is_known_architecture(self) -> bool:
        return self.architecture in _ARCHITECTURES.values()


def read_guest(definition: Mapping[str, object], vm: str, disks: Sequence[str]) -> Guest:
    """What a point's definition says.

    Raises:
        NotReadable: the definition is none that drsync makes.
    """
    origin = read_origin(definition, vm, disks, {ANY_NETWORK: "default"})
    domain = tree.parse(origin.xml, "domain")
    machine = tree.attribute(domain, "os/type", "arch") or "x86_64"
    loader = domain.find("os/loader")
    return Guest(
        vcpus=_vcpus(domain),
        memory_mib=max(1, -(-tree.size_bytes(domain.find("memory")) // MiB)),
        architecture=_ARCHITECTURES.get(machine, machine),
        boot_mode=UEFI if _is_uefi(domain) or machine == "aarch64" else LEGACY_BIOS,
        secure_boot=loader is not None and loader.get("secure") == "yes",
        has_tpm=domain.find("devices/tpm") is not None,
        nvram=origin.files.get("nvram"),
        disks=_boot_order(domain, origin, disks),
        interfaces=len(domain.findall("devices/interface")),
        networks=[_network_of(interface) for interface in domain.findall("devices/interface")],
        addresses=_addresses(domain, definition),
        may_be_windows=any(mark in origin.xml for mark in _WINDOWS),
        is_libvirt=definition.get("source") == "libvirt",
    )


def _vcpus(domain: ET.Element) -> int:
    text = tree.value(domain, "vcpu")
    return max(1, int(text)) if text.isascii() and text.isdecimal() and len(text) < 6 else 1


def _is_uefi(domain: ET.Element) -> bool:
    """As libvirt has it: firmware chosen by itself, or a loader in flash, which SeaBIOS never is."""
    is_flash = tree.attribute(domain, "os/loader", "type") == "pflash"
    return tree.attribute(domain, "os", "firmware") == "efi" or is_flash or domain.find("os/nvram") is not None


def _boot_order(domain: ET.Element, origin: Origin, disks: Sequence[str]) -> Sequence[str]:
    """The disks by <boot order>, then as the domain lists them, then as the point does."""
    by_target = {target: name for name, target in origin.targets.items()}
    listed: list[tuple[int, int, str]] = []
    for place, disk in enumerate(domain.findall("devices/disk")):
        name = by_target.get(tree.attribute(disk, "target", "dev"), "")
        order = tree.attribute(disk, "boot", "order")
        if name in disks:
            listed.append((int(order) if order.isascii() and order.isdecimal() else 10**6, place, name))
    first = [name for _, _, name in sorted(listed)]
    return [*first, *(name for name in disks if name not in first)]


def _network_of(interface: ET.Element) -> str:
    source = interface.find("source")
    found = {} if source is None else source.attrib
    return found.get("network") or found.get("bridge") or found.get("dev") or ""


def _addresses(domain: ET.Element, definition: Mapping[str, object]) -> Sequence[str]:
    """Addresses from nwfilter's IP parameters, <ip> elements, and the networks' static leases for its MACs."""
    found: list[str] = []
    for interface in domain.findall("devices/interface"):
        found += [p.get("value", "") for p in interface.findall("filterref/parameter") if p.get("name") == "IP"]
        found += [ip.get("address", "") for ip in interface.findall("ip")]
        found += _leases(definition, tree.attribute(interface, "mac", "address").lower())
    return list(dict.fromkeys(address for address in found if _is_ipv4(address)))


def _leases(definition: Mapping[str, object], mac: str) -> list[str]:
    networks = definition.get("networks")
    found: list[str] = []
    for text in networks.values() if isinstance(networks, dict) and mac else ():
        try:
            network = tree.parse(str(text), "network")
        except tree.NotReadable:  # one network that can't be read tells nothing
            continue
        hosts = network.findall("ip/dhcp/host")
        found += [host.get("ip", "") for host in hosts if host.get("mac", "").lower() == mac]
    return found


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True
