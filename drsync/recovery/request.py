"""What shall come back, and the plan of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from drsync.catalog import Point
from drsync.errors import DrsyncError
from drsync.image import PointImage
from drsync.target.domain.values import Note, Rewritten
from drsync.target.image import ImageFormat
from drsync.target.libvirt_host import Domain
from drsync.target.place import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryRequest:
    """What comes back, where, and as what."""

    vm: str
    number: int | None = None
    at: datetime | None = None
    uri: str = "qemu:///system"
    name: str | None = None
    """The domain's new name; then it is a copy, with a uuid of its own."""
    pool: str | None = None
    disk_dir: Path | None = None
    networks: Mapping[str, str] = field(default_factory=dict)
    keep_mac: bool | None = None
    """None: kept, unless it is a copy."""
    image_format: ImageFormat | None = None
    """None: as each disk had it."""
    start: bool = False
    replace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDisk:
    """A disk on its way."""

    name: str
    target: str
    file: str
    path: str
    image_format: ImageFormat
    size_bytes: int
    live_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A small file on its way."""

    place: Place
    name: str
    content: bytes

    @property
    def path(self) -> str:
        return self.place.path_of(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """All that a recovery does, and all that keeps it from being done."""

    request: RecoveryRequest
    point: Point
    image: PointImage
    domain: str
    uuid: str
    place: Place | None
    disks: Sequence[PlannedDisk]
    nvram: PlannedFile | None
    tpm: bytes | None
    """The state's tar."""
    tpm_version: str
    autostart: bool
    rewritten: Rewritten
    replaced: Domain | None
    errors: Sequence[DrsyncError]

    @property
    def notes(self) -> Sequence[Note]:
        return self.rewritten.notes
