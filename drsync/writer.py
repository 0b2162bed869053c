"""Writing a VM's log: the right to append, taking it over, and how a lost race is told from a lost reply.

A segment is created, never overwritten (log.py): who finds another's in the place of his own has lost the VM to it,
or prune has gone on with the log. His own segment in that place means that the reply was lost, not the race.
"""

import logging
from collections.abc import Sequence

from drsync.errors import (
    ChainBroken,
    Fenced,
    LogAdvanced,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    PointLost,
    StoreUnavailable,
)
from drsync.format import names, seal
from drsync.format.segment import DiskRows, PointMeta, SegmentMeta, encode_segment, pack_table
from drsync.horizon import newest_number, read_horizon
from drsync.log import FIRST_SEQ, Log, Segment

_LOGGER = logging.getLogger(__name__)


class LogWriter:
    """The right to append to one VM's log, until somebody else takes it."""

    def __init__(self, log: Log, writer: str, head: Segment | None, *, horizon: int = 0) -> None:
        """`horizon` is the number of the newest one, from before the head was looked for."""
        self.log = log
        self.writer = writer
        self.head = head
        self.horizon = horizon
        self.epoch = head.meta.epoch if head else 1

    @property
    def next_seq(self) -> int:
        return self.head.seq + 1 if self.head else FIRST_SEQ

    def meta(
        self, point: PointMeta | None, packs: int, rows: Sequence[DiskRows], rounds: Sequence[int] = ()
    ) -> SegmentMeta:
        """The metadata of the next segment."""
        return SegmentMeta(
            seq=self.next_seq,
            epoch=self.epoch,
            writer=self.writer,
            previous=self.head.index_sha256.hex() if self.head else "",
            point=point,
            packs=packs,
            contents=[r.extent for r in rows],
            rounds=list(rounds) if len(rounds) > 1 else [],
        )

    def append(self, buffer: memoryview, sealed: seal.Sealed) -> Segment:
        """Commit the segment that lies sealed in `buffer`; it is the new head.

        Raises:
            Fenced: another writer has this number: nothing of ours was stored.
            LogAdvanced: prune has it: nothing of ours was stored, either, and packs of ours may go.
            StoreUnavailable: it is unknown whether it was committed; opening the
                writer again finds out.
        """
        store = self.log.objects.store
        name = names.segment(self.log.vm, self.next_seq)
        try:
            try:
                store.create(name, buffer[: sealed.length], sha256=sealed.sha256)
            except ObjectExists as err:
                self._check_own(sealed.index_sha256, err)
            self._check_not_freed(self.next_seq, sealed.index_sha256)
            self.head = self.log.read(self.next_seq)
        except (ChainBroken, ObjectDamaged, ObjectMissing) as err:
            # Not to be taken for damage of what was read before: whoever sent this point again would fence himself.
            raise StoreUnavailable(url=store.url, problem=f"what was just committed can't be read back: {err}") from err
        return self.head

    def _check_own(self, index_sha256: bytes, cause: ObjectExists) -> None:
        """See whether the segment that is in the next one's place is this very one (F20): no two seal alike."""
        other = self.log.read(self.next_seq)
        if other.index_sha256 == index_sha256:
            return
        if other.meta.point is None and other.meta.epoch == (self.head.meta.epoch if self.head else 1):  # no fence
            raise LogAdvanced(vm=self.log.vm, seq=other.seq) from cause
        raise Fenced(vm=self.log.vm, writer=other.meta.writer, epoch=other.meta.epoch) from cause

    def _check_not_freed(self, seq: int, index_sha256: bytes) -> None:
        """See that segment `seq`, which was just created, is not in a place that prune had freed.

        A store forgets what was deleted, so creating is no proof for who was away for
        long, by whatever clock. A horizon that frees the place has a number that was
        not there when this writer looked for the head, and it stays. (It may also speak
        of this very segment: prune came right behind it.)

        Raises:
            Fenced: others have written that number before, and more; nothing of ours counts.
        """
        number = newest_number(self.log.objects, known=self.horizon)
        if number == self.horizon:
            return
        horizon = read_horizon(self.log.objects, number)
        survived = seq in horizon.survivors and horizon.hash_of_point(seq) == index_sha256
        if horizon.through >= seq and not survived:
            head = self.log.read(self.log.newest())
            raise Fenced(vm=self.log.vm, writer=head.meta.writer, epoch=head.meta.epoch)
        self.horizon = number

    def fence(self) -> Segment:
        """Take the VM over: append an empty segment with the next epoch.

        Raises:
            Fenced, LogAdvanced: somebody else appended at the same moment.
        """
        self.epoch += 1
        segment = self.advance()
        _LOGGER.warning("vm=%s took over, epoch=%d segment=%d", self.log.vm, self.epoch, segment.seq)
        return segment

    def advance(self) -> Segment:
        """Append an empty segment: nobody who looked for the head before this can append any more.

        Raises:
            Fenced, LogAdvanced: somebody else appended at the same moment, to the same effect.
        """
        objects = self.log.objects
        header = objects.new_header("segment", self.next_seq)
        meta = self.meta(None, 0, [])
        index = encode_segment(meta, pack_table([]), [])
        buffer, sealed = objects.seal_alone(header, index)
        return self.append(buffer, sealed)


def open_writer(
    log: Log,
    writer: str,
    *,
    known_seq: int = 0,
    wrote_before: bool = False,
    known_horizon: int = 0,
    stand_in: Segment | None = None,
) -> LogWriter:
    """The right to append to `log` as `writer`.

    A writer that never wrote this VM takes it over from another one; a writer
    that did (`wrote_before`) and finds somebody else's segment at the head was
    fenced, and must not take it back by itself. `known_seq` is a segment that
    is known to exist: the search for the head starts there; `known_horizon` is such a horizon, or 0.
    `stand_in` is the head in place of the newest segment, if that is the same number and damaged (heads.py).

    Raises:
        Fenced: another writer took the VM over.
        PointLost: segment `known_seq` is not there any more.
        ObjectDamaged: the newest segment is damaged, and nothing stands in for it.
    """
    horizon = newest_number(log.objects, known=known_horizon)  # before the head is looked for, see _check_not_freed
    newest = log.newest(after=known_seq)
    try:
        head = _head(log, newest, stand_in) if newest else None
    except ObjectMissing as err:
        raise PointLost(vm=log.vm, found=log.newest(), expected=known_seq) from err
    granted = LogWriter(log, writer, head, horizon=horizon)
    if head is not None and head.meta.writer != writer:
        if wrote_before:
            raise Fenced(vm=log.vm, writer=head.meta.writer, epoch=head.meta.epoch)
        granted.fence()
    return granted


def _head(log: Log, newest: int, stand_in: Segment | None) -> Segment:
    """The newest segment; or what stands in for it, if it is damaged however often it is read."""
    try:
        return log.read(newest)
    except ObjectDamaged as err:
        _LOGGER.debug("vm=%s reads its newest segment again: %s", log.vm, err)  # it may have come damaged
    try:
        return log.read(newest)
    except ObjectDamaged as err:
        if stand_in is None or stand_in.seq != newest:
            raise
        _LOGGER.warning("vm=%s sends everything: its newest segment can't be read: %s", log.vm, err)
        return stand_in
