"""Hypervisor, machine type, emulator; memory and processors, and where on the host they are pinned."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Final

from drsync.target.domain import tree
from drsync.target.domain.capabilities import GuestSupport, HostCapabilities
from drsync.target.domain.values import Notes, Platform, Target
from drsync.units import format_size

_ALIASES: Final = (("q35", "q35"), ("i440fx", "pc"), ("virt", "virt"), ("s390-ccw", "s390-ccw-virtio"))
_KVM_ONLY: Final = (
    ("features/kvm", "KVM's features"),
    ("features/hyperv", "Hyper-V enlightenments"),
    ("features/pvspinlock", "paravirtual spinlocks"),
    ("features/ioapic", "the I/O APIC's driver"),
)
_KVM_TIMERS: Final = frozenset({"kvmclock", "hypervclock", "tsc"})
_PINS: Final = (
    "cputune/vcpupin",
    "cputune/emulatorpin",
    "cputune/iothreadpin",
)
_SCHEDULERS: Final = (
    "cputune/vcpusched",
    "cputune/iothreadsched",
    "cputune/emulatorsched",
    "cputune/cachetune",
    "cputune/memorytune",
)
_FAMILY: Final = re.compile(r"(.*?)-?(\d+(?:\.\d+)*)$")


def choose_platform(domain: ET.Element, host: HostCapabilities, notes: Notes, *, machine: str = "") -> Platform | None:
    """What can run the domain on the host, as near as possible to what ran it; None if nothing can.

    `machine` is the canonical machine type behind an alias in the XML, if it is known.
    """
    kind = domain.find("os/type")
    arch = (kind.get("arch") if kind is not None else None) or host.arch
    wanted = machine or (kind.get("machine", "") if kind is not None else "")
    guest = _guest(domain.get("type", "kvm"), arch, host, notes)
    if guest is None:
        return None
    chosen = choose_machine(wanted, guest.machines)
    if not chosen:
        offered = ", ".join(dict.fromkeys(guest.machines.values())) or "none"
        notes.problem("machine", f"{wanted} is not offered, nor anything like it; there are: {offered}")
        return None
    if chosen != wanted:
        notes.changed("machine", f"{wanted or 'the default'} becomes {chosen}{_machine_hint(wanted, chosen)}")
    return Platform(arch=arch, virt_type=guest.virt_type, machine=chosen, emulator=guest.emulator)


def _guest(virt_type: str, arch: str, host: HostCapabilities, notes: Notes) -> GuestSupport | None:
    found = host.guest(arch, virt_type)
    if found is not None:
        return found
    for other in ("kvm", "qemu"):
        found = host.guest(arch, other)
        if found is not None:
            slow = "emulated, without KVM: the guest will be slow" if other == "qemu" else "with KVM"
            notes.changed("hypervisor", f"{virt_type} is not offered for {arch}: it runs {slow}")
            return found
    known = ", ".join(sorted({g.arch for g in host.guests})) or "none"
    notes.problem("hypervisor", f"guests of architecture {arch} can't run here; there are: {known}")
    return None


def choose_machine(wanted: str, offered: Mapping[str, str]) -> str:
    """The machine type to use: the same; else the newest below it of its family; else its chipset's newest; or ""."""
    if not wanted:
        return next(iter(offered.values()), "")
    names = set(offered) | set(offered.values())
    if wanted in names:
        return offered.get(wanted, wanted)
    family, version = _parts(wanted)
    older = [n for n in names if _parts(n)[0] == family and () < _parts(n)[1] <= version]
    if older:
        return max(older, key=lambda name: _parts(name)[1])
    alias = next((alias for part, alias in _ALIASES if part in wanted), family)
    if alias in offered:
        return offered[alias]
    newer = [n for n in names if _parts(n)[0] == family and _parts(n)[1]]
    return min(newer, key=lambda name: _parts(name)[1], default="")


def _parts(machine: str) -> tuple[str, tuple[int, ...]]:
    """Family and version: "pc-q35-7.2" is ("pc-q35", (7, 2))."""
    match = _FAMILY.fullmatch(machine)
    if match is None or not match[1]:
        return machine, ()
    return match[1], tuple(map(int, match[2].split(".")))


def _machine_hint(wanted: str, chosen: str) -> str:
    if _parts(wanted)[0] == _parts(chosen)[0] and () < _parts(chosen)[1] <= _parts(wanted)[1]:
        return ", the newest of its family that is offered up to it"
    if wanted in {alias for _, alias in _ALIASES}:
        return ", which the name stands for here"
    return ", the nearest that is offered: the guest may find devices at new places"


def map_platform(domain: ET.Element, target: Target, notes: Notes) -> None:
    """Set hypervisor, machine type and emulator; take away what only another hypervisor has."""
    platform = target.platform
    domain.attrib.pop("id", None)
    domain.set("type", platform.virt_type)
    kind = tree.child(domain, "os/type")
    kind.set("arch", platform.arch)
    kind.set("machine", platform.machine)
    emulator = tree.child(domain, "devices/emulator")
    if emulator.text and emulator.text.strip() != platform.emulator:
        notes.changed("emulator", f"{emulator.text.strip()} becomes {platform.emulator}")
    emulator.text = platform.emulator
    if platform.virt_type == "qemu":
        _drop_kvm_features(domain, notes)
    if domain.find("launchSecurity") is not None and not target.offer.sev:
        notes.problem("launch security", "the domain's memory is encrypted by the processor, which this host can't do")


def _drop_kvm_features(domain: ET.Element, notes: Notes) -> None:
    for path, what in _KVM_ONLY:
        if tree.drop(domain, path):
            notes.changed("features", f"{what} are left out: they need KVM")
    clock = domain.find("clock")
    for timer in clock.findall("timer") if clock is not None else ():
        if timer.get("name") in _KVM_TIMERS and clock is not None:
            clock.remove(timer)
            notes.changed("clock", f"timer {timer.get('name')} is left out: it needs KVM")


def map_resources(domain: ET.Element, target: Target, notes: Notes) -> None:
    """Check memory and processors; take away pins to what the host does not have."""
    memory = tree.size_bytes(domain.find("memory"))
    host = target.host
    if host.memory_bytes and memory > host.memory_bytes:
        has = format_size(host.memory_bytes)
        notes.problem("memory", f"the domain has {format_size(memory)}, the whole host {has}")
    vcpu = domain.find("vcpu")
    count = int((vcpu.text or "1").strip()) if vcpu is not None and (vcpu.text or "").strip().isdigit() else 1
    if target.offer.max_vcpus and count > target.offer.max_vcpus:
        notes.problem(
            "vcpu", f"{count} processors are more than the {target.offer.max_vcpus} that guests can have here"
        )
    elif host.cpus and count > len(host.cpus):
        notes.changed("vcpu", f"{count} processors share the host's {len(host.cpus)}: the guest will be slower")
    if vcpu is not None and vcpu.get("cpuset") and not _has(vcpu.get("cpuset", ""), host.cpus):
        del vcpu.attrib["cpuset"]
        notes.changed("vcpu", "is pinned no more: this host has other processors")
    _drop_pins(domain, target, notes)
    _drop_numa(domain, target, notes)
    _drop_hugepages(domain, target, notes)
    partition = tree.value(domain, "resource/partition")
    if partition and partition != "/machine":
        tree.drop(domain, "resource/partition")
        notes.changed("resource", f"control group {partition} is left out: it may not be here")
    tree.drop_empty(domain, "resource", "cputune", "numatune", "memoryBacking", "blkiotune")


def _has(numbers: str, there: frozenset[int]) -> bool:
    """Whether all numbers of a set are there; what can't be read isn't, and an unknown host has all."""
    try:
        return not there or tree.parse_set(numbers) <= there
    except ValueError:
        return False


def _drop_pins(domain: ET.Element, target: Target, notes: Notes) -> None:
    cpus = target.host.cpus
    pinned = [pin for path in _PINS for pin in domain.findall(path)]
    if all(_has(pin.get("cpuset", ""), cpus) for pin in pinned):
        return
    for path in (*_PINS, *_SCHEDULERS):  # half of a pinning is worse than none
        tree.drop(domain, path)
    notes.changed("cputune", "processors are pinned no more: this host has other ones")


def _drop_numa(domain: ET.Element, target: Target, notes: Notes) -> None:
    cells = target.host.cells
    numa = domain.find("numatune")
    if numa is None:
        return
    if not all(_has(part.get("nodeset", ""), cells) for part in numa):
        domain.remove(numa)
        notes.changed("numatune", "memory is bound to NUMA nodes no more: this host has other ones")


def _drop_hugepages(domain: ET.Element, target: Target, notes: Notes) -> None:
    huge = domain.find("memoryBacking/hugepages")
    if huge is None:
        return
    sizes = [_page_bytes(page) for page in huge.findall("page")] or [0]
    pages, needed = target.host.page_sizes, tree.size_bytes(domain.find("memory"))
    for size in sizes:
        room = sum(s * n for s, n in pages.items() if s > 4096 and size in (0, s))
        if room < needed:
            tree.drop(domain, "memoryBacking/hugepages")
            has, wants = format_size(room), format_size(needed)
            notes.changed("memory", f"uses no huge pages: this host has set {has} of them aside, {wants} are needed")
            return


def _page_bytes(page: ET.Element) -> int:
    sized = ET.Element("page", {"unit": page.get("unit", "KiB")})
    sized.text = page.get("size", "0")
    return tree.size_bytes(sized)
