"""A shipped VM that is pruned, and what every point that stays must still restore to."""

import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from crashing import Bomb, Crash
from fake_clock import FakeClock
from shipped_vm import ShippedVm, reopened, restored, restored_disk

from drsync import catalog
from drsync.image import load_image
from drsync.log import Log
from drsync.mapped import load_mapped_image
from drsync.prune.report import VmPruned
from drsync.prune.run import PruneOptions, prune_vm
from drsync.repository import open_repository
from drsync.retention import Pin, Rules
from drsync.store import ObjectInfo, ObjectStore
from drsync.store.memory import MemoryStore

AT_ONCE: Final = PruneOptions(grace=timedelta(0), orphan_grace=timedelta(days=14))
ONLY_PINNED: Final = Rules(last=1)
WRITES: Final = frozenset({"create", "replace", "delete"})
SOAK: Final = os.environ.get("DRSYNC_SOAK") == "1"


class PrunedVm(ShippedVm):
    """A ShippedVm with a clock, whose `points` are those that stay."""

    def __init__(self, directory: Path, *, store: ObjectStore | None = None, clock: FakeClock | None = None) -> None:
        self.clock = clock or FakeClock()
        super().__init__(directory, store=store or MemoryStore(self.clock))

    def prune(
        self, keep: Iterable[int] = (), *, options: PruneOptions = AT_ONCE, store: ObjectStore | None = None
    ) -> VmPruned:
        """Prune all points but `keep` and the newest."""
        log = self.log if store is None else reopened(self, store)
        pins = [Pin(point, None) for point in keep]
        done = prune_vm(log, ONLY_PINNED, pins, committed=0, now=self.clock.now(), options=options)
        if not options.dry_run:
            self.forget({v.point for v in done.dropped})
        return done

    def prune_knowing(self, committed: int) -> VmPruned:
        """Prune all points but the newest, if the log has segment `committed`."""
        return prune_vm(self.log, ONLY_PINNED, [], committed=committed, now=self.clock.now(), options=AT_ONCE)

    def forget(self, dropped: set[int]) -> None:
        self.points = {number: disks for number, disks in self.points.items() if number not in dropped}

    def check(self, *, log: Log | None = None) -> None:
        """Every point that stays restores to what it was, with and without block maps; and there are no others."""
        log = log or Log(self.repository.vm(self.vm))
        assert [point.number for point in catalog.points(log)] == sorted(self.points)
        for number, disks in self.points.items():
            assert restored(log, number) == disks, f"point {number}"
            image = load_mapped_image(log, number)
            by_map = {disk.name: restored_disk(image, log, disk.name) for disk in image.point.disks}
            assert by_map == disks, f"point {number}, by its maps"
            check_hashes(log, number)


def check_hashes(log: Log, number: int) -> None:
    """A resync compares with these: they must be those of the blocks that are there."""
    image = load_image(log, number)
    assert image.has_hashes
    for disk in image.point.disks:
        for window in image.windows(disk.name):
            held = window.containers >= 0
            assert window.hashes[held].any(axis=1).all()


class DyingStore:
    """A store whose process dies before or after a write; from then on nothing reaches it."""

    def __init__(self, inner: ObjectStore, bomb: Bomb) -> None:
        self._inner = inner
        self._bomb = bomb

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: object, **options: object) -> object:
            if name in WRITES:
                return self._bomb.around(f"{name} {args[0]}", lambda: found(*args, **options))
            if self._bomb.fired_at:
                raise Crash(name)
            return found(*args, **options)

        return call


class InterruptedStore:
    """A store before whose `at`-th call something else happens, once; `only` calls that begin so are counted."""

    def __init__(self, inner: ObjectStore, at: int, action: Callable[[], object], *, only: str = "") -> None:
        self._inner = inner
        self._at = at
        self._action = action
        self._only = only
        self._lock = threading.Lock()
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: object, **options: object) -> object:
            with self._lock:
                counts = " ".join([name, *map(str, args[:1])]).startswith(self._only)
                self.calls += counts
                due = counts and self.calls == self._at
            if due:
                self._action()
            return found(*args, **options)

        return call


class HidingStore:
    """A store that has an object and leaves it out of its listings."""

    def __init__(self, inner: ObjectStore, key: str) -> None:
        self._inner = inner
        self._key = key

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        return (info for info in self._inner.list(prefix, after=after) if info.key != self._key)


def snapshot(store: ObjectStore) -> dict[str, Any]:
    """What a store in memory holds, with its times."""
    assert isinstance(store, MemoryStore)
    return dict(vars(store)["_objects"])


def twin(vm: PrunedVm, objects: dict[str, Any]) -> PrunedVm:
    """Another VM of the same history, in a store of its own that holds these objects."""
    made = copy.copy(vm)
    made.clock = copy.copy(vm.clock)
    made.store = MemoryStore(made.clock)
    vars(made.store)["_objects"].update(objects)
    made.repository = open_repository(made.store, vm.root, "key")
    made.log = Log(made.repository.vm(vm.vm))
    made.points, made.disks, made.captures = dict(vm.points), {n: d.copy() for n, d in vm.disks.items()}, [*vm.captures]
    return made
