"""What is known of a domain's disks before a capture: which there are, and what an increment of each would be."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drsync.errors import DiskMissing
from drsync.model import Kind, block_count
from drsync.source import Base, DiskSurvey
from drsync.source.bitmap import no_increment
from drsync.source.libvirt_connection import LibvirtDomain
from drsync.source.libvirt_definition import is_other_image
from drsync.source.libvirt_pull import PullOptions
from drsync.source.libvirt_xml import DomainDisk, DomainXml, read_domain

RAW_REASON: Final = "libvirt keeps no bitmap of a {format} image, so all of it is read every time"
BROKEN_REASON: Final = "bitmap is missing or broken: QEMU did not end cleanly, or the image is another one"


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtOptions:
    """Which domain, and where."""

    vm: str
    domain: str
    """Its name or UUID."""
    uri: str
    repository_tag: str
    """First 8 hex digits of the repository's id: checkpoints of other repositories are not ours."""
    layers: Path
    """The directory below which all layers of this VM lie: a backup job that writes there is ours."""
    exclude: Collection[str] = ()
    """Targets of disks that are not captured."""
    pull: PullOptions | None = None
    """How it is read live; None: there is no place for that."""


def domain_xml(domain: LibvirtDomain, options: LibvirtOptions) -> DomainXml:
    """What libvirt says of the domain; it has a disk to capture.

    Raises:
        DiskMissing: it has none, or all are excluded.
    """
    text = domain.call("virDomainGetXMLDesc", lambda: domain.handle.XMLDesc(0))
    xml = read_domain(text, options.exclude)
    if not xml.disks:
        known = ", ".join(xml.excluded) or "none"
        raise DiskMissing(vm=options.vm, node="that is not excluded", known=known)
    return xml


def why_not_incremental(disk: DomainDisk, size_bytes: int, base: Base | None, *, full: bool) -> str:
    """Why no bitmap at all could make an increment of this disk; empty if one could."""
    problem = no_increment(disk.target, size_bytes, base, full=full)
    if problem or base is None:
        return problem
    if not disk.keeps_bitmaps:
        return RAW_REASON.format(format=disk.top.format)
    return is_other_image(base, disk.target, [storage.source for storage in disk.chain])


def surveyed(disk: DomainDisk, size_bytes: int, reason: str, dirty: Mapping[str, int]) -> DiskSurvey:
    """What is told of a disk. `reason`: why it is sent whole. `dirty`: what to send of those with a sound bitmap."""
    if not reason and disk.target not in dirty:
        reason = BROKEN_REASON
    return DiskSurvey(
        name=disk.target,
        size_bytes=size_bytes,
        kind=Kind.FULL if reason else Kind.INCREMENTAL,
        reason=reason,
        copy_bytes=_full_bytes(disk, size_bytes) if reason else min(dirty[disk.target], size_bytes),
        persistent=disk.keeps_bitmaps,
    )


def _full_bytes(disk: DomainDisk, size_bytes: int) -> int:
    """Upper bound of what a full copies: what its images take where the host can tell, else the disk's size.

    A layer needs tables beside that, to say of the rest that it is zeros.
    """
    tables_bytes = -(-block_count(size_bytes) // 8192) * 65536
    used = 0
    for storage in disk.chain:
        if storage.type != "file" or storage.path is None:
            return size_bytes + tables_bytes
        try:
            used += storage.path.stat().st_blocks * 512
        except OSError:
            return size_bytes + tables_bytes
    return min(used, size_bytes) + tables_bytes
