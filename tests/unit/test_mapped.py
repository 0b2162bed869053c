"""Points read by block maps: the same as by the walk over the log, whatever is wrong with the maps."""

import logging
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from faulty import Effect, Fault, FaultyStore
from forged import rehashed
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from shipped_vm import (
    ZEROED,
    DiskStep,
    OracleDisk,
    ShippedVm,
    Step,
    objects_of,
    reopened,
    restored,
    restored_disk,
    store_of,
)
from strategies import histories

from drsync import mapped, mapping
from drsync.errors import ChainBroken, ObjectDamaged, ObjectMissing, StoreUnavailable
from drsync.format import Malformed, names, seal
from drsync.format.blockmap import MAX_OLDER_MAPS, THIS_MAP, MapMeta, decode_map, encode_map
from drsync.image import PointImage, load_image
from drsync.log import Log
from drsync.mapped import listed_maps, load_mapped_image, newest_stretch, read_map
from drsync.mapping import MapPolicy, keep_mapped, write_map
from drsync.model import BLOCK_SIZE
from drsync.window import WINDOW_BLOCKS

LARGE = (3 * WINDOW_BLOCKS + 5) * BLOCK_SIZE


@pytest.fixture
def vm(tmp_path: Path) -> ShippedVm:
    return ShippedVm(tmp_path)


def step(writes: dict[int, int], size_bytes: int = LARGE, *, whole: bool = False) -> Step:
    return Step(disks={"root": DiskStep(size_bytes=size_bytes, writes=writes, whole=whole)})


def present(log: Log) -> set[str]:
    return {name for name, _ in listed_maps(log.objects)}


def make_map(log: Log, seq: int) -> str:
    return write_map(log, seq, present=present(log))


def by_map(log: Log, point: int) -> dict[str, OracleDisk]:
    """What a point restores to by its maps."""
    image = load_mapped_image(log, point)
    assert image.seq == point
    return {disk.name: restored_disk(image, log, disk.name) for disk in image.point.disks}


def uses_a_map(log: Log, point: int) -> bool:
    stretch = newest_stretch(log, point)
    return stretch.ground is not None and stretch.ground.block_map is not None


@settings(deadline=None, max_examples=40)
@given(histories(max_steps=8), st.sets(st.integers(1, 20)))
def test_every_point_restores_by_maps_as_without(history: list[Step], mapped_points: set[int]) -> None:
    with TemporaryDirectory() as directory:
        vm = ShippedVm(Path(directory))
        for change in history:
            seq = vm.capture(change).seq
            if seq in mapped_points:
                make_map(vm.log, seq)
        for point, disks in vm.points.items():
            assert by_map(vm.log, point) == restored(vm.log, point) == disks
            assert uses_a_map(vm.log, point) == any(seq in mapped_points for seq in vm.points if seq <= point)


def test_a_large_disk_that_changes_everywhere_restores_by_maps_as_without(vm: ShippedVm) -> None:
    chance = random.Random(7)
    edges = [0, WINDOW_BLOCKS - 1, WINDOW_BLOCKS, 2 * WINDOW_BLOCKS - 1, 2 * WINDOW_BLOCKS, 3 * WINDOW_BLOCKS]
    sizes = [LARGE, LARGE, WINDOW_BLOCKS * BLOCK_SIZE, LARGE, (WINDOW_BLOCKS + 1) * BLOCK_SIZE]
    for n in range(15):
        size = sizes[n % len(sizes)]
        blocks = [b for b in (*edges, chance.randrange(3 * WINDOW_BLOCKS)) if b < size // BLOCK_SIZE]
        writes = {b: chance.choice([ZEROED, 1, 2, 3]) for b in chance.sample(blocks, min(3, len(blocks)))}
        seq = vm.capture(step(writes, size, whole=n % 4 == 3)).seq
        if n % 2:
            make_map(vm.log, seq)
    for point, disks in vm.points.items():
        assert by_map(vm.log, point) == disks


def test_pages_that_did_not_change_are_not_written_again(vm: ShippedVm) -> None:
    vm.run([step({0: 1, WINDOW_BLOCKS: 1, 2 * WINDOW_BLOCKS: 1}), step({5: 2})])
    first = read_map(vm.log.objects, make_map(vm.log, 1))
    second = read_map(vm.log.objects, make_map(vm.log, 2))
    assert first.table("root").sources.tolist() == [1, 1, 1, 0]
    assert second.table("root").sources.tolist() == [1, 2, 2, 0]
    assert second.older.ids.tobytes() == first.object_id
    assert second.older.numbers.tolist() == [1]
    vm.capture(step({3 * WINDOW_BLOCKS + 1: 3}))
    third = read_map(vm.log.objects, make_map(vm.log, 3))
    assert third.table("root").sources.tolist() == [2, 3, 3, 1]
    assert {third.source("web", n)[0] for n in (2, 3)} == {first.name, second.name}
    assert by_map(vm.log, 3) == vm.disks


def test_zeroed_blocks_make_their_page_new(vm: ShippedVm) -> None:
    vm.run([step({0: 1, WINDOW_BLOCKS: 1}), step({WINDOW_BLOCKS: ZEROED})])
    make_map(vm.log, 1)
    assert read_map(vm.log.objects, make_map(vm.log, 2)).table("root").sources.tolist() == [2, 0, 0, 0]
    assert by_map(vm.log, 2) == vm.disks


@pytest.mark.parametrize("size", [WINDOW_BLOCKS * BLOCK_SIZE, (WINDOW_BLOCKS + 1) * BLOCK_SIZE, 2 * LARGE])
def test_a_disk_of_another_size_has_its_last_pages_anew(vm: ShippedVm, size: int) -> None:
    vm.run([step({0: 1, WINDOW_BLOCKS: 1, 2 * WINDOW_BLOCKS: 1}), step({}, size), step({}, LARGE)])
    make_map(vm.log, 1)
    make_map(vm.log, 3)
    assert by_map(vm.log, 3) == vm.points[3]
    make_map(vm.log, 2)
    assert by_map(vm.log, 2) == vm.points[2]


def test_a_map_that_leans_on_many_others_is_written_anew(vm: ShippedVm) -> None:
    """One page is rewritten at each point, another one never."""
    size = (MAX_OLDER_MAPS + 6) * WINDOW_BLOCKS * BLOCK_SIZE
    vm.capture(step({n * WINDOW_BLOCKS: 1 for n in range(MAX_OLDER_MAPS + 6)}, size))
    leans = []
    for n in range(MAX_OLDER_MAPS + 5):
        seq = vm.capture(step({n * WINDOW_BLOCKS: 3}, size)).seq
        leans.append(len(read_map(vm.log.objects, make_map(vm.log, seq)).older))
    assert leans == [*range(MAX_OLDER_MAPS + 1), 0, 1, 2, 3]
    assert by_map(vm.log, seq) == vm.disks


def test_a_restore_by_a_map_reads_little(vm: ShippedVm) -> None:
    vm.run(step({n % 8: n, 2 * WINDOW_BLOCKS + n: n}) for n in range(1, 41))
    make_map(vm.log, 40)
    vm.run([step({1: 50}), step({2: 51})])

    def reads(load: Callable[[Log, int], PointImage]) -> int:
        counting = FaultyStore(vm.store)
        image = load(reopened(vm, counting), 42)
        image.live_bytes("root")
        return counting.calls["get_tail"] + counting.calls["get_range"]

    assert reads(load_image) >= 42
    assert (
        reads(load_mapped_image) <= 6
    )  # no horizon, the map, segments 40 to 42, one group of pages; packs are small here


def test_pages_are_read_when_they_are_needed_and_once(vm: ShippedVm) -> None:
    vm.capture(step({n * WINDOW_BLOCKS: 1 for n in range(4)}))
    make_map(vm.log, 1)
    counting = FaultyStore(vm.store)
    image = load_mapped_image(reopened(vm, counting), 1)
    before = counting.calls["get_range"]
    for index in (0, 1, 2, 3, 0):
        image.window("root", index)
    assert counting.calls["get_range"] == before + 1


def test_a_point_that_was_read_by_a_map_has_no_hashes(vm: ShippedVm) -> None:
    vm.capture(step({0: 1}))
    assert load_mapped_image(vm.log, 1).has_hashes  # no map: it was the walk
    make_map(vm.log, 1)
    assert not load_mapped_image(vm.log, 1).has_hashes
    assert load_image(vm.log, 1).has_hashes
    assert np.count_nonzero(load_mapped_image(vm.log, 1).window("root", 0).hashes) == 0


def three_points_two_maps(vm: ShippedVm) -> list[str]:
    vm.run([step({0: 1, WINDOW_BLOCKS: 2}), step({0: 4}), step({WINDOW_BLOCKS: 6})])
    return [make_map(vm.log, 1), make_map(vm.log, 2)]


@pytest.mark.parametrize("gone", [[0], [1], [0, 1]])
def test_f22_a_missing_map_is_done_without(vm: ShippedVm, gone: list[int]) -> None:
    """Map 2 leans on map 1."""
    maps = three_points_two_maps(vm)
    lacking = {name: data for name, data in objects_of(vm.store).items() if name not in {maps[n] for n in gone}}
    log = reopened(vm, store_of(lacking))
    for point, disks in vm.points.items():
        assert by_map(log, point) == disks


@pytest.mark.parametrize("which", [0, 1])
def test_f22_a_map_that_is_damaged_anywhere_is_done_without(vm: ShippedVm, which: int) -> None:
    name = three_points_two_maps(vm)[which]
    objects = objects_of(vm.store)
    data = objects[name]
    for at in range(8, len(data), 7):
        damaged = rehashed(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert by_map(reopened(vm, store_of(objects | {name: damaged})), 3) == vm.points[3]
    for length in (0, 8, 57, len(data) // 2, len(data) - 1):
        assert by_map(reopened(vm, store_of(objects | {name: data[:length]})), 3) == vm.points[3]


def test_f22_what_is_done_without_is_told(vm: ShippedVm, caplog: pytest.LogCaptureFixture) -> None:
    maps = three_points_two_maps(vm)
    objects = objects_of(vm.store)
    data = objects[maps[0]]
    log = reopened(vm, store_of(objects | {maps[0]: data[:8] + bytes([data[8] ^ 1]) + data[9:], maps[1]: b"junk"}))
    with caplog.at_level(logging.WARNING):
        assert by_map(log, 3) == vm.points[3]
    told = [record.getMessage() for record in caplog.records]
    assert any(f"passed over a block map: object {maps[1]} is damaged" in line for line in told)
    assert any(f"reads the whole log instead of a block map: object {maps[0]} is damaged" in line for line in told)


def test_f22_maps_that_change_places_are_done_without(vm: ShippedVm) -> None:
    maps = three_points_two_maps(vm)
    objects = objects_of(vm.store)
    swapped = objects | {maps[0]: objects[maps[1]], maps[1]: objects[maps[0]]}
    for point, disks in vm.points.items():
        log = reopened(vm, store_of(swapped))
        assert not uses_a_map(log, point)
        assert by_map(log, point) == disks


def test_f23_a_map_under_the_number_of_another_point_is_refused(vm: ShippedVm) -> None:
    maps = three_points_two_maps(vm)
    moved = names.block_map(vm.vm, 3, names.object_id_of(maps[1]))
    log = reopened(vm, store_of(objects_of(vm.store) | {moved: objects_of(vm.store)[maps[1]]}))
    with pytest.raises(ObjectDamaged, match="not what its name says"):
        read_map(log.objects, moved)
    assert by_map(log, 3) == vm.points[3]


def test_f23_a_map_of_a_log_that_was_rolled_back_and_written_anew_is_done_without(vm: ShippedVm) -> None:
    vm.run([step({0: 1}), step({1: 2})])
    behind = objects_of(vm.store)
    vm.capture(step({0: 3}))
    stale = make_map(vm.log, 3)
    kept = objects_of(vm.store)[stale]

    store = store_of(behind | {stale: kept})
    vm.log = reopened(vm, store)
    vm.points.pop(3)
    vm.captures.pop()
    vm.disks = {name: disk.copy() for name, disk in vm.points[2].items()}
    assert by_map(vm.log, 2) == vm.points[2]  # the map is of a later point than there is
    vm.capture(step({0: 5}))
    assert not uses_a_map(vm.log, 3)
    assert by_map(vm.log, 3) == vm.points[3]
    make_map(vm.log, 3)
    assert by_map(vm.log, 3) == vm.points[3]


def reseal_map(log: Log, name: str, change: Callable[[MapMeta], MapMeta]) -> str:
    """Store the map `name` with other metadata, as a holder of the key could."""
    objects = log.objects
    data = objects.store.get(name, limit_bytes=2**30)
    opened = objects.read_index(name, "map", seq=names.seq_of_map(name))
    meta, older, tables = decode_map(opened.index, opened.frames_end)
    index = encode_map(change(meta), older, tables)
    buffer = memoryview(bytearray(opened.frames_end + seal.sealed_bound(len(index))))
    buffer[: opened.frames_end] = data[: opened.frames_end]
    sealed = seal.seal(buffer, opened.frames_end, opened.header, index, objects.object_keys(opened.header))
    objects.store.replace(name, bytes(buffer[: sealed.length]))
    return name


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: structs.replace(m, segment="00" * 32), "of another segment 2 than the log has"),
        (lambda m: structs.replace(m, segment=""), "of another segment 2 than the log has"),
        (lambda m: structs.replace(m, seq=3), "its index is of point 3"),
        (lambda m: structs.replace(m, disks=[structs.replace(m.disks[0], name="data")]), "not the point's"),
        (lambda m: structs.replace(m, disks=[structs.replace(m.disks[0], size_bytes=LARGE - 1)]), "not the point's"),
    ],
)
def test_f23_a_map_that_does_not_fit_its_point_is_done_without(
    vm: ShippedVm, change: Callable[[MapMeta], MapMeta], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    maps = three_points_two_maps(vm)
    vm.store.replace(maps[0], b"so that there is no other map")
    reseal_map(vm.log, maps[1], change)
    with caplog.at_level(logging.WARNING):
        assert by_map(vm.log, 3) == vm.points[3]
    assert any(problem in record.getMessage() for record in caplog.records)


def test_f22_a_map_of_a_fence_is_done_without(vm: ShippedVm) -> None:
    vm.run([step({0: 1}), Step(disks=step({0: 3}).disks, taken_over=True)])
    with pytest.raises(Malformed, match="segment 2 is no point"):
        make_map(vm.log, 2)
    make_map(vm.log, 3)
    assert newest_stretch(vm.log, 3).parent == 1
    assert by_map(vm.log, 3) == vm.points[3]


def test_f16_the_chain_is_checked_behind_the_map(vm: ShippedVm, tmp_path: Path) -> None:
    three_points_two_maps(vm)
    fork = ShippedVm(tmp_path, root=vm.root, repository=vm.repository)
    fork.writer_id, fork.captures = vm.writer_id, vm.captures[:2]
    fork.points, fork.disks = {2: vm.points[2]}, {name: disk.copy() for name, disk in vm.points[2].items()}
    objects = objects_of(vm.store)
    without_2 = {name: data for name, data in objects.items() if name != names.segment("web", 2)}
    with pytest.raises(ObjectMissing, match="web/log/0000000000000002"):
        load_mapped_image(reopened(vm, store_of(without_2)), 3)
    vm.run([step({0: 8}), step({0: 9})])
    forked = store_of({name: data for name, data in objects.items() if name != names.segment("web", 3)})
    fork.log = reopened(vm, forked)
    fork.run([step({0: 5})])
    mixed = objects_of(vm.store) | {names.segment("web", 3): objects_of(forked)[names.segment("web", 3)]}
    with pytest.raises(ChainBroken, match="broken at 4: it does not follow"):
        load_mapped_image(reopened(vm, store_of(mixed)), 5)


def test_junk_maps_cost_few_reads(vm: ShippedVm) -> None:
    vm.capture(step({0: 1}))
    junk = {names.block_map("web", 1, bytes([n]) * 16): b"junk" for n in range(50)}
    counting = FaultyStore(store_of(objects_of(vm.store) | junk | {"vm/web/map/nonsense": b""}))
    assert by_map(reopened(vm, counting), 1) == vm.points[1]
    assert counting.calls["get_tail"] <= mapped.MAX_TRIES + 2  # the segment, and the horizon that is not there


def test_a_store_that_does_not_answer_is_no_damaged_map(vm: ShippedVm) -> None:
    three_points_two_maps(vm)
    with FaultyStore(vm.store, Fault("get_range", key="vm/web/map/")) as faulty:
        image = load_mapped_image(reopened(vm, faulty), 3)
        with pytest.raises(StoreUnavailable):
            image.window("root", 0)
        assert image.window("root", 0).first_block == 0


def test_a_map_that_leans_on_a_missing_one_is_not_built_upon(vm: ShippedVm) -> None:
    maps = three_points_two_maps(vm)
    log = reopened(vm, store_of({k: v for k, v in objects_of(vm.store).items() if k != maps[0]}))
    third = read_map(log.objects, make_map(log, 3))
    assert len(third.older) == 0
    assert by_map(log, 3) == vm.points[3]
    assert uses_a_map(log, 3)


def test_when_a_map_is_due() -> None:
    policy = MapPolicy(every=64, step=8)
    assert [seq for seq in range(1, 200) if policy.is_due(seq, 0)] == list(range(64, 200, 8))
    assert next(seq for seq in range(64, 200) if policy.is_due(seq, 64)) == 128
    assert not policy.is_due(129, 64)
    assert not policy.is_due(128, 65)


def test_a_map_is_written_when_it_is_due(vm: ShippedVm) -> None:
    policy = MapPolicy(every=4, step=2)
    written = []
    for n in range(1, 14):
        segment = vm.capture(step({n: n}))
        if keep_mapped(vm.log, segment, policy) is not None:
            written.append(segment.seq)
    assert written == [4, 8, 12]
    assert sorted(seq for _, seq in listed_maps(vm.log.objects)) == written
    for point, disks in vm.points.items():
        assert by_map(vm.log, point) == disks


@pytest.mark.parametrize("effect", [Effect.REFUSED, Effect.REPLY_LOST, Effect.CUT, Effect.CORRUPT])
def test_a_map_that_could_not_be_written_right_harms_nothing(vm: ShippedVm, effect: Effect) -> None:
    vm.run([step({0: 1}), step({1: 2})])
    with FaultyStore(vm.store, Fault("create", key="vm/web/map/", effect=effect, at=20)) as faulty:
        with suppress(StoreUnavailable):
            make_map(reopened(vm, faulty), 2)
    vm.capture(step({2: 3}))
    assert by_map(vm.log, 3) == vm.points[3]
    make_map(vm.log, 3)
    assert by_map(vm.log, 3) == vm.points[3]


def test_a_map_that_would_be_too_large_is_not_written(vm: ShippedVm) -> None:
    from drsync.format.blockmap import MapDisk

    vm.capture(step({0: 1}, size_bytes=2**32 * BLOCK_SIZE))
    making = mapping._Making(vm.log, newest_stretch(vm.log, 1), 1)
    assert making._pages(MapDisk(name="root", size_bytes=0)) == 2**19
    many = {f"d{n}": DiskStep(size_bytes=2**32 * BLOCK_SIZE) for n in range(12)}
    vm.capture(Step(disks=many))
    with pytest.raises(Malformed, match="more pages"):
        make_map(vm.log, 2)
    assert present(vm.log) == set()


def test_a_source_names_the_map_that_it_means(vm: ShippedVm) -> None:
    maps = [read_map(vm.log.objects, name) for name in three_points_two_maps(vm)]
    assert maps[1].source("web", THIS_MAP) == (maps[1].name, maps[1].object_id, 2, 1)
    assert maps[1].source("web", THIS_MAP + 1) == (maps[0].name, maps[0].object_id, 1, 1)


def test_a_point_in_front_of_all_maps_is_walked(vm: ShippedVm) -> None:
    vm.run([step({0: 1}), step({1: 1})])
    make_map(vm.log, 2)
    assert not uses_a_map(vm.log, 1)
    assert restored_disk(load_mapped_image(vm.log, 1), vm.log, "root") == vm.points[1]["root"]
