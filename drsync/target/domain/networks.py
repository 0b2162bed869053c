"""The network interfaces: which network of the target each one is on, and their MAC addresses."""

import xml.etree.ElementTree as ET
from typing import Final

from drsync.target.domain import tree
from drsync.target.domain.values import ANY_NETWORK, Notes, Request, Surroundings, Target

BRIDGE_PREFIX: Final = "bridge:"
_AUTOMATIC: Final = ("vnet", "vif", "macvtap", "macvlan")
"""Prefixes of tap devices that libvirt names itself."""
_OF_THE_OLD: Final = ("source", "virtualport", "vlan", "portid", "driver", "script", "backend", "downscript")
"""What an interface has because of where it was plugged in."""


def map_networks(domain: ET.Element, request: Request, target: Target, notes: Notes) -> None:
    """Plug every interface in where the request says, else where it was, if that is here."""
    for _, interface in tree.devices(domain, "interface"):
        _map_interface(interface, request, target, notes)


def old_names(domain: ET.Element) -> list[str]:
    """What the domain's interfaces are plugged into: the OLD of --network OLD=NEW."""
    return list(dict.fromkeys(filter(None, (_old_name(i) for _, i in tree.devices(domain, "interface")))))


def _old_name(interface: ET.Element) -> str:
    source = interface.find("source")
    if source is None:
        return tree.attribute(interface, "target", "dev") if interface.get("type") == "ethernet" else ""
    for name in ("network", "bridge", "dev", "path"):
        if source.get(name):
            return source.get(name, "")
    address = source.find("address")
    if address is None:
        return ""
    domain, bus, slot, function = (
        address.get(k, "0").removeprefix("0x") for k in ("domain", "bus", "slot", "function")
    )
    return f"{domain}:{bus}:{slot}.{function}"


def _map_interface(interface: ET.Element, request: Request, target: Target, notes: Notes) -> None:
    old = _old_name(interface)
    mac = tree.attribute(interface, "mac", "address")
    subject = f"network {old}" if old else f"interface {mac}"
    _clean(interface, request, target, notes, subject)
    new = request.networks.get(old) or (request.networks.get(ANY_NETWORK) if interface.get("type") != "user" else None)
    if new is not None:
        _plug_in(interface, old, new, target.around, notes)
    else:
        _keep(interface, old, request, target.around, notes)


def _clean(interface: ET.Element, request: Request, target: Target, notes: Notes, subject: str) -> None:
    if tree.attribute(interface, "target", "dev").startswith(_AUTOMATIC):
        tree.drop(interface, "target")
    for alias in interface.findall("alias"):
        if not alias.get("name", "").startswith("ua-"):
            interface.remove(alias)
    rules = tree.attribute(interface, "filterref", "filter")
    if rules and rules not in target.around.filters:
        tree.drop(interface, "filterref")
        notes.lost(subject, f"packet filter {rules} is not here and is left out: nothing is filtered")
    mac = interface.find("mac")
    if mac is None:
        return
    if not request.keep_mac:
        interface.remove(mac)  # libvirt gives it a new one
        notes.changed(subject, f"MAC address {mac.get('address')} becomes a new one")
    else:
        holder = target.around.macs.get(mac.get("address", "").lower())
        if holder is not None and holder != request.name:
            notes.changed(
                subject, f"MAC address {mac.get('address')} is also that of {holder}: give --new-mac if both run"
            )


def _plug_in(interface: ET.Element, old: str, new: str, around: Surroundings, notes: Notes) -> None:
    for tag in _OF_THE_OLD:
        if tree.drop(interface, tag) and tag in ("vlan", "script"):
            notes.changed(f"network {old}", f"its {tag} is left out: {new} has its own")
    if new.startswith(BRIDGE_PREFIX):
        bridge = new.removeprefix(BRIDGE_PREFIX)
        interface.set("type", "bridge")
        interface.insert(0, ET.Element("source", {"bridge": bridge}))
        if around.interfaces is not None and bridge not in around.interfaces:
            notes.problem(f"network {old}", f"is to be bridge {bridge}, which is not here; {_there(around)}")
    else:
        interface.set("type", "network")
        interface.insert(0, ET.Element("source", {"network": new}))
        _check_network(f"network {old}", new, around, notes)
    if old and old != new:
        notes.changed(f"network {old}", f"becomes {new}")
    interface.attrib.pop("managed", None)


def _keep(interface: ET.Element, old: str, request: Request, around: Surroundings, notes: Notes) -> None:
    subject, kind = f"network {old}", interface.get("type", "")
    source = interface.find("source")
    match kind:
        case "network":
            _check_network(subject, old, around, notes)
            _keep_portgroup(source, old, around, notes)
            if source is not None:  # of a run: libvirt chose them
                source.attrib.pop("portid", None)
                source.attrib.pop("bridge", None)
        case "bridge" | "direct" | "ethernet":
            what = {"bridge": "bridge", "direct": "host device", "ethernet": "tap device"}[kind]
            if kind == "ethernet" and tree.attribute(interface, "target", "managed") != "no":
                return  # QEMU makes the tap device
            if around.interfaces is not None and old not in around.interfaces:
                notes.problem(subject, f"{what} {old} is not here; map it: --network {old}=NEW; {_there(around)}")
        case "hostdev" if not request.in_place:
            notes.problem(
                subject, f"was a NIC of the old host passed through; map it: --network {old}=NEW; {_there(around)}"
            )
        case "vhostuser" if around.has_path(old) is not True and not request.in_place:
            notes.problem(subject, f"socket {old} is not here; map it: --network {old}=NEW; {_there(around)}")


def _keep_portgroup(source: ET.Element | None, name: str, around: Surroundings, notes: Notes) -> None:
    network = around.networks.get(name)
    group = source.get("portgroup") if source is not None else None
    if source is not None and group and network is not None and group not in network.portgroups:
        del source.attrib["portgroup"]
        notes.changed(f"network {name}", f"port group {group} is not here: the network's default is used")


def _check_network(subject: str, name: str, around: Surroundings, notes: Notes) -> None:
    network = around.networks.get(name)
    if network is None:
        notes.problem(subject, f"there is no network {name} here; map it: --network {name}=NEW; {_there(around)}")
    elif not network.active:
        notes.problem(subject, f"network {name} is not active (virsh net-start {name})")


def _there(around: Surroundings) -> str:
    names = ", ".join(sorted(around.networks)) or "none"
    return f"networks here: {names}"
