"""Faults in a cycle: what each is reported as, what it leaves, and that the next cycle makes a correct point."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from faulty import Effect, Fault, FaultyStore
from protected_vm import KIB, VM, ProtectedVm

from drsync.capture import Result
from drsync.catalog import choose, lag_s
from drsync.errors import (
    CaptureFailed,
    CaptureTimeout,
    DrsyncError,
    Fenced,
    LayerDamaged,
    ObjectDamaged,
    PointLost,
    SourceLost,
    SpoolFull,
    StoreUnavailable,
)
from drsync.format import names
from drsync.model import Kind
from drsync.spooled import VmState
from drsync.store import ObjectStore
from drsync.store.memory import MemoryStore
from drsync.store.retry import RetryingStore

LOG = names.log_prefix(VM)
PACKS = names.pack_prefix(VM)
DAY = timedelta(days=1)


@pytest.fixture
def lab(tmp_path: Path) -> ProtectedVm:
    """A VM with one point and writes since."""
    lab = ProtectedVm(tmp_path)
    lab.cycle()
    lab.write()
    return lab


def state(lab: ProtectedVm, host: str = "alpha") -> VmState:
    return lab.spool(host).vm(VM).state()


def fail_to_ship(lab: ProtectedVm) -> Path:
    """A cycle whose capture can't be shipped; the directory where it waits."""
    with FaultyStore(lab.store, Fault("create", key=LOG)) as faulty, pytest.raises(StoreUnavailable):
        lab.cycle(store=faulty)
    [capture] = lab.spooled()
    return lab.spool().path / VM / capture


def copied(store: ObjectStore, lab: ProtectedVm, *, last_seq: int) -> MemoryStore:
    """A copy of the repository as it was when segment `last_seq` was the newest (packs are never looked for alone)."""
    copy = MemoryStore(lab.clock)
    for info in store.list(""):
        if not info.key.startswith(LOG) or names.seq_of_segment(info.key) <= last_seq:
            body = store.get(info.key, limit_bytes=info.size_bytes)
            copy.create(info.key, body, sha256=hashlib.sha256(body).digest())
    return copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fault of the store, and how it leaves a cycle that was to commit point 2."""

    name: str
    fault: Fault
    captured: bool = True
    committed: bool = False

    def __str__(self) -> str:
        return self.name


CASES = [
    Case(name="down at the start", fault=Fault("list", key=LOG), captured=False),
    Case(name="listing cut", fault=Fault("list", key=LOG, effect=Effect.REPLY_LOST), captured=False),
    Case(name="head unreadable", fault=Fault("get_tail", key=LOG), captured=False),
    Case(name="down before the segment", fault=Fault("create", key=LOG)),
    Case(name="segment's reply lost", fault=Fault("create", key=LOG, effect=Effect.REPLY_LOST), committed=True),
    Case(name="down after the segment", fault=Fault("get_tail", key=LOG, call=2), committed=True),
]


@pytest.mark.parametrize("busy", [False, True], ids=["quiet", "busy"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_store_that_fails_once_costs_no_point(lab: ProtectedVm, case: Case, busy: bool) -> None:
    seen = len(lab.seen)
    with FaultyStore(lab.store, case.fault) as faulty, pytest.raises(StoreUnavailable):
        lab.cycle(store=faulty)
    assert len(lab.seen) - seen == case.captured
    assert len(lab.check_points()) == 1 + case.committed
    assert len(lab.spooled()) == case.captured
    assert "scripted" in state(lab).error
    if busy:
        lab.write()
    outcome = lab.cycle()
    lab.check_settled()
    assert (outcome.shipped_before is not None) == (case.captured and not case.committed)
    assert len(lab.points()) == (3 if busy and case.captured else 2)
    assert {d.kind for p in lab.points()[1:] for d in p.disks} == {Kind.INCREMENTAL}
    assert state(lab).error == ""


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_reply_that_was_changed_on_the_way_fences_nobody(lab: ProtectedVm, call: int) -> None:
    """At any reading of the log: also when a resync's own segment is read back, just after it was committed."""
    lab.vm.crash()
    fault = Fault("get_tail", call=call, key=LOG, effect=Effect.CORRUPT, at=-2)
    with FaultyStore(lab.store, fault) as faulty, suppress(ObjectDamaged, StoreUnavailable):
        lab.cycle(store=faulty)
    assert not state(lab).fenced_by
    lab.cycle()
    lab.check_settled()


@pytest.mark.parametrize("effect", [Effect.REFUSED, Effect.REPLY_LOST])
def test_a_pack_that_can_not_be_stored_costs_no_point(tmp_path: Path, effect: Effect) -> None:
    lab = ProtectedVm(tmp_path, root_bytes=34 * 1024 * KIB)
    with FaultyStore(lab.store, Fault("create", key=PACKS, effect=effect)) as faulty:
        with pytest.raises(StoreUnavailable):
            lab.cycle(store=faulty)
    assert lab.points() == []
    assert lab.cycle().shipped_before is not None
    assert len(lab.seen) == 1
    lab.check_settled()


def test_lost_replies_are_settled_by_the_retries_within_the_cycle(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path, root_bytes=34 * 1024 * KIB)
    faults = [Fault("create", key=key, effect=Effect.REPLY_LOST) for key in (PACKS, LOG)]
    with FaultyStore(lab.store, *faults) as faulty:
        outcome = lab.cycle(store=RetryingStore(faulty, clock=lab.clock, sleep=lambda _: None))
    assert outcome.result is Result.COMMITTED
    lab.check_settled()


def test_while_the_store_is_down_the_layer_waits_and_nothing_more_is_captured(lab: ProtectedVm) -> None:
    fail_to_ship(lab)
    captured = len(lab.seen)
    for fault in (Fault("list", key=LOG), Fault("create", key=LOG), Fault("get_tail", key=LOG)):
        lab.write()
        with FaultyStore(lab.store, fault) as faulty, pytest.raises(StoreUnavailable):
            lab.cycle(store=faulty)
        assert len(lab.seen) == captured
        assert len(lab.spooled()) == 1
    outcome = lab.cycle()
    assert outcome.shipped_before is not None
    assert outcome.shipped_before.seq == 2
    assert outcome.segment is not None
    assert outcome.segment.seq == 3
    assert [p.kind for p in lab.points()[1:]] == [Kind.INCREMENTAL, Kind.INCREMENTAL]
    lab.check_settled()


def test_a_first_capture_waits_too(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    fail_to_ship(lab)
    lab.write()
    assert lab.cycle().shipped_before is not None
    assert len(lab.points()) == 2
    lab.check_settled()


def while_copying(lab: ProtectedVm, action: Callable[[], None]) -> list[bool]:
    """Run `action` once in the next capture; the list is filled when it ran."""
    ran: list[bool] = []

    def hook() -> None:
        lab.vm.during_capture = lambda: None
        ran.append(True)
        action()

    lab.vm.during_capture = hook
    return ran


def bravo_cycle(lab: ProtectedVm) -> None:
    lab.cycle("bravo")


def test_a_writer_that_takes_over_during_a_capture_fences_the_first_for_good(lab: ProtectedVm) -> None:
    ran = while_copying(lab, lambda: bravo_cycle(lab))
    with pytest.raises(Fenced) as caught:
        lab.cycle()
    assert ran
    assert lab.spool("bravo").writer_id() in str(caught.value)
    assert state(lab).fenced_by == lab.spool("bravo").writer_id()
    assert [p.epoch for p in lab.check_points()] == [1, 2]
    for _ in range(2):
        lab.write()
        captured, bitmaps = len(lab.seen), lab.bitmaps()
        with pytest.raises(Fenced):
            lab.cycle()
        assert (len(lab.seen), lab.bitmaps()) == (captured, bitmaps)
    lab.cycle("bravo")
    lab.check_settled("bravo")
    lab.write()
    lab.cycle(take_over=True)
    assert lab.check_settled().epoch == 3
    assert state(lab).fenced_by == ""
    with pytest.raises(Fenced):
        lab.cycle("bravo")


def test_of_two_daemons_one_is_fenced_and_every_point_is_right(lab: ProtectedVm) -> None:
    lab.cycle("bravo")
    for _ in range(2):
        lab.write()
        with pytest.raises(Fenced):
            lab.cycle("alpha")
        lab.cycle("bravo")
    lab.write()
    lab.cycle("alpha", take_over=True)
    lab.write()
    with pytest.raises(Fenced):
        lab.cycle("bravo")
    lab.cycle("alpha")
    lab.check_settled("alpha")
    assert [p.epoch for p in lab.points()] == [1, 2, 2, 2, 3, 3]
    assert {p.kind for p in lab.points()[1:]} == {Kind.INCREMENTAL}


def test_a_layer_that_waits_is_dropped_when_the_log_went_on_without_it(lab: ProtectedVm) -> None:
    fail_to_ship(lab)
    lab.write()
    lab.cycle("bravo")
    with pytest.raises(Fenced):
        lab.cycle()
    assert lab.cycle(take_over=True).shipped_before is None
    lab.check_settled()


def test_a_full_spool_is_told_before_qemu_is_touched(lab: ProtectedVm) -> None:
    captured, bitmaps = len(lab.seen), lab.bitmaps()
    lab.reserve_bytes = 2**60
    with pytest.raises(SpoolFull):
        lab.cycle()
    assert (len(lab.seen), lab.bitmaps(), lab.spooled()) == (captured, bitmaps, [])
    assert "beside the reserve" in state(lab).error
    lab.reserve_bytes = 0
    lab.cycle()
    assert lab.check_settled().kind is Kind.INCREMENTAL


def cut(layer: Path) -> None:
    with layer.open("r+b") as file:
        file.truncate(layer.stat().st_size // 2)


def overwrite(layer: Path) -> None:
    layer.write_bytes(b"\xff" * layer.stat().st_size)


@pytest.mark.parametrize("damage", [cut, overwrite, Path.unlink], ids=["cut", "overwritten", "gone"])
def test_a_damaged_layer_is_never_shipped(lab: ProtectedVm, damage: Callable[[Path], None]) -> None:
    damage(fail_to_ship(lab) / "root.qcow2")
    with pytest.raises(LayerDamaged):
        lab.cycle()
    assert lab.spooled() == []
    assert len(lab.check_points()) == 1
    lab.cycle()
    assert lab.check_settled().kind is Kind.INCREMENTAL


def of_an_earlier_boot(record: Path) -> None:
    capture = json.loads(record.read_bytes())
    assert capture["boot_id"]
    record.write_text(json.dumps({**capture, "boot_id": "00000000-0000-0000-0000-000000000000"}))


def of_another_capture(record: Path) -> None:
    record.write_text(json.dumps({**json.loads(record.read_bytes()), "capture": "0123456789abcdef"}))


def garbage(record: Path) -> None:
    record.write_bytes(b"\0" * 100)


@pytest.mark.parametrize("change", [of_an_earlier_boot, of_another_capture, garbage, Path.unlink])
def test_a_layer_whose_record_does_not_vouch_for_it_is_dropped(
    lab: ProtectedVm, change: Callable[[Path], None]
) -> None:
    change(fail_to_ship(lab) / "capture.json")
    assert lab.cycle().shipped_before is None
    assert lab.check_settled().kind is Kind.INCREMENTAL
    assert len(lab.points()) == 2


@pytest.mark.parametrize("change", [garbage, Path.unlink])
def test_a_lost_state_file_costs_nothing(lab: ProtectedVm, change: Callable[[Path], None]) -> None:
    change(lab.spool().path / VM / "state.json")
    lab.cycle()
    assert lab.check_settled().kind is Kind.INCREMENTAL
    assert state(lab).wrote_seq == 2


def test_a_clock_set_back_keeps_the_points_in_order(lab: ProtectedVm) -> None:
    lab.cycle()
    lab.write()
    lab.clock.wall -= DAY
    lab.cycle()
    points = lab.points()
    assert points[2].time < points[0].time
    assert [p.number for p in points] == [1, 2, 3]
    assert choose(VM, points).number == 3
    assert choose(VM, points, at=points[2].time).number == 3
    assert lag_s(points[1].time, points[1].time, lab.clock.now()) == 0.0
    assert 0.0 <= lag_s(points[2].time, points[2].time, lab.clock.now()) < 60.0
    assert lab.cycle().result is Result.UNCHANGED
    lab.check_settled()


def fails(lab: ProtectedVm) -> None:
    raise CaptureFailed(vm=VM, operation="copying", problem="scripted")


def takes_too_long(lab: ProtectedVm) -> None:
    raise TimeoutError


@pytest.mark.parametrize(("fault", "error"), [(fails, CaptureFailed), (takes_too_long, CaptureTimeout)])
def test_a_failed_capture_leaves_bitmaps_and_spool_as_they_were(
    lab: ProtectedVm, fault: Callable[[ProtectedVm], None], error: type[DrsyncError]
) -> None:
    bitmaps = lab.bitmaps()
    ran = while_copying(lab, lambda: fault(lab))
    with pytest.raises(error) as caught:
        lab.cycle()
    assert ran
    assert (lab.bitmaps(), lab.spooled()) == (bitmaps, [])
    assert state(lab).error == str(caught.value)
    lab.write()
    lab.cycle()
    assert lab.check_settled().kind is Kind.INCREMENTAL


def test_a_vm_that_dies_during_a_capture_is_read_again_as_a_whole(lab: ProtectedVm) -> None:
    ran = while_copying(lab, lab.vm.crash)
    with pytest.raises(SourceLost):
        lab.cycle()
    assert ran
    assert lab.spooled() == []
    lab.cycle()
    assert lab.check_settled().kind is Kind.RESYNC


def test_a_guest_that_writes_during_a_capture_is_captured_as_of_its_instant(lab: ProtectedVm) -> None:
    ran = while_copying(lab, lab.write)
    lab.cycle()
    assert ran
    assert len(lab.check_points()) == 2
    lab.cycle()
    assert lab.check_settled().kind is Kind.INCREMENTAL
    assert len(lab.points()) == 3


def test_a_repository_that_was_rolled_back_is_noticed_and_nothing_is_written(lab: ProtectedVm) -> None:
    lab.cycle()
    lab.write()
    lab.cycle()
    lab.write()
    whole, lab.store = lab.store, copied(lab.store, lab, last_seq=2)
    captured, bitmaps = len(lab.seen), lab.bitmaps()
    for _ in range(2):
        with pytest.raises(PointLost) as caught:
            lab.cycle()
        assert (caught.value.fields["found"], caught.value.fields["expected"]) == (2, 3)
    assert (len(lab.seen), lab.bitmaps()) == (captured, bitmaps)
    assert [p.number for p in lab.check_points()] == [1, 2]
    lab.store = whole
    lab.cycle()
    assert lab.check_settled().kind is Kind.INCREMENTAL
