"""What configures a guest's network: files' texts in, interfaces out. Pure.

Each function knows one tool's files and reads no more of them than a check needs: which interface,
DHCP or not, and whether it is tied to a name or a MAC address that a cloud's instance will not have.
"""

import configparser
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from drsync.preflight.facts import Interface, plain

_SECTION: Final = re.compile(r"\s*\[([^\]]+)\]\s*$")
_CLOUD_INIT: Final = ("cloud-init", "cloud init")


def netplan(file: str, text: str) -> list[Interface]:
    """Interfaces of a file of netplan's (netplan.readthedocs.io, YAML reference).

    Raises:
        ValueError: it is no YAML, or Python's yaml is not installed.
    """
    document = _yaml(text)
    network = document.get("network") if isinstance(document, dict) else None
    found: list[Interface] = []
    for section in ("ethernets", "bonds", "bridges", "vlans"):
        devices = network.get(section) if isinstance(network, dict) else None
        for name, device in (devices if isinstance(devices, dict) else {}).items():
            if isinstance(device, dict):
                found.append(_netplan_device(file, text, str(name), device))
    return found


def _netplan_device(file: str, text: str, name: str, device: Mapping[str, Any]) -> Interface:
    match = device.get("match")
    match = match if isinstance(match, dict) else {}
    addresses = device.get("addresses")
    dhcp = _true(device.get("dhcp4")) or _true(device.get("dhcp6"))
    return Interface(
        file=plain(file),
        name=_scalar(match.get("name", "" if match else name)),
        mac=_scalar(match.get("macaddress", "")),
        dhcp=dhcp,
        addresses=tuple(filter(None, map(_scalar, addresses[:16]))) if isinstance(addresses, list) else (),
        by_cloud_init=_by_cloud_init(text) or "cloud-init" in file,
    )


def _scalar(value: object) -> str:
    """A plain value; the first key of a mapping, as in `- 10.0.0.5/24: {label: x}`.

    Nothing else is turned into text: YAML's aliases make a few lines into a text that fits no memory.
    """
    if isinstance(value, dict):
        value = next(iter(value), "")
    return plain(value) if isinstance(value, str | int | float) else ""


def _yaml(text: str) -> Any:
    try:
        import yaml  # noqa: PLC0415 - of the extra `preflight`
    except ImportError as err:
        raise ValueError("Python's yaml is not installed") from err
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as err:
        raise ValueError("it is no YAML") from err


def networkd(file: str, text: str) -> list[Interface]:
    """The interface of a .network file (systemd.network(5))."""
    sections = dict(_sections(text))
    match, network = sections.get("match", {}), sections.get("network", {})
    dhcp = network.get("dhcp", "no").lower() not in {"no", "false", "0", "none"}
    types = match.get("type", "ether")
    if types not in {"ether", ""}:
        return []
    addresses = tuple(
        plain(v)
        for s, keys in _sections(text)
        if s in {"network", "address"}
        for k, v in keys.items()
        if k == "address"
    )
    return [
        Interface(
            file=plain(file),
            name=plain(match.get("name", "")),
            mac=plain(match.get("macaddress", match.get("permanentmacaddress", ""))),
            dhcp=dhcp,
            addresses=addresses[:16],
            by_cloud_init=_by_cloud_init(text),
        )
    ]


def _sections(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Sections of an INI file as systemd has them, lower case; one that stands twice comes twice."""
    name, keys = "", dict[str, str]()
    for raw in text.splitlines():
        line = raw.strip()
        head = _SECTION.match(line)
        if head:
            if name:
                yield name, keys
            name, keys = head.group(1).strip().lower(), {}
        elif "=" in line and not line.startswith(("#", ";")):
            key, _, value = line.partition("=")
            keys[key.strip().lower()] = value.strip()
    if name:
        yield name, keys


def network_manager(file: str, text: str) -> list[Interface]:
    """The interface of a connection of NetworkManager's (nm-settings-keyfile(5))."""
    parser = configparser.RawConfigParser(
        strict=False, delimiters=("=",), comment_prefixes=("#",), default_section="\0"
    )
    try:
        parser.read_string(text)
    except configparser.Error:
        return []
    if parser.get("connection", "type", fallback="") not in {"ethernet", "802-3-ethernet"}:
        return []
    method = parser.get("ipv4", "method", fallback="auto").strip()
    addresses = (
        [v for k, v in parser.items("ipv4") if re.fullmatch(r"address\d*", k)] if parser.has_section("ipv4") else []
    )
    mac = parser.get("ethernet", "mac-address", fallback=parser.get("802-3-ethernet", "mac-address", fallback=""))
    return [
        Interface(
            file=plain(file),
            name=plain(parser.get("connection", "interface-name", fallback="").strip()),
            mac=plain(mac.strip()),
            dhcp=method == "auto",
            addresses=tuple(plain(a) for a in addresses[:16]),
            by_cloud_init="cloud-init" in file or _by_cloud_init(text),
        )
    ]


def ifupdown(file: str, text: str) -> list[Interface]:
    """The interfaces of /etc/network/interfaces (interfaces(5)) that come up by themselves."""
    automatic: set[str] = set()
    found: list[dict[str, Any]] = []
    for raw in text.replace("\\\n", " ").splitlines():
        words = raw.split("#")[0].split()
        if not words:
            continue
        if words[0] == "auto" or words[0] == "allow-hotplug":
            automatic |= set(words[1:])
        elif words[0] == "iface" and len(words) >= 4:
            found.append({"name": words[1], "family": words[2], "method": words[3], "mac": "", "addresses": []})
        elif found and words[0] == "hwaddress":
            found[-1]["mac"] = words[-1]
        elif found and words[0] == "address" and len(words) > 1:
            found[-1]["addresses"].append(words[1])
    return [
        Interface(
            file=plain(file),
            name=plain(item["name"]),
            dhcp=item["method"] in {"dhcp", "auto"},
            addresses=tuple(plain(a) for a in item["addresses"][:16]),
            by_cloud_init=_by_cloud_init(text) or "cloud-init" in file,
        )
        for item in found
        if item["name"] != "lo" and item["name"] in automatic and item["method"] not in {"manual", "loopback"}
    ]


def sysconfig(file: str, text: str) -> list[Interface]:
    """The interface of an ifcfg file, as Red Hat's and SUSE's distributions have them (ifcfg(5), ifcfg-wicked)."""
    keys = shell_values(text)
    name = keys.get("DEVICE") or file.rpartition("/ifcfg-")[2]
    start = keys.get("ONBOOT", keys.get("STARTMODE", "yes")).lower()
    if name == "lo" or start in {"no", "off", "manual"}:
        return []
    protocol = keys.get("BOOTPROTO", "none").lower()
    address = keys.get("IPADDR", "")
    return [
        Interface(
            file=plain(file),
            name=plain(name if "HWADDR" not in keys or "DEVICE" in keys else ""),
            mac=plain(keys.get("HWADDR", "")),
            dhcp=protocol.startswith(("dhcp", "bootp")),
            addresses=(plain(address),) if address else (),
            by_cloud_init=_by_cloud_init(text),
        )
    ]


def fixed_names(rules: str) -> list[str]:
    """Names that udev's rules tie to a MAC address (70-persistent-net.rules)."""
    lines = [line for line in rules.splitlines() if not line.lstrip().startswith("#") and "address" in line]
    return [plain(name) for line in lines for name in re.findall(r'NAME="([^"]{1,64})"', line)]


def link_name(text: str) -> str:
    """The name that a .link file gives to one MAC address (systemd.link(5)); empty if it does not."""
    sections = dict(_sections(text))
    match, link = sections.get("match", {}), sections.get("link", {})
    tied = "macaddress" in match or "permanentmacaddress" in match
    return plain(link.get("name", "")) if tied else ""


def shell_values(text: str) -> dict[str, str]:
    """KEY=value lines as a shell reads them; quotes are taken off, nothing is expanded."""
    found: dict[str, str] = {}
    for raw in text.splitlines():
        key, equals, value = raw.strip().partition("=")
        if equals and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            found[key] = value.strip().strip("\"'")
    return found


def _true(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.lower() in {"true", "yes", "on"})


def _by_cloud_init(text: str) -> bool:
    return any(word in text[:2048].lower() for word in _CLOUD_INIT)
