"""Prune: what stays restores as before, and what is deleted is what nothing needs."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_vm import AT_ONCE, SOAK, PrunedVm
from shipped_vm import DiskStep, Step
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
