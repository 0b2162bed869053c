"""A VM across rotations of the root key: all points stay readable, and an older key adds none (F45, F48, F49)."""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_vm import PrunedVm
from shipped_vm import DiskStep, ShippedVm, Step, objects_of, restored, restored_disk, store_of
from strategies import histories

from drsync import catalog
from drsync.errors import ChainBroken, KeyMissing, ObjectDamaged, PinForged
from drsync.format import names, seal
from drsync.format.keys import Keys, RootKey, RootKeys
from drsync.heartbeat import Seen, read_heartbeats, write_heartbeat
from drsync.image import load_image
from drsync.log import Log, beside
from drsync.mapped import listed_maps, load_mapped_image, newest_stretch, read_map
from drsync.mapping import write_map
from drsync.model import BLOCK_SIZE, NoProgress
from drsync.pins import PinRecord, pin_point, read_pins, unpin_point, write_pin
from drsync.prune.run import USUAL
from drsync.repository import Repository, open_repository
from drsync.verify import verify
from drsync.window import WINDOW_BLOCKS
from drsync.writer import open_writer

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
LARGE = (3 * WINDOW_BLOCKS + 5) * BLOCK_SIZE


@pytest.fixture
def vm(tmp_path: Path) -> ShippedVm:
    return ShippedVm(tmp_path)


def step(writes: dict[int, int], *, whole: bool = False) -> Step:
    return Step(disks={"root": DiskStep(size_bytes=LARGE, writes=writes, whole=whole)})


def roots(vm: ShippedVm, count: int) -> RootKeys:
    """The root key of the repository, and further ones, always the same."""
    return RootKeys((vm.root, *(RootKey(bytes([n]) * 32) for n in range(1, count))))


def opened(vm: ShippedVm, keys: Keys) -> Repository:
    return open_repository(vm.store, keys, "/etc/drsync/repository.key")


def log_with(vm: ShippedVm, generations: int) -> Log:
    """The VM's log, as a host sees it that has keys up to this generation."""
    return Log(opened(vm, roots(vm, generations)).vm("web"))


def rotate(vm: ShippedVm, generations: int) -> None:
    """The host goes on with keys up to this generation."""
    vm.log = log_with(vm, generations)


def make_map(log: Log, seq: int) -> str:
    return write_map(log, seq, present={name for name, _ in listed_maps(log.objects)})


def header_of(vm: ShippedVm, name: str) -> dict[str, object]:
    data = objects_of(vm.store)[name]
    footer = seal.parse_footer(data, len(data))
    start = len(data) - footer.tail_length
    found: dict[str, object] = json.loads(data[start : start + footer.header_length])
    return found


def generations_of(vm: ShippedVm) -> list[object]:
    return [header_of(vm, names.segment("web", seq)).get("generation", 1) for seq in log_with(vm, 9).numbers()]


@settings(deadline=None, max_examples=25)
@given(histories(max_steps=6), st.lists(st.integers(1, 6), min_size=1, max_size=3), st.sets(st.integers(1, 8)))
def test_every_point_restores_whatever_keys_it_lies_under(
    history: list[Step], rotations: Sequence[int], mapped_points: set[int]
) -> None:
    with TemporaryDirectory() as directory:
        vm = ShippedVm(Path(directory))
        generation = 1
        for number, change in enumerate(history, 1):
            if number in rotations:
                generation += 1
                rotate(vm, generation)
            seq = vm.capture(change).seq
            if seq in mapped_points:
                make_map(vm.log, seq)
        reader = log_with(vm, generation)
        for point, expected in vm.points.items():
            assert restored(reader, point) == expected
            image = load_mapped_image(reader, point)
            assert {d.name: restored_disk(image, reader, d.name) for d in image.point.disks} == expected
        report = verify(reader, committed_seq=max(vm.points), read_data=True, progress=NoProgress())
        assert report.problems == []


def test_an_object_says_its_generation_and_the_first_says_nothing(vm: ShippedVm) -> None:
    vm.run([step({0: 1})])
    assert "generation" not in header_of(vm, names.segment("web", 1))
    rotate(vm, 3)
    vm.run([step({1: 1})])
    assert header_of(vm, names.segment("web", 2))["generation"] == 3
    assert generations_of(vm) == [1, 3]


def test_pages_of_an_older_map_are_read_under_its_own_key(vm: ShippedVm) -> None:
    far = 2 * WINDOW_BLOCKS
    vm.run([step({0: 1, far: 3})])
    first = make_map(vm.log, 1)
    rotate(vm, 2)
    vm.run([step({0: 5})])
    second = make_map(vm.log, 2)
    found = read_map(vm.log.objects, second)
    assert found.named_maps("web") == [first], "the far page did not change"
    assert (found.generation, found.older.generations.tolist()) == (2, [1])
    assert restored_disk(load_mapped_image(vm.log, 2), vm.log, "root") == vm.points[2]["root"]


def test_packs_of_a_seed_may_be_of_an_older_generation_than_its_segment(vm: ShippedVm) -> None:
    rounds = [{"root": {0: 1, 1: 3, 4: 5}}, {"root": {1: 7}}]
    seeded = Step(disks={"root": DiskStep(size_bytes=LARGE, writes={5: 9}, whole=True)}, rounds=rounds)
    newer = log_with(vm, 2)
    vm.capture(seeded, writer=open_writer(newer, vm.writer_id))
    packs = [name for name in objects_of(vm.store) if "/pack/" in name]
    assert packs
    assert all("generation" not in header_of(vm, name) for name in packs)
    assert generations_of(vm) == [2]
    assert restored(newer, 1) == vm.points[1]
    make_map(newer, 1)
    assert restored_disk(load_mapped_image(newer, 1), newer, "root") == vm.points[1]["root"]


def test_a_resync_behind_a_rotation_sends_what_differs_and_no_more(vm: ShippedVm) -> None:
    vm.run([step({n: 2 * n + 1 for n in range(6)})])
    rotate(vm, 2)
    segment = vm.capture(step({3: 99}, whole=True))
    assert segment.meta.point is not None
    assert [disk.kind for disk in segment.meta.point.disks] == ["resync"]
    assert sum(len(rows.blocks) for rows in segment.rows) == 1
    assert restored(vm.log, 2) == vm.points[2]


def test_a_host_whose_keys_are_older_reads_the_older_points_and_is_told_what_it_lacks(vm: ShippedVm) -> None:
    vm.run([step({0: 1}), step({1: 3})])
    rotate(vm, 2)
    vm.run([step({2: 5})])
    behind = log_with(vm, 1)
    assert restored(behind, 2) == vm.points[2]
    with pytest.raises(KeyMissing) as caught:
        behind.read(3)
    assert str(caught.value) == (
        "the key file /etc/drsync/repository.key has no key of generation 2 of VM web; it has those up to 1"
    )
    assert caught.value.remedy.startswith("drsync key export web --output FILE")
    with pytest.raises(KeyMissing):
        open_writer(behind, vm.writer_id)
    report = verify(behind, committed_seq=3, read_data=False, progress=NoProgress())
    assert [type(problem.error) for problem in report.problems if problem.point == 3] == [KeyMissing, ChainBroken][:1]


def test_f22_a_map_under_a_key_that_is_not_here_is_passed_over(vm: ShippedVm) -> None:
    vm.run([step({0: 1})])
    make_map(log_with(vm, 2), 1)
    behind = log_with(vm, 1)
    stretch = newest_stretch(behind, 1)
    assert stretch.ground is None
    assert restored_disk(stretch.image(1), behind, "root") == vm.points[1]["root"]


def test_f48_who_has_an_older_key_cannot_append(vm: ShippedVm) -> None:
    vm.run([step({0: 1})])
    thief = log_with(vm, 1)
    rotate(vm, 2)
    vm.run([step({1: 3})])
    head = vm.log.read(2)
    objects = thief.objects
    header = objects.new_header("segment", 3)
    assert head.meta.point is not None
    forged = forge(thief, header, seq=3, previous=head.index_sha256.hex())
    vm.store.create(names.segment("web", 3), forged, sha256=hashlib.sha256(forged).digest())
    with pytest.raises(ChainBroken, match="under an older key"):
        list(vm.log.chain(1, 3))
    with pytest.raises(ChainBroken, match="under an older key"):
        load_image(vm.log, 3)
    report = verify(vm.log, committed_seq=2, read_data=False, progress=NoProgress())
    assert any("under an older key" in str(problem.error) for problem in report.problems)
    assert restored(vm.log, 2) == vm.points[2]


def forge(log: Log, header: seal.Header, *, seq: int, previous: str) -> bytes:
    """A segment that only fences, under the keys of `log`."""
    from drsync.format.segment import SegmentMeta, encode_segment, pack_table

    meta = SegmentMeta(seq=seq, epoch=9, writer="thief", previous=previous, point=None, packs=0, contents=[], rounds=[])
    index = encode_segment(meta, pack_table([]), [])
    buffer = memoryview(bytearray(seal.FRAMES_START + seal.sealed_bound(len(index))))
    sealed = seal.seal(buffer, seal.FRAMES_START, header, index, log.objects.object_keys(header))
    return bytes(buffer[: sealed.length])


def test_f48_a_map_under_an_older_key_than_its_point_is_not_used(vm: ShippedVm) -> None:
    rotate(vm, 2)
    vm.run([step({0: 1})])
    name = make_map(vm.log, 1)
    opened_map = vm.log.objects.read_index(name, "map", seq=1)
    thief = log_with(vm, 1)
    header = thief.objects.new_header("map", 1)
    data = objects_of(vm.store)[name]
    buffer = memoryview(bytearray(data[: opened_map.frames_end].ljust(len(data) + 8192, b"\0")))
    sealed = seal.seal(buffer, opened_map.frames_end, header, opened_map.index, thief.objects.object_keys(header))
    forged = names.block_map("web", 1, bytes.fromhex(header.object))
    store = store_of({key: body for key, body in objects_of(vm.store).items() if key != name})
    store.create(forged, buffer[: sealed.length], sha256=sealed.sha256)
    log = Log(open_repository(store, roots(vm, 2), "key").vm("web"))
    assert newest_stretch(log, 1).ground is None
    from drsync.mapped import check_shows

    with pytest.raises(ObjectDamaged, match="under an older key than its point"):
        check_shows(read_map(log.objects, forged), log.read(1))


def test_f49_a_heartbeat_under_an_older_key_outdoes_none_under_a_newer(vm: ShippedVm) -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    write_heartbeat(opened(vm, roots(vm, 2)), "alpha", {"web": Seen(seq=7, checked_at=now)})
    write_heartbeat(opened(vm, roots(vm, 1)), "thief", {"web": Seen(seq=9999, checked_at=now.replace(year=2099))})
    assert read_heartbeats(opened(vm, roots(vm, 2))).seen == {"web": Seen(seq=7, checked_at=now)}
    assert json.loads(objects_of(vm.store)["host/alpha.json"])["vms"]["web"].startswith("2:")


@pytest.mark.parametrize("entry", ["2:", ":", "0:AAAA", "-1:AAAA", "99:AAAA", "x:AAAA", "2:2:AAAA", "²:AAAA"])
def test_f21_an_entry_of_any_generation_that_does_not_authenticate_counts_as_not_there(
    entry: str, vm: ShippedVm
) -> None:
    body = json.dumps({"format": 1, "host": "x", "vms": {"web": entry}}).encode()
    vm.store.replace("host/x.json", body)
    assert read_heartbeats(opened(vm, roots(vm, 2))).seen == {}


def test_a_host_with_the_keys_of_one_vm_reads_and_writes_that_one_and_no_other(vm: ShippedVm, tmp_path: Path) -> None:
    vm.run([step({0: 1})])
    keys = roots(vm, 1).of_vms(vm.repository.id, ["web"])
    (tmp_path / "db").mkdir()
    db = ShippedVm(tmp_path / "db", root=vm.root, repository=vm.repository, vm="db").run([step({0: 3})])
    host = opened(vm, keys)
    assert (host.holds("web"), host.holds("db")) == (True, False)
    vm.log = Log(host.vm("web"))
    vm.run([step({1: 5})])
    assert restored(log_with(vm, 1), 2) == vm.points[2]
    with pytest.raises(KeyMissing, match="has no key of VM db; it has keys of web alone"):
        host.vm("db")
    now = datetime(2026, 1, 2, tzinfo=UTC)
    write_heartbeat(opened(vm, roots(vm, 1)), "beta", {n: Seen(seq=1, checked_at=now) for n in ("web", "db")})
    assert sorted(read_heartbeats(host).seen) == ["web"], "the other one's entry is passed over"
    assert db.points
    for secret in keys.vms["web"].generations:
        with pytest.raises(ObjectDamaged, match="does not authenticate"):
            _other_vm_with(vm, keys, secret.secret).read(1)


def _other_vm_with(vm: ShippedVm, keys: Keys, secret: bytes) -> Log:
    """The log of `db`, tried with the key of `web`."""
    from drsync.format.keys import VmKey, VmKeys
    from drsync.repository import VmObjects

    return Log(VmObjects(vm.store, vm.repository.id, "db", VmKeys((VmKey(secret),))))


@settings(deadline=None, max_examples=15)
@given(
    histories(max_steps=7),
    st.lists(st.integers(2, 7), min_size=1, max_size=3),
    st.sets(st.integers(1, 9)),
    st.sets(st.integers(1, 9)),
)
def test_prune_with_newer_keys_than_the_host_leaves_all_that_stays_to_the_host(
    history: list[Step], rotations: Sequence[int], keep: set[int], pruned_behind: set[int]
) -> None:
    """Who prunes has every key; what it writes must be read by a host that has not got the newest one yet."""
    with TemporaryDirectory() as directory:
        vm = PrunedVm(Path(directory))
        generation = 1
        for number, change in enumerate(history, 1):
            if number in rotations:
                generation += 1
                rotate(vm, generation)
            vm.capture(change)
            if number in pruned_behind:
                prune_with(vm, 9, keep)
        host = log_with(vm, generation)
        vm.check(log=host)
        prune_with(vm, 9, keep)
        vm.check(log=host)
        report = verify(host, committed_seq=max(vm.points), read_data=True, progress=NoProgress())
        assert report.problems == []
        vm.capture(history[-1])
        vm.check(log=host)


def prune_with(vm: PrunedVm, generations: int, keep: set[int]) -> None:
    """Prune as a maintenance role that has keys up to this generation does (Pruning.prune)."""
    host = vm.log
    vm.log = beside(log_with(vm, generations))
    vm.prune(keep)
    vm.log = host


def test_what_prune_writes_is_under_keys_that_the_host_and_the_order_of_the_log_allow(tmp_path: Path) -> None:
    vm = PrunedVm(tmp_path)
    for content in (1, 3, 5):
        vm.capture(step({0: content, 1: content}))
    rotate(vm, 2)
    for content in (7, 9):
        vm.capture(step({0: content}))
    prune_with(vm, 9, {3})
    made = {name: header_of(vm, name).get("generation", 1) for name in objects_of(vm.store) if name.startswith("vm/")}
    assert {n: g for name, g in made.items() if (n := name.split("/")[2]) in {"merged", "horizon"}} == {
        "merged": 1,
        "horizon": 2,
    }
    vm.check(log=log_with(vm, 2))


def test_f48_a_horizon_under_an_older_key_than_its_newest_point_is_refused(tmp_path: Path) -> None:
    """Who stole the old keys, and may write, could drop points by it, and have prune delete what it likes."""
    vm = PrunedVm(tmp_path)
    vm.capture(step({0: 1, 1: 3}))
    rotate(vm, 2)
    for content in (7, 9):
        vm.capture(step({0: content}))
    vm.prune(options=USUAL)
    name = names.horizon("web", 1)
    index = vm.log.objects.read_index(name, "horizon", seq=1).index
    thief = vm.log.objects.under(1)
    buffer, sealed = thief.seal_alone(thief.new_header("horizon", 1), index)
    vm.store.delete(name)
    vm.store.create(name, buffer[: sealed.length], sha256=sealed.sha256)
    before = objects_of(vm.store)
    for does in (catalog.points, lambda log: load_image(log, 3)):
        with pytest.raises(ChainBroken, match="horizon 1 is under an older key"):
            does(log_with(vm, 2))
    vm.log = log_with(vm, 2)
    vm.clock.advance(30 * 86400)
    with pytest.raises(ChainBroken, match="horizon 1 is under an older key"):
        vm.prune()
    assert objects_of(vm.store) == before
    report = verify(vm.log, committed_seq=0, read_data=False, progress=NoProgress())
    assert any("under an older key" in str(problem.error) for problem in report.problems)


def test_f48_a_pin_record_under_an_older_key_than_the_one_before_it_is_refused(tmp_path: Path) -> None:
    """Who stole the old keys, and may write, could take pins away, and retention would drop those points."""
    vm = PrunedVm(tmp_path)
    for content in (1, 3, 5):
        vm.capture(step({0: content}))
    pin_point(vm.log.objects, 1, until=None, note="", now=NOON)
    rotate(vm, 2)
    pin_point(vm.log.objects, 2, until=None, note="", now=NOON)
    unpin_point(vm.log.objects, 2, now=NOON)
    assert [record.point for record in read_pins(vm.log.objects).standing()] == [1]
    thief = vm.log.objects.under(1)
    write_pin(thief, read_pins(thief), PinRecord(point=1, pinned=False, until=None, time=NOON))
    forged = names.pin("web", 4)
    with pytest.raises(PinForged, match=f"{forged} is under an older key") as refused:
        read_pins(vm.log.objects)
    assert f"PREFIX/{forged} " in str(refused.value.remedy)
    report = verify(log_with(vm, 2), committed_seq=3, read_data=False, progress=NoProgress())
    assert [type(found.error) for found in report.problems] == [PinForged]
    vm.store.delete(forged)  # as the remedy says
    assert [record.point for record in read_pins(vm.log.objects).standing()] == [1]
