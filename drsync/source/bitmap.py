"""The life of a dirty bitmap: how it is called, and whether it still makes an increment.

A bitmap's name says whose it is and what it is relative to:

    drsync-1a2b3c4d-0011223344556677-web:root
           │        │                │   └ disk
           │        │                └ VM
           │        └ capture that made it: the bitmap holds what was written since
           └ first 8 hex digits of the repository's id

VM and disk are part of it, so that a configuration in which two disks changed
places, or two VMs share one QEMU process, never makes an increment of one
relative to the other. Jobs and layer nodes are named likewise; what is not
named so is not drsync's, and is left alone.

One thing can't be seen here: QEMU (7.2) forgets the dirty bits of what a disk
loses when it shrinks. A disk that shrinks and grows back to the same size
between two captures therefore needs a full that nobody but the user asks for.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from drsync.model import BLOCK_SIZE, NAME_PATTERN, CaptureId, Kind
from drsync.source import Base
from drsync.units import format_size

_TAG_PATTERN = r"[0-9a-f]{8}"
_CAPTURE_PATTERN = r"[0-9a-f]{16}"
Action = dict[str, object]
_BITMAP = re.compile(rf"drsync-({_TAG_PATTERN})-({_CAPTURE_PATTERN})-({NAME_PATTERN}):({NAME_PATTERN})")
_CHECKPOINT = re.compile(rf"drsync-({_TAG_PATTERN})-({_CAPTURE_PATTERN})-({NAME_PATTERN})")
_JOB = re.compile(rf"drsync-({_TAG_PATTERN})-{_CAPTURE_PATTERN}-\d+-({NAME_PATTERN})")


class DirtyBitmap(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A dirty bitmap as QEMU reports it (BlockDirtyInfo)."""

    name: str = ""
    count: int
    """Dirty bytes, a multiple of the granularity."""
    granularity: int
    recording: bool
    busy: bool
    """A job or export uses it: it can be neither removed nor used."""
    persistent: bool
    inconsistent: bool = False
    """It was not saved when QEMU ended (crash, power loss): it can only be removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Names what drsync puts into a QEMU for one VM of one repository, and knows it again."""

    repository: str
    """First 8 hex digits of the repository's id."""
    vm: str

    def __post_init__(self) -> None:
        if not re.fullmatch(_TAG_PATTERN, self.repository):
            raise ValueError(f"{self.repository!r} is not 8 hex digits")
        if not re.fullmatch(NAME_PATTERN, self.vm):
            raise ValueError(f"{self.vm!r} can't name a VM")

    def bitmap(self, capture: CaptureId, disk: str) -> str:
        """The name of the bitmap that `capture` puts on `disk` (QEMU allows 1023 bytes, a migration 255)."""
        return f"drsync-{self.repository}-{capture}-{self.vm}:{disk}"

    def bitmap_capture(self, name: str) -> CaptureId | None:
        """The capture that made the bitmap; None if the bitmap is not this owner's."""
        match = _BITMAP.fullmatch(name)
        if match is None or (match[1], match[3]) != (self.repository, self.vm):
            return None
        return CaptureId(match[2])

    def checkpoint(self, capture: CaptureId) -> str:
        """The name of `capture`'s checkpoint in libvirt, which calls the bitmap on each of its disks the same."""
        return f"drsync-{self.repository}-{capture}-{self.vm}"

    def checkpoint_capture(self, name: str) -> CaptureId | None:
        """The capture that made the checkpoint; None if it is not this owner's."""
        match = _CHECKPOINT.fullmatch(name)
        if match is None or (match[1], match[3]) != (self.repository, self.vm):
            return None
        return CaptureId(match[2])

    def job(self, capture: CaptureId, index: int) -> str:
        """The id of the job that copies the disk number `index` of `capture`."""
        return f"drsync-{self.repository}-{capture}-{index}-{self.vm}"

    def owns_job(self, job_id: str) -> bool:
        """Whether a job is one of this owner's captures."""
        match = _JOB.fullmatch(job_id)
        return match is not None and (match[1], match[2]) == (self.repository, self.vm)

    def layer_node(self, index: int) -> str:
        """The block node of the layer number `index`: QEMU allows 31 characters, so the VM is a hash."""
        return f"{self._node_prefix}{index}"

    def export(self, index: int) -> str:
        """The id and name of the NBD export of the disk number `index` (QEMU's ids begin with a letter)."""
        return f"{self._node_prefix}live-{index}"

    def owns_export(self, export: str) -> bool:
        """Whether a block export is one of this owner's."""
        return export.startswith(f"{self._node_prefix}live-")

    def owns_node(self, node: str) -> bool:
        """Whether a block node is a layer of this owner's captures."""
        return node.startswith(self._node_prefix) and node.removeprefix(self._node_prefix).isdecimal()

    @property
    def _node_prefix(self) -> str:
        return f"drsync-{self.repository}-{hashlib.sha256(self.vm.encode()).hexdigest()[:8]}-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How a disk is to be captured, and why."""

    kind: Kind
    reason: str
    """Why it is a full, for people; empty for an increment."""
    dirty_bytes: int
    """For an increment: upper bound of what it copies."""


def decide(
    disk: str,
    size_bytes: int,
    bitmaps: Sequence[DirtyBitmap],
    base: Base | None,
    *,
    name: str,
    full: bool = False,
) -> Decision:
    """Whether `disk` can be captured as an increment of `base`, or why it must be a full.

    `bitmaps` are all that QEMU reports of the disk's node; `name` is what `base`'s
    capture called its bitmap on this very disk. Only that one counts, and only if it has
    recorded every write since. The text does not depend on what a survey cleans
    away, so that asking again gives the same answer.
    """
    problem = no_increment(disk, size_bytes, base, full=full)
    if problem or base is None:
        return Decision(kind=Kind.FULL, reason=problem, dirty_bytes=0)
    found = next((bitmap for bitmap in bitmaps if bitmap.name == name), None)
    if found is None:
        return Decision(kind=Kind.FULL, reason="bitmap is missing", dirty_bytes=0)
    problem = _unusable(found)
    if problem:
        return Decision(kind=Kind.FULL, reason=problem, dirty_bytes=0)
    return Decision(kind=Kind.INCREMENTAL, reason="", dirty_bytes=min(found.count, size_bytes))


def no_increment(disk: str, size_bytes: int, base: Base | None, *, full: bool) -> str:
    """Why no bitmap at all could make an increment; empty if one could."""
    if full:
        return "a full was asked for"
    if base is None:
        return "there is no point yet"
    before = next((known.size_bytes for known in base.disks if known.name == disk), None)
    if before is None:
        return "disk is not in the newest point"
    if before != size_bytes:
        change = "grew" if size_bytes > before else "shrank"
        return f"disk {change} from {format_size(before)} to {format_size(size_bytes)}"
    return ""


def _unusable(bitmap: DirtyBitmap) -> str:
    """Why the right bitmap can't be relied on; empty if it can."""
    if bitmap.inconsistent:
        return "bitmap is inconsistent, QEMU did not end cleanly"
    if bitmap.busy:
        return "bitmap is in use by another job or export"
    if not bitmap.recording:
        return "bitmap does not record"
    if bitmap.granularity != BLOCK_SIZE:
        return f"bitmap has a granularity of {format_size(bitmap.granularity)}, not {format_size(BLOCK_SIZE)}"
    return ""


def begin_bitmap(node: str, name: str, persistent: bool) -> Action:
    """Transaction action: a new bitmap records from now on."""
    data = {"node": node, "name": name, "granularity": BLOCK_SIZE, "persistent": persistent}
    return {"type": "block-dirty-bitmap-add", "data": data}
