"""The values that every stage passes on. Frozen, validated when made, no I/O.

The words are those of docs/architecture.md: a *point* is the state of all disks
of one VM at one instant; a *capture* takes it; its bytes are a *layer* per disk.
"""

import re
import secrets
import time
from datetime import UTC, datetime
from enum import StrEnum
from typing import NewType, Protocol

BLOCK_SIZE = 65536
"""Bytes of a block: the unit of change, the granularity of the dirty bitmap and the cluster of a layer."""

MAX_DISK_BYTES = BLOCK_SIZE * 2**32
"""Block numbers are 32 bits in the repository, so a disk holds 256 TiB at most."""

CaptureId = NewType("CaptureId", str)
"""16 hex digits that name one capture; a dirty bitmap carries the id of the capture that made it."""

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,62}"
"""A name of a VM or disk: safe as an object name, a file name and a QEMU job id."""


def is_name(text: str) -> bool:
    """Whether `text` can name a VM or a disk (see NAME_PATTERN)."""
    return re.fullmatch(NAME_PATTERN, text) is not None


def new_capture_id() -> CaptureId:
    """A capture id that no other capture has (64 random bits)."""
    return CaptureId(secrets.token_hex(8))


def block_count(size_bytes: int) -> int:
    """How many blocks a disk of `size_bytes` has; the last one may be short."""
    return -(-size_bytes // BLOCK_SIZE)


def block_length(block: int, size_bytes: int) -> int:
    """Bytes of block number `block` on a disk of `size_bytes`."""
    return min(BLOCK_SIZE, size_bytes - block * BLOCK_SIZE)


class Kind(StrEnum):
    """How a capture relates to the point before it."""

    INCREMENTAL = "incremental"
    """Only the blocks written since the point before, by an unbroken dirty bitmap."""
    RESYNC = "resync"
    """Everything was read again, only what differs was sent."""
    FULL = "full"
    """Everything was read and sent."""


class Consistency(StrEnum):
    """What the guest's file systems can expect of a point; what was reached, not what was asked for."""

    CRASH = "crash"
    FILESYSTEM = "filesystem"


class OnFreezeFailure(StrEnum):
    """What becomes of a point whose guest could not be held frozen."""

    CRASH = "crash"
    """It is taken all the same, and labelled as what it is."""
    FAIL = "fail"
    """It is not taken."""


class Clock(Protocol):
    """The time, passed in so that tests can set it."""

    def now(self) -> datetime:
        """The present instant, in UTC."""
        ...

    def monotonic_s(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...


class SystemClock:
    """The host's own clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        return time.monotonic()


class Progress(Protocol):
    """Where a long step reports how far it is; called from several threads."""

    def start(self, step: str, total_bytes: int) -> None:
        """A step begins that will handle `total_bytes`."""
        ...

    def advance(self, done_bytes: int) -> None:
        """`done_bytes` more of the present step are done."""
        ...


class NoProgress:
    """A Progress that nobody watches."""

    def start(self, step: str, total_bytes: int) -> None:
        pass

    def advance(self, done_bytes: int) -> None:
        pass


class Pace(Protocol):
    """How fast bytes may pass; called from several threads."""

    def take(self, size_bytes: int) -> None:
        """Return when `size_bytes` more may pass."""
        ...

    def take_now(self, size_bytes: int) -> bool:
        """Whether `size_bytes` more may pass at once; if not, nothing was taken."""
        ...

    def limit_bytes_per_s(self) -> float | None:
        """The rate now, for who can hold to it by itself; None: there is no limit."""
        ...


class NoPace:
    """A Pace without a limit."""

    def take(self, size_bytes: int) -> None:
        pass

    def take_now(self, size_bytes: int) -> bool:
        return True

    def limit_bytes_per_s(self) -> float | None:
        return None
