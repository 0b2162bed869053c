"""Sends what lies in the spool into the log: what this cycle captured, and what an earlier one left there."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack

import msgspec

from drsync.errors import LayerDamaged
from drsync.heads import newest_point, note_of
from drsync.heal import Healed
from drsync.image import PointImage, load_image
from drsync.journal import Journal
from drsync.log import Log, Segment
from drsync.model import Clock, Kind, Progress
from drsync.opening import LogOpening
from drsync.packs import FAILURES
from drsync.seed import Seed, SeedOptions, open_journal
from drsync.ship import Seeded, ship
from drsync.source.layer import Layer
from drsync.spool import VmSpool
from drsync.spooled import SpooledCapture
from drsync.writer import LogWriter

_LOGGER = logging.getLogger(__name__)


class Sending:
    """The way from one VM's spool into its log, under the VM's lock."""

    def __init__(
        self, log: Log, spool: VmSpool, opening: LogOpening, clock: Clock, progress: Progress, options: SeedOptions
    ) -> None:
        self._log = log
        self._spool = spool
        self._opening = opening
        self._clock = clock
        self._progress = progress
        self._options = options

    def ship_waiting(self, writer: LogWriter) -> Segment | None:
        """Ship the capture that an earlier cycle left complete, unless it is committed already."""
        waiting = self._spool.waiting()
        if waiting is None:
            return None
        head = self.newest_point(writer)
        base = head.meta.point.capture if head and head.meta.point else None
        if base == waiting.capture:
            self._spool.remove(waiting.capture)  # committed; the crash came before the removal
            return None
        if self._opening.head_is_lost or waiting.base != base:
            # behind a lost head: it is that, or an increment over it
            _LOGGER.warning("vm=%s dropped capture=%s: the log went on without it", self._log.vm, waiting.capture)
            self._spool.remove(waiting.capture)
            return None
        seed = self._seed_of(waiting, head)
        if waiting.seed is not None and seed is None:
            _LOGGER.warning("vm=%s dropped capture=%s: the seed is gone that it closes", self._log.vm, waiting.capture)
            self._spool.remove(waiting.capture)
            return None
        return self.ship(waiting, writer, seed)

    def _seed_of(self, waiting: SpooledCapture, head: Segment | None) -> Seed | None:
        """The seed that a spooled capture closes, if all of it is there still."""
        journal = open_journal(self._spool, waiting.base, send_all=False) if waiting.seed is not None else None
        if journal is None or journal.present is None or journal.present.begun.capture != waiting.seed:
            return None
        seed = self.seed(journal, head)
        return None if seed.drop_missing_packs() else seed

    def seed(self, journal: Journal, head: Segment | None) -> Seed:
        """The seed of a journal, over the point in `head`."""
        return Seed(
            journal,
            self._log,
            head,
            self._spool,
            clock=self._clock,
            progress=self._progress,
            options=self._options,
        )

    def newest_point(self, writer: LogWriter) -> Segment | None:
        """The newest segment that holds a point; None, too, if the log's newest one is damaged."""
        return newest_point(self._log, writer.head) if not self._opening.head_is_lost else None

    def ship(
        self, spooled: SpooledCapture, writer: LogWriter, seed: Seed | None = None, healed: Healed | None = None
    ) -> Segment:
        """Commit a spooled capture and remove it from the spool; with it the `seed` that it closes, or what it heals.

        If this dies, the capture is shipped by the next cycle without what it healed, which then heals anew.
        """
        with ExitStack() as stack:
            try:
                layers = {
                    d.name: stack.enter_context(Layer(self._spool.layer_path(spooled.capture, d.name), d.size_bytes))
                    for d in spooled.disks
                }
                before = self._point_before(spooled, writer)
                self._progress.start("ship", self._spool.used_bytes())
                seeded = seed.seeded([d.name for d in spooled.disks]) if seed is not None else None
                if healed is not None:
                    told = spooled.definition | {"healed": healed.told}
                    spooled = msgspec.structs.replace(spooled, definition=told)
                    kinds = dict.fromkeys(layers, Kind.INCREMENTAL)
                    seeded = Seeded(rounds=[healed.packs], kinds=kinds, changed_bytes={})
                segment = self._shipped(spooled, layers, writer, before, seeded)
            except LayerDamaged:
                self._spool.remove(spooled.capture)  # QEMU's bitmaps still hold all of it
                raise
        self._opening.remember(wrote_seq=segment.seq, head=note_of(segment))
        self._opening.note_head(writer)
        self._spool.remove(spooled.capture)
        self._spool.remove_journal()  # of the seed that this closes, or of one that goes on from an older point
        return segment

    def _shipped(
        self,
        spooled: SpooledCapture,
        layers: Mapping[str, Layer],
        writer: LogWriter,
        before: PointImage | None,
        seeded: Seeded | None,
    ) -> Segment:
        """Commit; where the point before can't be compared with, since it is damaged, everything is sent."""
        limits = self._options.limits
        try:
            return ship(spooled, layers, writer, before, self._progress, limits, seeded=seeded)
        except FAILURES as err:
            if before is None:
                raise
            _LOGGER.warning("vm=%s sends everything: the point before is damaged: %s", self._log.vm, err)
            return ship(spooled, layers, writer, None, self._progress, limits, seeded=seeded)

    def _point_before(self, spooled: SpooledCapture, writer: LogWriter) -> PointImage | None:
        head = self.newest_point(writer)
        if head is None or spooled.send_all or not any(d.full for d in spooled.disks):
            return None
        try:
            return load_image(self._log, head.seq)
        except FAILURES as err:
            _LOGGER.warning("vm=%s sends everything: the log is damaged: %s", self._log.vm, err)
            return None
