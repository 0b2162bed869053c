"""What grows with the number of VMs does not grow with the number of their points: requests are counted."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from counting_store import CountingStore
from many_points import beat, crowd, open_session

from drsync import catalog
from drsync.catalog import State
from drsync.overview import Overview
from drsync.session import Session

VMS, HOSTS = 12, 3
NAMES = [f"vm-{number:04}" for number in range(VMS)]


def opened(tmp_path: Path, points: int) -> tuple[Session, CountingStore]:
    store, repository, root = crowd(VMS, points)
    beat(repository, HOSTS, VMS, points)
    counting = CountingStore(store)
    session = open_session(tmp_path, root, counting)
    assert session.repository.id == repository.id
    return session, counting


@pytest.mark.parametrize("points", [5, 60])
def test_status_takes_two_requests_a_vm_however_many_points_it_has(tmp_path: Path, points: int) -> None:
    session, store = opened(tmp_path, points)
    with store.counted() as requests:
        found = Overview(session).status()
    assert [(status.vm, status.point, status.state) for status in found] == [(vm, points, State.OK) for vm in NAMES]
    assert (requests.put, requests.get, requests.list) == (0, VMS + HOSTS, VMS + 3)  # 3: VMs, hosts, key rotations


@pytest.mark.parametrize("points", [5, 60])
def test_points_of_all_vms_take_four_requests_a_vm(tmp_path: Path, points: int) -> None:
    session, store = opened(tmp_path, points)
    with store.counted() as requests:
        found = Overview(session).summaries()
    assert [summary.vm for summary in found] == NAMES
    assert {summary.segments for summary in found} == {points}
    for summary in found:
        assert summary.oldest is not None
        assert summary.newest is not None
        assert (summary.oldest.number, summary.newest.number) == (1, points)
    assert (requests.put, requests.get, requests.list) == (0, 3 * VMS + HOSTS, VMS + 2)


def test_points_of_a_vm_take_a_request_each(tmp_path: Path) -> None:
    session, store = opened(tmp_path, 60)
    with store.counted() as requests:
        found: Sequence[catalog.Point] = Overview(session).points("vm-0003")
    assert [point.number for point in found] == list(range(1, 61))
    assert (requests.put, requests.get, requests.list) == (0, 62, 1)


def test_the_summary_of_a_log_passes_over_take_overs_at_its_ends(tmp_path: Path) -> None:
    from shipped_vm import DiskStep, ShippedVm, Step

    step = Step(disks={"root": DiskStep(size_bytes=2**20, writes={0: 1})})
    taken_over = Step(disks={"root": DiskStep(size_bytes=2**20, writes={1: 3})}, taken_over=True)
    vm = ShippedVm(tmp_path).run([step, taken_over])
    found = catalog.summary(vm.log)
    assert found.oldest is not None
    assert found.newest is not None
    assert (found.segments, found.oldest.number, found.newest.number) == (3, 1, 3)
    vm.writer_id = "f" * 16
    vm.writer()
    again = catalog.summary(vm.log)
    assert (again.segments, again.newest) == (4, found.newest)


def test_an_empty_log_has_no_points_at_its_ends(tmp_path: Path) -> None:
    from shipped_vm import ShippedVm

    found = catalog.summary(ShippedVm(tmp_path).log)
    assert (found.segments, found.oldest, found.newest) == (0, None, None)


def test_a_log_whose_end_is_gone_hides_no_other_vm(tmp_path: Path) -> None:
    session, store = opened(tmp_path, 5)
    store.delete("vm/vm-0003/log/0000000000000005")
    found = {summary.vm: summary for summary in Overview(session).summaries()}
    assert found["vm-0003"].newest is None
    assert "vm/vm-0003/log/0000000000000005" in found["vm-0003"].problem
    assert all(summary.newest is not None for vm, summary in found.items() if vm != "vm-0003")
