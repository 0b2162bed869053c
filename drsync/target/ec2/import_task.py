"""VM Import: a disk becomes an EBS snapshot, or disks become an image whose guest AWS has converted.

    blocks ─▶ vmdk.py ─▶ upload.py ─▶ bucket ─▶ ImportSnapshot ─▶ snapshot        import_disk
                                        └─────▶ ImportImage ─▶ image              upload_disk, import_image
                             EBS snapshot ───────────┘

What a caller uses (`aws` is the session of aws.py):

    import_disk(aws, place, disk, read, progress=…, clock=…) -> snapshot id
    upload_disk(aws, place, disk, read, progress=…, clock=…) -> ImageSource, for import_image
    import_image(aws, place, request, sources, progress=…, clock=…) -> ImportedImage(image id, snapshot ids)
    remove_leftovers(aws, place, name) -> what of it was there: cancels tasks, aborts uploads, deletes the objects

`read(first)` gives (block number, bytes) of the blocks of 64 KiB that hold data, ascending, from block `first` on;
blocks of zeros may be left out or not. It is called with 0, or, when an upload that was killed goes on, with the
block where it goes on: the same disk of the same point must give the same blocks then.

All are idempotent by `disk.name` (or `request.name`): called again after a kill they go on with the upload, follow the
task that runs, or answer with what it has made. If they raise, what they made is removed, unless `keep_on_error`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

ReadBlocks = Callable[[int], Iterable[tuple[int, bytes]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPlace:
    """Where images lie while AWS reads them, and as whom it reads."""

    bucket: str
    """In the Region of the import."""
    prefix: str = "drsync-import"
    role_name: str = "vmimport"
    kms_key_id: str | None = None
    """Encrypts the snapshots that are made; None: as the account does by default."""
    keep_on_error: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskImport:
    """One disk of one point."""

    name: str
    """Of this disk of this point in this repository, and of no other: makes the object's key, tags and tokens."""
    size_bytes: int
    data_bytes: int
    """No more than this of it is data (so many blocks of 64 KiB)."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """For the task and the snapshot."""
