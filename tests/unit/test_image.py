"""The disks of a point: segments laid over each other, window by window."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from faulty import FaultyStore
from forged import change_point, put_pack, reseal
from msgspec import structs
from shipped_vm import ZEROED, DiskStep, ShippedVm, Step, content, reopened, restored

from drsync.errors import ChainBroken, ObjectDamaged, ObjectMissing
from drsync.format.frame import HASH_BYTES
from drsync.format.segment import DiskRows, PointMeta, position
from drsync.image import PointImage, load_image
from drsync.model import BLOCK_SIZE, CaptureId, Kind
from drsync.qcow2 import TABLE_BLOCKS
from drsync.ship import ShipLimits
from drsync.window import NOWHERE, WINDOW_BLOCKS, Window
from drsync.writer import open_writer

EDGES = (0, 1, WINDOW_BLOCKS - 1, WINDOW_BLOCKS, WINDOW_BLOCKS + 1, 2 * WINDOW_BLOCKS - 1, 2 * WINDOW_BLOCKS)
LARGE = (2 * WINDOW_BLOCKS + 3) * BLOCK_SIZE - 512
LAST = 2 * WINDOW_BLOCKS + 2


@pytest.fixture
def vm(tmp_path: Path) -> ShippedVm:
    return ShippedVm(tmp_path)


def step(size_bytes: int, writes: dict[int, int] | None = None, *, whole: bool = False) -> Step:
    return Step(disks={"root": DiskStep(size_bytes=size_bytes, writes=writes or {}, whole=whole)})


def rows_of(blocks: tuple[int, ...], zeros: tuple[tuple[int, int], ...] = ()) -> DiskRows:
    return DiskRows(
        disk="root",
        blocks=np.array(blocks, np.uint32),
        lengths=np.ones(len(blocks), np.uint32),
        hashes=np.zeros((len(blocks), HASH_BYTES), np.uint8),
        zero_first=np.array([first for first, _ in zeros], np.uint32),
        zero_count=np.array([count for _, count in zeros], np.uint32),
    )


def test_a_window_is_what_one_table_of_a_restored_image_maps() -> None:
    assert WINDOW_BLOCKS == TABLE_BLOCKS


def test_the_last_writer_of_a_block_wins_also_at_the_edges_of_windows(vm: ShippedVm) -> None:
    vm.run(
        [
            step(LARGE, {n: 2 * n + 1 for n in (*EDGES, LAST)}),
            step(LARGE, {0: 4, WINDOW_BLOCKS: ZEROED, LAST: 6}),
            step(LARGE, {WINDOW_BLOCKS - 1: ZEROED, WINDOW_BLOCKS: 8, LAST: ZEROED}, whole=True),
            step(LARGE, dict.fromkeys(range(WINDOW_BLOCKS - 40, WINDOW_BLOCKS + 40), ZEROED)),
        ]
    )
    for point, disks in vm.points.items():
        assert restored(vm.log, point) == disks


def test_windows_cover_the_disk_and_know_where_each_block_is(vm: ShippedVm) -> None:
    vm.capture(step(LARGE, dict.fromkeys((*EDGES, LAST), 1)))
    image = load_image(vm.log, 1)
    windows = list(image.windows("root"))
    assert image.window_count("root") == 3
    assert [(w.first_block, len(w.containers)) for w in windows] == [
        (0, WINDOW_BLOCKS),
        (WINDOW_BLOCKS, WINDOW_BLOCKS),
        (2 * WINDOW_BLOCKS, 3),
    ]
    live = [w.first_block + int(n) for w in windows for n in np.flatnonzero(w.containers != NOWHERE)]
    assert live == [*EDGES, LAST]
    assert image.live_bytes("root") == len(live) * BLOCK_SIZE


def test_only_the_packs_that_can_hold_a_window_are_opened_and_only_once(vm: ShippedVm) -> None:
    limits = ShipLimits(object_blocks=2, workers=1)
    writes = dict.fromkeys((*EDGES, LAST), 1)
    vm.capture(Step(disks={"root": DiskStep(size_bytes=LARGE, writes=writes)}, limits=limits))
    faulty = FaultyStore(vm.store)
    log = reopened(vm, faulty)
    image = PointImage(log.objects, list(log.chain(1, 1)))
    before = faulty.calls["get_tail"]
    opened = []
    for index in (2, 2, 0, 1):
        image.window("root", index)
        opened.append(faulty.calls["get_tail"] - before)
    # the packs: (0, 1) (8191, 8192) (8193, 16383) (16384, 16386), the last of them is the segment
    assert opened == [0, 0, 2, 3]


def test_a_window_can_be_asked_for_from_several_threads(vm: ShippedVm) -> None:
    vm.capture(step(LARGE, dict.fromkeys((*EDGES, LAST), 1)))
    image = load_image(vm.log, 1)
    with ThreadPoolExecutor(8) as pool:
        windows = list(pool.map(lambda n: image.window("root", n % 3), range(30)))
    for number, window in enumerate(windows):
        assert np.array_equal(window.offsets, image.window("root", number % 3).offsets)


def test_blocks_behind_the_end_of_a_smaller_disk_do_not_come_back(vm: ShippedVm) -> None:
    vm.run(
        [
            step(8 * BLOCK_SIZE, dict.fromkeys(range(8), 2)),
            step(3 * BLOCK_SIZE + 512),
            step(8 * BLOCK_SIZE, {7: 4}),
        ]
    )
    assert sorted(restored(vm.log, 3)["root"].blocks) == [0, 1, 2, 3, 7]
    assert restored(vm.log, 3)["root"].blocks[3] == content(2, BLOCK_SIZE)[:512].ljust(BLOCK_SIZE, b"\0")
    assert restored(vm.log, 3) == vm.disks


def test_f15_a_disk_that_comes_back_starts_from_nothing(vm: ShippedVm) -> None:
    both = {"root": DiskStep(size_bytes=BLOCK_SIZE), "data": DiskStep(size_bytes=4 * BLOCK_SIZE, writes={0: 1, 1: 3})}
    vm.capture(Step(disks=both))
    vm.capture(Step(disks={"root": both["root"]}))
    vm.capture(Step(disks={**both, "data": DiskStep(size_bytes=4 * BLOCK_SIZE, writes={1: 5})}))
    assert sorted(restored(vm.log, 3)["data"].blocks) == [1]
    assert set(restored(vm.log, 2)) == {"root"}
    assert restored(vm.log, 1) == vm.points[1]


def test_laying_rows_over_a_window_takes_what_lies_in_it() -> None:
    from drsync.window import place

    (placed,) = place([rows_of((3, 9, 12), ((0, 2), (10, 2), (14, 2)))]).values()
    window = Window.empty(8, 6)
    window.containers[:] = 5
    window.lay(placed, 7)
    assert window.containers.tolist() == [5, 7, NOWHERE, NOWHERE, 7, 5]
    assert window.offsets.tolist() == [0, 9, 0, 0, 10, 0]
    window.forget_from(11)
    assert window.containers.tolist() == [5, 7, NOWHERE, NOWHERE, NOWHERE, NOWHERE]
    window.forget_from(2)
    assert (window.containers == NOWHERE).all()


def test_a_log_of_fences_has_no_point(vm: ShippedVm) -> None:
    vm.writer().fence()
    with pytest.raises(ChainBroken, match="no point in it"):
        load_image(vm.log, 1)
    with pytest.raises(ChainBroken, match="no point in it"):
        PointImage(vm.log.objects, [])


def test_a_fence_changes_nothing(vm: ShippedVm) -> None:
    vm.capture(step(4 * BLOCK_SIZE, {0: 1}))
    open_writer(vm.log, "another")
    vm.writer_id = "another"
    vm.capture(step(4 * BLOCK_SIZE, {1: 3}))
    assert restored(vm.log, 3) == vm.disks
    assert load_image(vm.log, 2).seq == 1


def test_a_disk_that_the_point_does_not_have_is_not_there(vm: ShippedVm) -> None:
    vm.capture(step(4 * BLOCK_SIZE, {0: 1}))
    with pytest.raises(KeyError):
        load_image(vm.log, 1).disk("data")


def disk_changed(**fields: object) -> Callable[[PointMeta], PointMeta]:
    return lambda point: structs.replace(point, disks=[structs.replace(point.disks[0], **fields)])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda p: structs.replace(p, base=None), "is an increment, but not of the point before"),
        (lambda p: structs.replace(p, base=CaptureId("f" * 16)), "is an increment, but not of the point before"),
        (disk_changed(name="data"), "is no full, and the point before does not have it"),
        (disk_changed(name="data", kind=Kind.RESYNC), "is no full, and the point before does not have it"),
        (disk_changed(size_bytes=8 * BLOCK_SIZE), "is an increment of another size than the point before has"),
    ],
)
def test_f15_a_point_that_does_not_lie_on_the_one_before_is_refused(
    vm: ShippedVm, change: Callable[[PointMeta], PointMeta], problem: str
) -> None:
    vm.run([step(4 * BLOCK_SIZE, {0: 1}), step(4 * BLOCK_SIZE)])
    reseal(vm.log, 2, change_point(change))
    with pytest.raises(ChainBroken, match=f"broken at 2: disk .* {problem}"):
        load_image(vm.log, 2)
    assert restored(vm.log, 1) == vm.points[1]


def test_f15_the_first_point_must_be_full(vm: ShippedVm) -> None:
    vm.capture(step(4 * BLOCK_SIZE))
    reseal(vm.log, 1, change_point(disk_changed(kind=Kind.RESYNC)))
    with pytest.raises(ChainBroken, match="broken at 1"):
        load_image(vm.log, 1)


@pytest.mark.parametrize(("first", "last"), [(0, 4), (3, 8), (position(1, 0), position(1, 8))])
def test_f14_a_pack_with_blocks_outside_of_where_its_segment_says_is_refused(
    vm: ShippedVm, first: int, last: int
) -> None:
    vm.capture(step(8 * BLOCK_SIZE))
    pack = put_pack(vm.log, [rows_of((2, 5))], [content(1, BLOCK_SIZE)] * 2, first, last)
    reseal(vm.log, 1, lambda meta: meta, [pack])
    image = load_image(vm.log, 1)
    if first >= position(1, 0):
        return  # no reader looks for this disk's blocks there; verify opens all packs and says so
    with pytest.raises(ObjectDamaged, match="outside of where its segment says"):
        image.window("root", 0)


def test_f14_a_pack_of_another_point_is_refused(vm: ShippedVm) -> None:
    vm.capture(step(8 * BLOCK_SIZE))
    pack = put_pack(vm.log, [rows_of((2,))], [content(1, BLOCK_SIZE)], 0, 7)
    for wrong in ({"length": pack.length + 1}, {"index_sha256": bytes(32)}):
        entry = type(pack)(**{name: wrong.get(name, getattr(pack, name)) for name in type(pack).__dataclass_fields__})
        reseal(vm.log, 1, lambda meta: meta, [entry])
        with pytest.raises(ObjectDamaged, match="not the pack that its segment lists"):
            load_image(vm.log, 1).window("root", 0)


def test_f13_a_pack_with_blocks_that_the_point_does_not_have_is_refused(vm: ShippedVm) -> None:
    vm.capture(step(8 * BLOCK_SIZE))
    pack = put_pack(vm.log, [rows_of((2, 8))], [content(1, BLOCK_SIZE)] * 2, 0, 8)
    reseal(vm.log, 1, lambda meta: meta, [pack])
    with pytest.raises(ObjectDamaged, match="outside of the disk"):
        load_image(vm.log, 1).window("root", 0)


def test_a_missing_pack_is_named(vm: ShippedVm) -> None:
    vm.capture(step(8 * BLOCK_SIZE))
    pack = put_pack(vm.log, [rows_of((2,))], [content(1, BLOCK_SIZE)], 0, 7)
    missing = type(pack)(object_id=bytes(16), length=100, index_sha256=bytes(32), first=0, last=7)
    reseal(vm.log, 1, lambda meta: meta, [missing])
    with pytest.raises(ObjectMissing, match=f"vm/web/pack/{'0' * 32}"):
        load_image(vm.log, 1).window("root", 0)


def test_a_restore_that_fails_gives_its_target_up(vm: ShippedVm) -> None:
    vm.capture(step(20 * BLOCK_SIZE, {n: 2 * n + 2 for n in range(20)}))
    key = next(info.key for info in vm.store.list("vm/web/pack/"))
    vm.store.delete(key)
    with pytest.raises(ObjectMissing, match=key):
        restored(vm.log, 1)  # which sees that the target was abandoned, and not finished
