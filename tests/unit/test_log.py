"""A VM's log: numbered, chained, and the lock over who may write."""

import logging
from pathlib import Path

import pytest
from faulty import Effect, Fault, FaultyStore
from forged import reseal
from msgspec import structs
from shipped_vm import DiskStep, ShippedVm, Step, objects_of, reopened, restored, store_of

from drsync.errors import ChainBroken, Fenced, ObjectDamaged, ObjectMissing, PointLost, StoreUnavailable
from drsync.format import names
from drsync.log import Log
from drsync.model import BLOCK_SIZE
from drsync.writer import LogWriter, open_writer


@pytest.fixture
def vm(tmp_path: Path) -> ShippedVm:
    return ShippedVm(tmp_path)


def step(number: int) -> Step:
    return Step(disks={"root": DiskStep(size_bytes=8 * BLOCK_SIZE, writes={number % 8: number})})


def without(vm: ShippedVm, *numbers: int) -> Log:
    """The log of a copy of the repository that lacks these segments."""
    gone = {names.segment(vm.vm, number) for number in numbers}
    return reopened(vm, store_of({name: data for name, data in objects_of(vm.store).items() if name not in gone}))


def test_an_empty_log_has_no_segments(vm: ShippedVm) -> None:
    assert vm.log.newest() == 0
    assert vm.log.numbers() == []
    assert list(vm.log.chain(1, 0)) == []
    with pytest.raises(ObjectMissing):
        vm.log.read(1)


def test_f12_segments_are_numbered_from_1_and_carry_the_hash_of_the_index_before(vm: ShippedVm) -> None:
    vm.run(map(step, range(1, 6)))
    segments = list(vm.log.chain(1, 5))
    assert [s.seq for s in segments] == vm.log.numbers() == [1, 2, 3, 4, 5]
    previous = [s.meta.previous for s in segments]
    assert previous == ["", *(s.index_sha256.hex() for s in segments[:-1])]
    assert vm.log.newest() == vm.log.newest(after=3) == 5
    assert vm.log.numbers(after=3) == [4, 5]


def test_f12_a_segment_that_calls_itself_another_number_is_refused(vm: ShippedVm) -> None:
    vm.capture(step(1))
    open_writer(vm.log, "another")
    reseal(vm.log, 2, lambda meta: structs.replace(meta, seq=3))
    with pytest.raises(ObjectDamaged, match="its index is of segment 3"):
        vm.log.read(2)


def test_a_chain_can_be_followed_from_any_segment_whose_hash_is_known(vm: ShippedVm) -> None:
    vm.run(map(step, range(1, 5)))
    known = vm.log.read(2).index_sha256.hex()
    assert [s.seq for s in vm.log.chain(3, 4, previous=known)] == [3, 4]
    with pytest.raises(ChainBroken, match="broken at 3: it does not follow"):
        list(vm.log.chain(3, 4))


def test_a_long_chain_is_read_in_order(vm: ShippedVm) -> None:
    writer = vm.writer()
    for _ in range(70):
        writer.fence()
    assert [s.seq for s in vm.log.chain(1, 70)] == list(range(1, 71))
    assert [s.meta.epoch for s in vm.log.chain(1, 70)] == list(range(2, 72))


def test_f12_a_missing_middle_is_noticed(vm: ShippedVm) -> None:
    vm.run(map(step, range(1, 5)))
    log = without(vm, 2)
    with pytest.raises(ChainBroken, match="segment 2 is missing, 3 is there") as caught:
        log.newest()
    assert caught.value.remedy == "drsync verify web"
    with pytest.raises(ObjectMissing):
        list(log.chain(1, 4))


def test_f16_a_missing_newest_segment_is_noticed_by_who_remembers_it(vm: ShippedVm) -> None:
    vm.run(map(step, range(1, 5)))
    log = without(vm, 3, 4)
    assert log.newest() == 2  # the log itself has no memory
    with pytest.raises(PointLost) as caught:
        open_writer(log, vm.writer_id, known_seq=4)
    assert (caught.value.fields["found"], caught.value.fields["expected"]) == (2, 4)
    assert "drsync restore web --point 2" in caught.value.remedy


def test_a_segment_of_another_history_of_the_same_repository_does_not_fit(vm: ShippedVm) -> None:
    vm.run([step(1), step(2)])
    copied = store_of(objects_of(vm.store))
    vm.run([step(3), step(4)])
    other_log = reopened(vm, copied)
    open_writer(other_log, "another")
    objects = objects_of(vm.store) | {names.segment("web", 3): objects_of(copied)[names.segment("web", 3)]}
    with pytest.raises(ChainBroken, match="broken at 4"):
        list(reopened(vm, store_of(objects)).chain(1, 4))


@pytest.mark.parametrize("name", ["foo", "1", "000000000000000g", "0000000000000000", "0000000000000001.tmp", "x/y"])
def test_what_lies_in_a_log_and_is_no_segment_is_named(vm: ShippedVm, name: str) -> None:
    vm.capture(step(1))
    vm.store.replace(f"vm/web/log/{name}", b"")
    with pytest.raises(ObjectDamaged) as caught:
        vm.log.newest()
    assert caught.value.fields["key"] == f"vm/web/log/{name}"


def test_f8_a_segment_under_another_number_is_refused(vm: ShippedVm) -> None:
    vm.run([step(1), step(2)])
    objects = objects_of(vm.store)
    objects[names.segment("web", 3)] = objects[names.segment("web", 2)]
    with pytest.raises(ObjectDamaged, match="segment 2 of VM 'web', not what its name says"):
        reopened(vm, store_of(objects)).read(3)


def test_a_writer_goes_on_where_it_stopped(vm: ShippedVm) -> None:
    vm.capture(step(1))
    writer = open_writer(vm.log, vm.writer_id, known_seq=1, wrote_before=True)
    assert (writer.next_seq, writer.epoch) == (2, 1)
    assert writer.head is not None
    assert writer.head.seq == 1


def test_f20_a_new_writer_takes_over_with_an_empty_segment_of_the_next_epoch(
    vm: ShippedVm, caplog: pytest.LogCaptureFixture
) -> None:
    vm.capture(step(1))
    with caplog.at_level(logging.WARNING):
        writer = open_writer(vm.log, "another")
    fence = vm.log.read(2)
    assert (fence.meta.epoch, fence.meta.writer, fence.meta.point) == (2, "another", None)
    assert (writer.next_seq, writer.epoch) == (3, 2)
    assert caplog.messages == ["vm=web took over, epoch=2 segment=2"]


def test_the_first_writer_of_a_vm_fences_nobody(vm: ShippedVm) -> None:
    writer = open_writer(vm.log, "first")
    assert (writer.head, writer.next_seq, writer.epoch) == (None, 1, 1)


def test_f20_the_writer_that_was_taken_over_is_refused_at_its_next_segment(vm: ShippedVm) -> None:
    vm.capture(step(1))
    old = vm.writer()
    new = open_writer(vm.log, "another")
    with pytest.raises(Fenced) as caught:
        vm.capture(step(2), writer=old)
    assert (caught.value.fields["writer"], caught.value.fields["epoch"]) == ("another", 2)
    assert caught.value.remedy.startswith("drsync capture web --take-over")
    assert vm.capture(step(10), writer=new).seq == 3  # writes the same block
    assert restored(vm.log, 3) == vm.disks


def test_f20_a_writer_that_wrote_before_does_not_take_the_vm_back_by_itself(vm: ShippedVm) -> None:
    vm.capture(step(1))
    open_writer(vm.log, "another")
    with pytest.raises(Fenced):
        open_writer(vm.log, vm.writer_id, known_seq=1, wrote_before=True)
    assert vm.log.newest() == 2


def test_f20_of_two_that_take_over_at_once_one_wins(vm: ShippedVm) -> None:
    vm.capture(step(1))
    head = vm.log.read(1)
    first, second = LogWriter(vm.log, "first", head), LogWriter(vm.log, "second", head)
    first.fence()
    with pytest.raises(Fenced) as caught:
        second.fence()
    assert caught.value.fields["writer"] == "first"
    assert vm.log.newest() == 2


def test_a_lost_reply_to_a_commit_is_cleared_up_by_opening_the_writer_again(vm: ShippedVm) -> None:
    vm.capture(step(1))
    with FaultyStore(vm.store, Fault("create", effect=Effect.REPLY_LOST)) as faulty:
        writer = open_writer(reopened(vm, faulty), vm.writer_id)
        with pytest.raises(StoreUnavailable):
            writer.fence()
        assert writer.next_seq == 2
    assert open_writer(vm.log, vm.writer_id, known_seq=1, wrote_before=True).next_seq == 3


def test_a_listing_that_fails_is_no_shorter_log(vm: ShippedVm) -> None:
    vm.run(map(step, range(1, 4)))
    with FaultyStore(vm.store, Fault("list", effect=Effect.REPLY_LOST, at=2)) as faulty:
        log = reopened(vm, faulty)
        with pytest.raises(StoreUnavailable):
            log.newest()


def test_stored_bytes_are_those_of_the_segment_and_its_packs(vm: ShippedVm) -> None:
    segment = vm.capture(Step(disks={"root": DiskStep(size_bytes=8 * BLOCK_SIZE, writes=dict.fromkeys(range(8), 2))}))
    assert len(segment.packs) == 2
    assert segment.stored_bytes == sum(len(d) for name, d in objects_of(vm.store).items() if name.startswith("vm/"))
