"""Deletes what a horizon took out of use, a grace time after it, when nobody can commit it any more."""

import logging
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from drsync.errors import Fenced, IntegrityError, LogAdvanced, ObjectMissing, StoreDenied
from drsync.format import names
from drsync.horizon import Horizon
from drsync.log import Log
from drsync.mapped import read_map
from drsync.prune.inventory import Inventory
from drsync.repository import VmObjects
from drsync.store import ObjectInfo
from drsync.writer import LogWriter

_LOGGER = logging.getLogger(__name__)
_WORKERS: Final = 8
_SKEW: Final = timedelta(minutes=15)
"""What the times that a store gives to two objects may be apart from the order in which it took them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What was deleted."""

    objects: int = 0
    size_bytes: int = 0
    denied: int = 0
    """Still there: locked, or these credentials may not. Tried again in the next run."""


def garbage_of(found: Inventory, horizon: Horizon, listed: Collection[bytes]) -> list[ObjectInfo]:
    """What is there and was taken out of use by the horizon, but for block maps.

    `listed` are the packs that segments behind the horizon list.
    """
    gone = horizon.retired_ids.difference(listed)
    for object_id in horizon.retired_ids - gone:
        _LOGGER.error("pack %s is retired, and a point lists it: it stays", object_id.hex())
    segments = [
        info for seq, info in found.segments.items() if seq <= horizon.through and horizon.merged_at(seq) is not None
    ]
    packs = [info for object_id, info in found.packs.items() if object_id in gone]
    merged = [info for object_id, info in found.merged.items() if object_id in gone]
    return [*segments, *packs, *merged]


def bar_late_writers(log: Log, found: Inventory, horizon: Horizon) -> None:
    """See that the log went on after the horizon; if it did not, append a segment without a point to it.

    A writer that has slept since before the horizon may still know packs as its own that this retires as orphans.
    It would commit them in the segment behind the head that it knows: which is taken now. Whoever looks for the head
    from now on sees the horizon, too (docs/decisions/0006-prune.md, "A writer that sleeps over its packs").

    Raises:
        StoreError: it could not be appended; nothing may be deleted.
    """
    newest, modified = found.newest, found.horizon_modified
    if newest and modified is not None and found.segments[newest].modified >= modified + _SKEW:
        return
    head = log.read(newest) if newest else None
    writer = LogWriter(log, head.meta.writer if head else "", head, horizon=horizon.number)
    try:
        barrier = writer.advance()
    except (Fenced, LogAdvanced) as err:
        _LOGGER.info("vm=%s went on by itself: %s", log.vm, err)
    else:
        _LOGGER.info("vm=%s has an empty segment %d, so that no older writer goes on", log.vm, barrier.seq)


def stale_maps(objects: VmObjects, found: Inventory, horizon: Horizon) -> list[ObjectInfo]:
    """The block maps that no reader takes any more, and that none leans on that one takes."""
    modified = found.horizon_modified
    if modified is None:
        return []
    needed: set[str] = set()
    for info in found.maps:
        if info.modified < modified:
            continue
        try:
            block_map = read_map(objects, info.key)
        except (IntegrityError, ObjectMissing) as err:
            _LOGGER.warning("vm=%s passed over a block map: %s", objects.vm, err)
            continue
        if block_map.meta.horizon == horizon.number:
            needed |= {info.key, *block_map.named_maps(objects.vm)}
    prefix = names.map_prefix(objects.vm)
    return [i for i in found.maps if i.key not in needed and i.modified < modified and i.key.startswith(prefix)]


def sweep(objects: VmObjects, garbage: Sequence[ObjectInfo]) -> Swept:
    """Delete; what is denied stays for another time.

    Raises:
        StoreError: the store does not work; what was deleted is deleted, the rest comes in the next run.
    """
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="sweep") as workers:
        done = list(workers.map(lambda info: _delete(objects, info), garbage))
    deleted = [info for info, gone in zip(garbage, done, strict=True) if gone]
    return Swept(
        objects=len(deleted), size_bytes=sum(i.size_bytes for i in deleted), denied=len(garbage) - len(deleted)
    )


def _delete(objects: VmObjects, info: ObjectInfo) -> bool:
    try:
        objects.store.delete(info.key)
    except StoreDenied as err:
        _LOGGER.info("vm=%s kept %s for now: %s", objects.vm, info.key, err)
        return False
    return True
