"""The disks: those that were restored, and those that were not captured."""

import xml.etree.ElementTree as ET
from typing import Final

from drsync.target.domain import tree
from drsync.target.domain.values import NewDisk, Notes, Request, Target

_REMOVABLE: Final = frozenset({"cdrom", "floppy"})
_STALE: Final = ("alias", "backingStore", "mirror", "auth", "state")
"""Children that belong to the old source, or to a run of the domain."""
_NATIVE_CACHES: Final = frozenset({"none", "directsync"})
"""io="native" needs O_DIRECT."""


def map_disks(domain: ET.Element, request: Request, target: Target, notes: Notes) -> None:
    """Point each restored disk to its new place; take away what has no bytes here."""
    found = set()
    for parent, disk in tree.devices(domain, "disk"):
        name = tree.attribute(disk, "target", "dev")
        if name in request.disks:
            found.add(name)
            _place(disk, name, request.disks[name], notes)
            _check_bus(disk, name, target, notes)
        elif disk.get("device", "disk") in _REMOVABLE:
            _eject(disk, name, target, notes)
        elif request.in_place:
            notes.changed(f"disk {name}", "was not captured and stays as it is now: it does not go back")
        else:
            parent.remove(disk)
            source = _source(disk)
            notes.lost(f"disk {name}", f"was not captured and is left out{f' ({source})' if source else ''}")
    for name in sorted(request.disks.keys() - found):
        notes.problem(f"disk {name}", "is in the point, but the domain has no such disk")
    _drop_device_limits(domain, target, notes)


def _place(disk: ET.Element, name: str, new: NewDisk, notes: Notes) -> None:
    subject = f"disk {name}"
    if disk.find("encryption") is not None or disk.find("source/encryption") is not None:
        notes.changed(subject, "was encrypted at rest on the old host; here it is as the guest sees it")
    if disk.get("device") == "lun":
        disk.set("device", "disk")
        notes.changed(subject, "was a SCSI device passed through; it is a disk in a file now")
    for attribute in ("snapshot", "rawio", "sgio"):
        disk.attrib.pop(attribute, None)
    for tag in (*_STALE, "encryption", "source"):
        tree.drop(disk, tag)
    kind, attribute = ("block", "dev") if new.is_block_device else ("file", "file")
    disk.set("type", kind)
    disk.insert(1, ET.Element("source", {attribute: new.path}))
    _set_driver(disk, name, new, notes)


def _set_driver(disk: ET.Element, name: str, new: NewDisk, notes: Notes) -> None:
    driver = disk.find("driver")
    if driver is None:
        driver = ET.Element("driver", {"name": "qemu"})
        disk.insert(0, driver)
    before = driver.get("type", "")
    driver.set("name", "qemu")
    driver.set("type", new.format)
    if before and before != new.format:
        notes.changed(f"disk {name}", f"format {before} becomes {new.format}")
    if driver.get("io") == "native" and driver.get("cache", "") not in _NATIVE_CACHES:
        del driver.attrib["io"]
    if new.format != "qcow2":
        tree.drop(driver, "metadata_cache")


def _check_bus(disk: ET.Element, name: str, target: Target, notes: Notes) -> None:
    bus = tree.attribute(disk, "target", "bus")
    offered = target.offer.disk_buses
    if bus and offered and bus not in offered:
        notes.problem(f"disk {name}", f"bus {bus} is not offered; there are: {', '.join(sorted(offered))}")


def _eject(disk: ET.Element, name: str, target: Target, notes: Notes) -> None:
    """Leave the drive, and take the medium out if it is not here."""
    tree.drop(disk, "alias")
    source = disk.find("source")
    if source is None:
        return
    path = source.get("file") or source.get("dev")
    if disk.get("type") in (None, "file", "block") and path and target.around.has_path(path):
        tree.drop(disk, "backingStore")
        return
    medium = _source(disk)
    for tag in ("source", "auth", "backingStore", "encryption"):
        tree.drop(disk, tag)
    disk.set("type", "file")
    disk.attrib.pop("startupPolicy", None)
    notes.changed(f"disk {name}", f"the medium {medium} is not here: the drive is empty")


def _source(disk: ET.Element) -> str:
    """What the disk was made of, for people."""
    source = disk.find("source")
    if source is None:
        return ""
    for name in ("file", "dev", "dir"):
        if source.get(name):
            return source.get(name, "")
    volume = "/".join(filter(None, (source.get("pool"), source.get("volume"))))
    return volume or " ".join(filter(None, (source.get("protocol"), source.get("name"))))


def _drop_device_limits(domain: ET.Element, target: Target, notes: Notes) -> None:
    """I/O limits name host devices, which are other ones here."""
    tune = domain.find("blkiotune")
    for device in tune.findall("device") if tune is not None else ():
        path = tree.value(device, "path")
        if target.around.has_path(path) is not True and tune is not None:
            tune.remove(device)
            notes.changed("blkiotune", f"the limit on {path} is left out: there is no such device here")
