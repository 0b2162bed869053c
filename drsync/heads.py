"""What a host knows of the newest segment of a log, so that it need not be read: in memory, and in the spool.

    Heads      of this process, for a while          ─▶ LogWriter, without a request
    HeadNote   in state.json: number, epoch, hash    ─▶ a stand-in for the newest segment, should that be damaged
                                                          ─▶ LogWriter ─▶ the next segment: every disk in full, and
                                                             a block map of it alone (F54)

The next segment names the hash of the one before (F12), which its writer remembers. A segment that is gone is another
matter: then the repository may have been rolled back, and nobody goes on by himself (PointLost).
"""

import threading
from dataclasses import dataclass
from typing import Final

from drsync.format.segment import SegmentMeta, pack_table
from drsync.log import Log, Segment
from drsync.model import Clock
from drsync.spooled import HeadNote, VmState

FRESH_S: Final = 600.0
"""How long a head is taken for the newest segment without a look: an idle VM costs two requests in this time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownHead:
    """The newest segment of a log as it was seen, and the horizon from before it was looked for."""

    head: Segment
    horizon: int


class Heads:
    """The newest segment of each log that this process has written or seen, so that it is not looked for all the time.

    The log is the lock, so an old one can do no harm: an append to it is refused, or lands in a place that a newer
    horizon had freed, which the writer looks for. It is forgotten after a while, so that a daemon whose VMs are idle
    learns that another one has taken them over.
    """

    def __init__(self, clock: Clock, *, fresh_s: float = FRESH_S) -> None:
        self._clock = clock
        self._fresh_s = fresh_s
        self._lock = threading.Lock()
        self._known: dict[str, tuple[KnownHead, float]] = {}

    def of(self, vm: str) -> KnownHead | None:
        """The head, if it was seen not long ago."""
        with self._lock:
            found = self._known.get(vm)
        if found is None or self._clock.monotonic_s() - found[1] > self._fresh_s:
            return None
        return found[0]

    def note(self, vm: str, head: Segment, horizon: int) -> None:
        """The head was found, or written, just now; `horizon` is that of its LogWriter."""
        with self._lock:
            self._known[vm] = (KnownHead(head=head, horizon=horizon), self._clock.monotonic_s())

    def forget(self, vm: str) -> None:
        """It is not known any more what the head is."""
        with self._lock:
            self._known.pop(vm, None)


def note_of(segment: Segment) -> HeadNote:
    """What is to be remembered of a segment that was just written."""
    return HeadNote(seq=segment.seq, epoch=segment.meta.epoch, index_sha256=segment.index_sha256.hex())


def stand_in_of(state: VmState, writer: str) -> Segment | None:
    """What says of the segment that `writer` wrote last what the next one needs, and of disks nothing; or None."""
    note = state.head
    if note is None or note.seq != state.wrote_seq or state.fenced_by:
        return None
    meta = SegmentMeta(
        seq=note.seq, epoch=note.epoch, writer=writer, previous="", point=None, packs=0, contents=[], rounds=[]
    )
    return Segment.unstored(meta, pack_table([]), index_sha256=bytes.fromhex(note.index_sha256))


def newest_point(log: Log, head: Segment | None) -> Segment | None:
    """The newest segment that holds a point; fences in front of it are passed over."""
    while head is not None and head.meta.point is None:
        head = log.read(head.seq - 1) if head.seq > 1 else None
    return head
