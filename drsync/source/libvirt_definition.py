"""All that is needed to start a domain again elsewhere: kept with every point.

The keys are described in docs/libvirt.md. Everything is bounded: what doesn't
fit is left out, and the log says so.
"""

import base64
import hashlib
import io
import logging
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import libvirt
import zstandard

from drsync.source import Base
from drsync.source.libvirt_connection import LibvirtDomain, LibvirtRefused
from drsync.source.libvirt_xml import DomainXml, parse

log = logging.getLogger(__name__)

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
"""Of NVRAM or a TPM's state before compression: OVMF's variables are 528 KiB, a TPM's state some 100 KiB."""
MAX_STORED_BYTES: Final = 2 * 1024 * 1024
"""Of one file in the point, as base64: it stands in the segment's metadata."""
MAX_XML_BYTES: Final = 1024 * 1024
"""Of one XML document; a domain with 30 disks has about 30 KiB."""
TPM_DIRECTORY: Final = Path("/var/lib/libvirt/swtpm")
"""Where libvirt has the state of emulated TPMs, in a directory for each domain's UUID."""


def describe(domain: LibvirtDomain, xml: DomainXml, *, tpm_directory: Path = TPM_DIRECTORY) -> dict[str, object]:
    """The domain as JSON-able values. What libvirt refuses to tell is null.

    Raises:
        SourceLost: the domain or libvirt went away.
    """
    return {
        "source": "libvirt",
        "domain": _domain(domain),
        "host": _host(domain),
        "disks": describe_disks(xml),
        "excluded": list(xml.excluded),
        "networks": _documents(domain, "network", domain.connection.networkLookupByName, xml.networks),
        "pools": _documents(domain, "pool", domain.connection.storagePoolLookupByName, xml.pools),
        "files": _files(domain, xml, tpm_directory),
    }


def describe_disks(xml: DomainXml) -> dict[str, object]:
    """What each disk is made of: by this a later survey knows it again (see `is_other_image`)."""
    return {
        disk.target: {
            "target": disk.target,
            "source": disk.top.source,
            "format": disk.top.format,
            "chain": [storage.source for storage in disk.chain],
        }
        for disk in xml.disks
    }


def is_other_image(base: Base, target: str, chain: Sequence[str]) -> str:
    """Why a disk is not the one that the base's point has; empty if it is. `chain`: its images now, from the top.

    It still is below a snapshot's overlay that was put on, and above one that was committed. Images
    further down count for nothing: two disks may share a template.
    """
    disks = base.definition.get("disks")
    known = disks.get(target) if isinstance(disks, Mapping) and base.definition.get("source") == "libvirt" else None
    before = known.get("chain") if isinstance(known, Mapping) else None
    if not isinstance(before, list) or not before:
        return "the newest point does not tell which image the disk was"
    if before[0] in chain or chain[0] in before:
        return ""
    return f"disk is another image than in the newest point: {chain[0]}, not {before[0]}"


def _domain(domain: LibvirtDomain) -> dict[str, object]:
    handle, secure = domain.handle, libvirt.VIR_DOMAIN_XML_SECURE
    inactive = libvirt.VIR_DOMAIN_XML_INACTIVE
    return {
        "name": domain.name,
        "uuid": domain.uuid,
        "xml": _text(domain, "XML", lambda: handle.XMLDesc(secure | inactive)),
        "live_xml": _text(domain, "live XML", lambda: handle.XMLDesc(secure)) if domain.active else None,
        "running": domain.active,
        "autostart": bool(_asked(domain, handle.autostart)) if handle.isPersistent() else False,
        "persistent": bool(handle.isPersistent()),
    }


def _host(domain: LibvirtDomain) -> dict[str, object]:
    connection = domain.connection
    system = parse(domain.call("virDomainGetXMLDesc", lambda: domain.handle.XMLDesc(0)))
    kind = system.find("./os/type")
    arch, machine = (kind.get("arch"), kind.get("machine")) if kind is not None else (None, None)
    emulator, virt_type = system.findtext("./devices/emulator"), system.get("type")
    capabilities = _asked(domain, connection.getCapabilities)
    offered = _asked(domain, lambda: connection.getDomainCapabilities(emulator, arch, machine, virt_type))
    return {
        "libvirt": _version(_asked(domain, connection.getLibVersion)),
        "qemu": _version(_asked(domain, connection.getVersion)),
        "arch": arch,
        "machine": _canonical(offered) or machine,
        "cpu": _part(capabilities, "./host/cpu"),
        "host_model": _host_model(offered),
    }


def _asked(domain: LibvirtDomain, question: Callable[[], Any]) -> Any:
    """The answer, or None when libvirt refuses it."""
    try:
        return domain.call("describing the domain", question)
    except LibvirtRefused as err:
        log.debug("vm=%s libvirt does not tell: %s", domain.vm, err)
        return None


def _text(domain: LibvirtDomain, what: str, question: Callable[[], str]) -> str | None:
    text = _asked(domain, question)
    if not isinstance(text, str):
        return None
    if len(text) > MAX_XML_BYTES:
        log.warning("vm=%s %s is left out of the point: it has %d characters", domain.vm, what, len(text))
        return None
    return text


def _documents(domain: LibvirtDomain, what: str, look: Callable[[str], Any], names: Sequence[str]) -> dict[str, object]:
    """The XML of networks or pools, by name; those that libvirt doesn't know are left out."""
    documents: dict[str, object] = {}
    for name in names:
        text = _text(domain, f"{what} {name}", lambda name=name: look(name).XMLDesc(0))  # type: ignore[misc]  # the default binds it
        if text is not None:
            documents[name] = text
    return documents


def _version(number: object) -> str | None:
    """libvirt writes 7.2.22 as 7002022."""
    if not isinstance(number, int):
        return None
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"


def _canonical(offered: object) -> str | None:
    """The machine type that an alias such as "pc" stands for."""
    return parse(offered).findtext("./machine") if isinstance(offered, str) else None


def _part(document: object, path: str) -> str | None:
    element = parse(document).find(path) if isinstance(document, str) else None
    return ElementTree.tostring(element, encoding="unicode").strip() if element is not None else None


def _host_model(offered: object) -> str | None:
    """The CPU that "host-model" means here, as a <cpu> that other hosts can be asked about."""
    mode = parse(offered).find("./cpu/mode[@name='host-model'][@supported='yes']") if isinstance(offered, str) else None
    if mode is None:
        return None
    cpu = ElementTree.Element("cpu", mode="custom", match="exact")
    cpu.extend(mode)
    return ElementTree.tostring(cpu, encoding="unicode").strip()


def _files(domain: LibvirtDomain, xml: DomainXml, tpm_directory: Path) -> list[dict[str, object]]:
    found = []
    if xml.nvram is not None:
        found.append(_file(domain, "nvram", lambda: _read(xml.nvram)))
    if xml.has_tpm:
        found.append(_file(domain, "tpm", lambda: _tar(tpm_directory / domain.uuid)))
    return [file for file in found if file is not None]


def _file(domain: LibvirtDomain, role: str, read: Callable[[], bytes]) -> dict[str, object] | None:
    try:
        content = read()
    except (OSError, ValueError, tarfile.TarError) as err:
        log.warning("vm=%s %s is left out of the point: %s", domain.vm, role, err)
        return None
    data = base64.b64encode(zstandard.compress(content, 9)).decode()
    if len(data) > MAX_STORED_BYTES:
        log.warning("vm=%s %s is left out of the point: compressed it has %d bytes", domain.vm, role, len(data))
        return None
    return {
        "role": role,
        "encoding": "zstd+base64",
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "data": data,
    }


def _read(path: Path | None) -> bytes:
    """A file's content.

    Raises:
        OSError: it can't be read.
        ValueError: it is larger than MAX_FILE_BYTES.
    """
    if path is None:
        return b""
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    return content


def _tar(directory: Path) -> bytes:
    """A directory's files as a tar, without times and owners, so that the same state gives the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(directory.rglob("*")):
            if not path.is_file() or path.name.endswith(".lock") or path.name == ".lock":
                continue
            content = _read(path)
            entry = tarfile.TarInfo(str(path.relative_to(directory)))
            entry.size, entry.mode = len(content), 0o600
            archive.addfile(entry, io.BytesIO(content))
            if buffer.tell() > MAX_FILE_BYTES:
                raise ValueError(f"{directory} holds more than {MAX_FILE_BYTES} bytes")
    return buffer.getvalue()
