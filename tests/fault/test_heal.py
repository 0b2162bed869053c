"""Healing: what the repository has lost of the newest point, the next capture sends again from the live disk."""

import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import pytest
from crashing import Bomb, Crash, Mined
from damaging import flipped
from faulty import Effect, Fault, FaultyStore
from forwarding_source import ForwardingSource
from protected_vm import KIB, VM, Contents, MemoryTarget, ProtectedVm
from shipped_vm import SMALL

from drsync.capture import Result
from drsync.damage import record
from drsync.errors import LiveUnavailable, ObjectDamaged, StoreUnavailable
from drsync.format import names, seal
from drsync.hurt import TOLD_NAME, DamageTold, standing_of, told_of
from drsync.image import PointImage
from drsync.log import Log
from drsync.mapped import listed_maps, load_mapped_image
from drsync.model import BLOCK_SIZE, Kind, NoProgress, Pace
from drsync.restore import restore_disk
from drsync.seed import SeedOptions
from drsync.source import Base, DiskSurvey, LiveView, Source
from drsync.spool import VmSpool
from drsync.store import ObjectStore
from drsync.store.memory import MemoryStore
from drsync.verify import verify

OPTIONS: Final = SeedOptions(limits=SMALL)
"""Packs of three blocks."""
STREAMED: Final = SeedOptions(limits=SMALL, stream_above_bytes=0)


@pytest.fixture
def lab(tmp_path: Path) -> ProtectedVm:
    return begun(ProtectedVm(tmp_path))


def begun(lab: ProtectedVm) -> ProtectedVm:
    """Two points: the first in several packs, the second overwrites some of its blocks."""
    lab.cycle(seed=OPTIONS)
    lab.write()
    lab.cycle(seed=OPTIONS)
    return lab


def packs(lab: ProtectedVm, seq: int) -> list[str]:
    segment = lab.log().read(seq)
    return [names.pack(VM, segment.packs.ids[n].tobytes()) for n in range(len(segment.packs))]


def change(lab: ProtectedVm, name: str, how: Callable[[bytes], bytes]) -> None:
    lab.store.replace(name, how(lab.store.get(name, limit_bytes=2**30)))


def lose(lab: ProtectedVm, name: str) -> None:
    assert isinstance(lab.store, MemoryStore)
    del lab.store._objects[name]


def found(lab: ProtectedVm) -> list[int]:
    """Somebody on this host verifies, and records what is damaged; the points that are hurt."""
    log = lab.log()
    report = verify(log, committed_seq=0, read_data=True, progress=NoProgress())
    for damaged in report.damaged:
        record(log, [damaged], lab.clock.now())
    lab.spool().vm(VM).note(TOLD_NAME, told_of(standing_of(log), report.hurt, lab.clock.now()))
    return [point.point for point in report.hurt]


def contents(log: Log, image: PointImage) -> Contents:
    targets = {disk.name: MemoryTarget(disk.size_bytes) for disk in image.point.disks}
    for name, target in targets.items():
        restore_disk(log.objects, image, name, target, NoProgress())
    return {name: target.content for name, target in targets.items()}


def check_exact(lab: ProtectedVm, number: int) -> None:
    log = lab.log()
    image = load_mapped_image(log, number)
    assert image.seq == number
    assert contents(log, image) == lab.seen[image.point.capture]


def healed(lab: ProtectedVm, number: int) -> object:
    point = lab.log().read(number).meta.point
    assert point is not None
    return point.definition.get("healed")


def test_the_next_capture_of_an_idle_vm_heals_and_older_points_with_it(lab: ProtectedVm) -> None:
    for name in packs(lab, 1):
        change(lab, name, lambda data: flipped(data, 20))
    assert found(lab) == [1, 2]
    outcome = lab.cycle(seed=OPTIONS)
    assert outcome.result is Result.COMMITTED
    told = healed(lab, 3)
    assert isinstance(told, dict)
    assert told["blocks"] >= 2
    assert set(told["records"]) == {info.key for info in lab.store.list(names.damage_prefix(VM))}
    assert lab.seen[lab.log().read(3).meta.point.capture] == lab.contents()  # type: ignore[union-attr]
    for number in (2, 3):
        check_exact(lab, number)
    kept = lab.spool().vm(VM).noted(TOLD_NAME, DamageTold)
    assert kept is not None
    assert not kept.newest_is_hurt
    assert lab.cycle(seed=OPTIONS).result is Result.UNCHANGED  # and that was that
    assert healed(lab, 3) is not None


def test_a_lost_pack_is_healed_though_nobody_knows_which_blocks_it_held(lab: ProtectedVm) -> None:
    for name in packs(lab, 1):
        lose(lab, name)
    assert found(lab) == [1, 2]
    lab.write()
    lab.cycle(seed=OPTIONS)
    check_exact(lab, 3)
    assert found(lab) == [1, 2]  # the hashes of what they held are lost with the packs


class Writing:
    """A Pace at which the guest writes before each piece that is read."""

    def __init__(self, lab: ProtectedVm) -> None:
        self._lab = lab
        self.pieces = 0

    def take(self, size_bytes: int) -> None:
        self.pieces += 1
        self._lab.write()
        self._lab.vm.disks["root"].write(5 * BLOCK_SIZE + 7, bytes([self.pieces + 100]) * 999)

    def take_now(self, size_bytes: int) -> bool:
        return False

    def limit_bytes_per_s(self) -> float | None:
        return None


def test_what_the_guest_writes_while_it_is_read_is_in_the_point(lab: ProtectedVm) -> None:
    for name in packs(lab, 1):
        lose(lab, name)
    found(lab)
    writing = Writing(lab)
    lab.cycle(seed=SeedOptions(limits=SMALL, read_pace=writing))
    assert writing.pieces > 1
    assert healed(lab, 3) is not None
    check_exact(lab, 3)


def test_a_lost_segment_makes_the_next_point_whole_by_itself(lab: ProtectedVm) -> None:
    lab.write()
    lab.cycle(seed=OPTIONS)
    lose(lab, names.segment(VM, 2))
    assert found(lab) == [2, 3]
    lab.cycle(seed=OPTIONS)
    point = lab.log().read(4).meta.point
    assert point is not None
    assert {disk.kind for disk in point.disks} == {Kind.FULL}
    assert [seq for _, seq in listed_maps(lab.log().objects)] == [4]
    lab.write()
    lab.cycle(seed=OPTIONS)
    for number in (1, 4, 5):
        check_exact(lab, number)
    assert found(lab) == [2, 3]


def damaged_index(data: bytes) -> bytes:
    return flipped(data, len(data) - seal.FOOTER_BYTES - 40)


@pytest.mark.parametrize("options", [OPTIONS, STREAMED], ids=["spooled", "streamed"])
@pytest.mark.parametrize("newest", [1, 2])
def test_behind_a_newest_segment_that_is_damaged_its_writer_goes_on_with_everything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, newest: int, options: SeedOptions
) -> None:
    lab = ProtectedVm(tmp_path)
    for _ in range(newest):
        lab.write()
        lab.cycle(seed=OPTIONS)
    change(lab, names.segment(VM, newest), damaged_index)
    lab.write()
    with caplog.at_level(logging.WARNING):
        assert lab.cycle(seed=options).result is Result.COMMITTED
    assert any(f"log/{newest:016x} is damaged" in r.getMessage() for r in caplog.records)
    point = lab.log().read(newest + 1).meta.point
    assert point is not None
    assert {disk.kind for disk in point.disks} == {Kind.FULL}
    assert [seq for _, seq in listed_maps(lab.log().objects)] == [newest + 1]
    lab.write()
    lab.cycle(seed=OPTIONS)
    increment = lab.log().read(newest + 2).meta.point
    assert increment is not None
    assert Kind.INCREMENTAL in {disk.kind for disk in increment.disks}
    for number in {1, newest + 1, newest + 2} - {newest}:
        check_exact(lab, number)
    assert found(lab) == [newest]


class AtRemoval:
    """A Bomb that goes off when a capture that was committed is to be removed from the spool."""

    def around(self, name: str, call: Callable[[], Any]) -> Any:
        if name == "VmSpool.remove":
            raise Crash(name)
        return call()


@pytest.mark.parametrize("newest", [1, 3])
def test_a_capture_that_waits_is_not_sent_behind_a_newest_segment_that_is_damaged(tmp_path: Path, newest: int) -> None:
    """It was committed as that segment, or is an increment over it: neither can be told any more."""
    lab = ProtectedVm(tmp_path)
    for _ in range(newest - 1):
        lab.write()
        lab.cycle(seed=OPTIONS)
    lab.write()
    with pytest.raises(Crash):
        lab.cycle(seed=OPTIONS, spool=cast(VmSpool, Mined(lab.spool().vm(VM), cast(Bomb, AtRemoval()))))
    assert lab.spool().vm(VM).waiting() is not None
    change(lab, names.segment(VM, newest), damaged_index)
    lab.cycle(seed=OPTIONS)
    assert lab.log().newest() == newest + 1
    check_exact(lab, newest + 1)


def test_a_newest_segment_that_came_damaged_over_the_line_is_read_again(lab: ProtectedVm) -> None:
    lab.write()
    newest = names.segment(VM, 2)
    at = len(lab.store.get(newest, limit_bytes=2**30)) - seal.FOOTER_BYTES - 40
    with FaultyStore(lab.store, Fault("get_tail", effect=Effect.CORRUPT, key=newest, at=at)) as store:
        lab.cycle(seed=OPTIONS, store=store)
    point = lab.log().read(3).meta.point
    assert point is not None
    assert Kind.FULL not in {disk.kind for disk in point.disks}


def test_behind_somebody_elses_damaged_segment_nobody_goes_on(lab: ProtectedVm) -> None:
    lab.cycle(host="bravo", take_over=True, seed=OPTIONS)
    change(lab, names.segment(VM, lab.log().newest()), damaged_index)
    before = lab.log().newest()
    with pytest.raises(ObjectDamaged):
        lab.cycle(seed=OPTIONS, take_over=True)
    assert lab.log().newest() == before


def test_a_resync_over_a_damaged_log_sends_everything(lab: ProtectedVm) -> None:
    lose(lab, packs(lab, 1)[0])
    lab.vm.crash()
    lab.write()
    lab.cycle(seed=OPTIONS)
    point = lab.log().read(3).meta.point
    assert point is not None
    assert Kind.FULL in {disk.kind for disk in point.disks}
    check_exact(lab, 3)


class NotLive(ForwardingSource):
    def open_live(self, base: Base | None, disks: Sequence[DiskSurvey], *, pace: Pace) -> LiveView:
        raise LiveUnavailable(vm=VM, problem="its NBD server is somebody else's")


def test_a_vm_that_cant_be_read_live_is_captured_all_the_same(
    lab: ProtectedVm, caplog: pytest.LogCaptureFixture
) -> None:
    for name in packs(lab, 1):
        lose(lab, name)
    found(lab)
    lab.write()
    with caplog.at_level(logging.WARNING):
        lab.cycle(seed=OPTIONS, open_source=lambda: NotLive(lab.source()))
    assert any("remedy: drsync capture web --full" in r.getMessage() for r in caplog.records)
    assert healed(lab, 3) is None
    assert 3 in found(lab)
    lab.write()
    lab.cycle(seed=OPTIONS, full=True)
    check_exact(lab, 4)


def test_a_store_that_fails_while_it_heals_costs_a_cycle(lab: ProtectedVm) -> None:
    for name in packs(lab, 1):
        lose(lab, name)
    found(lab)
    for key in (names.damage_prefix(VM), names.pack_prefix(VM), names.log_prefix(VM)):
        method = "list" if key == names.damage_prefix(VM) else "create"
        fault = Fault("list", key=key) if method == "list" else Fault("create", key=key)
        with FaultyStore(lab.store, fault) as faulty, pytest.raises(StoreUnavailable):
            lab.cycle(store=faulty, seed=OPTIONS)
    lab.cycle(seed=OPTIONS)
    lab.cycle(seed=OPTIONS)
    newest = lab.log().newest()
    check_exact(lab, newest)
    assert newest not in found(lab)


def test_a_healthy_vm_costs_a_listing_an_hour(lab: ProtectedVm) -> None:
    key = names.damage_prefix(VM)
    lab.cycle()
    for _ in range(20):
        lab.write()
        counting = FaultyStore(lab.store, Fault("list", key=key))
        lab.cycle(store=counting)
        assert counting.not_fired


def mined_source(lab: ProtectedVm, bomb: Bomb) -> Source:
    return cast(Source, Mined(lab.source(), bomb))


class MinedWrites(Mined):
    """A store before whose writes alone the bomb may go off: what is read leaves nothing behind."""

    def __getattr__(self, name: str) -> Any:
        return (
            getattr(self._inner, name)
            if name in {"get", "get_tail", "get_range", "list"}
            else super().__getattr__(name)
        )


def test_a_crash_at_any_step_of_healing_leaves_it_to_the_next_cycle(tmp_path: Path) -> None:
    steps: set[str] = set()
    for step in itertools.count(1):  # before each: that is after the one before it
        lab = begun(ProtectedVm(tmp_path / str(step), root_bytes=384 * KIB))
        for name in packs(lab, 1):
            lose(lab, name)
        found(lab)
        bomb = Bomb(step, "before")
        with suppress(Crash):
            lab.cycle(
                store=cast(ObjectStore, MinedWrites(lab.store, bomb)),
                spool=cast(VmSpool, Mined(lab.spool().vm(VM), bomb)),
                open_source=partial(mined_source, lab, bomb),
                seed=OPTIONS,
            )
        if not bomb.fired_at:
            assert steps >= {"Witness.open_live", "MemoryStore.create", "Witness.capture", "VmSpool.complete"}
            return
        steps.add(bomb.fired_at)
        if step % 2:
            lab.write()
        for _ in range(2):
            lab.cycle(seed=OPTIONS)
        newest = lab.points()[-1]
        assert lab.seen[newest.capture] == lab.contents()
        check_exact(lab, newest.number)
        assert newest.number not in found(lab)
