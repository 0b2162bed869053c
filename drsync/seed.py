"""Seeds a VM: reads its disks live, in rounds, until an ordinary capture can close the seed.

    survey ─▶ bitmaps begin ─▶ read live, store packs ─▶ survey ─▶ little enough? ─▶ Closing
       ▲                                                   │ no: another round, just what was written meanwhile
       └───────────────────────────────────────────────────┘

Nothing of a seed is in the log before the point that closes it; until then its
journal knows all that was sent, and any crash costs at most what was on its way.
docs/decisions/0004-seed.md has the protocol, and why each step is right.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

from drsync.format import names
from drsync.format.segment import DiskMeta, PackEntry, PointMeta, SegmentMeta, pack_table, position
from drsync.image import PointImage
from drsync.journal import Begin, Drop, Journal, Round, RoundDisk, RoundState, Stretch, changed_bytes
from drsync.log import Log, Segment
from drsync.model import CaptureId, Clock, Consistency, Kind, NoPace, Pace, Progress, new_capture_id
from drsync.ship import USUAL as SHIP_USUAL
from drsync.ship import Seeded, ShipLimits
from drsync.source import Base, BaseDisk, DiskSurvey, Source
from drsync.spool import VmSpool
from drsync.store import ObjectStore
from drsync.stream import Stopped, Streaming
from drsync.units import GiB, format_duration, format_size

_LOGGER = logging.getLogger(__name__)
_SHRINKS: Final = 0.8
"""A round that leaves more than this part of what it read for the next one does not bring the end nearer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedOptions:
    """How a VM is seeded."""

    stream_above_bytes: int = 4 * GiB
    """Disks that are to be read whole, and hold more than this together, are read live."""
    read_pace: Pace = field(default_factory=NoPace)
    store: ObjectStore | None = None
    """Where the packs go, if another way than the log's: one with limits of its own."""
    stop: Callable[[], bool] = lambda: False
    """Asked between pieces: True ends the run, to be gone on with another time."""
    limits: ShipLimits = SHIP_USUAL


USUAL: Final = SeedOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """What the capture that closes a seed is relative to."""

    base: Base
    disks: Sequence[DiskSurvey]


def is_to_be_streamed(disks: Sequence[DiskSurvey], spool: VmSpool, options: SeedOptions) -> bool:
    """Whether a capture of `disks` shall be read live instead of being copied into the spool."""
    whole = sum(disk.copy_bytes for disk in disks if disk.kind is not Kind.INCREMENTAL)
    return whole > options.stream_above_bytes or not spool.has_room(sum(disk.copy_bytes for disk in disks))


def open_journal(spool: VmSpool, over: CaptureId | None, *, send_all: bool) -> Journal | None:
    """The journal of the seed that goes on from the point of capture `over`; one of any other seed is removed."""
    journal = Journal.load(spool.journal_path, repair=True)
    if journal is not None and journal.begin.over == over and (journal.begin.send_all or not send_all):
        return journal
    if journal is not None:
        _LOGGER.info("vm=%s gave up a seed: %s", spool.vm, "all was asked for" if send_all else "the log went on")
    spool.remove_journal()
    return None


def begin_journal(spool: VmSpool, over: CaptureId | None, *, send_all: bool, clock: Clock) -> Journal:
    """Begin a seed that goes on from the point of capture `over`.

    Raises:
        SpoolFull: the spool has not even the room to close it.
    """
    spool.check_room(0)
    return Journal.create(spool.journal_path, Begin(over=over, send_all=send_all, time=clock.now().isoformat()))


class Seed:
    """A seed under way."""

    def __init__(
        self,
        journal: Journal,
        log: Log,
        newest: Segment | None,
        spool: VmSpool,
        *,
        clock: Clock,
        progress: Progress,
        options: SeedOptions,
    ) -> None:
        """`newest` is the newest point's segment, which the journal goes on from."""
        self._journal = journal
        self._log = log
        self._newest = newest
        self._spool = spool
        self._clock = clock
        self._progress = progress
        self._options = options

    def run(self, source: Source) -> Closing | None:
        """Go on until the seed can be closed; None if it was asked to stop before.

        Raises:
            LiveUnavailable, LibraryMissing: the disks can't be read live.
            SourceError, StoreError, SpoolError: what was noted stays; another run goes on.
        """
        state = self._resumed(source)
        while True:
            try:
                self._stream(source, state)
            except Stopped:
                return None
            disks = self._survey(source, state)
            lost = self.drop_missing_packs()
            if not lost and self._may_close(state, disks):
                return Closing(base=self._base(state), disks=disks)
            state = self._begin_round(source, self._base(state), _as_whole(disks, lost))

    # Where it stands

    def _resumed(self, source: Source) -> RoundState:
        """The round to go on with: the present one if nothing was lost since, else a new one."""
        state = self._journal.present
        lost = self.drop_missing_packs()
        if state is None:
            return self._begin_round(
                source, self._over(), source.survey(self._over(), full=self._journal.begin.send_all)
            )
        if state.begun.incarnation != source.incarnation():
            return self._begin_round(source, None, self._all_whole(source, "QEMU was restarted during the seed"))
        disks = self._survey(source, state)
        unread = {d.name: "its packs are gone" for d in state.begun.disks if d.name in state.dropped and not d.whole}
        whole = {d.name for d in disks if d.kind is not Kind.INCREMENTAL}
        same = {d.name for d in disks} == {d.name for d in state.begun.disks}
        if same and not whole and not unread and not lost and self._has_base(source, state):
            return state
        unread |= {d.name: "it was not read to its end" for d in state.begun.disks if state.missing(d)}
        return self._begin_round(source, self._base(state), _as_whole(disks, unread | lost))

    def _has_base(self, source: Source, state: RoundState) -> bool:
        """Whether what the round reads of is still there."""
        open_disks = {d.name for d in state.begun.disks if not d.whole and state.missing(d)}
        if not open_disks:
            return True
        base = self._read_of(state)
        if base is None:
            return False
        found = source.survey(base, keep=[*self._kept(), state.begun.capture])
        return all(d.kind is Kind.INCREMENTAL for d in found if d.name in open_disks)

    def _all_whole(self, source: Source, reason: str) -> Sequence[DiskSurvey]:
        disks = source.survey(None, keep=self._kept())
        return _as_whole(disks, {d.name: reason for d in disks})

    def _survey(self, source: Source, state: RoundState) -> Sequence[DiskSurvey]:
        """What was written since the present round began."""
        before = [state.begun.base] if state.begun.base and not state.is_done else []
        return source.survey(self._base(state), keep=[*self._kept(), *before])

    def _kept(self) -> list[CaptureId]:
        """The newest point's bitmaps stay: if the seed is given up, nothing is lost."""
        return [self._journal.begin.over] if self._journal.begin.over is not None else []

    def _over(self) -> Base | None:
        point = self._newest.meta.point if self._newest is not None else None
        if point is None:
            return None
        return _base_of(point.capture, {d.name: d.size_bytes for d in point.disks}, point.definition)

    @staticmethod
    def _base(state: RoundState) -> Base:
        sizes = {d.name: d.size_bytes for d in state.begun.disks}
        return _base_of(state.begun.capture, sizes, state.begun.definition)

    def _read_of(self, state: RoundState) -> Base | None:
        """What a round reads of: an earlier round, or the newest point. None if all of it is read whole."""
        if state.begun.base is None:
            return None
        over = self._over()
        known = [self._base(r) for r in self._journal.rounds] + ([over] if over is not None else [])
        definition = next((b.definition for b in known if b.capture == state.begun.base), {})
        return _base_of(state.begun.base, {d.name: d.size_bytes for d in state.begun.disks}, definition)

    # A round

    def _begin_round(self, source: Source, base: Base | None, disks: Sequence[DiskSurvey]) -> RoundState:
        """Begin to record, then note the round: a crash in between leaves bitmaps that the next survey removes."""
        for disk in disks:
            size_bytes = self._journal.size_bytes(disk.name)
            if size_bytes is not None and size_bytes != disk.size_bytes:
                self._journal.append(Drop(disk=disk.name))
        capture = new_capture_id()
        definition = source.begin_recording(capture, disks)
        self._journal.append(
            Round(
                capture=capture,
                base=base.capture if base is not None else None,
                incarnation=source.incarnation(),
                time=self._clock.now().isoformat(),
                disks=[_round_disk(disk) for disk in disks],
                definition=dict(definition),
            )
        )
        state = self._journal.rounds[-1]
        _LOGGER.info("vm=%s seed round=%d reads=%s", self._log.vm, len(self._journal.rounds), _size(state.total_bytes))
        return state

    def _stream(self, source: Source, state: RoundState) -> None:
        if state.is_done:
            return
        if self._options.stop():
            raise Stopped
        disks = [_survey_of(disk) for disk in state.begun.disks]
        view = source.open_live(self._read_of(state), disks, pace=self._options.read_pace)
        try:
            store = self._options.store
            Streaming(
                self._log.objects if store is None else self._log.objects.through(store),
                self._journal,
                view,
                self._known(state),
                progress=self._progress,
                stop=self._options.stop,
                limits=self._options.limits,
            ).run(state)
        finally:
            view.close()

    def _may_close(self, state: RoundState, disks: Sequence[DiskSurvey]) -> bool:
        """Whether what is left is little enough for a capture; if the rounds don't shrink, any that fits is."""
        if any(disk.kind is not Kind.INCREMENTAL for disk in disks):
            return False
        left_bytes = sum(disk.copy_bytes for disk in disks)
        fits = self._spool.has_room(left_bytes)
        shrinks = left_bytes <= _SHRINKS * max(1, state.read_bytes)
        if not fits and not shrinks:
            self._say_endless(state, left_bytes)
        return fits and (left_bytes <= self._options.stream_above_bytes or not shrinks)

    def _say_endless(self, state: RoundState, left_bytes: int) -> None:
        took_s = max(1.0, (self._clock.now() - datetime.fromisoformat(state.begun.time)).total_seconds())
        message = (
            "vm=%s the seed does not come to an end: in the %s in which round %d read %s, the guest changed %s, "
            "and the spool has no room for that; raise [limits] upload and seed_read, or give the spool more room"
        )
        read, left = format_size(state.read_bytes), format_size(left_bytes)
        _LOGGER.warning(message, self._log.vm, format_duration(took_s), len(self._journal.rounds), read, left)

    # What was sent

    def _known(self, state: RoundState) -> PointImage | None:
        """What the point before and the packs come to; None if no disk of the round has anything to compare with."""
        has = {d.name for d in state.begun.disks if d.whole and (self._journal.packs(d.name) or self._is_below(d.name))}
        if not has:
            return None
        chain = list(self._log.chain(1, self._newest.seq)) if self._newest is not None else []
        return PointImage(self._log.objects, [*chain, self._as_segment(state)])

    def _as_segment(self, state: RoundState) -> Segment:
        """The packs as if they were a point's: never stored, just for reading them."""
        names_ = [d.name for d in state.begun.disks]
        rounds = rounds_of(self._journal, names_)
        kinds = {name: Kind.RESYNC if self._is_below(name) else Kind.FULL for name in names_}
        point = PointMeta(
            capture=state.begun.capture,
            base=None,
            time=state.begun.time,
            consistency=Consistency.CRASH,
            disks=[
                DiskMeta(
                    name=d.name,
                    size_bytes=d.size_bytes,
                    kind=kinds[d.name],
                    reason="",
                    changed_bytes=0,
                    persistent_bitmap=False,
                )
                for d in state.begun.disks
            ],
            definition={},
        )
        entries = [entry for round_ in rounds for entry in round_]
        meta = SegmentMeta(
            seq=self._newest.seq + 1 if self._newest is not None else 1,
            epoch=0,
            writer="",
            previous="",
            point=point,
            packs=len(entries),
            contents=[],
            rounds=[len(round_) for round_ in rounds],
        )
        return Segment.unstored(meta, pack_table(entries))

    def _is_below(self, disk: str) -> bool:
        """Whether the point before has the disk, and counts."""
        point = self._newest.meta.point if self._newest is not None else None
        return point is not None and not self._journal.begin.send_all and disk in {d.name for d in point.disks}

    def seeded(self, disks: Sequence[str]) -> Seeded:
        """What a closing capture of `disks`, in this order, lies over."""
        kinds: dict[str, Kind] = {}
        for name in disks:
            read_whole = self._journal.whole_reason(name) is not None
            kinds[name] = (Kind.RESYNC if read_whole else Kind.INCREMENTAL) if self._is_below(name) else Kind.FULL
        return Seeded(rounds=rounds_of(self._journal, disks), kinds=kinds, changed_bytes=changed_bytes(self._journal))

    def reason(self, disk: str) -> str:
        """Why the disk is not an increment in the seed's point; empty if it is one."""
        return self._journal.whole_reason(disk) or ""

    def drop_missing_packs(self) -> dict[str, str]:
        """See that every pack is in the store; what becomes of each disk that lost one, and why."""
        return drop_missing_packs(self._journal, self._log)


def rounds_of(journal: Journal, disks: Sequence[str]) -> list[list[PackEntry]]:
    """The packs of each round, in the order of a point with these disks; rounds without any are left out."""
    rounds: list[list[PackEntry]] = []
    for state in journal.rounds:
        entries = [
            _entry(stretch, number)
            for number, disk in enumerate(disks)
            for stretch in sorted(state.stretches.get(disk, []), key=lambda s: s.first)
            if stretch.pack is not None
        ]
        if entries:
            rounds.append(entries)
    return rounds


def drop_missing_packs(journal: Journal, log: Log) -> dict[str, str]:
    """See that every pack of a journal is in the store, by one listing; the disks that lost one, and why that is.

    What was read of such a disk does not count any more: it is to be read again.
    """
    disks = sorted({name for state in journal.rounds for name in state.stretches})
    wanted = {name: journal.packs(name) for name in disks}
    if not any(wanted.values()):
        return {}
    prefix = names.pack_prefix(log.vm)
    retired = {names.pack(log.vm, object_id) for object_id in log.horizon().retired_ids}
    listed = log.objects.store.list(prefix)
    sizes = {info.key: info.size_bytes for info in listed if info.key not in retired}  # those are as good as gone
    lost: dict[str, str] = {}
    for name, stretches in wanted.items():
        if not all(_is_there(log.vm, stretch, sizes) for stretch in stretches):
            _LOGGER.warning("vm=%s packs that were sent are gone: disk %s is read again", log.vm, name)
            journal.append(Drop(disk=name))
            lost[name] = "packs of the seed are gone"
    return lost


def _is_there(vm: str, stretch: Stretch, sizes: Mapping[str, int]) -> bool:
    pack = stretch.pack
    return pack is None or sizes.get(names.pack(vm, bytes.fromhex(pack.object_id))) == pack.length


def _base_of(capture: CaptureId, sizes: Mapping[str, int], definition: Mapping[str, object]) -> Base:
    disks = [BaseDisk(name=name, size_bytes=size) for name, size in sizes.items()]
    return Base(capture=capture, disks=disks, definition=definition)


def _as_whole(disks: Sequence[DiskSurvey], reasons: dict[str, str]) -> Sequence[DiskSurvey]:
    """The surveys, those of the disks in `reasons` as fulls; what they hold is then known as the disk's size only."""
    return [
        replace(disk, kind=Kind.FULL, reason=reasons[disk.name], copy_bytes=disk.size_bytes)
        if disk.name in reasons and disk.kind is Kind.INCREMENTAL
        else replace(disk, reason=reasons[disk.name])
        if disk.name in reasons
        else disk
        for disk in disks
    ]


def _round_disk(disk: DiskSurvey) -> RoundDisk:
    return RoundDisk(
        name=disk.name,
        size_bytes=disk.size_bytes,
        whole=disk.kind is not Kind.INCREMENTAL,
        reason=disk.reason,
        copy_bytes=disk.copy_bytes,
        persistent_bitmap=disk.persistent,
    )


def _survey_of(disk: RoundDisk) -> DiskSurvey:
    return DiskSurvey(
        name=disk.name,
        size_bytes=disk.size_bytes,
        kind=Kind.FULL if disk.whole else Kind.INCREMENTAL,
        reason=disk.reason,
        copy_bytes=disk.copy_bytes,
        persistent=disk.persistent_bitmap,
    )


def _entry(stretch: Stretch, number: int) -> PackEntry:
    if stretch.pack is None:
        raise ValueError(stretch)
    return PackEntry(
        object_id=bytes.fromhex(stretch.pack.object_id),
        length=stretch.pack.length,
        index_sha256=bytes.fromhex(stretch.pack.index_sha256),
        first=position(number, stretch.first),
        last=position(number, stretch.end - 1),
    )


def _size(size_bytes: int) -> str:
    return format_size(size_bytes).replace(" ", "")
