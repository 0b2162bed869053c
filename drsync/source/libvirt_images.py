"""The images of a domain that is off: how QEMU opens them, and what tells whether they are the same as before."""

from collections.abc import Iterator, Mapping

from drsync.source import Base
from drsync.source.libvirt_connection import LibvirtDomain
from drsync.source.libvirt_definition import is_other_image
from drsync.source.libvirt_xml import DomainDisk, DomainXml, Storage
from drsync.source.nodes import Image, Node


class NotOpenable(Exception):
    """Only libvirt knows how to open this image; the text says which."""


def protocol_options(domain: LibvirtDomain, storage: Storage) -> Mapping[str, object]:
    """How QEMU opens an image: the protocol part of blockdev-add.

    Raises:
        NotOpenable: drsync does not know how.
        LibvirtRefused: libvirt does not know the volume.
    """
    if storage.type in {"file", "block"} and storage.source.startswith("/"):
        return {"driver": "host_device" if storage.type == "block" else "file", "filename": storage.source}
    if storage.type == "volume":
        return {"driver": "file", "filename": _volume_path(domain, storage)}
    protocol, _, name = storage.source.partition(":")
    if storage.type == "network" and protocol == "nbd":
        return {"driver": "nbd", "server": _nbd_server(storage.host), "export": name}
    if storage.type == "network" and protocol == "rbd":
        pool, _, image = name.partition("/")
        return {"driver": "rbd", "pool": pool, "image": image}
    raise NotOpenable(f"a {storage.type} disk ({storage.source}) can only be read while the VM runs")


def _volume_path(domain: LibvirtDomain, storage: Storage) -> str:
    pool, _, volume = storage.source.partition("/")

    def look() -> str:
        return str(domain.connection.storagePoolLookupByName(pool).storageVolLookupByName(volume).path())

    return domain.call("virStorageVolGetPath", look)


def _nbd_server(host: Mapping[str, str]) -> Mapping[str, object]:
    if host.get("transport") == "unix":
        return {"type": "unix", "path": host.get("socket", "")}
    return {"type": "inet", "host": host.get("name", ""), "port": host.get("port", "10809")}


def chain_names(disk: DomainDisk, node: Node) -> list[str]:
    """The disk's images from the top: an inactive domain's XML has the first one alone, so QEMU is asked."""
    return [disk.top.source, *(image.filename for image in _below(node))]


def split_bitmap(node: Node, name: str) -> str:
    """Whether a part of the bitmap lies in a backing image: an external snapshot was taken since the base's capture."""
    for image in _below(node):
        stored = image.format_specific.data.get("bitmaps", []) if image.format_specific is not None else []
        if isinstance(stored, list) and any(isinstance(b, dict) and b.get("name") == name for b in stored):
            return "a snapshot was taken since the newest point, and the domain is off"
    return ""


def _below(node: Node) -> Iterator[Image]:
    image = node.image.backing_image
    while image is not None:
        yield image
        image = image.backing_image


def identities(xml: DomainXml) -> dict[str, str | None]:
    """Of each disk, what changes whenever its file is written or replaced; None if there is no file to look at."""
    return {disk.target: _identity(disk) for disk in xml.disks}


def _identity(disk: DomainDisk) -> str | None:
    if disk.top.type != "file" or disk.top.path is None:
        return None
    try:
        status = disk.top.path.stat()
    except OSError:
        return None
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def is_as_read(disk: DomainDisk, base: Base, node: Node) -> bool:
    """Whether a disk without a bitmap is as it was when the base's point read it, the VM being off then."""
    disks = base.definition.get("disks")
    before = disks.get(disk.target) if isinstance(disks, Mapping) else None
    known = before.get("identity") if isinstance(before, Mapping) else None
    same = known is not None and known == _identity(disk)
    return same and not is_other_image(base, disk.target, chain_names(disk, node))
