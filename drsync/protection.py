"""Which VMs this host protects: those that the configuration names, and those that its patterns find.

[[vm]]       ──────────────────────────────▶ VmSettings
[[protect]]  ──▶ libvirt: which domains? ──▶ VmSettings, a name in the repository for each
"""

import fnmatch
import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

from drsync.config import Config, LibvirtSource, ProtectSettings, VmSettings
from drsync.errors import LibvirtMissing, UnknownVm
from drsync.model import is_name

_KEPT_LENGTH: Final = 54
"""Of a name that has to be changed: with a dash and 8 hex digits behind it, it has 63 characters at most."""


class Domain(Protocol):
    """What is asked of a domain that a pattern finds."""

    @property
    def name(self) -> str:
        """Its name in libvirt."""
        ...

    @property
    def uuid(self) -> str:
        """Its UUID."""
        ...


class Protection:
    """One configuration's VMs. Thread-safe."""

    def __init__(self, config: Config, find: Callable[[str], Sequence[Domain]] | None = None) -> None:
        """`find` lists the domains of a libvirt URI; libvirt is asked unless given."""
        self._config = config
        self._find = find or _find_domains
        self._lock = threading.Lock()
        self._found: Sequence[VmSettings] = ()

    @property
    def vms(self) -> Sequence[VmSettings]:
        """The VMs that are named, then those that were found when it was last looked."""
        with self._lock:
            return (*self._config.vms, *self._found)

    def look(self) -> Sequence[VmSettings]:
        """Ask libvirt which domains the patterns match now; all VMs, as `vms`.

        Raises:
            LibvirtMissing, LibvirtUnreachable: it can't be asked; `vms` is as before.
        """
        domains = {uri: self._find(uri) for uri in sorted({protect.uri for protect in self._config.protects})}
        found: dict[str, VmSettings] = {}
        taken = {vm.name for vm in self._config.vms} | {key for vm in self._config.vms for key in _domain_keys(vm)}
        for protect in self._config.protects:
            for domain in domains[protect.uri]:
                name = repository_name(domain.name)
                if name in found or taken & {name, domain.name, domain.uuid} or not matches(protect, domain.name):
                    continue
                found[name] = _settings(name, domain, protect)
        with self._lock:
            self._found = tuple(found.values())
        return self.vms

    def vm(self, name: str) -> VmSettings:
        """The settings of the VM of this name; looks for it once more if it isn't known.

        Raises:
            UnknownVm: it is not configured; the message lists those that are.
            LibvirtMissing, LibvirtUnreachable: as `look`.
        """
        known = self.vms
        if self._config.protects and not any(vm.name == name for vm in known):
            known = self.look()
        for vm in known:
            if vm.name == name:
                return vm
        raise UnknownVm(vm=name, known=", ".join(vm.name for vm in known) or "none")


def matches(protect: ProtectSettings, domain: str) -> bool:
    """Whether a pattern means the domain of this name."""
    excluded = any(fnmatch.fnmatchcase(domain, pattern) for pattern in protect.exclude_vms)
    return fnmatch.fnmatchcase(domain, protect.match) and not excluded


def repository_name(domain: str) -> str:
    """The name in the repository of the domain that libvirt calls `domain`.

    The same, if it can be one. Else it is made one: lower case, every run of other characters
    a dash, and 8 digits of the name's hash behind it, so that no two names become one.
    """
    if is_name(domain):
        return domain
    kept = re.sub(r"[^a-z0-9._-]+", "-", domain.lower()).strip("._-")[:_KEPT_LENGTH]
    return f"{kept or 'vm'}-{hashlib.sha256(domain.encode()).hexdigest()[:8]}"


def _settings(name: str, domain: Domain, protect: ProtectSettings) -> VmSettings:
    source = LibvirtSource(domain=domain.name, uri=protect.uri, exclude=protect.exclude)
    return VmSettings(
        name=name,
        source=source,
        rpo_s=protect.rpo_s,
        capture_timeout_s=protect.capture_timeout_s,
        consistency=protect.consistency,
        freeze_timeout_s=protect.freeze_timeout_s,
        on_freeze_failure=protect.on_freeze_failure,
        group=protect.group,
        group_pause=protect.group_pause,
    )


def _domain_keys(vm: VmSettings) -> Iterator[str]:
    if isinstance(vm.source, LibvirtSource):
        yield vm.source.domain or vm.name


def _find_domains(uri: str) -> Sequence[Domain]:
    with libvirt_needed("*"):
        from drsync.source.libvirt_domains import find_domains  # noqa: PLC0415  a host without libvirt does without

    return find_domains(uri)


@contextmanager
def libvirt_needed(vm: str) -> Iterator[None]:
    """What is imported inside needs Python's binding of libvirt.

    Raises:
        LibvirtMissing: it is not there, or does not load.
    """
    try:
        yield
    except ImportError as err:
        raise LibvirtMissing(vm=vm, problem=str(err)) from err
