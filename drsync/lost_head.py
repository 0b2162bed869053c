"""The newest segment of a log when it can't be read: whoever wrote it goes on behind it, with everything.

    state.json: number, epoch, hash of the segment that this host wrote last
        │  it is the newest one still, is there, and is not what was written
        ▼
    a stand-in for it ─▶ LogWriter ─▶ the next segment: every disk in full, and a block map of it alone (F54)

The next segment names the hash of the one before (F12), which its writer remembers. A segment that is gone is another
matter: then the repository may have been rolled back, and nobody goes on by himself (PointLost).
"""

import logging

from drsync.errors import ObjectDamaged
from drsync.format.segment import SegmentMeta, pack_table
from drsync.horizon import newest_number
from drsync.log import Log, LogWriter, Segment, open_writer
from drsync.spool import HeadNote, VmState

_LOGGER = logging.getLogger(__name__)


def note_of(segment: Segment) -> HeadNote:
    """What is to be remembered of a segment that was just written."""
    return HeadNote(seq=segment.seq, epoch=segment.meta.epoch, index_sha256=segment.index_sha256.hex())


def open_writer_of(log: Log, writer: str, state: VmState, *, take_over: bool) -> tuple[LogWriter, bool]:
    """The right to append to `log` as `writer`; and whether the newest segment is lost, so that all has to be sent.

    Raises:
        Fenced, PointLost: as open_writer.
        ObjectDamaged: the newest segment is lost, and it is not the one that this host wrote last.
    """
    try:
        return _opened(log, writer, state, take_over), False
    except ObjectDamaged as err:
        _LOGGER.debug("vm=%s reads its newest segment again: %s", log.vm, err)  # it may have come damaged
    try:
        return _opened(log, writer, state, take_over), False
    except ObjectDamaged as err:
        behind = _writer_behind(log, writer, state)
        if behind is None:
            raise
        _LOGGER.warning("vm=%s sends everything: its newest segment can't be read: %s", log.vm, err)
        return behind, True


def _opened(log: Log, writer: str, state: VmState, take_over: bool) -> LogWriter:
    wrote_before = bool(state.wrote_seq) and not take_over
    known = {"known_seq": state.wrote_seq, "known_horizon": state.horizon}
    return open_writer(log, writer, wrote_before=wrote_before, **known)


def _writer_behind(log: Log, writer: str, state: VmState) -> LogWriter | None:
    """A LogWriter behind the newest segment; None if that is not the one that `writer` wrote last."""
    note = state.head
    if note is None or note.seq != state.wrote_seq or state.fenced_by:
        return None
    horizon = newest_number(log.objects, known=state.horizon)  # before the head is looked for, as open_writer does
    if log.newest(after=note.seq) != note.seq:
        return None
    return LogWriter(log, writer, _stand_in(note, writer), horizon=horizon)


def _stand_in(note: HeadNote, writer: str) -> Segment:
    """A segment that says of the damaged one what the next one needs, and of disks nothing."""
    meta = SegmentMeta(
        seq=note.seq, epoch=note.epoch, writer=writer, previous="", point=None, packs=0, contents=[], rounds=[]
    )
    return Segment(
        name="",
        object_id=bytes(16),
        meta=meta,
        packs=pack_table([]),
        rows=[],
        index_sha256=bytes.fromhex(note.index_sha256),
        frames_end=0,
        length=0,
    )
