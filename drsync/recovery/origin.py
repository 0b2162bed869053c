"""What a point knows of its VM, whichever source it was captured by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from drsync.target.domain import tree
from drsync.target.domain.definition import LibvirtDefinition, is_libvirt, read_definition
from drsync.target.domain.plain import plain_domain
from drsync.target.domain.values import Note, Notes
from drsync.target.domain.values import Origin as OldHost


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A VM as it was."""

    xml: str
    name: str
    uuid: str
    targets: Mapping[str, str]
    """Disk of the point → target (vda)."""
    formats: Mapping[str, str]
    pools: Sequence[str]
    autostart: bool
    host: OldHost
    files: Mapping[str, bytes]
    notes: Sequence[Note]


def read_origin(definition: Mapping[str, object], vm: str, disks: Sequence[str], networks: Mapping[str, str]) -> Origin:
    """The VM of a point. One without a domain gets a plain one, on `networks`.

    Raises:
        NotReadable: the definition is none that drsync makes.
    """
    if is_libvirt(definition):
        return _of_libvirt(read_definition(definition))
    return _of_qmp(definition, vm, disks, networks)


def _of_qmp(definition: Mapping[str, object], vm: str, disks: Sequence[str], networks: Mapping[str, str]) -> Origin:
    notes = Notes()
    xml, targets = plain_domain(definition, vm, disks, networks, notes)
    known = definition.get("disks")
    drivers = known if isinstance(known, dict) else {}
    return Origin(
        xml=xml,
        name=vm,
        uuid=tree.value(tree.parse(xml, "domain"), "uuid"),
        targets=targets,
        formats={name: str(d.get("driver", "")) for name, d in drivers.items() if isinstance(d, dict)},
        pools=(),
        autostart=False,
        host=OldHost(),
        files={},
        notes=tuple(notes.all),
    )


def _of_libvirt(known: LibvirtDefinition) -> Origin:
    xml = known.domain.xml or known.domain.live_xml or ""
    tree.parse(xml, "domain")
    contents = {role: known.file(role) for role in ("nvram", "tpm")}
    return Origin(
        xml=xml,
        name=known.domain.name,
        uuid=known.domain.uuid,
        targets={name: disk.target or name for name, disk in known.disks.items()},
        formats={name: disk.format or "" for name, disk in known.disks.items()},
        pools=tuple(known.pools),
        autostart=known.domain.autostart,
        host=OldHost(cpu_xml=known.host.cpu or "", machine=known.host.machine or ""),
        files={role: content for role, content in contents.items() if content is not None},
        notes=(),
    )
