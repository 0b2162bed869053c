"""Domains to rewrite for another host, without libvirt: real XML of libvirt 9.0 and a judge with set answers."""

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from drsync.target.domain import tree
from drsync.target.domain.capabilities import DomainCapabilities, HostCapabilities, read_domain, read_host
from drsync.target.domain.platform import choose_platform
from drsync.target.domain.rewrite import rewrite
from drsync.target.domain.values import (
    Effect,
    Mark,
    Network,
    NewDisk,
    Notes,
    Origin,
    Request,
    Rewritten,
    Surroundings,
    Target,
)

DATA: Final = Path(__file__).parent / "unit/target/domain/data"
MARK: Final = Mark(repository="00" * 16, vm="shop", point=7, capture="c" * 16)
SHOP_UUID: Final = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
SMALL_UUID: Final = "0c3f0a5e-7c7b-4f0a-9a54-0a3c62d0f6b1"


def xml_of(name: str) -> str:
    """A domain's inactive XML, as libvirt wrote it."""
    return (DATA / f"{name}.xml").read_text()


def host() -> HostCapabilities:
    """A host with two processors, one NUMA node and no huge pages, with KVM and without."""
    return read_host(xml_of("capabilities"))


def offer(virt_type: str = "kvm") -> DomainCapabilities:
    return read_domain(xml_of(f"domcapabilities-{virt_type}"))


@dataclass(slots=True)
class Judge:
    """A CpuJudge with set answers; remembers what it was asked."""

    misfits: Mapping[str, str] = field(default_factory=dict)
    """Model → what the host lacks of it."""
    common: str | None = None
    asked: list[str] = field(default_factory=list)

    def misfit(self, cpu_xml: str) -> str:
        self.asked.append(cpu_xml)
        return self.misfits.get(tree.value(tree.parse(cpu_xml, "cpu"), "model"), "")

    def baseline(self, cpus: Sequence[str]) -> str | None:
        del cpus
        return self.common


def disks(*targets: str, image_format: str = "qcow2") -> Mapping[str, NewDisk]:
    return {t: NewDisk(path=f"/pool/shop-{t}.{image_format}", format=image_format) for t in targets}


def request(**changes: Any) -> Request:
    """The shop as it was, its three captured disks restored."""
    usual = Request(name="shop", uuid=SHOP_UUID, disks=disks("vda", "vdb", "sda"), mark=MARK)
    return replace(usual, **changes)


def small_request(**changes: Any) -> Request:
    usual = Request(name="small", uuid=SMALL_UUID, disks=disks("vda", image_format="raw"), mark=MARK)
    return replace(usual, **changes)


def around(**changes: Any) -> Surroundings:
    """A host with one active network and one NIC; no file of the old host is there."""
    usual = Surroundings(
        networks={"default": Network(active=True)}, interfaces=frozenset({"lo", "eth0"}), has_path=lambda _path: False
    )
    return replace(usual, **changes)


@dataclass(slots=True)
class Outcome:
    """A rewritten domain, to ask questions of."""

    rewritten: Rewritten
    domain: ET.Element

    def value(self, path: str) -> str:
        return tree.value(self.domain, path)

    def attributes(self, path: str) -> Mapping[str, str] | None:
        found = self.domain.find(path)
        return None if found is None else dict(found.attrib)

    def has(self, path: str) -> bool:
        return self.domain.find(path) is not None

    def disk(self, target: str) -> ET.Element | None:
        return next(
            (d for _, d in tree.devices(self.domain, "disk") if tree.attribute(d, "target", "dev") == target), None
        )

    def notes(self, subject: str, effect: Effect | None = None) -> list[str]:
        notes = self.rewritten.notes
        return [n.text for n in notes if n.subject == subject and effect in (None, n.effect)]

    @property
    def problems(self) -> list[str]:
        return [f"{note.subject}: {note.text}" for note in self.rewritten.problems]


def run(
    xml: str,
    wanted: Request,
    *,
    capabilities: HostCapabilities | None = None,
    offered: DomainCapabilities | None = None,
    surroundings: Surroundings | None = None,
    judge: Judge | None = None,
    origin: Origin | None = None,
) -> Outcome:
    """Rewrite a domain for the bench's host, or one that differs from it."""
    capabilities = capabilities or host()
    notes = Notes()
    origin = origin or Origin()
    platform = choose_platform(tree.parse(xml, "domain"), capabilities, notes, machine=origin.machine)
    assert platform is not None, notes.all
    target = Target(
        host=capabilities,
        offer=offered or offer(platform.virt_type),
        platform=platform,
        around=surroundings or around(),
        judge=judge or Judge(),
    )
    rewritten = rewrite(xml, wanted, target, origin, notes.all)
    return Outcome(rewritten, tree.parse(rewritten.xml, "domain"))


def without_kvm(capabilities: HostCapabilities) -> HostCapabilities:
    return replace(capabilities, guests=[g for g in capabilities.guests if g.virt_type == "qemu"])
