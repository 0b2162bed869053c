"""What every document is made of."""

from collections.abc import Mapping
from datetime import UTC, datetime

from drsync.errors import DrsyncError
from drsync.model import BLOCK_SIZE

Document = Mapping[str, object]


def instant(time: datetime | None) -> str | None:
    """RFC 3339, in UTC."""
    return None if time is None else time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def error(err: DrsyncError) -> Document:
    """What an error is to a program."""
    return {
        "code": err.code,
        "class": type(err).__name__,
        "message": str(err),
        "remedy": err.remedy,
        "retryable": err.retryable,
    }


def byte_range(first: int, count: int, size_bytes: int) -> Document:
    """A run of blocks, in blocks and in bytes of a disk of that size."""
    offset = first * BLOCK_SIZE
    size = min((first + count) * BLOCK_SIZE, size_bytes) - offset
    return {"first_block": first, "blocks": count, "offset_bytes": offset, "size_bytes": size}
