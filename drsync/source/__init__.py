"""Where bytes come from: the contract that every source keeps.

A source is an open session with one VM's QEMU. It takes captures into layer
files and looks after the dirty bitmaps that make increments possible.

**Two generations.** The bitmap made by capture C records what changed since C.
The next capture P copies what C's bitmap holds while P's own bitmap already
records. Both go on recording until the repository has acknowledged P; only then
is C's dropped. So whatever fails in between, either C's or P's bitmap still
tells the whole truth:

    guest writes  ──────────────────────────────────────────────▶
    bitmap of C   ├──────────────────────────┤ dropped after the commit
    bitmap of P              ├────────────────────────────────────
                          capture P       P committed

Rules, checked for every source by tests/contract/test_source.py and test_source_failures.py:

- C1  all disks of a capture are of one instant.
- C2  a layer holds every block written since the base capture, zeros included.
- C3  after a failed or abandoned capture the next survey gives the same answer
      as before it, plus what was written since.
- C4  a base that is not exactly the bitmap's capture never makes an increment.
- C5  a survey leaves nothing of dead captures behind in QEMU: jobs, nodes, bitmaps, and what live reading needs.
- C6  a bitmap, node, job or NBD server that is not drsync's own (of this repository) is never touched.
- C7  `instant` is entered at most once a capture, when everything else is ready; the one call
      that fixes the instant of all disks is made in it, and nothing more; it is left before the
      copying is waited for. What it raises, entered or left, fails the capture (C3) and comes out as it is.
- C8  `pause` stops only a guest that runs, `resume` starts only one that is paused.
- C11 a capture reads no faster than its `pace`, all disks together, and goes on at another limit a second after
      that has changed. What the guest is about to overwrite is copied at once, whatever the pace. (In libvirt's
      push mode QEMU begins without a limit, and is told it then: 64 MiB may be on their way.)

**Live reading**, for a seed (docs/decisions/0004-seed.md), takes no instant: bitmaps
begin to record (`begin_recording`), then each block is read as it is at that
moment (`open_live`). Whatever is written since is in those bitmaps; so a capture
relative to them, laid over what was read, is of one instant.

- C9  a block that was not written since `begin_recording` is read as it is; any other is in the bitmaps of then.
- C10 a live view of an increment tells of every block written since its base, zeros included.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from drsync.model import CaptureId, Consistency, Kind, NoPace, Pace, Progress

Flags: TypeAlias = npt.NDArray[np.bool_]
Numbers: TypeAlias = npt.NDArray[np.int64]

NO_PACE: Final = NoPace()
INSTANT_TIMEOUT_S: Final = 60.0
"""How long the call that fixes the instant may take when nobody is held still for it: longer is a hang."""

Instant = Callable[[], AbstractContextManager[float]]
"""Makes the context manager that stands around the one call that fixes a capture's instant.

What is done on entering (freeze file systems, pause, wait for other VMs) is done when all
that takes time is ready; what is undone on leaving is undone before anything is copied. It yields how
many seconds the call may take: a source gives up then, if its library lets it.
"""


def at_once() -> AbstractContextManager[float]:
    """The Instant around which nothing is done."""
    return nullcontext(INSTANT_TIMEOUT_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDisk:
    """A disk as the newest committed point has it."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The newest committed point: what an increment would be relative to."""

    capture: CaptureId
    disks: Sequence[BaseDisk]
    definition: Mapping[str, object] = field(default_factory=dict)
    """What the point's CaptureResult said of the VM: a source may tell by it whether a disk is still the same one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSurvey:
    """What a capture of one disk would do now."""

    name: str
    size_bytes: int
    kind: Kind
    """INCREMENTAL, or FULL. (Whether a full is sent as a resync is not the source's business.)"""
    reason: str
    """Why it is not an increment, for people: "bitmap is missing"; empty for an increment."""
    copy_bytes: int
    """Upper bound of what the layer would hold: dirty bytes, or the allocated bytes for a full."""
    persistent: bool
    """Whether the bitmap survives a clean restart of QEMU (qcow2), or ends with the process (raw)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureResult:
    """A capture that succeeded: every layer file is complete and closed by QEMU."""

    time: datetime
    """The instant that the disks show, by this host's clock, UTC."""
    consistency: Consistency
    """What the source alone reaches; whoever did more around the instant knows better."""
    definition: Mapping[str, object]
    """What is known of the VM beside its disks, as JSON-able values (machine, memory, versions, block nodes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """What a live view says of neighbouring blocks of a disk; one array element a block."""

    holds: Flags
    """It belongs to the view, and has to be read."""
    zeros: Flags
    """It belongs to the view, and reads as zeros for sure."""


class LiveReader(Protocol):
    """Reads one disk as it is now. For one thread."""

    def presence(self, first_block: int, count: int) -> Presence:
        """What is to be read of blocks `first_block` on.

        Raises:
            SourceLost: QEMU went away.
            CaptureFailed: QEMU can't tell.
        """
        ...

    def read(self, blocks: Numbers) -> Iterator[tuple[Numbers, memoryview]]:
        """The bytes of `blocks`, which are in order: some blocks and a buffer with 64 KiB for each, again and again.

        A last block that is shorter is filled up with zeros. A buffer is good until the next one is asked for.
        Some of what comes next is on its way meanwhile: before anything that takes long, call `settle`.

        Raises:
            SourceLost: QEMU went away.
            CaptureFailed: the disk can't be read.
        """
        ...

    def settle(self) -> None:
        """Wait for what is on its way. Until it has arrived, whatever drains QEMU's block layer has to wait for it.

        Raises:
            SourceLost, CaptureFailed: as `read`.
        """
        ...

    def close(self) -> None: ...


class LiveView(Protocol):
    """The disks of a VM, open for live reading. `reader` may be called from several threads."""

    def reader(self, disk: str) -> LiveReader:
        """A reader of a disk, for the calling thread to use and close.

        Raises:
            SourceLost: QEMU went away.
        """
        ...

    def close(self) -> None:
        """Take away what the view needs in QEMU. Call it from the source's thread; safe to call twice."""
        ...


class Source(Protocol):
    """An open session with one VM. Not thread-safe: one thread uses it. A context manager that closes it."""

    def survey(
        self, base: Base | None, *, full: bool = False, tidy: bool = True, keep: Collection[CaptureId] = ()
    ) -> Sequence[DiskSurvey]:
        """What a capture relative to `base` would do, one entry a disk, in the order of the disks' names.

        First removes what earlier captures left behind: jobs, layer nodes, what live reading needs,
        and every bitmap of ours that is neither `base.capture`'s nor of one in `keep`. `full` asks for a full
        of every disk, whatever the bitmaps say. Without `tidy` nothing is removed: for looking only.

        Raises:
            DiskMissing: a configured disk is not there.
            CaptureFailed: the VM is being migrated, or a dead capture's job does not end.
            SourceLost: QEMU went away.
        """
        ...

    def capture(
        self,
        capture: CaptureId,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        layers: Mapping[str, Path],
        *,
        timeout_s: float,
        keep_free_bytes: int = 0,
        progress: Progress | None = None,
        instant: Instant = at_once,
        pace: Pace = NO_PACE,
    ) -> CaptureResult:
        """Write one layer a disk, all of one instant, and start the bitmaps of `capture`.

        `disks` is what `survey` returned just before; `layers` maps each disk's name to
        the path of a layer file that does not exist yet. The bitmaps of `base` go on recording.
        If less than `keep_free_bytes` are free where the layers grow, it is cancelled: a guest
        whose old blocks can't be copied away any more would get write errors. After any
        failure, the layer files that it made are gone. The call that fixes the instant, and the
        reading of the clock just before it, are wrapped in `instant`. The disks are read at `pace`,
        all together; a limit that changes meanwhile holds a second later.

        Raises:
            CaptureFailed: a job failed or was refused; the new bitmaps are removed again.
            SpoolUnusable: a layer file can't be made, or exists; QEMU was not asked for anything.
            CaptureTimeout: cancelled; the new bitmaps are removed again.
            SourceLost: QEMU went away, or the call that fixes the instant took too long; the next
                survey finds out what is left.
            Whatever `instant` raises.
        """
        ...

    def is_running(self) -> bool:
        """Whether a guest's processors run now; one that is paused or off answers no agent.

        Raises:
            SourceLost: QEMU went away.
        """
        ...

    def pause(self, *, timeout_s: float) -> bool:
        """Stop the guest's processors, if they run; whether this call did.

        Raises:
            CaptureFailed: QEMU refused.
            SourceLost: QEMU went away, or did not answer in time: the guest may be paused.
        """
        ...

    def resume(self, *, timeout_s: float) -> None:
        """Let a paused guest run on; one that runs, or is in any other state, is left as it is.

        Raises:
            CaptureFailed: QEMU refused; the guest is still paused.
            SourceLost: QEMU went away, or did not answer in time: the guest may be paused.
        """
        ...

    def check_live(self, disks: Sequence[DiskSurvey]) -> None:
        """Check, as far as it can be told without changing anything, that `disks` could be read live.

        Raises:
            LiveUnavailable, LibraryMissing: they can't be; the error tells why.
            SourceLost: QEMU went away.
        """
        ...

    def begin_recording(self, capture: CaptureId, disks: Sequence[DiskSurvey]) -> Mapping[str, object]:
        """Start the bitmaps of `capture` on all `disks`, which `survey` returned just before; nothing is copied.

        What it returns, as JSON-able values, is the `definition` of a Base of this capture.

        Raises:
            LiveUnavailable: nothing of this VM can be read live; nothing was changed.
            CaptureFailed: QEMU refused; no bitmap of `capture` is there.
            SourceLost: QEMU went away.
        """
        ...

    def open_live(self, base: Base | None, disks: Sequence[DiskSurvey], *, pace: Pace) -> LiveView:
        """A view for reading `disks` live: what changed since `base` of an increment, and all of any other.

        Reading keeps to `pace`. While the view is open, the guest's disks can't be resized.

        Raises:
            LiveUnavailable, LibraryMissing: these disks can't be read live; nothing was changed.
            CaptureFailed: QEMU refused something else.
            SourceLost: QEMU went away.
        """
        ...

    def incarnation(self) -> str:
        """Names the process that runs the VM: another one after every start, and on every boot of the host."""
        ...

    def release(self, keep: CaptureId) -> None:
        """Drop every bitmap of ours but those of `keep`: call it when `keep`'s point is committed."""
        ...

    def close(self) -> None:
        """End the session; QEMU runs on. Safe to call twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
