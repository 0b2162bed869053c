"""Everything else that a domain can have of the host that it ran on."""

import xml.etree.ElementTree as ET
from pathlib import PurePosixPath
from typing import Final

from drsync.target.domain import tree
from drsync.target.domain.values import Notes, Request, Target

_SPICE_ONLY: Final = frozenset({"channel", "redirdev", "smartcard"})
_VIDEOS: Final = ("virtio", "vga", "bochs", "cirrus", "ramfb", "none")
"""What a display falls back to, best first."""
_CHARACTER_DEVICES: Final = frozenset({"serial", "console", "parallel", "channel"})
_PRIVATE_SOCKETS: Final = "/var/lib/libvirt/qemu/"
"""Where libvirt puts the sockets that it names itself."""
_EVERYWHERE: Final = frozenset({"0.0.0.0", "::", "127.0.0.1", "::1", "localhost", ""})  # noqa: S104  compared, not bound


def map_devices(domain: ET.Element, request: Request, target: Target, notes: Notes) -> None:
    """Take away, or point anew, what another host does not have."""
    _map_graphics(domain, target, notes)
    _map_videos(domain, target, notes)
    _drop_passed_through(domain, request, target, notes)
    for parent, device in tree.devices(domain):
        _forget_alias(device)
        if device.tag in _CHARACTER_DEVICES:
            _map_character_device(device, target, notes)
        elif device.tag in ("filesystem", "shmem", "memory"):
            _drop_missing_path(parent, device, target, notes)
    _map_labels(domain, notes)
    _map_command_line(domain, target, notes)


def _forget_alias(device: ET.Element) -> None:
    """libvirt's own aliases are of one run; a user's begin with ua-."""
    for alias in device.findall("alias"):
        if not alias.get("name", "").startswith("ua-"):
            device.remove(alias)


def _map_graphics(domain: ET.Element, target: Target, notes: Notes) -> None:
    offered = target.offer.graphics
    for _, graphics in tree.devices(domain, "graphics"):
        kind = graphics.get("type", "")
        if offered and kind not in offered:
            instead = "vnc" if "vnc" in offered else sorted(offered)[0]
            graphics.attrib.clear()
            graphics.attrib.update({"type": instead, "port": "-1", "autoport": "yes"})
            for part in list(graphics):
                graphics.remove(part)
            notes.changed("graphics", f"{kind} is not offered here and becomes {instead}, on this host alone")
            if kind == "spice":
                _drop_spice(domain, notes)
        tree.drop(graphics, "gl")
        if graphics.get("autoport") == "yes":
            graphics.attrib.pop("port", None)
        _map_listen(graphics, kind, notes)


def _drop_spice(domain: ET.Element, notes: Notes) -> None:
    for parent, device in tree.devices(domain, *_SPICE_ONLY):
        if device.get("type") in ("spicevmc", "spiceport"):
            parent.remove(device)
            notes.changed("graphics", f"a {device.tag} of SPICE is left out")
    for parent, device in tree.devices(domain, "audio"):
        if device.get("type") == "spice":
            device.set("type", "none")
        del parent


def _map_listen(graphics: ET.Element, kind: str, notes: Notes) -> None:
    """An address of the old host can't be listened on here; it may even be another machine's."""
    addresses = {graphics.get("listen", "")} | {part.get("address", "") for part in graphics.findall("listen")}
    if addresses <= _EVERYWHERE:
        return
    graphics.attrib.pop("listen", None)
    tree.drop(graphics, "listen")
    ET.SubElement(graphics, "listen", {"type": "address", "address": "127.0.0.1"})
    gone = ", ".join(sorted(addresses - _EVERYWHERE))
    notes.changed("graphics", f"{kind} listened on {gone}, an address of the old host; now on 127.0.0.1")


def _map_videos(domain: ET.Element, target: Target, notes: Notes) -> None:
    offered = target.offer.videos
    for _, video in tree.devices(domain, "video"):
        model = video.find("model")
        kind = model.get("type", "") if model is not None else ""
        if model is None or not offered or kind in offered:
            continue
        instead = next((name for name in _VIDEOS if name in offered), "none")
        model.attrib.clear()
        model.set("type", instead)
        tree.drop(video, "driver")
        tree.drop(model, "acceleration")
        notes.changed("video", f"{kind} is not offered here and becomes {instead}")


def _drop_passed_through(domain: ET.Element, request: Request, target: Target, notes: Notes) -> None:
    for parent, device in tree.devices(domain, "hostdev"):
        what = f"{device.get('type', '')} {_address(device)}".strip()
        if request.in_place and _is_here(device, target):
            continue
        parent.remove(device)
        notes.lost("hostdev", f"{what} was a device of the old host, passed through; it is left out")
    for parent, device in tree.devices(domain, "input", "rng"):
        path = tree.attribute(device, "source", "dev") or device.get("dev", "")
        if device.get("type") in ("passthrough", "evdev") and target.around.has_path(path) is not True:
            parent.remove(device)
            notes.lost("input", f"{path} was a device of the old host; it is left out")


def _address(device: ET.Element) -> str:
    address = device.find("source/address")
    if address is not None:
        return " ".join(f"{name}={value}" for name, value in address.attrib.items())
    vendor, product = tree.attribute(device, "source/vendor", "id"), tree.attribute(device, "source/product", "id")
    return ":".join(filter(None, (vendor, product)))


def _is_here(device: ET.Element, target: Target) -> bool:
    """Whether the host has the PCI device; of other kinds that can't be told, and it is believed."""
    address = device.find("source/address")
    if device.get("type") != "pci" or address is None or target.around.devices is None:
        return True
    parts = [int(address.get(key, "0"), 0) for key in ("domain", "bus", "slot", "function")]
    return "pci_{:04x}_{:02x}_{:02x}_{:x}".format(*parts) in target.around.devices


def _map_character_device(device: ET.Element, target: Target, notes: Notes) -> None:
    subject = device.tag
    source = device.find("source")
    path = source.get("path", "") if source is not None else ""
    log = device.find("log")
    if log is not None and (why := _no_folder(log.get("file", ""), target)):
        device.remove(log)
        notes.changed(subject, f"its log is left out: {why}")
    if path.startswith(_PRIVATE_SOCKETS) and source is not None:
        device.remove(source)  # libvirt names it anew
    elif device.get("type") == "pty" and source is not None:
        device.remove(source)
        device.attrib.pop("tty", None)
    elif device.get("type") in ("dev", "pipe") and target.around.has_path(path) is not True:
        _make_pty(device, notes, f"{path} was a device of the old host")
    elif device.get("type") in ("file", "unix") and (why := _no_folder(path, target)):
        _make_pty(device, notes, why)


def _make_pty(device: ET.Element, notes: Notes, why: str) -> None:
    tree.drop(device, "source")
    tree.drop(device, "protocol")
    if device.tag == "channel":
        device.set("type", "unix")
        ET.SubElement(device, "source", {"mode": "bind"})
        notes.changed(device.tag, f"{why}: it is a socket of libvirt's choice")
    else:
        device.set("type", "pty")
        notes.changed(device.tag, f"{why}: it is a pseudo-terminal (virsh console)")


def _no_folder(path: str, target: Target) -> str:
    """Why a file or socket can't be made at `path`, as far as it is known; empty if it can."""
    there = target.around.has_path(str(PurePosixPath(path).parent)) if path else True
    if there is None:
        return f"it can't be told from here whether there is a directory for {path}"
    return "" if there else f"there is no directory for {path} here"


def _drop_missing_path(parent: ET.Element, device: ET.Element, target: Target, notes: Notes) -> None:
    """Shared directories, memory and NVDIMMs that lie on the host."""
    source = device.find("source") if device.tag != "shmem" else device.find("server")
    if source is None:
        return
    path = source.get("dir") or source.get("file") or source.get("path") or tree.value(source, "path")
    if path and target.around.has_path(path) is not True:
        parent.remove(device)
        notes.lost(device.tag, f"{path} of the old host is not here; it is left out")


def _map_labels(domain: ET.Element, notes: Notes) -> None:
    """Security labels are of the old host's driver and its files; libvirt makes new ones."""
    for label in tree.drop(domain, "seclabel"):
        if label.get("type") == "static" or label.find("baselabel") is not None:
            notes.changed("seclabel", f"the fixed {label.get('model', '')} label is left out: libvirt makes its own")
    for source in domain.iter("source"):
        tree.drop(source, "seclabel")


def _map_command_line(domain: ET.Element, target: Target, notes: Notes) -> None:
    """Take options away whose files could only be on the old host: QEMU would not start with them."""
    line = domain.find(f"{{{tree.QEMU_NAMESPACE}}}commandline")
    if line is None:
        return
    arguments = line.findall(f"{{{tree.QEMU_NAMESPACE}}}arg")
    for option in _options(arguments):
        words = [argument.get("value", "") for argument in option]
        why = next((why for word in words for path in _paths(word) if (why := _no_folder(path, target))), "")
        if why:
            for argument in option:
                line.remove(argument)
            notes.changed("QEMU options", f"{' '.join(words)} is left out: {why}")
    if not len(line):
        domain.remove(line)


def _options(arguments: list[ET.Element]) -> list[list[ET.Element]]:
    """The arguments, each option with what belongs to it."""
    options: list[list[ET.Element]] = []
    for argument in arguments:
        if argument.get("value", "").startswith("-") or not options:
            options.append([])
        options[-1].append(argument)
    return options


def _paths(word: str) -> list[str]:
    """The absolute paths in "unix:/run/a,server=on" or "file.filename=/x"."""
    parts = word.replace("=", ",").replace(":", ",").split(",")
    return [part for part in parts if part.startswith("/") and part.count("/") > 1]
