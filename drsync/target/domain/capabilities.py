"""What libvirt says of a host (`virsh capabilities`, `virsh domcapabilities`), as values.

Formats: https://libvirt.org/formatcaps.html and https://libvirt.org/formatdomaincaps.html
"""

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from drsync.target.domain import tree


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSupport:
    """One way to run guests: an architecture and a hypervisor."""

    arch: str
    virt_type: str
    """"kvm", or "qemu": emulated."""
    emulator: str
    machines: Mapping[str, str]
    """Machine type or alias → canonical machine type, in libvirt's order: an alias and the newest come first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCapabilities:
    """What the host is, and which guests it can run."""

    arch: str = ""
    cpu_xml: str = ""
    cpus: frozenset[int] = frozenset()
    """Ids of its processors; empty: not known."""
    cells: frozenset[int] = frozenset()
    """Ids of its NUMA nodes; empty: not known."""
    memory_bytes: int = 0
    """0: not known."""
    page_sizes: Mapping[int, int] = field(default_factory=dict)
    """Bytes of a page → how many of them are set aside on the whole host."""
    guests: Sequence[GuestSupport] = ()

    def guest(self, arch: str, virt_type: str) -> GuestSupport | None:
        return next((g for g in self.guests if (g.arch, g.virt_type) == (arch, virt_type)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainCapabilities:
    """What domains of one architecture, hypervisor and machine type can have. An empty set: libvirt does not say."""

    max_vcpus: int = 0
    cpu_modes: frozenset[str] = frozenset()
    host_model_xml: str = ""
    """The <cpu> that mode host-model stands for, as one of mode custom; empty if there is none."""
    features: frozenset[str] = frozenset()
    """All features that a guest's processor can have here; filled in by who can ask libvirt for them."""
    firmware: frozenset[str] = frozenset()
    """What <os firmware=...> may be."""
    loaders: frozenset[str] = frozenset()
    secure_loader: bool = False
    disk_buses: frozenset[str] = frozenset()
    graphics: frozenset[str] = frozenset()
    videos: frozenset[str] = frozenset()
    tpm_models: frozenset[str] = frozenset()
    tpm_backends: frozenset[str] = frozenset()
    has_tpm: bool = True
    sev: bool = False


def read_host(text: str) -> HostCapabilities:
    """The host behind `virsh capabilities`.

    Raises:
        NotReadable: it is no such document.
    """
    root = tree.parse(text, "capabilities")
    cells = root.findall("host/topology/cells/cell")
    cpu = root.find("host/cpu")
    return HostCapabilities(
        arch=tree.value(root, "host/cpu/arch"),
        cpu_xml="" if cpu is None else tree.text(cpu),
        cpus=frozenset(int(c.get("id", "0")) for cell in cells for c in cell.findall("cpus/cpu")),
        cells=frozenset(int(cell.get("id", "0")) for cell in cells),
        memory_bytes=sum(tree.size_bytes(cell.find("memory")) for cell in cells),
        page_sizes=_page_sizes(cells),
        guests=[support for guest in root.findall("guest") for support in _guests(guest)],
    )


def _page_sizes(cells: Sequence[ET.Element]) -> Mapping[int, int]:
    sizes: dict[int, int] = {}
    for cell in cells:
        for pages in cell.findall("pages"):
            size = int(pages.get("size", "0")) * {"KiB": 1024, "MiB": 2**20}.get(pages.get("unit", "KiB"), 1024)
            sizes[size] = sizes.get(size, 0) + int((pages.text or "0").strip())
    return sizes


def _guests(guest: ET.Element) -> Sequence[GuestSupport]:
    arch = guest.find("arch")
    if arch is None or tree.value(guest, "os_type") != "hvm":
        return []
    common = (tree.value(arch, "emulator"), _machines(arch))
    found = []
    for domain in arch.findall("domain"):
        emulator = tree.value(domain, "emulator") or common[0]
        machines = _machines(domain) or common[1]
        virt_type = domain.get("type", "")
        found.append(GuestSupport(arch=arch.get("name", ""), virt_type=virt_type, emulator=emulator, machines=machines))
    return found


def _machines(element: ET.Element) -> Mapping[str, str]:
    names = [(machine.text or "", machine.get("canonical", "")) for machine in element.findall("machine")]
    return {name: canonical or name for name, canonical in names if name}


def read_domain(text: str) -> DomainCapabilities:
    """What `virsh domcapabilities` says.

    Raises:
        NotReadable: it is no such document.
    """
    root = tree.parse(text, "domainCapabilities")
    tpm = root.find("devices/tpm")
    return DomainCapabilities(
        max_vcpus=int(tree.attribute(root, "vcpu", "max") or 0),
        cpu_modes=frozenset(m.get("name", "") for m in root.findall("cpu/mode") if m.get("supported") == "yes"),
        host_model_xml=_host_model(root),
        firmware=_values(root, "os", "firmware"),
        loaders=frozenset((v.text or "").strip() for v in root.findall("os/loader/value")),
        secure_loader="yes" in _values(root, "os/loader", "secure"),
        disk_buses=_values(root, "devices/disk", "bus"),
        graphics=_values(root, "devices/graphics", "type"),
        videos=_values(root, "devices/video", "modelType"),
        tpm_models=_values(root, "devices/tpm", "model"),
        tpm_backends=_values(root, "devices/tpm", "backendModel"),
        has_tpm=tpm is None or tpm.get("supported") == "yes",
        sev=tree.attribute(root, "features/sev", "supported") == "yes",
    )


def _values(root: ET.Element, path: str, name: str) -> frozenset[str]:
    """The values of an <enum>."""
    return frozenset((v.text or "").strip() for v in root.findall(f"{path}/enum[@name='{name}']/value"))


def _host_model(root: ET.Element) -> str:
    mode = root.find("cpu/mode[@name='host-model']")
    if mode is None or mode.get("supported") != "yes" or not tree.value(mode, "model"):
        return ""
    cpu = ET.Element("cpu", {"mode": "custom", "match": "exact", "check": "partial"})
    for part in mode:
        copied = ET.SubElement(cpu, part.tag, dict(part.attrib))
        copied.text = (part.text or "").strip() or None
    return tree.text(cpu)
