"""Verify in slices: every object within the time, evenly, going on after restarts, with what is written meanwhile."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from damaging import flipped
from faulty import Effect, Fault, FaultyStore
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_vm import PrunedVm
from shipped_vm import DiskStep, ShippedVm, Step

from drsync.errors import StoreUnavailable
from drsync.format import names
from drsync.log import Log
from drsync.model import BLOCK_SIZE
from drsync.scrub import SHARE, ScrubState, Slice, is_next_due, read_slice, with_credit
from drsync.store import Bytes, ObjectStore
from drsync.store.memory import MemoryStore

DAY_S: Final = 86400.0
WITHIN_S: Final = 30 * DAY_S
BEGAN: Final = datetime(2026, 3, 1, tzinfo=UTC)


class Hands:
    """A Clock that a test moves."""

    def __init__(self) -> None:
        self.at = BEGAN

    def now(self) -> datetime:
        return self.at

    def monotonic_s(self) -> float:
        return (self.at - BEGAN).total_seconds()

    def move(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


class Watched:
    """A store that notes which objects were read as a whole, and when."""

    def __init__(self, inner: ObjectStore, clock: Hands) -> None:
        self._inner = inner
        self._clock = clock
        self.read: dict[str, list[datetime]] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def get(self, key: str, *, limit_bytes: int) -> bytes:
        self.read.setdefault(key, []).append(self._clock.now())
        return self._inner.get(key, limit_bytes=limit_bytes)

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        self._inner.create(key, body, sha256=sha256)


class Host:
    """A host that reads slices of one VM, and may be restarted at any time: only the saved state lives on."""

    def __init__(self, vm: ShippedVm) -> None:
        self.clock = Hands()
        self.vm = vm
        self.watched = Watched(vm.store, self.clock)
        self.saved: ScrubState | None = None

    def log(self, store: object | None = None) -> Log:
        repository = type(self.vm.repository)(store or self.watched, self.vm.repository.record, self.vm.root)  # type: ignore[arg-type]
        return Log(repository.vm(self.vm.vm))

    def slice(self, store: object | None = None, *, stop_after: int | None = None) -> Slice:
        calls = iter(range(10**6))

        def stop() -> bool:
            return stop_after is not None and next(calls) >= stop_after

        return read_slice(self.log(store), self.saved, within_s=WITHIN_S, clock=self.clock, save=self._save, stop=stop)

    def _save(self, state: ScrubState) -> None:
        self.saved = state

    def run(self, seconds: float, every_s: float = 1800.0) -> None:
        for _ in range(int(seconds / every_s)):
            self.clock.move(every_s)
            self.slice()


def step(writes: dict[int, int], blocks: int = 12) -> Step:
    return Step(disks={"root": DiskStep(size_bytes=blocks * BLOCK_SIZE, writes=writes)})


@pytest.fixture
def host(tmp_path: Path) -> Host:
    vm = ShippedVm(tmp_path)
    for number in range(8):
        vm.capture(step({n: 2 * (number + n) + 2 for n in range(12 if number == 0 else 2)}))
    return Host(vm)


def objects(vm: ShippedVm) -> set[str]:
    prefixes = (names.log_prefix(vm.vm), names.pack_prefix(vm.vm))
    return {info.key for prefix in prefixes for info in vm.store.list(prefix)}


def test_every_object_is_read_within_the_time_again_and_again(host: Host) -> None:
    host.run(2.5 * WITHIN_S, every_s=3600.0)
    assert host.watched.read.keys() == objects(host.vm)
    for key, times in host.watched.read.items():
        gaps = [(b - a).total_seconds() for a, b in zip([BEGAN, *times], times, strict=False)]
        assert max(gaps) <= WITHIN_S, key
        assert len(times) <= 2.5 / SHARE + 1


def test_the_reading_is_spread_evenly(host: Host) -> None:
    sizes = [len(host.vm.store.get(key, limit_bytes=2**30)) for key in objects(host.vm)]
    slices = int(SHARE * WITHIN_S / 600)
    read = host.slice().read_bytes
    for number in range(1, slices + 1):
        host.clock.move(600)
        read += host.slice().read_bytes
        assert abs(read - sum(sizes) * number / slices) <= 2 * max(sizes)


def test_objects_that_are_written_meanwhile_are_read_in_the_same_pass(host: Host) -> None:
    host.run(SHARE * WITHIN_S / 2)
    host.vm.capture(step({3: 101, 4: 103, 5: 105, 6: 107}))
    host.run(WITHIN_S / 2)
    assert host.watched.read.keys() == objects(host.vm)


def test_a_log_that_is_pruned_in_the_midst_of_a_pass_is_read_through_and_nothing_of_it_is_damage(
    tmp_path: Path,
) -> None:
    vm = PrunedVm(tmp_path)
    for number in range(8):
        vm.capture(step({n: 2 * (number + n) + 2 for n in range(12 if number == 0 else 2)}))
    host = Host(vm)
    host.run(SHARE * WITHIN_S / 4)
    vm.prune(keep=[3, 6])
    host.run(2 * WITHIN_S, every_s=3600.0)
    needed = {info.key for info in vm.store.list("vm/web/") if info.key.split("/")[2] in {"log", "pack", "merged"}}
    assert host.watched.read.keys() >= needed
    assert list(vm.store.list(names.damage_prefix("web"))) == []
    merged = next(iter(vm.store.list(names.merged_prefix("web")))).key
    vm.store.replace(merged, b"junk")
    host.run(WITHIN_S, every_s=3600.0)
    assert len(list(vm.store.list(names.damage_prefix("web")))) == 1


def test_a_restart_goes_on_where_it_was_and_reads_nothing_twice(host: Host) -> None:
    host.slice()
    for _ in range(int(WITHIN_S / 600)):
        host.clock.move(600)
        host.slice(stop_after=1)  # "restarted" behind every object
        if host.saved is not None and host.saved.ended_at:
            break
    assert all(len(times) == 1 for times in host.watched.read.values())
    assert host.watched.read.keys() == objects(host.vm)


def test_losing_the_state_begins_a_pass_anew(host: Host) -> None:
    host.run(WITHIN_S / 3)
    host.saved = None
    host.run(WITHIN_S)
    assert host.watched.read.keys() == objects(host.vm)


def test_a_store_that_is_down_costs_nothing_but_time(host: Host) -> None:
    host.run(WITHIN_S / 4)
    before = host.saved
    with FaultyStore(host.vm.store, Fault("get")) as faulty, pytest.raises(StoreUnavailable):
        for _ in range(5000):
            host.clock.move(600)
            host.slice(faulty)
    assert before is not None
    assert host.saved is not None
    assert (host.saved.seq, host.saved.pack) == (before.seq, before.pack)
    host.run(WITHIN_S)
    assert host.watched.read.keys() == objects(host.vm)
    assert list(host.vm.store.list(names.damage_prefix("web"))) == []


def test_a_day_off_is_not_made_up_for_at_once(host: Host) -> None:
    host.run(3600)
    assert host.saved is not None
    late = with_credit(host.saved, host.clock.now() + timedelta(days=20), WITHIN_S)
    assert 0 < late.credit_bytes - host.saved.credit_bytes < host.saved.total_bytes / 10


def test_a_clock_that_is_set_back_reads_nothing_and_forgets_nothing(host: Host) -> None:
    host.run(WITHIN_S / 4)
    before = host.saved
    host.clock.move(-40 * DAY_S)
    assert host.slice().read_bytes == 0
    assert before is not None
    assert host.saved is not None
    assert (host.saved.seq, host.saved.pack, host.saved.done_bytes) == (before.seq, before.pack, before.done_bytes)
    host.run(WITHIN_S)
    assert host.watched.read.keys() == objects(host.vm)


def test_a_pass_that_has_ended_waits_for_the_next_one_or_for_a_clock_that_was_set_back() -> None:
    at = BEGAN.isoformat()
    state = ScrubState(began_at=at, looked_at=at, listed_at=at, total_bytes=1, ended_at=at)
    due = [is_next_due(state, BEGAN + timedelta(days=days), WITHIN_S) for days in (0, 20, 22.5, 90, -1)]
    assert due == [False, False, True, True, True]


def test_damage_is_recorded_once_and_the_points_are_named(host: Host) -> None:
    log = host.vm.log
    segment = log.read(1)
    name = names.pack("web", segment.packs.ids[0].tobytes())
    host.vm.store.replace(name, flipped(host.vm.store.get(name, limit_bytes=2**30), 30))
    lost = names.segment("web", 5)
    assert isinstance(host.vm.store, MemoryStore)
    del host.vm.store._objects[lost]
    found: list[Slice] = []
    for _ in range(int(2 * SHARE * WITHIN_S / 3600)):
        host.clock.move(3600)
        done = host.slice()
        if done.found:
            found.append(done)
    assert [[d.name for d in done.found] for done in found] == [[name], [lost], [name], [lost]]
    assert len(list(host.vm.store.list(names.damage_prefix("web")))) == 2
    told = found[-1].assessed
    assert told is not None
    assert told.hurt[0] == 1
    assert told.hurt[-4:] == [5, 6, 7, 8]
    assert told.newest_is_hurt


def test_a_transfer_that_went_wrong_once_is_no_damage(host: Host) -> None:
    with FaultyStore(host.vm.store, Fault("get", effect=Effect.CORRUPT, at=40)) as faulty:
        for _ in range(5000):
            host.clock.move(600)
            assert host.slice(faulty).found == []
            if not faulty.not_fired:
                break


def test_a_slice_in_which_nothing_is_due_asks_for_nothing_and_writes_nothing_down(host: Host) -> None:
    host.run(3600)
    before = host.saved
    assert before is not None
    assert before.credit_bytes < 0
    host.clock.move(60)
    faults = [Fault(method) for method in ("get", "get_range", "get_tail", "list", "create", "replace")]
    counting = FaultyStore(host.vm.store, *faults)
    host.slice(counting)
    assert counting.not_fired == faults
    assert host.saved is before


def test_a_log_without_any_segment_is_read_through(tmp_path: Path) -> None:
    host = Host(ShippedVm(tmp_path))
    host.run(3600)
    assert host.saved is not None
    assert host.saved.ended_at


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(0, 2**50),
    done=st.integers(0, 2**50),
    credit=st.floats(-(2**28), 2**40),
    elapsed_s=st.floats(-1e7, 1e8),
    gap_s=st.floats(-1e6, 1e8),
)
def test_what_is_due_never_falls_and_is_never_more_than_all(
    total: int, done: int, credit: float, elapsed_s: float, gap_s: float
) -> None:
    now = BEGAN + timedelta(seconds=elapsed_s)
    looked = now - timedelta(seconds=gap_s)
    state = ScrubState(
        began_at=BEGAN.isoformat(),
        looked_at=looked.isoformat(),
        listed_at=looked.isoformat(),
        total_bytes=total,
        done_bytes=done,
        credit_bytes=credit,
    )
    due = with_credit(state, now, WITHIN_S).credit_bytes - credit
    assert -1 <= due <= max(total - done - credit, total / 100, 1) + 1
