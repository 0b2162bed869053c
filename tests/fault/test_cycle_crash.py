"""A cycle that dies before or after any of its steps: the next one goes on, and no point is lost."""

import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

import pytest
from crashing import WHENS, Bomb, Crash, Mined
from faulty import Fault, FaultyStore
from protected_vm import KIB, VM, ProtectedVm

from drsync.errors import StoreUnavailable
from drsync.mapping import MapPolicy
from drsync.model import Kind
from drsync.source import Source
from drsync.spool import VmSpool
from drsync.store import ObjectStore


def crashing_cycle(lab: ProtectedVm, bomb: Bomb, **options: Any) -> None:
    """One cycle of a process that has the bomb in it."""
    host = options.get("host", "alpha")
    with suppress(Crash):
        lab.cycle(
            store=cast(ObjectStore, Mined(lab.store, bomb)),
            spool=cast(VmSpool, Mined(lab.spool(host).vm(VM), bomb)),
            open_source=lambda: cast(Source, Mined(lab.source(), bomb)),
            **options,
        )


def crash_at_every_step(
    place: Path,
    prepare: Callable[[ProtectedVm], None],
    *,
    write_after: bool,
    root_bytes: int = 512 * KIB,
    **options: Any,
) -> list[str]:
    """Crash a cycle at each of its steps, each time on a VM of its own; the steps, "before" and "after" each."""
    fired: list[str] = []
    for step in itertools.count(1):
        for when in WHENS:
            lab = ProtectedVm(place / f"{step}-{when}", root_bytes=root_bytes)
            prepare(lab)
            committed = lab.points()
            bomb = Bomb(step, when)
            crashing_cycle(lab, bomb, **options)
            if not bomb.fired_at:
                lab.check_settled(options.get("host", "alpha"))
                return fired
            fired.append(f"{when} {bomb.fired_at}")
            assert lab.check_points()[: len(committed)] == committed
            if write_after:
                lab.write()
            lab.cycle(**options)
            lab.check_settled(options.get("host", "alpha"))
            assert lab.points()[: len(committed)] == committed
    raise AssertionError("not reached")


def nothing_before(lab: ProtectedVm) -> None:
    pass


def a_point_and_writes(lab: ProtectedVm) -> None:
    lab.cycle()
    lab.write()


def a_point_and_lost_bitmaps(lab: ProtectedVm) -> None:
    a_point_and_writes(lab)
    lab.vm.crash()
    lab.write()


def an_idle_vm(lab: ProtectedVm) -> None:
    a_point_and_writes(lab)
    lab.cycle()


def a_waiting_layer(lab: ProtectedVm) -> None:
    a_point_and_writes(lab)
    with FaultyStore(lab.store, Fault("create")) as faulty, pytest.raises(StoreUnavailable):
        lab.cycle(store=faulty)
    assert len(lab.spooled()) == 1
    lab.write()


def a_grown_disk(lab: ProtectedVm) -> None:
    a_point_and_writes(lab)
    lab.vm.disks["data"].resize(320 * KIB + 512)
    lab.write()


CAPTURING: Final = {"MemoryStore.create", "Witness.survey", "Witness.capture", "Witness.release", "VmSpool.complete"}


@pytest.mark.parametrize("write_after", [False, True], ids=["quiet", "busy"])
@pytest.mark.parametrize(
    "prepare",
    [nothing_before, a_point_and_writes, a_point_and_lost_bitmaps, a_waiting_layer, a_grown_disk],
)
def test_a_crash_at_any_step_of_a_capture_loses_no_point(
    tmp_path: Path, prepare: Callable[[ProtectedVm], None], write_after: bool
) -> None:
    fired = crash_at_every_step(tmp_path, prepare, write_after=write_after)
    assert {f"{when} {step}" for when in WHENS for step in CAPTURING} <= set(fired)


def test_a_crash_at_any_step_of_a_full_that_was_asked_for_loses_no_point(tmp_path: Path) -> None:
    fired = crash_at_every_step(tmp_path, a_point_and_writes, write_after=True, full=True)
    assert {f"before {step}" for step in CAPTURING} <= set(fired)


def test_a_crash_at_any_step_of_an_idle_cycle_loses_no_point(tmp_path: Path) -> None:
    fired = crash_at_every_step(tmp_path, an_idle_vm, write_after=True)
    assert "after Witness.survey" in fired
    assert "before MemoryStore.create" not in fired


def test_a_crash_at_any_step_of_a_take_over_loses_no_point(tmp_path: Path) -> None:
    fired = crash_at_every_step(tmp_path, a_point_and_writes, write_after=True, host="bravo")
    assert fired.count("after MemoryStore.create") == 2  # the fence, and the point


def test_a_crash_at_any_step_of_shipping_packs_loses_no_point(tmp_path: Path) -> None:
    """As much data as a segment and two packs: more than 64 MiB."""
    root_bytes = 66 * 1024 * KIB
    fired: list[str] = []
    for call in (1, 2, 3):
        for when in WHENS:
            lab = ProtectedVm(tmp_path / f"{call}-{when}", root_bytes=root_bytes)
            bomb = Bomb(call, when)
            with suppress(Crash):
                lab.cycle(store=cast(ObjectStore, CreatesMined(lab.store, bomb)))
            fired.append(bomb.fired_at)
            lab.write()
            lab.cycle()
            lab.check_settled()
    assert fired == ["MemoryStore.create"] * 6


class CreatesMined(Mined):
    """As Mined, but only what creates an object is a step."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "create" else getattr(self._inner, name)


@pytest.mark.parametrize(
    ("prepare", "kinds"),
    [
        (nothing_before, {"root": Kind.FULL, "data": Kind.FULL}),
        (a_point_and_writes, {"root": Kind.INCREMENTAL, "data": Kind.INCREMENTAL}),
        (a_point_and_lost_bitmaps, {"root": Kind.RESYNC, "data": Kind.RESYNC}),
        (a_grown_disk, {"root": Kind.INCREMENTAL, "data": Kind.RESYNC}),
    ],
)
def test_what_is_crashed_is_what_its_name_says(
    tmp_path: Path, prepare: Callable[[ProtectedVm], None], kinds: dict[str, Kind]
) -> None:
    lab = ProtectedVm(tmp_path)
    prepare(lab)
    lab.cycle()
    newest = lab.check_settled()
    assert {disk.name: disk.kind for disk in newest.disks} == kinds


def test_a_cycle_that_writes_a_block_map_may_die_at_each_of_its_steps(tmp_path: Path) -> None:
    often = MapPolicy(every=2, step=2)

    def a_map_is_due(lab: ProtectedVm) -> None:
        for _ in range(3):
            lab.cycle(maps=often)
            lab.write()

    fired = crash_at_every_step(tmp_path, a_map_is_due, write_after=True, maps=often)
    assert fired[-2:] == ["before MemoryStore.create", "after MemoryStore.create"]  # the last thing that a cycle does
    assert fired.index("after Witness.release") < fired.index("before MemoryStore.get_range")
