"""Opens a VM's log for a cycle, and keeps what this host remembers of it (state.json in the spool, Heads in memory)."""

import msgspec

from drsync.errors import Fenced
from drsync.heads import Heads, KnownHead, note_of, stand_in_of
from drsync.log import Log
from drsync.spool import VmSpool
from drsync.spooled import VmState
from drsync.writer import LogWriter, open_writer


class LogOpening:
    """What one cycle knows of its VM's log, under the VM's lock."""

    def __init__(self, log: Log, spool: VmSpool, writer_id: str, heads: Heads | None, *, take_over: bool) -> None:
        """Without `heads` the newest segment is looked for each time. `take_over`: even if another has the log."""
        self._log = log
        self._spool = spool
        self._writer_id = writer_id
        self._heads = heads
        self._take_over = take_over
        self.head_is_lost = False
        """The newest segment is damaged: nothing is known of the point before, and everything is sent."""

    def open(self) -> LogWriter:
        """The log, to be written behind its newest segment.

        Raises:
            Fenced: another drsync took the VM over, now or some time ago; it is remembered.
            PointLost, IntegrityError, StoreError: see open_writer.
        """
        state = self._spool.state()
        if state.fenced_by and not self._take_over:
            head = self._log.read(self._log.newest(after=state.wrote_seq))
            raise Fenced(vm=self._log.vm, writer=state.fenced_by, epoch=head.meta.epoch)
        known = self._known_head(state)
        if known is not None:
            return LogWriter(self._log, self._writer_id, known.head, horizon=known.horizon)
        wrote_before = bool(state.wrote_seq) and not self._take_over
        stand_in = stand_in_of(state, self._writer_id)
        try:
            writer = open_writer(
                self._log,
                self._writer_id,
                known_seq=state.wrote_seq,
                wrote_before=wrote_before,
                known_horizon=state.horizon,
                stand_in=stand_in,
            )
        except Fenced as fenced:
            self.remember(fenced_by=str(fenced.fields["writer"]))
            raise
        self.head_is_lost = writer.head is not None and writer.head is stand_in
        if writer.head is not None and not self.head_is_lost:
            note = note_of(writer.head)
            self.remember(wrote_seq=note.seq, head=note, horizon=writer.horizon, fenced_by="")
            self.note_head(writer)
        return writer

    def _known_head(self, state: VmState) -> KnownHead | None:
        """The head of the log, if this process saw it not long ago and no other one on this host wrote since."""
        known = self._heads.of(self._log.vm) if self._heads is not None else None
        if known is None or self._take_over or state.fenced_by:
            return None
        return known if (known.head.seq, known.head.meta.writer) == (state.wrote_seq, self._writer_id) else None

    def note_head(self, writer: LogWriter) -> None:
        """It was just found, or written."""
        if self._heads is not None and writer.head is not None:
            self._heads.note(self._log.vm, writer.head, writer.horizon)

    def forget_head(self) -> None:
        """Look for the head next time: what was being done may have changed it."""
        if self._heads is not None:
            self._heads.forget(self._log.vm)

    def remember(self, **changes: object) -> None:
        """Change what this host remembers of the VM."""
        self._spool.remember(msgspec.structs.replace(self._spool.state(), **changes))
