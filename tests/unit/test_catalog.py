"""Points, which one is meant, and how far behind the newest one is."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shipped_vm import DiskStep, ShippedVm, Step

from drsync.catalog import (
    GroupTold,
    Point,
    QuiesceTold,
    State,
    choose,
    group_points,
    lag_s,
    parse_time,
    point_of,
    points,
    points_of,
    state_of,
)
from drsync.errors import ChainBroken, UnknownPoint
from drsync.model import BLOCK_SIZE, CaptureId, Consistency, Kind
from drsync.writer import open_writer

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
BEGINNING = datetime.min.replace(tzinfo=UTC)


def point(number: int, time: datetime) -> Point:
    return Point(
        vm="web",
        number=number,
        time=time,
        kind=Kind.INCREMENTAL,
        consistency=Consistency.CRASH,
        disks=(),
        changed_bytes=0,
        stored_bytes=0,
        capture=CaptureId("0" * 16),
        parent=None,
        reason="",
        epoch=1,
    )


def step(*, whole: bool = False, compare: bool = True, **disks: dict[int, int]) -> Step:
    return Step(
        disks={name: DiskStep(size_bytes=4 * BLOCK_SIZE, writes=w, whole=whole) for name, w in disks.items()},
        compare=compare,
    )


@pytest.fixture
def vm(tmp_path: Path) -> ShippedVm:
    return ShippedVm(tmp_path)


def test_points_say_what_they_are_relative_to_and_why(vm: ShippedVm) -> None:
    vm.run(
        [step(root={0: 1}), step(root={1: 3}), step(root={2: 5}, whole=True), step(root={}, whole=True, compare=False)]
    )
    found = points(vm.log)
    assert [(p.number, p.kind, p.parent) for p in found] == [
        (1, Kind.FULL, None),
        (2, Kind.INCREMENTAL, 1),
        (3, Kind.RESYNC, 2),
        (4, Kind.FULL, None),
    ]
    assert [p.reason for p in found] == ["bitmap is missing", "", "bitmap is missing", "bitmap is missing"]
    assert [p.changed_bytes for p in found] == [BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE, 3 * BLOCK_SIZE]
    assert [p.capture for p in found] == vm.captures
    assert found[0].time == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_a_point_of_which_one_disk_is_full_needs_the_one_before(vm: ShippedVm) -> None:
    vm.run([step(root={0: 1}), step(root={1: 3}, data={0: 1})])
    newest = points(vm.log)[-1]
    assert (newest.kind, newest.parent) == (Kind.FULL, 1)
    assert newest.reason == "data: bitmap is missing"


def test_a_fence_is_no_point_and_no_parent(vm: ShippedVm) -> None:
    vm.capture(step(root={0: 1}))
    open_writer(vm.log, "another")
    assert [p.number for p in points(vm.log)] == [1]
    vm.writer_id = "another"
    vm.capture(step(root={1: 1}))
    found = points(vm.log)
    assert [(p.number, p.parent, p.epoch) for p in found] == [(1, None, 1), (3, 1, 2)]


def test_a_vm_without_a_log_has_no_points(vm: ShippedVm) -> None:
    assert points(vm.log) == []
    assert points_of([]) == []


def test_points_of_a_log_that_is_not_whole_are_not_listed(vm: ShippedVm) -> None:
    vm.run([step(root={n: 1}) for n in range(2)])
    vm.store.replace("vm/web/log/0000000000000004", b"")
    with pytest.raises(ChainBroken):
        points(vm.log)


KNOWN = [point(1, NOON), point(2, NOON + timedelta(hours=1)), point(4, NOON - timedelta(hours=1))]
"""Point 4 was taken after somebody had set the clock back."""


@pytest.mark.parametrize(
    ("number", "at", "expected"),
    [
        (None, None, 4),
        (2, None, 2),
        (None, NOON, 4),
        (None, NOON - timedelta(minutes=30), 4),
        (None, NOON + timedelta(days=1), 4),
        (2, NOON + timedelta(hours=1), 2),
    ],
)
def test_the_point_that_is_meant(number: int | None, at: datetime | None, expected: int) -> None:
    assert choose("web", KNOWN, number=number, at=at).number == expected


@pytest.mark.parametrize(
    ("number", "at", "wanted"),
    [(3, None, "3"), (0, None, "0"), (5, None, "5"), (None, NOON - timedelta(days=1), "at or before"), (2, NOON, "2")],
)
def test_f16_no_other_point_is_taken_instead(number: int | None, at: datetime | None, wanted: str) -> None:
    with pytest.raises(UnknownPoint) as caught:
        choose("web", KNOWN, number=number, at=at)
    assert f"no point {wanted}" in str(caught.value)
    assert "1 (2026-01-02 12:00:00Z) to 4 (2026-01-02 11:00:00Z)" in str(caught.value)
    assert caught.value.remedy == "drsync points web"


def test_a_vm_without_points_says_so() -> None:
    with pytest.raises(UnknownPoint, match="has no point at all; it has none"):
        choose("web", [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-02T12:00:00+00:00", NOON),
        ("2026-01-02T12:00:00Z", NOON),
        ("2026-01-02T14:00:00+02:00", NOON),
        ("2026-01-02T12:00:00", NOON),
        ("", BEGINNING),
        ("yesterday", BEGINNING),
        ("0001-01-01T00:00:00+23:59", BEGINNING),
        ("9999-12-31T23:59:59-23:59", BEGINNING),
    ],
)
def test_a_time_that_is_none_is_the_beginning_of_time(text: str, expected: datetime) -> None:
    assert parse_time(text) == expected


@given(st.text())
def test_any_text_is_a_time_of_some_kind(text: str) -> None:
    assert parse_time(text).tzinfo is UTC


@pytest.mark.parametrize(
    ("checked_at", "now", "expected"),
    [
        (None, NOON + timedelta(minutes=5), 300),
        (NOON + timedelta(minutes=4), NOON + timedelta(minutes=5), 60),
        (NOON - timedelta(hours=1), NOON + timedelta(minutes=5), 300),
        (None, NOON - timedelta(days=1), 0),
        (NOON.astimezone(timezone(timedelta(hours=5))), NOON + timedelta(minutes=5), 300),
    ],
)
def test_the_lag_is_the_age_of_what_could_be_restored_and_never_negative(
    checked_at: datetime | None, now: datetime, expected: float
) -> None:
    assert lag_s(NOON, checked_at, now) == expected


@pytest.mark.parametrize(
    ("lag", "rpo_s", "error", "fenced", "expected"),
    [
        (10, 60, "", False, State.OK),
        (60, 60, "", False, State.OK),
        (61, 60, "", False, State.LATE),
        (61, 60, "x", False, State.LATE),
        (10, 60, "x", False, State.FAILING),
        (1e9, None, "", False, State.OK),
        (None, 60, "", False, State.UNPROTECTED),
        (None, 60, "x", False, State.UNPROTECTED),
        (10, 60, "", True, State.FENCED),
        (None, None, "", True, State.FENCED),
    ],
)
def test_the_state_of_a_vm(lag: float | None, rpo_s: float | None, error: str, fenced: bool, expected: State) -> None:
    assert state_of(lag=lag, rpo_s=rpo_s, error=error, fenced=fenced) is expected


def member(
    vm: str, number: int, instant: str, *, members: Sequence[str], reason: str = "", after_s: float = 0
) -> Point:
    """A point of a group's member."""
    told = GroupTold(
        name="shop",
        id=instant,
        consistent=not reason,
        reason=reason,
        skew_ms=2.5,
        members={name: CaptureId("0" * 16) for name in members},
    )
    quiesce = QuiesceTold(asked=Consistency.CRASH, reason="", group=told)
    return replace(point(number, NOON + timedelta(seconds=after_s)), vm=vm, quiesce=quiesce)


def test_the_instants_of_a_group_are_found_among_all_points_of_all_vms() -> None:
    both = ("app", "db")
    known = [
        point(1, NOON),
        member("app", 8, "b", members=both, after_s=60),
        member("db", 10, "b", members=both, after_s=59),
        member("app", 7, "a", members=both),
        member("db", 9, "a", members=both),
        replace(member("app", 6, "c", members=both), quiesce=None),
    ]
    first, second = group_points("shop", known)
    assert {vm: p.number for vm, p in first.points.items()} == {"app": 7, "db": 9}
    assert (first.consistent, first.reason, first.missing, first.skew_ms) == (True, "", [], 2.5)
    assert (second.id, second.time) == ("b", NOON + timedelta(seconds=59))
    assert group_points("other", known) == []


def test_an_instant_of_which_a_members_point_is_missing_does_not_fit_together() -> None:
    (found,) = group_points("shop", [member("app", 7, "a", members=("app", "db"))])
    assert (found.consistent, found.missing, found.reason) == (False, ["db"], "no point of db")


def test_an_instant_that_a_member_says_is_flawed_is_flawed() -> None:
    known = [member("app", 7, "a", members=["app"], reason="db failed: no"), member("db", 3, "b", members=["db"])]
    found = {p.id: p for p in group_points("shop", known)}
    assert (found["a"].consistent, found["a"].reason) == (False, "db failed: no")


@pytest.mark.parametrize(
    "told",
    [None, "no", [], {}, {"asked": "best", "reason": ""}, {"asked": "crash", "reason": "", "group": {"name": "shop"}}],
)
def test_what_a_definition_tells_in_another_way_is_passed_over(vm: ShippedVm, told: object) -> None:
    vm.run([step(root={0: 1})])
    segment = vm.log.read(1)
    meta = segment.meta.point
    assert meta is not None
    changed = msgspec.structs.replace(meta, definition={"quiesce": told})
    found = point_of(replace(segment, meta=msgspec.structs.replace(segment.meta, point=changed)), None)
    assert found is not None
    assert found.quiesce is None
