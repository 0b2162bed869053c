"""Prune: what stays restores as before, and what is deleted is what nothing needs."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_vm import AT_ONCE, SOAK, PrunedVm
from shipped_vm import ZEROED, DiskStep, Step, objects_of
from strategies import busy_histories, histories

from drsync.model import BLOCK_SIZE

SIZE = 12 * BLOCK_SIZE


@pytest.fixture
def vm(tmp_path: Path) -> PrunedVm:
    return PrunedVm(tmp_path)


def step(writes: dict[int, int], size_bytes: int = SIZE, *, whole: bool = False, compare: bool = True) -> Step:
    return Step(disks={"root": DiskStep(size_bytes=size_bytes, writes=writes, whole=whole)}, compare=compare)


def test_points_that_retention_drops_are_gone_and_the_others_restore(vm: PrunedVm) -> None:
    vm.run(step({0: 2 * n + 2, 1: 2 * n + 40, n + 2: 2 * n + 21}) for n in range(8))
    done = vm.prune(keep=[3, 6])
    assert [v.point for v in done.dropped] == [7, 5, 4, 2, 1]
    assert (done.kept, done.horizon) == (3, 1)
    assert done.deleted_objects > 0
    vm.check()


@settings(deadline=None, max_examples=400 if SOAK else 30)
@given(st.one_of(histories(max_steps=10), busy_histories()), st.data())
def test_what_stays_restores_whatever_happened_and_whatever_is_dropped(
    history: list[Step], data: st.DataObject
) -> None:
    copy_below = data.draw(st.sampled_from([0.5, 0.5, 1.0]))
    with TemporaryDirectory() as directory:
        vm = PrunedVm(Path(directory))
        for change in history:
            vm.capture(change)
            vm.clock.advance(60)
            if data.draw(st.integers(0, 2)) == 0:
                keep = data.draw(st.sets(st.sampled_from(sorted(vm.points))))
                vm.prune(keep=keep, options=replace(AT_ONCE, copy_below=copy_below))
                vm.check()
        vm.check()


def test_more_points_than_one_run_drops_go_in_the_next_ones_the_oldest_first(vm: PrunedVm) -> None:
    vm.run(step({0: 2 * n + 2, 1: 2 * n + 40}) for n in range(9))
    few = replace(AT_ONCE, most_dropped=3)
    dropped = [[v.point for v in vm.prune(options=few).dropped] for _ in range(4)]
    assert dropped == [[3, 2, 1], [6, 5, 4], [8, 7], []]
    vm.check()


@pytest.mark.parametrize("change", ["full", "size"])
def test_a_merged_segment_goes_across_no_full_and_no_other_size(vm: PrunedVm, change: str) -> None:
    """F34: what is laid where several segments were has one size of each disk, and a full at most at its start."""
    vm.run(step({0: 2 * n + 2, 1: 2 * n + 40, 2 + n: 2 * n + 60}) for n in range(4))
    larger = SIZE if change == "full" else SIZE + BLOCK_SIZE
    edge = vm.capture(step({n: 2 * n + 100 for n in range(10)}, larger, whole=True, compare=change == "size")).seq
    vm.run(step({0: 2 * n + 202, 1: 2 * n + 240, 2 + n: 2 * n + 260}, larger) for n in range(4))
    vm.prune(options=replace(AT_ONCE, copy_below=1.0))
    holes = [(merged.first, merged.last) for merged in vm.log.horizon().merged()]
    assert any(first == edge < last for first, last in holes), holes
    assert not any(first < edge <= last for first, last in holes), holes
    vm.check()


def test_nothing_below_a_full_stays(vm: PrunedVm) -> None:
    vm.run(step({n: 2 * n + 20 * m + 2 for n in range(10)}) for m in range(3))
    old = {name for name in objects_of(vm.store) if "/pack/" in name}
    zeros = dict.fromkeys(range(4, 12), ZEROED)  # of which a full says nothing
    vm.capture(step({n: 2 * n + 200 for n in range(4)} | zeros, whole=True, compare=False))
    vm.capture(step({0: 300}))
    vm.prune()
    assert old
    assert not old & set(objects_of(vm.store))
    vm.check()
