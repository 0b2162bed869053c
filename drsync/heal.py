"""Sends again what the newest point has lost and the live disk still has.

    newest point N ─────────────────────── its bitmaps record ────────────────────────▶ capture N+1
       │ lost: these blocks                    │ read live, into packs                    │ an ordinary increment
       ▼                                       ▼                                          ▼
    point N+1:  N, laid over by the packs that were read, laid over by the increment

A block that was not written since point N reads live as N had it; any other is in the bitmaps of N, so the
increment, which lies over the packs, brings it. So it makes no difference when it is read, nor whether
the bytes are the lost ones: point N+1 is exact. Where they are, older points get them too (copies.py).
docs/decisions/0008-heal.md has what is promised, and what is not.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Final

import msgspec
import numpy as np

from drsync.changes import nonzero_rows, zero_runs
from drsync.damage import MAX_RECORDS, Runs, read_records
from drsync.direct import aligned_buffer
from drsync.encode import Frames, RowsBuilder, store_pack
from drsync.format import names
from drsync.format.segment import PackEntry, position
from drsync.hurt import TOLD_NAME, DamageTold, find_hurt, standing_of, told_of
from drsync.log import Log
from drsync.model import BLOCK_SIZE, Kind, Pace, Progress
from drsync.repository import VmObjects
from drsync.ship import ShipLimits
from drsync.source import DiskSurvey, LiveReader, Source
from drsync.spool import VmSpool

_LOGGER = logging.getLogger(__name__)
_NOTE: Final = "heal.json"
LOOK_EVERY_S: Final = 3600.0
"""How often records are looked for that another host, or a person, may have written; one's own are known at once."""


class HealNote(msgspec.Struct, frozen=True, kw_only=True):
    """heal.json: what this host has looked at. Losing it costs a look."""

    looked_at: str
    settled: list[str]
    """Names of the damage records that the newest point is known not to be hurt by."""
    waits: bool = False
    """There is something to heal that could not be: it is tried again when it is time to look again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealPlan:
    """What the next point has to bring beside what changed."""

    blocks: Mapping[str, Runs]
    """Lost blocks of the newest point, by disk."""
    broken: bool
    """The newest point can't be read at all: its log is not whole. Every disk has to be sent whole."""
    records: Sequence[str]

    @property
    def block_count(self) -> int:
        return sum(count for runs in self.blocks.values() for _, count in runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Healed:
    """Packs with what was read live: the next point lists them below its own blocks."""

    packs: Sequence[PackEntry]
    blocks: int
    records: Sequence[str]

    @property
    def told(self) -> Mapping[str, object]:
        """What the point's definition says of it."""
        return {"blocks": self.blocks, "records": list(self.records)}


class Healer:
    """What one host knows of the damage to one VM's newest point."""

    def __init__(self, log: Log, spool: VmSpool) -> None:
        self._log = log
        self._spool = spool

    def plan(self, newest: int, now: datetime) -> HealPlan | None:
        """What of point `newest` is to be sent again; None if nothing is known to be.

        A listing an hour, as long as nothing is damaged.

        Raises:
            StoreError: it could not be found out.
        """
        note = self._spool.noted(_NOTE, HealNote)
        if note is not None and not self._is_time(note, now):
            return None
        records_there = self._log.objects.store.list(names.damage_prefix(self._log.vm))
        listed = [info.key for info in islice(records_there, MAX_RECORDS)]
        new = set(listed).difference(note.settled if note is not None else ())
        is_told = self._is_told()
        if not new and not is_told:
            self._settle(listed, now)
            return None
        records = [r for r in read_records(self._log.objects) if is_told or r.name in new]
        hurt = find_hurt(standing_of(self._log), [r.damaged for r in records], [newest], copies=False)
        if not hurt:
            self._settle(listed, now)
            return None
        runs = {disk.name: disk.runs for disk in hurt[0].disks}
        return HealPlan(blocks=runs, broken=hurt[0].broken is not None, records=[r.name for r in records])

    def put_off(self, now: datetime) -> None:
        """What was planned can't be done: look again in a while, not with every cycle."""
        note = self._spool.noted(_NOTE, HealNote) or HealNote(looked_at="", settled=[])
        self._spool.note(_NOTE, msgspec.structs.replace(note, looked_at=now.isoformat(), waits=True))

    def _is_time(self, note: HealNote, now: datetime) -> bool:
        if self._is_told() and not note.waits:
            return True
        since_s = (now - datetime.fromisoformat(note.looked_at)).total_seconds()
        return not 0 <= since_s < LOOK_EVERY_S

    def _is_told(self) -> bool:
        """Whether somebody on this host has found the newest point to be hurt."""
        told = self._spool.noted(TOLD_NAME, DamageTold)
        return told is not None and told.newest_is_hurt

    def _settle(self, records: Sequence[str], now: datetime) -> None:
        self._spool.note(_NOTE, HealNote(looked_at=now.isoformat(), settled=list(records)))

    def healed(self, now: datetime) -> DamageTold:
        """Look again at what is damaged, after a point that healed; the result is kept for `status`.

        Raises:
            StoreError: it could not be found out.
        """
        standing = standing_of(self._log)
        told = told_of(standing, find_hurt(standing, [r.damaged for r in read_records(self._log.objects)]), now)
        self._spool.note(TOLD_NAME, told)
        return told


def read_again(
    objects: VmObjects,
    source: Source,
    disks: Sequence[DiskSurvey],
    plan: HealPlan,
    *,
    pace: Pace,
    progress: Progress,
    limits: ShipLimits,
) -> Healed:
    """Read the planned blocks live, and store them in packs.

    `disks` is what `survey` returned just before; all of them are increments.

    Raises:
        LiveUnavailable, LibraryMissing: they can't be read live; nothing was changed.
        SourceError, StoreError: packs may have been stored, which nothing lists.
    """
    wanted = [replace(d, kind=Kind.FULL, reason="it is damaged") for d in disks if plan.blocks.get(d.name)]
    packs: list[PackEntry] = []
    view = source.open_live(None, wanted, pace=pace)
    progress.start("heal", plan.block_count * BLOCK_SIZE)
    try:
        out = aligned_buffer(limits.object_bytes)
        for number, disk in enumerate(disks):
            if plan.blocks.get(disk.name):
                reader = view.reader(disk.name)
                try:
                    sending = _Sending(objects, reader, disk, number, out, progress)
                    packs += [sending.send(piece) for piece in _pieces(plan.blocks[disk.name], limits.object_blocks)]
                finally:
                    reader.close()
    finally:
        view.close()
    _LOGGER.info("vm=%s read %d lost blocks again, packs=%d", objects.vm, plan.block_count, len(packs))
    return Healed(packs=packs, blocks=plan.block_count, records=plan.records)


def _pieces(runs: Runs, most: int) -> Iterator[list[tuple[int, int]]]:
    """The runs in groups of `most` blocks, each of which becomes a pack."""
    piece: list[tuple[int, int]] = []
    room = most
    for start, number in runs:
        first, count = start, number
        while count:
            taken = min(count, room)
            piece.append((first, taken))
            first, count, room = first + taken, count - taken, room - taken
            if not room:
                yield piece
                piece, room = [], most
    if piece:
        yield piece


class _Sending:
    """Lost blocks of one disk on their way into packs."""

    def __init__(
        self,
        objects: VmObjects,
        reader: LiveReader,
        disk: DiskSurvey,
        number: int,
        out: memoryview,
        progress: Progress,
    ) -> None:
        self._objects = objects
        self._reader = reader
        self._disk = disk
        self._number = number
        self._out = out
        self._progress = progress

    def send(self, piece: Sequence[tuple[int, int]]) -> PackEntry:
        frames = Frames(self._objects, self._objects.new_header("pack"), self._out)
        rows = RowsBuilder(self._disk.name, self._disk.size_bytes)
        for first, count in piece:
            self._read(first, count, frames, rows)
        self._reader.settle()  # the line may take its time
        low, high = piece[0][0], sum(piece[-1]) - 1
        return store_pack(
            self._objects,
            frames.header,
            self._out,
            frames.end,
            [rows.rows()],
            first=position(self._number, low),
            last=position(self._number, high),
        )

    def _read(self, first: int, count: int, frames: Frames, rows: RowsBuilder) -> None:
        """Read a run; what holds nothing is told as zeros, since something else lies below it."""
        zeros = self._reader.presence(first, count).zeros.copy()
        for blocks, raw in self._reader.read(np.flatnonzero(~zeros) + first):
            data = nonzero_rows(raw, len(blocks))
            zeros[blocks[~data] - first] = True
            for row in np.flatnonzero(data).tolist():
                rows.seal(int(blocks[row]), raw[row * BLOCK_SIZE : (row + 1) * BLOCK_SIZE], frames)
        starts, counts = zero_runs(zeros, first)
        rows.note_zeros(starts.tolist(), counts.tolist())
        self._progress.advance(count * BLOCK_SIZE)
