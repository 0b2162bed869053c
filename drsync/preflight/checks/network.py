"""Whether the instance has a network: another interface name, another MAC address, an address from DHCP."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

from drsync.preflight.facts import Facts, Interface, Linux
from drsync.preflight.findings import Finding, fails, ok, unknown, warning
from drsync.preflight.machine import Machine

_PREDICTABLE: Final = "ens5"
"""The first ENA interface of Nitro instances, by its slot (EC2 User Guide, network interfaces)."""
_CLASSIC: Final = "eth0"
_ANY: Final = (
    "in the guest: DHCP for any name and without a MAC address (netplan: match: {name: 'e*'}, dhcp4: true;"
    " networkd: [Match] Name=e*; NetworkManager: no interface-name); or restore with --fix-guest ec2"
)


def interface_name(linux: Linux) -> str:
    """What the instance's first interface will be called."""
    classic = linux.command_lines and all("net.ifnames=0" in line for line in linux.command_lines)
    return _CLASSIC if classic or not linux.systemd else _PREDICTABLE


def check_network(_machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether the first interface gets an address."""
    return [_network_of(linux) for linux in facts.linux]


def _network_of(linux: Linux) -> Finding:
    check, name = "network", interface_name(linux)
    fitting = [i for i in linux.interfaces if i.dhcp and not i.mac and _fits(i, name)]
    if linux.fixed_names and name in linux.fixed_names:
        reason = (
            f"udev keeps the name {name} for another MAC address: the instance's interface would be called otherwise"
        )
        return fails(
            check, reason, "in the guest: remove /etc/udev/rules.d/70-persistent-net.rules (or the .link file)"
        )
    if fitting:
        return ok(check, f"DHCP on {fitting[0].name or 'any interface'} ({fitting[0].file})")
    if configures_network(linux):
        return ok(check, "cloud-init writes the configuration when it finds itself on EC2")
    if linux.interfaces:
        return _unfitting(linux.interfaces, name)
    if linux.network_by:
        return fails(check, f"{', '.join(linux.network_by)} configures no interface", _ANY)
    return unknown(
        check, "it was not found what configures the network", "in the guest: see that DHCP is used on any interface"
    )


def _fits(interface: Interface, name: str) -> bool:
    return not interface.name or any(fnmatchcase(name, pattern) for pattern in interface.name.split())


def configures_network(linux: Linux) -> bool:
    """Whether cloud-init will configure the network in EC2."""
    return linux.cloud_init and linux.cloud_init_network and knows_ec2(linux)


def knows_ec2(linux: Linux) -> bool:
    """Whether cloud-init may look for EC2's metadata."""
    return not linux.datasources or "ec2" in {source.lower() for source in linux.datasources}


def _unfitting(interfaces: Sequence[Interface], name: str) -> Finding:
    check = "network"
    first = next((i for i in interfaces if i.dhcp), interfaces[0])
    if first.mac:
        return fails(check, f"{first.file} is for the MAC address {first.mac}, which the instance will not have", _ANY)
    if not _fits(first, name):
        return fails(check, f"{first.file} is for {first.name}; the instance's interface is called {name}", _ANY)
    address = first.addresses[0] if first.addresses else "no DHCP"
    reason = f"{first.file} has a fixed address ({address})"
    return warning(check, reason, "restore into a subnet with that address and gateway, with --keep-ip; or use DHCP")
