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
- C5  a survey leaves nothing of dead captures behind in QEMU: jobs, nodes, bitmaps.
- C6  a bitmap, node or job that is not drsync's own (of this repository) is never touched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from drsync.model import CaptureId, Consistency, Kind, Progress


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
    definition: Mapping[str, object]
    """What is known of the VM beside its disks, as JSON-able values (machine, memory, versions, block nodes)."""


class Source(Protocol):
    """An open session with one VM. Not thread-safe: one thread uses it. A context manager that closes it."""

    def survey(self, base: Base | None, *, full: bool = False, tidy: bool = True) -> Sequence[DiskSurvey]:
        """What a capture relative to `base` would do, one entry a disk, in the order of the disks' names.

        First removes what earlier captures left behind: jobs, layer nodes, and
        every bitmap of ours that is not `base.capture`'s. `full` asks for a full
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
    ) -> CaptureResult:
        """Write one layer a disk, all of one instant, and start the bitmaps of `capture`.

        `disks` is what `survey` returned just before; `layers` maps each disk's name to
        the path of a layer file that does not exist yet. The bitmaps of `base` go on recording.
        If less than `keep_free_bytes` are free where the layers grow, it is cancelled: a guest
        whose old blocks can't be copied away any more would get write errors. After any
        failure, the layer files that it made are gone.

        Raises:
            CaptureFailed: a job failed or was refused; the new bitmaps are removed again.
            SpoolUnusable: a layer file can't be made, or exists; QEMU was not asked for anything.
            CaptureTimeout: cancelled; the new bitmaps are removed again.
            SourceLost: QEMU went away; the next survey finds out what is left.
        """
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
