"""A domain, rewritten for another host: every part in its order."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from drsync.target.domain import tree
from drsync.target.domain.cpu import map_cpu
from drsync.target.domain.devices import map_devices
from drsync.target.domain.disks import map_disks
from drsync.target.domain.firmware import map_firmware, map_tpm
from drsync.target.domain.networks import map_networks
from drsync.target.domain.platform import map_platform, map_resources
from drsync.target.domain.values import Mark, Note, Notes, Origin, Request, Rewritten, Target


def rewrite(domain_xml: str, request: Request, target: Target, origin: Origin, known: Sequence[Note] = ()) -> Rewritten:
    """The domain as it can be defined on the target; `known` is what was noted before.

    Raises:
        NotReadable: `domain_xml` is not a domain's.
    """
    domain = tree.parse(domain_xml, "domain")
    notes = Notes()
    notes.all.extend(known)
    _identify(domain, request, notes)
    map_platform(domain, target, notes)
    map_resources(domain, target, notes)
    map_cpu(domain, target, origin, notes)
    map_firmware(domain, request, target, notes)
    map_disks(domain, request, target, notes)
    map_networks(domain, request, target, notes)
    map_tpm(domain, request, target, notes)
    map_devices(domain, request, target, notes)
    _mark(domain, request.mark)
    return Rewritten(xml=tree.text(domain), notes=tuple(notes.all))


def _identify(domain: ET.Element, request: Request, notes: Notes) -> None:
    before = tree.value(domain, "uuid")
    if before and before.lower() != request.uuid.lower():
        notes.changed("uuid", f"{before} becomes {request.uuid}")
    name = tree.value(domain, "name")
    if name != request.name:
        notes.changed("name", f"{name} becomes {request.name}")
    tree.child(domain, "name").text = request.name
    tree.child(domain, "uuid").text = request.uuid
    for entry in domain.findall("sysinfo/system/entry[@name='uuid']"):
        entry.text = request.uuid  # libvirt refuses a domain whose SMBIOS tells another one
    genid = domain.find("genid")
    if genid is not None and request.genid is not None:
        genid.text = request.genid
        notes.changed("genid", "is new: the guest is told that it went back in time")


_MARK = f"{{{tree.DRSYNC_NAMESPACE}}}restored"


def _mark(domain: ET.Element, mark: Mark) -> None:
    metadata = tree.child(domain, "metadata")
    tree.drop(metadata, _MARK)
    fields = {"repository": mark.repository, "vm": mark.vm, "point": str(mark.point), "capture": mark.capture}
    ET.SubElement(metadata, _MARK, fields)


def read_mark(domain_xml: str) -> Mark | None:
    """Where a domain was restored from, if drsync did it.

    Raises:
        NotReadable: it is not a domain's XML.
    """
    found = tree.parse(domain_xml, "domain").find(f"metadata/{_MARK}")
    if found is None or not found.get("point", "").isdecimal():
        return None
    return Mark(
        repository=found.get("repository", ""),
        vm=found.get("vm", ""),
        point=int(found.get("point", "0")),
        capture=found.get("capture", ""),
    )
