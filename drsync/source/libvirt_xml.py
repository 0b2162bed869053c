"""What drsync reads in libvirt's XML, and what it writes. No I/O, and no need for libvirt itself.

    <domain>            which disks there are, what each is made of, who runs QEMU
    <domainbackup>      what virDomainBackupBegin is asked to copy, and where to, or to serve
    <domaincheckpoint>  the bitmaps that begin with it

https://libvirt.org/formatdomain.html, formatbackup.html, formatcheckpoint.html
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

Element = ElementTree.Element


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """One image of a disk's chain."""

    type: str
    """file, block, network, volume … (the attribute of <disk>)."""
    source: str
    """Its path, or what names it on the network: "protocol:name", "pool/volume"."""
    format: str
    host: Mapping[str, str]
    """Where a network image is served: the attributes of <host>."""

    @property
    def path(self) -> Path | None:
        """The image's path on this host, if it has one."""
        return Path(self.source) if self.type in {"file", "block"} else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainDisk:
    """A disk of a domain that can be captured."""

    target: str
    """The name that the guest's bus gives it in the XML: vda. It is the disk's name in the repository."""
    chain: Sequence[Storage]
    """The image that is written, then what lies below it, as far as the XML tells."""

    @property
    def top(self) -> Storage:
        return self.chain[0]

    @property
    def keeps_bitmaps(self) -> bool:
        """Whether libvirt makes checkpoints of it: of qcow2 only (qemuCheckpointPrepare)."""
        return self.top.format == "qcow2"


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainXml:
    """What drsync needs to know of a domain's XML."""

    disks: Sequence[DomainDisk]
    excluded: Sequence[str]
    """Targets that are not captured: read-only and empty ones, and those that the configuration excludes."""
    networks: Sequence[str]
    pools: Sequence[str]
    has_iothreads: bool
    emulator: str
    """The path of QEMU's program."""
    qemu_user: tuple[int, int]
    """User and group that QEMU runs as, where libvirt says it; else root's."""
    nvram: Path | None
    has_tpm: bool


def parse(text: str) -> Element:
    """An element from what libvirt wrote."""
    return ElementTree.fromstring(text)  # noqa: S314  libvirt wrote it; it expands no entities


def read_domain(text: str, exclude: Collection[str] = ()) -> DomainXml:
    """What a domain's XML (of XMLDesc) says."""
    root = parse(text)
    disks, excluded = [], []
    for element in root.findall("./devices/disk"):
        target = element.find("target")
        name = target.get("dev", "") if target is not None else ""
        if not name:
            continue
        if name in exclude or not _can_be_captured(element):
            excluded.append(name)
        else:
            disks.append(DomainDisk(target=name, chain=_chain(element)))
    nvram = root.find("./os/nvram")
    return DomainXml(
        disks=sorted(disks, key=lambda disk: disk.target),
        excluded=sorted(excluded),
        networks=_attributes(root, "./devices/interface/source", "network"),
        pools=_attributes(root, "./devices/disk/source", "pool"),
        has_iothreads=any(map(_is_in_iothread, root.iterfind("./devices/*/driver"))),
        emulator=root.findtext("./devices/emulator", ""),
        qemu_user=_qemu_user(root),
        nvram=Path(nvram.text.strip()) if nvram is not None and nvram.text else None,
        has_tpm=root.find("./devices/tpm/backend[@type='emulator']") is not None,
    )


def _is_in_iothread(driver: Element) -> bool:
    """Whether a device's requests are handled by an iothread, or (libvirt 10) by several."""
    return bool(driver.get("iothread")) or driver.find("iothreads") is not None


def _can_be_captured(disk: Element) -> bool:
    """Whether a disk holds data of the VM's own that lasts."""
    if disk.get("device", "disk") != "disk" or disk.find("readonly") is not None or disk.find("transient") is not None:
        return False
    source = disk.find("source")
    return source is not None and bool(source.attrib)


def _chain(disk: Element) -> list[Storage]:
    chain = [_storage(disk, _format(disk.find("driver"), "type", "raw"))]
    below = disk.find("backingStore")
    while below is not None and below.find("source") is not None:
        chain.append(_storage(below, _format(below.find("format"), "type", "raw")))
        below = below.find("backingStore")
    return chain


def _format(element: Element | None, attribute: str, default: str) -> str:
    return default if element is None else element.get(attribute, default)


def _storage(holder: Element, image_format: str) -> Storage:
    kind, source = holder.get("type", "file"), holder.find("source")
    values = dict(source.attrib) if source is not None else {}
    name = values.get("file") or values.get("dev") or values.get("dir") or ""
    if kind == "network":
        name = f"{values.get('protocol')}:{values.get('name', '')}"
    elif kind == "volume":
        name = f"{values.get('pool')}/{values.get('volume')}"
    elif not name:  # nvme, vhostuser …: whatever names it
        name = " ".join(f"{key}={value}" for key, value in sorted(values.items()) if key != "index")
    host = source.find("host") if source is not None else None
    return Storage(type=kind, source=name, format=image_format, host=dict(host.attrib) if host is not None else {})


def _attributes(root: Element, path: str, attribute: str) -> list[str]:
    return sorted({value for element in root.iterfind(path) if (value := element.get(attribute))})


def _qemu_user(root: Element) -> tuple[int, int]:
    """From `<seclabel model='dac'><label>+64055:+64055</label>`, which a running domain has."""
    for label in root.iterfind("./seclabel[@model='dac']/label"):
        match = re.fullmatch(r"\+?(\d+):\+?(\d+)", label.text or "")
        if match:
            return int(match[1]), int(match[2])
    return 0, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCopy:
    """What a backup does with one disk."""

    target: str
    layer: Path
    incremental: str
    """The checkpoint that it is relative to; empty = all of the disk."""
    checkpoint: bool
    """Whether a bitmap begins with this backup."""


def backup_xml(copies: Sequence[DiskCopy], others: Sequence[str]) -> str:
    """A push-mode backup of `copies`, into files that exist; `others` are the domain's disks that it leaves alone."""
    root = Element("domainbackup", mode="push")
    disks = ElementTree.SubElement(root, "disks")
    for copy in copies:
        disk = ElementTree.SubElement(disks, "disk", name=copy.target, backup="yes", type="file")
        disk.set("backupmode", "incremental" if copy.incremental else "full")
        if copy.incremental:
            disk.set("incremental", copy.incremental)
        ElementTree.SubElement(disk, "driver", type="qcow2")
        ElementTree.SubElement(disk, "target", file=str(copy.layer))
    for target in others:
        ElementTree.SubElement(disks, "disk", name=target, backup="no")
    return ElementTree.tostring(root, encoding="unicode")


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledDisk:
    """What a pull-mode backup does with one disk."""

    target: str
    scratch: Path
    """Where QEMU puts what the guest overwrites meanwhile."""
    export: str
    """The name of its NBD export."""
    incremental: str
    """The checkpoint whose bitmap is exported with it; empty = none."""
    bitmap: str
    """What that bitmap is called there."""


def pull_xml(disks: Sequence[PulledDisk], others: Sequence[str], socket: Path) -> str:
    """A pull-mode backup of `disks` at an NBD server of QEMU's, with scratch files that exist; `others` as above."""
    root = Element("domainbackup", mode="pull")
    ElementTree.SubElement(root, "server", transport="unix", socket=str(socket))
    listed = ElementTree.SubElement(root, "disks")
    for pulled in disks:
        disk = ElementTree.SubElement(listed, "disk", name=pulled.target, backup="yes", type="file")
        disk.set("backupmode", "incremental" if pulled.incremental else "full")
        disk.set("exportname", pulled.export)
        if pulled.incremental:
            disk.set("incremental", pulled.incremental)
            disk.set("exportbitmap", pulled.bitmap)
        ElementTree.SubElement(disk, "driver", type="qcow2")
        ElementTree.SubElement(disk, "scratch", file=str(pulled.scratch))
    for target in others:
        ElementTree.SubElement(listed, "disk", name=target, backup="no")
    return ElementTree.tostring(root, encoding="unicode")


def checkpoint_xml(name: str, targets: Sequence[str], others: Sequence[str], *, domain: str = "") -> str:
    """A checkpoint `name` of the disks `targets`; with the XML of its `domain` it tells libvirt of one that exists."""
    root = Element("domaincheckpoint")
    ElementTree.SubElement(root, "name").text = name
    if domain:
        ElementTree.SubElement(root, "creationTime").text = "1"
    disks = ElementTree.SubElement(root, "disks")
    for target in targets:
        ElementTree.SubElement(disks, "disk", name=target, checkpoint="bitmap", bitmap=name)
    for target in others:
        ElementTree.SubElement(disks, "disk", name=target, checkpoint="no")
    if domain:
        root.append(parse(domain))
    return ElementTree.tostring(root, encoding="unicode")


def checkpoint_sizes(text: str) -> dict[str, int]:
    """Dirty bytes by target in a checkpoint's XML; libvirt tells them of those disks alone whose bitmaps are whole."""
    return {
        disk.get("name", ""): int(disk.get("size", "0"))
        for disk in parse(text).iterfind("./disks/disk")
        if disk.get("size") is not None
    }


def backup_targets(text: str) -> list[Path]:
    """The files that a running backup writes."""
    root = parse(text)
    elements = [*root.iterfind("./disks/disk/target"), *root.iterfind("./disks/disk/scratch")]
    return [Path(file) for element in elements if (file := element.get("file"))]
