"""Reads all of a VM's objects again and again, a little at a time, so that damage is found while it can be healed.

    pass ├── segment 1, its packs ── segment 2, its packs ── … ── the newest ──┤ wait ├── segment 1 …
              ▲ cursor: kept in the spool; a restart goes on there
    every minute: credit += what is left of the pass / the time that is left for it; read objects while there is credit

The order is that of the log, so nothing has to be remembered but where it stands: objects that are written
meanwhile come at the end of the pass. If the cursor is lost a pass begins anew: something is read twice.
What is damaged is recorded (damage.py) for whoever can heal it, and the points are told that it hurts (hurt.py).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import msgspec

from drsync.damage import Checked, Damaged, check_pack, check_segment, record
from drsync.errors import ObjectDamaged, ObjectMissing
from drsync.format import names
from drsync.horizon import Horizon, Merged
from drsync.hurt import DamageTold, assess
from drsync.log import FIRST_SEQ, Log, Segment
from drsync.model import Clock
from drsync.units import format_duration, format_size

_LOGGER = logging.getLogger(__name__)

STATE_NAME: Final = "verify.json"
"""The file in a VM's spool that has the cursor."""
SHARE: Final = 0.75
"""Part of the time in which everything is to be read that a pass is planned for: the rest is for a host that was
off, and for logs whose middle was pruned, which brings an object later in its pass than it was in the one before."""
_LONGEST_GAP_S: Final = 6 * 3600.0
"""Time that passed between two slices and counts: after a day off, what is due is spread over what is left."""
_SAVE_EVERY_S: Final = 3600.0
_LEAST_LEFT: Final = 1 / 30
"""Of a pass: one that is late catches up within this, not at once."""
_LIST_EVERY_S: Final = 86400.0
"""So often it is reckoned anew how much there is: logs grow, and are pruned."""
_WHOLE_SEGMENT: Final = -1


class ScrubState(msgspec.Struct, frozen=True, kw_only=True):
    """Where a pass stands."""

    began_at: str
    """RFC 3339."""
    looked_at: str
    """When the last slice was read, or was not due."""
    listed_at: str
    """When `total_bytes` was reckoned."""
    total_bytes: int
    """Stored bytes, so far as that is known."""
    done_bytes: int = 0
    credit_bytes: float = 0.0
    """What may be read now; below zero after a large object."""
    seq: int = FIRST_SEQ
    pack: int = _WHOLE_SEGMENT
    """The next object: this pack of segment `seq`, or the segment itself."""
    ended_at: str = ""
    """When the pass reached the newest object; empty: it has not yet."""
    last_ended_at: str = ""
    """When the pass before did; empty: there was none."""
    frames: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one slice came to."""

    state: ScrubState
    read_bytes: int
    found: Sequence[Damaged]
    assessed: DamageTold | None
    """What all known damage comes to; None if this slice found nothing new."""


def new_pass(log: Log, now: datetime, last_ended_at: str = "") -> ScrubState:
    """The beginning of a pass.

    Raises:
        StoreError: the objects can't be listed.
    """
    at = now.isoformat()
    return ScrubState(
        began_at=at, looked_at=at, listed_at=at, total_bytes=_stored_bytes(log), last_ended_at=last_ended_at
    )


def _stored_bytes(log: Log) -> int:
    prefixes = (names.log_prefix(log.vm), names.pack_prefix(log.vm))
    return sum(info.size_bytes for prefix in prefixes for info in log.objects.store.list(prefix))


def _reckoned(log: Log, state: ScrubState, now: datetime) -> ScrubState:
    """The state with how much there is now, if that was not looked up for a day."""
    if abs((now - datetime.fromisoformat(state.listed_at)).total_seconds()) < _LIST_EVERY_S:
        return state
    return msgspec.structs.replace(state, listed_at=now.isoformat(), total_bytes=_stored_bytes(log))


def with_credit(state: ScrubState, now: datetime, within_s: float) -> ScrubState:
    """The state with what became due since it was looked at. Pure.

    Evenly over what is left of the pass, whatever happened before. If the clock was set back, so is the pass.
    """
    pass_s = within_s * SHARE
    began, looked = datetime.fromisoformat(state.began_at), datetime.fromisoformat(state.looked_at)
    began += min(now - looked, timedelta(0))
    gap_s = min(max(0.0, (now - looked).total_seconds()), _LONGEST_GAP_S)
    left_s = max(pass_s - (now - began).total_seconds() + gap_s, pass_s * _LEAST_LEFT, gap_s)
    left_bytes = state.total_bytes - state.done_bytes - state.credit_bytes
    due = max(left_bytes, state.total_bytes / 100, 1) * gap_s / left_s  # it may be more than was reckoned
    return msgspec.structs.replace(
        state, began_at=began.isoformat(), looked_at=now.isoformat(), credit_bytes=state.credit_bytes + due
    )


def is_next_due(state: ScrubState, now: datetime, within_s: float) -> bool:
    """Whether a pass that has ended is to be followed by the next one: at once if the clock was set back. Pure."""
    since_s = (now - datetime.fromisoformat(state.began_at)).total_seconds()
    return not 0 <= since_s < within_s * SHARE


def read_slice(
    log: Log,
    state: ScrubState | None,
    *,
    within_s: float,
    clock: Clock,
    save: Callable[[ScrubState], None],
    stop: Callable[[], bool] = lambda: False,
) -> Slice:
    """Read what is due of a VM's objects, and record what is damaged.

    `save` is called after every object. With `stop` it ends behind the object that it is at.

    Raises:
        StoreError: reading failed, which says nothing of the objects; the next slice goes on.
    """
    now = clock.now()
    if state is None or (state.ended_at and is_next_due(state, now, within_s)):
        state = new_pass(log, now, state.ended_at if state is not None else "")
        save(state)
    if state.ended_at:
        return Slice(state=state, read_bytes=0, found=[], assessed=None)
    due = with_credit(_reckoned(log, state, now), now, within_s)
    waited_s = abs((now - datetime.fromisoformat(state.looked_at)).total_seconds())
    if due.credit_bytes > 0 or waited_s >= _SAVE_EVERY_S:
        save(due)  # else what became due is reckoned again from the last time: no need to write it down each minute
    return _Reading(log, due, save, clock).run(stop)


class _Reading:
    """One run of `read_slice`."""

    def __init__(self, log: Log, state: ScrubState, save: Callable[[ScrubState], None], clock: Clock) -> None:
        self._log = log
        self._state = state
        self._save = save
        self._clock = clock
        self._segment: Segment | None = None
        self._known_horizon: Horizon | None = None
        self._found: list[Damaged] = []
        self._read_bytes = 0

    def run(self, stop: Callable[[], bool]) -> Slice:
        assessed: DamageTold | None = None
        while self._state.credit_bytes > 0 and not self._state.ended_at and not stop():
            self._read_next()
            self._save(self._state)
        if self._found:
            assessed = assess(self._log, self._clock.now())
        return Slice(state=self._state, read_bytes=self._read_bytes, found=self._found, assessed=assessed)

    def _read_next(self) -> None:
        if self._state.pack != _WHOLE_SEGMENT:
            self._read_pack()
        elif (link := self._next_link()) is None:
            self._end()
        else:
            seq = link.last if isinstance(link, Merged) else link
            checked = check_segment(self._log, link)
            self._take(checked)
            self._segment = checked.segment
            packs = len(checked.segment.packs) if checked.segment is not None else 0
            self._move(*((seq, 0) if packs else (seq + 1, _WHOLE_SEGMENT)))

    @property
    def _horizon(self) -> Horizon:
        """The horizon in force when this slice first asked: a slice in which nothing is due asks for nothing."""
        if self._known_horizon is None:
            self._known_horizon = self._log.horizon()
        return self._known_horizon

    def _next_link(self) -> int | Merged | None:
        """What is to be read next: a segment, what stands for several, or a number that is missing; None: the end."""
        seq = self._state.seq
        if seq <= self._horizon.through:
            return self._horizon.merged_at(seq) or seq
        return seq if next(iter(self._log.listed(after=seq - 1)), None) is not None else None

    def _read_pack(self) -> None:
        seq, number = self._state.seq, self._state.pack
        try:
            segment = self._segment if self._segment is not None and self._segment.seq == seq else self._read_link(seq)
        except (ObjectMissing, ObjectDamaged):  # it was whole a moment ago: look at it as a whole
            self._move(seq, _WHOLE_SEGMENT)
            return
        self._segment = segment
        if number < len(segment.packs):
            self._take(check_pack(self._log.objects, segment, number))
        more = number + 1 < len(segment.packs)
        self._move(*((seq, number + 1) if more else (seq + 1, _WHOLE_SEGMENT)))

    def _read_link(self, seq: int) -> Segment:
        merged = self._horizon.merged_at(seq) if seq <= self._horizon.through else None
        return self._log.read(seq) if merged is None else self._log.read_merged(merged)

    def _move(self, seq: int, pack: int) -> None:
        self._state = msgspec.structs.replace(self._state, seq=seq, pack=pack)

    def _take(self, checked: Checked) -> None:
        """Note what an object came to."""
        self._read_bytes += checked.read_bytes
        self._state = msgspec.structs.replace(
            self._state,
            done_bytes=self._state.done_bytes + checked.read_bytes,
            credit_bytes=self._state.credit_bytes - max(1, checked.read_bytes),
            frames=self._state.frames + checked.frames,
        )
        if checked.damaged is not None and not self._was_pruned(checked.damaged):
            _LOGGER.error("vm=%s point=%d %s", self._log.vm, checked.damaged.seq, checked.damaged.error)
            record(self._log, [checked.damaged], self._clock.now())
            self._found.append(checked.damaged)

    def _was_pruned(self, damaged: Damaged) -> bool:
        """Whether what is missing may have been deleted on purpose since this slice began."""
        if not isinstance(damaged.error, ObjectMissing):
            return False
        before, self._known_horizon = self._horizon, self._log.horizon()
        return before.number != self._known_horizon.number

    def _end(self) -> None:
        now = self._clock.now()
        took_s = (now - datetime.fromisoformat(self._state.began_at)).total_seconds()
        read = format_size(self._state.done_bytes)
        _LOGGER.info("vm=%s verified: %s read in %s", self._log.vm, read, format_duration(max(0.0, took_s)))
        self._state = msgspec.structs.replace(self._state, ended_at=now.isoformat())
