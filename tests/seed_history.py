"""Steps of a history in which a VM is seeded: a guest writes between any two pieces, drsync stops or dies.

For vm_history.Lab, whichever source it has.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from crashing import WHENS, Bomb, Crash, When
from faulty import Effect, Fault, FaultyStore
from hypothesis import strategies as st
from protected_vm import VM
from vm_history import CHANGES, SIZES, Change, Lab, Write

from drsync.capture import Result
from drsync.errors import SourceLost, StoreUnavailable
from drsync.format import names
from drsync.seed import SeedOptions
from drsync.ship import ShipLimits

SMALL: Final = ShipLimits(object_blocks=8, object_zero_runs=8, workers=3)


class Guest:
    """A Pace at which the guest changes its disks: something before every piece that is read."""

    def __init__(self, lab: Lab, changes: Sequence[Change], stop_after: int | None) -> None:
        self._lab = lab
        self._changes = list(changes)
        self._stop_after = stop_after
        self._lock = threading.Lock()
        self.pieces = 0

    def take(self, size_bytes: int) -> None:
        with self._lock:
            self.pieces += 1
            if self._changes:
                self._changes.pop(0).run(self._lab)  # type: ignore[attr-defined]

    def take_now(self, size_bytes: int) -> bool:
        return False

    def limit_bytes_per_s(self) -> float | None:
        return None

    def is_asked_to_stop(self) -> bool:
        return self._stop_after is not None and self.pieces >= self._stop_after


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """A cycle that reads live whatever is not an increment. `stop_after`: it is asked to stop after so many pieces."""

    meanwhile: Sequence[Change]
    stop_after: int | None = None
    full: bool = False
    bomb: tuple[int, When] | None = None
    failing_pack: int | None = None

    def run(self, lab: Lab) -> None:
        guest = Guest(lab, self.meanwhile, self.stop_after)
        seed = SeedOptions(stream_above_bytes=0, read_pace=guest, stop=guest.is_asked_to_stop, limits=SMALL)
        bomb = Bomb(*self.bomb) if self.bomb else None
        store = None
        if self.failing_pack:
            fault = Fault("create", call=self.failing_pack, key=names.pack_prefix(VM), effect=Effect.REPLY_LOST)
            store = FaultyStore(lab.store, fault)
        with suppress(Crash, StoreUnavailable):
            outcome = lab.cycle(seed=seed, full=self.full, bomb=bomb, store=store)
            if outcome.result is not Result.SEEDING and not self.meanwhile:
                assert outcome.segment is not None
                assert outcome.segment.meta.point is not None
                assert lab.seen[outcome.segment.meta.point.capture] == lab.contents()


@dataclass(frozen=True, slots=True, kw_only=True)
class DiesMeanwhile:
    """QEMU loses power while it is read."""

    after: int

    def run(self, lab: Lab) -> None:
        class Killer(Guest):
            def take(inner, size_bytes: int) -> None:
                super().take(size_bytes)
                if inner.pieces == self.after and lab.daemon.running:
                    lab.daemon.kill()

        guest = Killer(lab, [], None)
        seed = SeedOptions(stream_above_bytes=0, read_pace=guest, limits=SMALL)
        with suppress(SourceLost):
            lab.cycle(seed=seed, full=True)
        if not lab.daemon.running:
            lab.daemon.start()
            lab.oracle = {name: bytearray(lab.daemon.read(name)) for name in SIZES}


MEANWHILE: Final = st.lists(CHANGES.filter(lambda c: type(c).__name__ != "Grow"), max_size=8)
SEEDS: Final = st.one_of(
    st.builds(Seed, meanwhile=MEANWHILE, full=st.sampled_from([False, False, True])),
    st.builds(Seed, meanwhile=MEANWHILE, stop_after=st.integers(1, 6)),
    st.builds(Seed, meanwhile=MEANWHILE, bomb=st.tuples(st.integers(1, 45), st.sampled_from(WHENS))),
    st.builds(Seed, meanwhile=MEANWHILE, failing_pack=st.integers(1, 6)),
)
BEGINNING: Final = (
    Write(disk="root", start=0, sectors=6000, pattern=254),
    Write(disk="data", start=300, sectors=3000, pattern=255),
)
