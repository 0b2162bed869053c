"""What the store lists of one VM, checked against what is known: a listing that is cut must delete nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from drsync.errors import ObjectMissing, PruneRefused
from drsync.format import Malformed, names
from drsync.horizon import Horizon, listed_newest
from drsync.repository import VmObjects
from drsync.store import ObjectInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What there is of a VM."""

    segments: Mapping[int, ObjectInfo]
    packs: Mapping[bytes, ObjectInfo]
    merged: Mapping[bytes, ObjectInfo]
    maps: Sequence[ObjectInfo]
    horizon_modified: datetime | None
    """When the store took the newest horizon; None: there is none."""

    @property
    def newest(self) -> int:
        """The newest segment; 0 if there is none."""
        return max(self.segments, default=0)


def take_inventory(objects: VmObjects, horizon: Horizon, *, committed: int) -> Inventory:
    """List a VM's objects; `committed` is a segment that is known to have been committed, or 0.

    Packs are listed before the log: who commits a point meanwhile is seen to list them.

    Raises:
        PruneRefused: it does not fit what is known.
    """
    vm = objects.vm
    packs = listed_packs(objects)
    merged = _by_id(objects, names.merged_prefix(vm))
    maps = list(objects.store.list(names.map_prefix(vm)))
    newest = listed_newest(objects)
    if newest.number != horizon.number:
        raise PruneRefused(vm=vm, problem=f"horizon {newest.number} is the newest, not {horizon.number}")
    found = Inventory(
        segments=_segments(objects), packs=packs, merged=merged, maps=maps, horizon_modified=newest.modified
    )
    _check(objects, found, horizon, committed)
    return found


def listed_packs(objects: VmObjects) -> Mapping[bytes, ObjectInfo]:
    """The packs that the store lists now, by their ids."""
    return _by_id(objects, names.pack_prefix(objects.vm))


def _by_id(objects: VmObjects, prefix: str) -> dict[bytes, ObjectInfo]:
    """Objects by the id at the end of their names; what has none is not drsync's, and is left alone."""
    found: dict[bytes, ObjectInfo] = {}
    for info in objects.store.list(prefix):
        try:
            found[names.object_id_of(info.key)] = info
        except Malformed:
            continue
    return found


def _segments(objects: VmObjects) -> dict[int, ObjectInfo]:
    """The segments; the one behind the last is asked for by name, since a listing that is cut looks complete."""
    found = _listed(objects, 0)
    while True:
        newest = max(found, default=0)
        try:
            objects.store.get_tail(names.segment(objects.vm, newest + 1), 1)
        except ObjectMissing:
            return found
        more = _listed(objects, newest)  # committed since the listing, or left out of it
        if newest + 1 not in more:
            problem = f"segment {newest + 1} is there, and the store does not list it"
            raise PruneRefused(vm=objects.vm, problem=problem)
        found |= more


def _listed(objects: VmObjects, after: int) -> dict[int, ObjectInfo]:
    found: dict[int, ObjectInfo] = {}
    start = names.segment(objects.vm, after) if after else ""
    for info in objects.store.list(names.log_prefix(objects.vm), after=start):
        try:
            found[names.seq_of_segment(info.key)] = info
        except Malformed as err:
            raise PruneRefused(vm=objects.vm, problem=f"{info.key}: {err}") from err
    return found


def _check(objects: VmObjects, found: Inventory, horizon: Horizon, committed: int) -> None:
    vm, newest = objects.vm, found.newest
    if newest < max(committed, horizon.through):
        problem = f"the store lists segments up to {newest}, and {max(committed, horizon.through)} was committed"
        raise PruneRefused(vm=vm, problem=problem)
    for link in horizon.links(1, newest):
        if isinstance(link, int) and link not in found.segments:
            raise PruneRefused(vm=vm, problem=f"the store does not list segment {link}, which must be there")
        if not isinstance(link, int) and link.object_id not in found.merged:
            name = names.merged(vm, link.last, link.object_id)
            raise PruneRefused(vm=vm, problem=f"the store does not list {name}, which must be there")
    missing = [row.tobytes() for row in horizon.index.packs if row.tobytes() not in found.packs]
    if missing:
        problem = f"the store does not list {names.pack(vm, missing[0])}, which must be there"
        raise PruneRefused(vm=vm, problem=problem)
