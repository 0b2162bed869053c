"""The records of the spool: what a capture in it is, and what this host remembers of a VM (spool.py keeps them)."""

from enum import Enum
from typing import Final

import msgspec

from drsync.model import CaptureId, Consistency


class CaptureState(Enum):
    """Where a spooled capture stands."""

    TAKING = "taking"
    CAPTURED = "captured"
    COMMITTED = "committed"
    DROPPED = "dropped"

    def may_become(self, other: "CaptureState") -> bool:
        """Whether a capture may go from this state to `other`."""
        return other in _MOVES[self]


_MOVES: Final = {
    CaptureState.TAKING: {CaptureState.CAPTURED, CaptureState.DROPPED},
    CaptureState.CAPTURED: {CaptureState.COMMITTED, CaptureState.DROPPED},
    CaptureState.COMMITTED: set(),
    CaptureState.DROPPED: set(),
}


class SpooledDisk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A layer of a spooled capture."""

    name: str
    size_bytes: int
    full: bool
    """Whether the layer holds the whole disk, or just what changed since the base."""
    reason: str
    persistent_bitmap: bool


class SpooledCapture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """capture.json: all that shipping needs to know of a complete capture."""

    capture: CaptureId
    base: CaptureId | None
    boot_id: str
    time: str
    consistency: Consistency
    send_all: bool
    """Whether a full is sent whole (first point, or asked for), not compared with the point before."""
    disks: list[SpooledDisk]
    definition: dict[str, object]
    seed: CaptureId | None = None
    """The round of a seed that this capture closes: its layers hold what changed since that round began."""


class HeadNote(msgspec.Struct, frozen=True, kw_only=True):
    """What the next segment needs of the one that was written last, should that be damaged by then."""

    seq: int
    epoch: int
    index_sha256: str


class VmState(msgspec.Struct, frozen=True, kw_only=True):
    """state.json: what this host remembers of a VM. Losing it costs a listing, never data."""

    wrote_seq: int = 0
    """The newest segment that this spool wrote; 0 = it never wrote this VM."""
    head: HeadNote | None = None
    """That segment, if this spool has seen it since it remembers this."""
    horizon: int = 0
    """The number of the newest horizon that this spool knows of; 0 = none."""
    fenced_by: str = ""
    """The writer that took the VM over; empty if none did."""
    checked_at: str = ""
    """When the newest point was last seen to be the VM's present state."""
    error: str = ""
    """What the last cycle failed with; empty if it succeeded."""
    error_at: str = ""


class HeldGuest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """held.json: a guest is about to be frozen or paused. Whoever finds it after a crash lets that guest go."""

    boot_id: str
    pid: int
    """The process that holds it."""
    vm_run: str
    """Which run of the VM was frozen (GuestAgent.vm_run); empty if it was not."""
    paused: bool
    since: str

    @property
    def what(self) -> str:
        """What was done to the guest, in words."""
        return " and ".join(word for word, done in (("frozen", bool(self.vm_run)), ("paused", self.paused)) if done)
