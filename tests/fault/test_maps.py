"""Block maps in the life of a VM: cycles that write them, restores that read them, faults and crashes in between."""

import itertools
import logging
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest
from faulty import Effect, Fault, FaultyStore, Method
from protected_vm import VM, MemoryTarget, ProtectedVm
from shipped_vm import objects_of, write_directory

from drsync.capture import Result
from drsync.catalog import choose
from drsync.config import parse_config
from drsync.errors import ObjectDamaged, ObjectMissing, StoreUnavailable, UnknownPoint
from drsync.format import names
from drsync.image import PointImage
from drsync.keyfile import write_key_file
from drsync.log import Log
from drsync.mapped import listed_maps, load_mapped_image
from drsync.mapping import MapPolicy
from drsync.model import NoProgress
from drsync.restore import restore_disk
from drsync.restoring import RestoreRequest, Restoring
from drsync.session import Session
from drsync.store import ObjectStore
from drsync.verify import VmReport, verify

OFTEN: Final = MapPolicy(every=2, step=2)
MAPS: Final = names.map_prefix(VM)


@pytest.fixture
def lab(tmp_path: Path) -> ProtectedVm:
    return ProtectedVm(tmp_path)


def captured(lab: ProtectedVm, points: int) -> ProtectedVm:
    for _ in range(points):
        lab.write()
        lab.cycle(maps=OFTEN)
    return lab


def mapped(lab: ProtectedVm) -> list[int]:
    return [seq for _, seq in listed_maps(lab.log().objects)]


def contents(log: Log, image: PointImage) -> dict[str, bytes]:
    targets = {disk.name: MemoryTarget(disk.size_bytes) for disk in image.point.disks}
    for name, target in targets.items():
        restore_disk(log.objects, image, name, target, NoProgress())
    return {name: target.content for name, target in targets.items()}


def check_points_by_maps(lab: ProtectedVm) -> None:
    log = lab.log()
    for point in lab.check_points():
        assert contents(log, load_mapped_image(log, point.number)) == lab.seen[point.capture]


def audited(lab: ProtectedVm, *, read_data: bool = True, store: ObjectStore | None = None) -> VmReport:
    return verify(lab.log(store), committed_seq=0, read_data=read_data, progress=NoProgress())


def test_cycles_write_maps_and_all_points_restore_by_them(lab: ProtectedVm) -> None:
    captured(lab, 7)
    assert mapped(lab) == [2, 4, 6]
    check_points_by_maps(lab)
    assert audited(lab).problems == []


def test_a_usual_cycle_asks_for_no_map_until_it_may_be_due(lab: ProtectedVm) -> None:
    for _ in range(3):
        lab.write()
        counting = FaultyStore(lab.store, Fault("list", key=MAPS))
        lab.cycle(store=counting)
        assert counting.not_fired


@pytest.mark.parametrize("method", ["list", "create", "get_tail", "get_range"])
def test_a_capture_succeeds_although_its_map_does_not(
    lab: ProtectedVm, method: Method, caplog: pytest.LogCaptureFixture
) -> None:
    captured(lab, 3)
    lab.write()
    with caplog.at_level(logging.WARNING), FaultyStore(lab.store, Fault(method, key=MAPS)) as faulty:
        outcome = lab.cycle(store=faulty, maps=OFTEN)
    assert outcome.result is Result.COMMITTED
    assert any("wrote no block map of point 4: StoreUnavailable" in r.getMessage() for r in caplog.records)
    assert lab.spool().vm(VM).state().error == ""
    lab.check_settled()
    assert mapped(lab) == [2]
    captured(lab, 2)
    assert mapped(lab) == [2, 6]
    check_points_by_maps(lab)


def test_a_reply_that_was_lost_leaves_a_map_that_is_right(lab: ProtectedVm) -> None:
    captured(lab, 1)
    lab.write()
    with FaultyStore(lab.store, Fault("create", key=MAPS, effect=Effect.REPLY_LOST)) as faulty:
        lab.cycle(store=faulty, maps=OFTEN)
    assert mapped(lab) == [2]
    check_points_by_maps(lab)


def test_an_idle_vm_gets_no_map(lab: ProtectedVm) -> None:
    captured(lab, 3)
    for _ in range(3):
        lab.cycle(maps=OFTEN)
    assert mapped(lab) == [2]


def session_of(lab: ProtectedVm, place: Path, *, without: str = "nothing") -> Session:
    """A session on a copy of the lab's repository in a directory."""
    held = {name: data for name, data in objects_of(lab.store).items() if without not in name}
    write_directory(held, place / "repository")
    write_key_file(place / "key", lab.key)
    text = f'[repository]\nurl = "file://{place}/repository"\nkey_file = "key"\n[spool]\npath = "spool"\n'
    return Session(parse_config(text.encode(), place / "drsync.toml"), lab.clock)


@pytest.mark.parametrize("without", ["nothing", MAPS])
def test_a_session_finds_the_point_that_was_asked_for(lab: ProtectedVm, tmp_path: Path, without: str) -> None:
    captured(lab, 3)
    lab.cycle(host="beta", take_over=True)  # a fence, and no point: nothing was written
    captured_by_beta = 0
    for _ in range(4):
        lab.write()
        captured_by_beta += lab.cycle(host="beta", maps=OFTEN).result is Result.COMMITTED
    points = lab.points()
    assert captured_by_beta == 4
    place = tmp_path / "restored"
    place.mkdir()
    session = session_of(lab, place, without=without)
    second = timedelta(seconds=1)
    wanted = [(p.number, None) for p in points] + [(None, p.time + second) for p in points] + [(None, None)]
    for number, at in wanted:
        plan = Restoring(session).plan_restore(RestoreRequest(vm=VM, output=tmp_path / "out", number=number, at=at))
        point = choose(VM, points, number=number, at=at)
        assert plan.point == point
        assert contents(session.log(VM), plan.image) == lab.seen[point.capture]
    for number, at in [(4, None), (99, None), (None, points[0].time - second)]:
        with pytest.raises(UnknownPoint, match=rf"it has 1 \(.*\) to {points[-1].number} \("):
            Restoring(session).plan_restore(RestoreRequest(vm=VM, output=tmp_path / "out", number=number, at=at))


def test_verify_tells_of_damaged_maps_and_that_no_point_is_hurt(lab: ProtectedVm) -> None:
    captured(lab, 6)
    two, four, six = (name for name, _ in listed_maps(lab.log().objects))
    whole = lab.store.get(six, limit_bytes=2**20)
    lab.store.replace(six, whole[:8] + bytes([whole[8] ^ 1]) + whole[9:])
    assert audited(lab, read_data=False).problems == []  # the index is whole
    lab.store.replace(four, b"junk")
    for read_data in (False, True):
        found = {str(p.error.fields["key"]): (p.point, p.error) for p in audited(lab, read_data=read_data).problems}
        assert found.keys() == ({four, six} if read_data else {four})
        point, error = found[four]
        assert point == 4
        assert isinstance(error, ObjectDamaged)
        assert "just a cache: restores do without it, and it can be deleted" in str(error)
    check_points_by_maps(lab)
    assert two not in found


def test_verify_tells_of_a_map_whose_pages_are_gone_and_of_one_of_no_point(lab: ProtectedVm) -> None:
    captured(lab, 4)
    two, four = (name for name, _ in listed_maps(lab.log().objects))
    lab.store.replace(names.block_map(VM, 9, bytes(16)), lab.store.get(four, limit_bytes=2**20))
    problems = audited(lab).problems
    assert [(p.point, p.error.fields["key"]) for p in problems] == [(9, names.block_map(VM, 9, bytes(16)))]
    assert "the log has no segment 9" in str(problems[0].error)
    assert two < four


def test_verify_of_a_damaged_log_does_not_blame_the_maps(lab: ProtectedVm) -> None:
    captured(lab, 4)
    lab.store.replace(names.segment(VM, 1), b"junk")
    assert {p.error.fields["key"] for p in audited(lab).problems} == {names.segment(VM, 1)}


def test_a_map_outlives_the_segments_that_it_needs_no_more(lab: ProtectedVm) -> None:
    """Not a promise of the format: segment 1 is damaged, and what does not lie in it comes back."""
    captured(lab, 4)
    lab.vm.disks["root"].zero(0, len(lab.vm.disks["root"].content))
    lab.vm.disks["data"].zero(0, len(lab.vm.disks["data"].content))
    lab.cycle()
    lab.store.replace(names.segment(VM, 1), b"junk")
    log = lab.log()
    image = load_mapped_image(log, 5)
    assert contents(log, image) == lab.contents()
    with pytest.raises(ObjectDamaged):
        load_mapped_image(log, 1)
    with pytest.raises((ObjectMissing, ObjectDamaged)):
        log.read(1)


def test_the_store_fails_in_the_middle_of_a_mapped_restore(lab: ProtectedVm) -> None:
    captured(lab, 4)
    for call in itertools.count(1):
        faulty = FaultyStore(lab.store, Fault("get_range", call=call))
        log = lab.log(faulty)
        try:
            assert contents(log, load_mapped_image(log, 4)) == lab.contents()
        except StoreUnavailable:
            continue
        assert faulty.not_fired
        assert call > 1
        return
