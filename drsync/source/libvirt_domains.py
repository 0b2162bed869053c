"""Which domains a libvirt has: for patterns that find VMs by their names."""

from collections.abc import Sequence
from dataclasses import dataclass

import libvirt

from drsync.source.libvirt_connection import connected


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundDomain:
    """A domain that could be protected."""

    name: str
    uuid: str


def find_domains(uri: str) -> Sequence[FoundDomain]:
    """All domains of the host, in the order of their names, but those that have moved to another host.

    Raises:
        LibvirtUnreachable: it does not answer.
    """
    with connected(uri) as connection:
        domains = [domain for domain in connection.listAllDomains() if _is_here(domain)]
        found = [FoundDomain(name=domain.name(), uuid=domain.UUIDString()) for domain in domains]
    return sorted(found, key=lambda domain: domain.name)


def _is_here(domain: libvirt.virDomain) -> bool:
    """Whether it lives here: after a migration, its old host may keep it, shut off; one that arrives isn't here yet."""
    moved = {
        (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION),
    }
    try:
        return tuple(domain.state()) not in moved
    except libvirt.libvirtError:  # it went away while we looked
        return False
