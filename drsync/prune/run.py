"""Prunes one VM: first deletes what an earlier horizon took out of use, then drops what retention drops.

    inventory ─▶ is the horizon older than the grace time? ─▶ sweep ─▶ decide ─▶ plan ─▶ copy ─▶ horizon ─▶ block map
                   └ no, and something waits for it: that is all for now

Dying between any two steps leaves a repository that reads as before, or as the
new horizon says; the next run goes on (docs/decisions/0006-prune.md).
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final

import numpy as np

from drsync.errors import ChainBroken, DrsyncError, ObjectExists, ObjectMissing, PruneRaced, PruneRefused
from drsync.format import Malformed, names
from drsync.format.columns import Bytes2D
from drsync.format.horizon import (
    HorizonIndex,
    HorizonMeta,
    MergedTable,
    PointTable,
    decode_horizon,
    encode_horizon,
)
from drsync.format.keys import OBJECT_ID_BYTES
from drsync.horizon import Horizon
from drsync.log import Log, Segment
from drsync.mapping import rewrite_map
from drsync.model import NoProgress, Progress
from drsync.packs import read_pack
from drsync.pins import read_pins
from drsync.prune.copying import Replacement, replace_run
from drsync.prune.inventory import Inventory, listed_packs, take_inventory
from drsync.prune.liveness import Placed, lives_of
from drsync.prune.planning import FREE, Prices, Run, plan_runs
from drsync.prune.report import VmPruned
from drsync.prune.sweeping import Swept, bar_late_writers, garbage_of, stale_maps, sweep
from drsync.retention import Aged, Pin, Rules, Verdict, decide
from drsync.store import ObjectInfo
from drsync.window import place

_LOGGER = logging.getLogger(__name__)
_READERS: Final = 8
_AHEAD: Final = 64
"""Packs whose indexes are read and held at a time."""
_LEAST_AGE: Final = timedelta(days=1)
"""Orphans that are younger are left alone, whatever the newest point says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """How a prune is done."""

    grace: timedelta = timedelta(days=1)
    """Between taking out of use and deleting: a restore that began before has this long to end."""
    orphan_grace: timedelta = timedelta(days=14)
    """What no point lists is left alone for so long."""
    prices: Prices = FREE
    copy_below: float = 0.5
    """Objects are copied out of if not more than this part of them is alive: so not more is copied than freed."""
    most_dropped: int = 10_000
    """Points of a VM that one horizon drops, the oldest first: bounds time and memory. The next one goes on."""
    dry_run: bool = False


USUAL: Final = PruneOptions()


@dataclass(frozen=True, slots=True)
class _Known:
    """A segment behind the horizon, as far as prune needs it."""

    seq: int
    is_point: bool
    index_sha256: bytes
    packs: Sequence[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a new horizon is to say."""

    vm: str
    through: int
    verdicts: Sequence[Verdict]
    dropped: Sequence[Verdict]
    runs: Sequence[Run]
    orphans: Sequence[ObjectInfo]
    new: Sequence[_Known] = field(repr=False)

    @property
    def is_empty(self) -> bool:
        return not self.dropped and not self.orphans

    @property
    def survivors(self) -> list[int]:
        return sorted(v.point for v in self.verdicts if v.keep)


def prune_vm(
    log: Log,
    rules: Rules,
    pins: Collection[Pin],
    *,
    committed: int,
    now: datetime,
    options: PruneOptions = USUAL,
    progress: Progress | None = None,
) -> VmPruned:
    """Prune one VM; `now` is the store's time, `committed` a segment that is known to have been committed, or 0.

    Raises:
        PruneRefused: the store lists less than there must be; nothing was deleted.
        PruneRaced: another prune is at it.
        ChainBroken, ObjectDamaged, ObjectMissing: the log is not whole; nothing was deleted.
        StoreError: it did not answer; the next run goes on.
    """
    horizon = log.horizon()
    try:
        return _Prune(log, rules, pins, committed, now, options, progress or NoProgress()).run(horizon)
    except (ObjectMissing, ChainBroken) as err:
        if (number := log.horizon().number) != horizon.number:
            raise PruneRaced(vm=log.vm, number=number) from err
        raise


class _Prune:
    """One run of `prune_vm`."""

    def __init__(
        self,
        log: Log,
        rules: Rules,
        pins: Collection[Pin],
        committed: int,
        now: datetime,
        options: PruneOptions,
        progress: Progress,
    ) -> None:
        self._log = log
        self._objects = log.objects
        self._rules = rules
        self._pins = pins
        self._committed = committed
        self._now = now
        self._options = options
        self._progress = progress

    def run(self, horizon: Horizon) -> VmPruned:
        found = self._inventory(horizon)
        self._check_horizon(horizon)
        new = self._behind(horizon, found)
        garbage = garbage_of(found, horizon, {pack for segment in new for pack in segment.packs})
        if garbage and not self._is_due(found):
            return self._waiting(horizon, found, new, garbage)
        swept = self._sweep(horizon, found, garbage)
        plan = self._plan(horizon, found, new)
        if plan.is_empty or self._options.dry_run:
            return _report(horizon.number, plan, swept, self._options.prices)
        done = self._write(horizon, plan, garbage if swept.denied else [])
        self._map(horizon, plan)
        return self._written(done, plan, swept)

    def _is_due(self, found: Inventory) -> bool:
        """Whether the horizon in force is so old that nobody reads any more what it took out of use."""
        modified, grace = found.horizon_modified, self._options.grace
        return modified is not None and (grace <= timedelta(0) or self._now - modified >= grace)

    def _check_horizon(self, horizon: Horizon) -> None:
        """See that it is one of this log: what it took out of use is about to be deleted (F32, F48)."""
        if horizon.through:
            self._log.survivor(horizon, horizon.through)

    def _inventory(self, horizon: Horizon) -> Inventory:
        return take_inventory(self._objects, horizon, committed=self._committed)

    def _behind(self, horizon: Horizon, found: Inventory) -> list[_Known]:
        """The segments behind the horizon, each checked to follow the one before.

        Raises:
            PruneRefused: a pack that one of them lists is not listed by the store.
        """
        behind = self._log.chain(horizon.through + 1, found.newest, previous=horizon.segment, horizon=horizon)
        known = [_known(segment) for segment in behind]
        missing = {p for segment in known for p in segment.packs if p not in found.packs}
        if missing:  # unless they were committed since the packs were listed
            missing -= listed_packs(self._objects).keys()
        if missing:
            name = names.pack(self._log.vm, min(missing))
            raise PruneRefused(vm=self._log.vm, problem=f"the store does not list {name}, which must be there")
        return known

    # Deleting

    def _sweep(self, horizon: Horizon, found: Inventory, garbage: Sequence[ObjectInfo]) -> Swept:
        """Delete what the horizon took out of use, if it is time; the store is asked anew right before."""
        if not self._is_due(found):
            return Swept()
        maps = stale_maps(self._objects, found, horizon)
        if self._options.dry_run:
            return Swept(objects=len(garbage) + len(maps), size_bytes=sum(i.size_bytes for i in [*garbage, *maps]))
        if not garbage and not maps:
            return Swept()
        if any(info.key.startswith(names.pack_prefix(self._log.vm)) for info in garbage):
            bar_late_writers(self._log, found, horizon)
        again = self._inventory(horizon)
        if not again.segments.keys() >= found.segments.keys():
            raise PruneRefused(vm=self._log.vm, problem="the store lists fewer segments than a moment ago")
        listed = {pack for segment in self._behind(horizon, again) for pack in segment.packs}
        still = {info.key for info in garbage_of(again, horizon, listed)}
        return sweep(self._objects, [*maps, *(info for info in garbage if info.key in still)])

    def _waiting(
        self, horizon: Horizon, found: Inventory, new: Sequence[_Known], garbage: Sequence[ObjectInfo]
    ) -> VmPruned:
        """Nothing more is dropped before that is deleted: so the horizon in force says all that is to be done."""
        modified = found.horizon_modified
        points = len(horizon.survivors) + sum(segment.is_point for segment in new)
        return VmPruned(
            vm=self._log.vm,
            kept=points,
            dropped=[],
            horizon=horizon.number,
            waiting_objects=len(garbage),
            waiting_bytes=sum(info.size_bytes for info in garbage),
            waiting_until=modified + self._options.grace if modified is not None else None,
        )

    # Planning

    def _plan(self, horizon: Horizon, found: Inventory, new: Sequence[_Known]) -> Plan:
        numbers = [*sorted(horizon.survivors), *(segment.seq for segment in new if segment.is_point)]
        points = [Aged(seq, found.segments[seq].modified) for seq in numbers]
        verdicts = _limited(decide(points, self._rules, self._pins, self._now), self._options.most_dropped)
        dropped = [verdict for verdict in verdicts if not verdict.keep]
        return Plan(
            vm=self._log.vm,
            through=max(numbers, default=0),
            verdicts=verdicts,
            dropped=dropped,
            runs=self._runs(horizon, verdicts, new),
            orphans=self._orphans(horizon, found, new),
            new=new,
        )

    def _runs(self, horizon: Horizon, verdicts: Sequence[Verdict], new: Sequence[_Known]) -> list[Run]:
        """What is worth to be taken out, of each interval between two points that stay in which one was dropped."""
        hashes = {segment.seq: segment.index_sha256.hex() for segment in new}
        runs: list[Run] = []
        before, dropped = 0, False
        for verdict in reversed(verdicts):
            if not verdict.keep:
                dropped = True
                continue
            if dropped:
                previous = hashes[before] if before in hashes else _hash_of(horizon, before)
                links = list(self._log.chain(before + 1, verdict.point, previous=previous, horizon=horizon))
                below = self._options.copy_below
                lives = lives_of(links, self._read_packs, copy_below=below)
                runs += plan_runs(lives, self._options.prices, copy_below=below)
            before, dropped = verdict.point, False
        return runs

    def _read_packs(self, link: Segment, numbers: Sequence[int]) -> Iterator[Placed]:
        """The rows of packs of a link; several are read at once, few are held."""
        disks = link.meta.point.disks if link.meta.point is not None else []
        with ThreadPoolExecutor(_READERS, thread_name_prefix="prune") as readers:
            for start in range(0, len(numbers), _AHEAD):
                entries = [link.packs.entry(n) for n in numbers[start : start + _AHEAD]]
                yield from readers.map(lambda entry: place(read_pack(self._objects, entry, disks)), entries)

    def _orphans(self, horizon: Horizon, found: Inventory, new: Sequence[_Known]) -> list[ObjectInfo]:
        """What no link lists, and nobody can list any more (docs/decisions/0006-prune.md, "Deleting").

        What is older than the newest point can't become a point's: a seed or a capture that goes on from an older
        point is given up by its host. What is younger may be a seed's, as long as that still sends.
        """
        listed = {row.tobytes() for row in horizon.index.packs} | {p for segment in new for p in segment.packs}
        known = listed | horizon.retired_ids | {merged.object_id for merged in horizon.merged()}
        unlisted = [i for ids in (found.packs, found.merged) for object_id, i in ids.items() if object_id not in known]
        newest = max((*horizon.survivors, *(segment.seq for segment in new if segment.is_point)), default=0)
        committed = found.segments[newest].modified if newest else None
        sends = any(self._now - info.modified < self._options.orphan_grace for info in unlisted)
        return [
            info
            for info in unlisted
            if self._now - info.modified >= min(_LEAST_AGE, self._options.orphan_grace)
            and (not sends or (committed is not None and info.modified < committed))
        ]

    # Writing

    def _write(self, horizon: Horizon, plan: Plan, left: Sequence[ObjectInfo]) -> list[Replacement]:
        """Copy forward, then create the horizon; what was not deleted yet goes on being retired.

        Raises:
            PruneRaced: somebody else created that horizon; what was copied becomes orphans.
        """
        self._progress.start(f"prune {self._log.vm}", sum(run.copied_bytes for run in plan.runs))
        done = [replace_run(self._log, run, self._progress) for run in plan.runs]
        number = horizon.number + 1
        header = self._objects.new_header("horizon", number)
        index = encode_horizon(_next_index(horizon, plan, done, left, self._now))
        try:
            decode_horizon(index)  # what no reader would take must not be stored
            buffer, sealed = self._objects.seal_alone(header, index)
        except Malformed as err:
            raise PruneRefused(vm=self._log.vm, problem=f"its horizon can't be written: {err}") from err
        self._check_pins(plan)
        name = names.horizon(self._log.vm, number)
        try:
            self._objects.store.create(name, buffer[: sealed.length], sha256=sealed.sha256)
        except ObjectExists as err:
            raise PruneRaced(vm=self._log.vm, number=number) from err
        _LOGGER.info("vm=%s horizon=%d dropped=%d runs=%d", self._log.vm, number, len(plan.dropped), len(done))
        return done

    def _check_pins(self, plan: Plan) -> None:
        """Look, at the last moment, whether a point that goes was pinned since the rules were asked (F42).

        Copying may take hours. `drsync pin` looks the other way: first its record, then whether the point is there.

        Raises:
            PruneRefused: one was; what was copied becomes orphans.
        """
        standing = {pin.point for pin in read_pins(self._objects).for_rules() if not pin.until or pin.until > self._now}
        pinned = sorted(standing & {verdict.point for verdict in plan.dropped})
        if pinned:
            problem = f"point {pinned[0]} was pinned while it worked; the next run keeps it"
            raise PruneRefused(vm=self._log.vm, problem=problem)

    def _map(self, old: Horizon, plan: Plan) -> None:
        """Bring the newest block map under the new horizon. It is a cache: what fails is told, and is no error."""
        if not plan.through:
            return
        try:
            name = rewrite_map(self._log, old, plan.through)
        except (DrsyncError, Malformed) as err:
            _LOGGER.warning("vm=%s has no block map under the new horizon: %s", self._log.vm, err)
        else:
            _LOGGER.info("vm=%s brought its block map under the new horizon: %s", self._log.vm, name or "it had none")

    def _written(self, done: Sequence[Replacement], plan: Plan, swept: Swept) -> VmPruned:
        """The report, after the horizon; without a grace time, all is deleted at once."""
        horizon = self._log.horizon()
        found = self._inventory(horizon)
        behind = {pack for segment in self._behind(horizon, found) for pack in segment.packs}
        garbage = garbage_of(found, horizon, behind)
        at_once = self._options.grace <= timedelta(0)
        more = self._sweep(horizon, found, garbage) if at_once else Swept()
        left = [] if at_once else garbage
        report = _report(horizon.number, plan, swept, self._options.prices)
        return replace(
            report,
            deleted_objects=swept.objects + more.objects,
            deleted_bytes=swept.size_bytes + more.size_bytes,
            denied_objects=swept.denied + more.denied,
            waiting_objects=len(left),
            waiting_bytes=sum(info.size_bytes for info in left),
            waiting_until=found.horizon_modified + self._options.grace if left and found.horizon_modified else None,
            new_objects=1 + len(done) + sum(len(d.packs) for d in done),
        )


def _limited(verdicts: Sequence[Verdict], most: int) -> list[Verdict]:
    """The verdicts (newest first), of which not more than so many drop a point; the others stay for now."""
    beyond = {v.point for v in [v for v in verdicts if not v.keep][:-most]}
    reason = "more points go than one run drops: it stays for the next run"
    return [replace(v, keep=True, reasons=(reason,)) if v.point in beyond else v for v in verdicts]


def _known(segment: Segment) -> _Known:
    packs = [segment.packs.ids[n].tobytes() for n in range(len(segment.packs))]
    return _Known(segment.seq, segment.meta.point is not None, segment.index_sha256, packs)


def _hash_of(horizon: Horizon, seq: int) -> str:
    return horizon.hash_of_point(seq).hex() if seq else ""


def _report(number: int, plan: Plan, swept: Swept, prices: Prices) -> VmPruned:
    return VmPruned(
        vm=plan.vm,
        kept=len(plan.survivors),
        dropped=plan.dropped,
        horizon=number,
        deleted_objects=swept.objects,
        deleted_bytes=swept.size_bytes,
        denied_objects=swept.denied,
        orphans=len(plan.orphans),
        copied_bytes=sum(run.copied_bytes for run in plan.runs),
        new_objects=sum(run.puts for run in plan.runs),
        freed_bytes=sum(run.freed_bytes for run in plan.runs) + sum(info.size_bytes for info in plan.orphans),
        cost_dollars=sum(run.cost(prices) for run in plan.runs),
        saved_dollars_month=sum(run.saved(prices) for run in plan.runs),
    )


def _next_index(
    old: Horizon, plan: Plan, done: Sequence[Replacement], left: Sequence[ObjectInfo], now: datetime
) -> HorizonIndex:
    """What the next horizon says."""
    new_hashes = {segment.seq: segment.index_sha256 for segment in plan.new}
    survivors = plan.survivors
    hashes = [new_hashes[seq] if seq in new_hashes else old.hash_of_point(seq) for seq in survivors]
    replaced = {merged for d in done for merged in (old.merged_at(d.run.first), old.merged_at(d.run.last)) if merged}
    replaced |= {m for d in done for link in d.run.links if (m := old.merged_at(link.link.seq)) is not None}
    merged = sorted([m for m in old.merged() if m not in replaced] + [d.merged for d in done], key=lambda m: m.last)
    gone = {entry.object_id for d in done for entry in d.run.retired}
    in_use = {row.tobytes() for row in old.index.packs} | {p for segment in plan.new for p in segment.packs}
    in_use = (in_use - gone) | {pack for d in done for pack in d.packs}
    retired = gone | {m.object_id for m in replaced} | {names.object_id_of(i.key) for i in plan.orphans}
    retired |= old.retired_ids & {
        names.object_id_of(i.key) for i in left if not i.key.startswith(names.log_prefix(plan.vm))
    }
    meta = HorizonMeta(
        number=old.number + 1,
        previous=old.index_sha256.hex(),
        through=plan.through,
        segment=hashes[-1].hex() if hashes else "",
        time=now.isoformat(),
        points=len(survivors),
        merged=len(merged),
        packs=len(in_use),
        retired=len(retired),
    )
    return HorizonIndex(
        meta=meta,
        points=PointTable(numbers=np.array(survivors, np.uint64), index_sha256=_rows(hashes, 32)),
        merged=MergedTable(
            first=np.array([m.first for m in merged], np.uint64),
            last=np.array([m.last for m in merged], np.uint64),
            ids=_rows([m.object_id for m in merged], OBJECT_ID_BYTES),
            index_sha256=_rows([m.index_sha256 for m in merged], 32),
            segment_sha256=_rows([m.segment_sha256 for m in merged], 32),
        ),
        packs=_rows(sorted(in_use), OBJECT_ID_BYTES),
        retired=_rows(sorted(retired), OBJECT_ID_BYTES),
    )


def _rows(values: Sequence[bytes], width: int) -> Bytes2D:
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, width)
