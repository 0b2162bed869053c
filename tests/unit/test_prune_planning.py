"""What is worth to be taken out: pure, and fast."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from pruned_vm import PrunedVm
from shipped_vm import ZEROED, DiskStep, Step

from drsync.format.frame import HASH_BYTES
from drsync.format.segment import DiskMeta, DiskRows, PointMeta, SegmentMeta, pack_table
from drsync.log import Segment
from drsync.model import BLOCK_SIZE, CaptureId, Consistency, Kind
from drsync.packs import read_pack
from drsync.prune.liveness import LinkLife, Placed, lives_of
from drsync.prune.planning import FREE, Prices, plan_runs
from drsync.units import GiB
from drsync.window import place


def no_packs(link: Segment, numbers: Sequence[int]) -> Iterator[Placed]:
    assert not numbers
    return iter(())


def link(
    seq: int,
    blocks: Sequence[int],
    *,
    zeros: Sequence[tuple[int, int]] = (),
    size_blocks: int = 1000,
    kind: Kind = Kind.INCREMENTAL,
    frame_bytes: int = 20_000,
) -> Segment:
    """A segment as the log has it, with rows of one disk, and no bytes."""
    rows = DiskRows(
        disk="root",
        blocks=np.array(blocks, np.uint32),
        lengths=np.full(len(blocks), frame_bytes, np.uint32),
        hashes=np.full((len(blocks), HASH_BYTES), seq % 256, np.uint8),
        zero_first=np.array([first for first, _ in zeros], np.uint32),
        zero_count=np.array([count for _, count in zeros], np.uint32),
    )
    disk = DiskMeta(
        name="root", size_bytes=size_blocks * BLOCK_SIZE, kind=kind, reason="", changed_bytes=0, persistent_bitmap=True
    )
    point = PointMeta(
        capture=CaptureId(f"{seq:016x}"),
        base=CaptureId(f"{seq - 1:016x}"),
        time="2026-01-02T03:04:05+00:00",
        consistency=Consistency.CRASH,
        disks=[disk],
        definition={},
    )
    meta = SegmentMeta(seq=seq, epoch=1, writer="w", previous="", point=point, packs=0, contents=[rows.extent])
    return Segment(
        name=f"vm/web/log/{seq:016x}",
        object_id=seq.to_bytes(16, "big"),
        meta=meta,
        packs=pack_table([]),
        rows=[rows],
        index_sha256=bytes(32),
        frames_end=8 + len(blocks) * frame_bytes,
        length=len(blocks) * frame_bytes + 1500,
    )


def alive(lives: Sequence[LinkLife]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Blocks and zero runs that are alive, of each link."""
    return [
        (
            [int(b) for rows in life.own.rows.values() for b in rows.blocks],
            [z for rows in life.own.rows.values() for z in zip(rows.zero_first, rows.zero_count, strict=True)],
        )
        for life in lives
    ]


def test_a_row_is_alive_if_the_next_point_that_stays_shows_it() -> None:
    links = [link(1, [1, 2, 3, 4]), link(2, [2, 5]), link(3, [3, 6], zeros=[(4, 1)]), link(4, [6])]
    assert alive(lives_of(links, no_packs)) == [([1], []), ([2, 5], []), ([3], [(4, 1)])]


def test_zero_runs_are_alive_in_parts() -> None:
    links = [link(1, [], zeros=[(0, 100)]), link(2, [10, 50]), link(3, [], zeros=[(20, 5)]), link(4, [99])]
    assert alive(lives_of(links, no_packs)) == [
        ([], [(0, 10), (11, 9), (25, 25), (51, 48)]),
        ([10, 50], []),
        ([], [(20, 5)]),
    ]


def test_what_a_disk_lost_by_shrinking_is_dead_also_when_it_grew_again() -> None:
    links = [
        link(1, [1, 90], zeros=[(95, 5)], size_blocks=100),
        link(2, [2], size_blocks=50, kind=Kind.RESYNC),
        link(3, [], size_blocks=100, kind=Kind.RESYNC),
        link(4, [3], size_blocks=100),
    ]
    assert alive(lives_of(links, no_packs)) == [([1], []), ([2], []), ([], [])]


def test_behind_a_full_nothing_older_is_alive() -> None:
    links = [link(1, [1]), link(2, [2], kind=Kind.FULL), link(3, [3]), link(4, [4])]
    assert alive(lives_of(links, no_packs)) == [([], []), ([2], []), ([3], [])]
    assert alive(lives_of([link(1, [1]), link(2, [2], kind=Kind.FULL)], no_packs)) == [([], [])]


def test_neighbours_are_taken_out_together() -> None:
    links = [link(n, [0, 1, 2, 3, 10 + n]) for n in range(1, 11)]
    (run,) = plan_runs(lives_of(links, no_packs), Prices())
    assert (run.first, run.last, run.copied_blocks) == (1, 9, 9)
    assert run.copied_bytes == 9 * 20_000
    assert run.freed_bytes == pytest.approx(9 * (4 * 20_000 + 1500), rel=0.01)


def test_what_is_mostly_alive_stays() -> None:
    links = [link(n, [0, 10 * n, 10 * n + 1, 10 * n + 2]) for n in range(1, 11)]
    assert plan_runs(lives_of(links, no_packs), Prices()) == []
    assert plan_runs(lives_of(links, no_packs), FREE) == []


def test_copying_has_to_pay_within_a_month() -> None:
    links = [link(1, [0, 1, 2, 3]), link(2, [0, 1, 2])]
    (run,) = plan_runs(lives_of(links, no_packs), FREE)
    prices = Prices()
    assert run.saved(prices) == pytest.approx(run.freed_bytes / GiB * 0.023)
    assert run.cost(prices) > run.saved(prices)
    assert plan_runs(lives_of(links, no_packs), prices) == []
    large = [link(1, range(400)), link(2, range(350))]
    (run,) = plan_runs(lives_of(large, no_packs), prices)
    assert run.copied_blocks == 50
    far = Prices(transfer_gib=0.09)
    assert run.cost(far) > run.cost(prices)
    many = [link(1, range(400)), link(2, range(210))]
    assert plan_runs(lives_of(many, no_packs), prices)
    assert plan_runs(lives_of(many, no_packs), far) == []


def test_a_run_ends_where_disks_change_or_are_sent_in_full() -> None:
    links = [
        link(1, [1]),
        link(2, [1], kind=Kind.FULL),
        link(3, [1]),
        link(4, [1], size_blocks=900, kind=Kind.RESYNC),
        link(5, [1], size_blocks=900),
        link(6, [1], size_blocks=900),
    ]
    runs = plan_runs(lives_of(links, no_packs), FREE)
    assert [(run.first, run.last) for run in runs] == [(1, 1), (2, 3), (4, 5)]


def test_packs_that_are_not_needed_are_not_opened(tmp_path: Path) -> None:
    """What a full that stays has told of is settled without a look into its packs."""
    vm = PrunedVm(tmp_path)
    size = 14 * BLOCK_SIZE
    vm.capture(Step(disks={"root": DiskStep(size_bytes=size, writes={n: 2 * n + 2 for n in range(14)})}))
    vm.capture(Step(disks={"root": DiskStep(size_bytes=size, writes={0: 3, 1: ZEROED}, whole=True)}, compare=False))
    opened: list[int] = []

    def read(of: Segment, numbers: Sequence[int]) -> Iterator[Placed]:
        opened.extend(numbers)
        point = of.meta.point
        assert point is not None
        return (place(read_pack(vm.log.objects, of.packs.entry(n), point.disks)) for n in numbers)

    (life,) = lives_of(list(vm.log.chain(1, 2)), read)
    assert opened == []
    assert len(life.packs) > 1
    assert all(pack.is_dead for pack in life.packs)


def test_an_interval_of_a_thousand_points_is_planned_in_a_moment() -> None:
    """A VM with a point a minute, of which a day's 1,440 become one: planning is not what a prune takes long for."""
    random = np.random.default_rng(1)
    links = [
        link(n, np.unique(random.integers(0, 1_600_000, 57)).tolist(), size_blocks=1_638_400) for n in range(1, 1441)
    ]
    started_s = time.process_time()
    plan_runs(lives_of(links, no_packs), Prices())
    assert time.process_time() - started_s < 2
