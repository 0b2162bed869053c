"""A libvirt host on which VMs come back: what it offers, and its domains.

The only module of this package that loads libvirt's binding, and only when a host is opened:
no other command needs it.
"""

import importlib
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlsplit

from drsync.errors import BindingMissing, HostRefused, HostUnreachable
from drsync.target.domain import tree
from drsync.target.domain.capabilities import DomainCapabilities, HostCapabilities, read_domain, read_host
from drsync.target.domain.rewrite import read_mark
from drsync.target.domain.values import Mark, Network, Platform, Surroundings

_AGENT_TIMEOUT_S: Final = 5
_COMPARISONS: Final = frozenset({1, 2})
"""VIR_CPU_COMPARE_IDENTICAL and _SUPERSET: the host has all of it."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A domain of the host."""

    name: str
    uuid: str
    active: bool
    xml: str
    """Inactive, with its secrets."""
    autostart: bool
    has_saved_state: bool
    """It would start with the memory of its last run (virsh managedsave)."""
    mark: Mark | None

    @property
    def disks(self) -> Mapping[str, str]:
        """Target (vda) → path, of the writable disks in files and on devices."""
        found = {}
        for _, disk in tree.devices(tree.parse(self.xml, "domain"), "disk"):
            source = disk.find("source")
            path = (source.get("file") or source.get("dev")) if source is not None else None
            if path and disk.get("device", "disk") == "disk" and disk.find("readonly") is None:
                found[tree.attribute(disk, "target", "dev")] = path
        return found

    @property
    def nvram(self) -> str:
        """The path of its NVRAM, if it has any."""
        return tree.value(tree.parse(self.xml, "domain"), "os/nvram")


def load_libvirt() -> Any:
    """libvirt's binding, made to raise its errors and not to print them too.

    Raises:
        BindingMissing: it is not installed.
    """
    try:
        libvirt = importlib.import_module("libvirt")
    except ImportError as err:
        raise BindingMissing(problem=err) from err
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    return libvirt


class LibvirtHost:
    """An open connection. Its methods may be called from several threads."""

    def __init__(self, uri: str) -> None:
        """Connect.

        Raises:
            BindingMissing: there is no binding.
            HostUnreachable: nobody answers at `uri`.
        """
        self.libvirt = load_libvirt()
        self.uri = uri
        try:
            self.connection = self.libvirt.open(uri)
        except self.libvirt.libvirtError as err:
            raise HostUnreachable(uri=uri, problem=_said(err)) from err

    @property
    def is_local(self) -> bool:
        """Whether the URI is of this machine, so that libvirt's files are this machine's, too."""
        return not urlsplit(self.uri).hostname

    @contextmanager
    def asked(self, operation: str) -> Iterator[None]:
        """Raise what libvirt answers as an error of drsync's.

        Raises:
            HostUnreachable: the connection is gone.
            HostRefused: anything else.
        """
        try:
            yield
        except self.libvirt.libvirtError as err:
            if not self._alive():
                raise HostUnreachable(uri=self.uri, problem=_said(err)) from err
            raise HostRefused(uri=self.uri, operation=operation, problem=_said(err)) from err

    def _alive(self) -> bool:
        try:
            return bool(self.connection.isAlive())
        except self.libvirt.libvirtError:
            return False

    @cached_property
    def capabilities(self) -> HostCapabilities:
        """What the host is."""
        with self.asked("capabilities"):
            return self._read(read_host, self.connection.getCapabilities())

    def offer(self, platform: Platform) -> DomainCapabilities:
        """What domains on a platform can have."""
        with self.asked("domcapabilities"):
            text = self.connection.getDomainCapabilities(*_words(platform), 0)
        offer = self._read(read_domain, text)
        if not offer.host_model_xml:
            return offer
        expand = self.libvirt.VIR_CONNECT_BASELINE_CPU_EXPAND_FEATURES
        try:
            expanded = self.connection.baselineHypervisorCPU(*_words(platform), [offer.host_model_xml], expand)
        except self.libvirt.libvirtError:  # an architecture for which libvirt has no list of features
            return offer
        features = tree.parse(expanded, "cpu").findall("feature")
        return replace(offer, features=frozenset(f.get("name", "") for f in features if f.get("policy") != "disable"))

    def _read(self, read: Callable[[str], T], text: str) -> T:
        try:
            return read(text)
        except tree.NotReadable as err:
            raise HostRefused(uri=self.uri, operation="capabilities", problem=f"its answer {err}") from err

    def judge(self, platform: Platform) -> "HostCpuJudge":
        """Who knows which processors fit here."""
        return HostCpuJudge(self.connection, self.libvirt, platform)

    def surroundings(self) -> Surroundings:
        """Networks, devices, filters and secrets of the host."""
        with self.asked("listing networks"):
            networks = {n.name(): self._network(n) for n in self.connection.listAllNetworks(0)}
        return Surroundings(
            networks=networks,
            interfaces=self._interfaces(),
            filters=frozenset(f.name() for f in self._listed("listAllNWFilters")),
            secrets=frozenset(s.UUIDString() for s in self._listed("listAllSecrets")),
            devices=frozenset(d.name() for d in self._listed("listAllDevices")) or None,
            macs=self._macs(),
            has_path=self._has_path,
        )

    def _network(self, network: Any) -> Network:
        described = tree.parse(network.XMLDesc(0), "network")
        groups = frozenset(group.get("name", "") for group in described.findall("portgroup"))
        return Network(active=bool(network.isActive()), portgroups=groups)

    def _listed(self, method: str) -> Sequence[Any]:
        """What a driver of libvirt lists; a host without that driver has none."""
        try:
            found: Sequence[Any] = getattr(self.connection, method)(0)
        except self.libvirt.libvirtError:
            return ()
        return found

    def _interfaces(self) -> frozenset[str] | None:
        if self.is_local:
            return frozenset(path.name for path in Path("/sys/class/net").iterdir())
        names = set()
        for device in self._listed("listAllDevices"):
            if device.name().startswith("net_"):
                names.add(tree.value(tree.parse(device.XMLDesc(0), "device"), "capability/interface"))
        return frozenset(names) or None

    def _macs(self) -> Mapping[str, str]:
        found = {}
        for domain in self.domains():
            for _, interface in tree.devices(tree.parse(domain.xml, "domain"), "interface"):
                found[tree.attribute(interface, "mac", "address").lower()] = domain.name
        return found

    def _has_path(self, path: str) -> bool | None:
        return os.path.lexists(path) if self.is_local and path.startswith("/") else None

    def domains(self) -> Sequence[Domain]:
        """All domains."""
        with self.asked("listing domains"):
            return [self._describe(domain) for domain in self.connection.listAllDomains(0)]

    def find(self, *, name: str = "", uuid: str = "") -> Domain | None:
        """The domain of that name or uuid."""
        handle = self._handle(name=name, uuid=uuid)
        if handle is None:
            return None
        with self.asked(f"reading domain {name or uuid}"):
            return self._describe(handle)

    def _handle(self, *, name: str = "", uuid: str = "") -> Any:
        try:
            return self.connection.lookupByUUIDString(uuid) if uuid else self.connection.lookupByName(name)
        except self.libvirt.libvirtError as err:
            if err.get_error_code() == self.libvirt.VIR_ERR_NO_DOMAIN:
                return None
            with self.asked(f"looking for domain {name or uuid}"):
                raise

    def _describe(self, domain: Any) -> Domain:
        flags = self.libvirt.VIR_DOMAIN_XML_INACTIVE | self.libvirt.VIR_DOMAIN_XML_SECURE
        xml = domain.XMLDesc(flags)
        persistent = bool(domain.isPersistent())
        return Domain(
            name=domain.name(),
            uuid=domain.UUIDString(),
            active=bool(domain.isActive()),
            xml=xml,
            autostart=persistent and bool(domain.autostart()),
            has_saved_state=persistent and bool(domain.hasManagedSaveImage(0)),
            mark=read_mark(xml),
        )

    def define(self, xml: str, *, autostart: bool) -> None:
        """Define a domain, or define it anew.

        Raises:
            HostRefused: libvirt does not take it; nothing changed.
        """
        with self.asked("defining the domain"):
            self.connection.defineXML(xml).setAutostart(1 if autostart else 0)

    def undefine(self, uuid: str) -> None:
        """Forget a domain; its files are the caller's. Nothing happens if there is none."""
        domain = self._handle(uuid=uuid)
        flags = self.libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM | self.libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        if domain is not None:
            with self.asked("undefining the domain"):
                domain.undefineFlags(flags)

    def start(self, uuid: str) -> None:
        """Start a domain.

        Raises:
            HostRefused: it does not start.
        """
        with self.asked("starting the domain"):
            self.connection.lookupByUUIDString(uuid).create()

    def agent_answers(self, uuid: str) -> bool:
        """Whether the guest's agent answers (guest-ping); waits a few seconds at most."""
        libvirt_qemu = importlib.import_module("libvirt_qemu")
        try:
            domain = self.connection.lookupByUUIDString(uuid)
            libvirt_qemu.qemuAgentCommand(domain, '{"execute": "guest-ping"}', _AGENT_TIMEOUT_S, 0)
        except self.libvirt.libvirtError:
            return False
        return True

    def addresses(self, uuid: str) -> Sequence[str]:
        """The guest's IP addresses, as its DHCP lease, its agent or the ARP table tell; the first that knows any."""
        domain = self._handle(uuid=uuid)
        for source in (0, 1, 2) if domain is not None else ():  # VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE, _AGENT, _ARP
            try:
                interfaces = domain.interfaceAddresses(source)
            except self.libvirt.libvirtError:
                continue
            listed = [a["addr"] for i in interfaces.values() for a in i.get("addrs") or ()]
            usable = [address for address in listed if not address.startswith(("127.", "::1", "fe80"))]
            if usable:
                return usable
        return ()

    def is_active(self, uuid: str) -> bool:
        """Whether the domain runs."""
        domain = self._handle(uuid=uuid)
        if domain is None:
            return False
        with self.asked("asking for the domain's state"):
            return bool(domain.isActive())

    def close(self) -> None:
        """Disconnect; what runs goes on."""
        try:
            self.connection.close()
        except self.libvirt.libvirtError:  # it was gone already
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HostCpuJudge:
    """A CpuJudge that asks the host's libvirt."""

    def __init__(self, connection: Any, libvirt: Any, platform: Platform) -> None:
        self._connection = connection
        self._libvirt = libvirt
        self._platform = platform

    def misfit(self, cpu_xml: str) -> str:
        flags = self._libvirt.VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE
        try:
            result = self._connection.compareHypervisorCPU(*_words(self._platform), cpu_xml, flags)
        except self._libvirt.libvirtError as err:
            return _misfit(_said(err))
        return "" if result in _COMPARISONS else "this host's processor is another one"

    def baseline(self, cpus: Sequence[str]) -> str | None:
        try:
            common: str = self._connection.baselineHypervisorCPU(*_words(self._platform), list(cpus), 0)
        except self._libvirt.libvirtError:
            return None
        cpu = tree.parse(common, "cpu")
        cpu.attrib.clear()
        cpu.attrib.update({"mode": "custom", "match": "exact", "check": "partial"})
        return tree.text(_required(cpu))


def _required(cpu: ET.Element) -> ET.Element:
    """baseline* answers with policies for the model as a host; as a guest's, `require` and `disable` say the same."""
    for feature in cpu.findall("feature"):
        feature.attrib.setdefault("policy", "require")
    return cpu


def _words(platform: Platform) -> tuple[str, str, str, str]:
    return platform.emulator, platform.arch, platform.machine, platform.virt_type


def _said(err: Exception) -> str:
    return " ".join(str(err).split()) or type(err).__name__


def _misfit(said: str) -> str:
    """libvirt's message without what every one of them begins with."""
    return said.rpartition("host CPU: ")[2] or said
