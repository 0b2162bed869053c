"""A shipped VM that is pruned, and what every point that stays must still restore to."""

import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Final

from fake_clock import FakeClock
from shipped_vm import ShippedVm, reopened, restored, restored_disk

from drsync import catalog
from drsync.image import load_image
from drsync.log import Log
from drsync.mapped import load_mapped_image
from drsync.prune.report import VmPruned
from drsync.prune.run import PruneOptions, prune_vm
from drsync.retention import Pin, Rules
from drsync.store import ObjectStore
from drsync.store.memory import MemoryStore

AT_ONCE: Final = PruneOptions(grace=timedelta(0), orphan_grace=timedelta(days=14))
ONLY_PINNED: Final = Rules(last=1)
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
