"""Every source keeps the rules C1 to C8 of drsync/source/__init__.py: the reference in memory, and real QEMU.

What layers hold is checked with qemu-img (see source_bench.Replica). C3, and what else
happens when a capture fails, is in test_source_failures.py.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from source_bench import KIB, MIB, OTHER_TAG, SIZES, TAG, SourceBench, layer_map, present_blocks
from source_protection import BOTH_FULL, BOTH_INCREMENTAL, Protection, ours

from drsync.errors import CaptureFailed, DiskMissing, DrsyncError, SourceLost, SpoolUnusable
from drsync.model import Consistency, Kind, new_capture_id
from drsync.source import Base

pytestmark = pytest.mark.qemu

BLOCK = 64 * KIB


def test_the_first_capture_is_a_full_and_holds_all_that_was_written(bench: SourceBench, protection: Protection) -> None:
    layers = protection.point()
    assert protection.kinds() == BOTH_FULL
    assert {survey.reason for survey in protection.surveys} == {"there is no point yet"}
    assert [survey.name for survey in protection.surveys] == sorted(SIZES)
    assert {survey.name: survey.size_bytes for survey in protection.surveys} == SIZES
    assert {survey.persistent for survey in protection.surveys} == {bench.keeps_bitmaps}
    assert protection.replica.contents() == bench.contents()
    assert {path.stat().st_mode & 0o777 for path in layers.values()} == {0o600}


def test_a_result_tells_instant_consistency_and_definition(bench: SourceBench, protection: Protection) -> None:
    before = datetime.now(UTC)
    protection.point()
    result = protection.result
    assert result is not None
    assert before <= result.time <= datetime.now(UTC)
    assert result.time.tzinfo is UTC
    assert result.consistency is Consistency.CRASH
    assert result.definition


def test_an_increment_holds_exactly_what_was_written_since(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    bench.write("root", 3 * BLOCK + 512, 1024, 7)
    bench.write("root", 10 * BLOCK - 512, 1024, 8)
    layers = protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert {survey.reason for survey in protection.surveys} == {""}
    assert present_blocks(layers["root"]) == {3, 9, 10}
    assert present_blocks(layers["data"]) == set()
    assert {survey.name: survey.copy_bytes for survey in protection.surveys} == {"root": 3 * BLOCK, "data": 0}
    assert protection.replica.contents() == bench.contents()


def test_c2_zeros_and_discards_are_explicit_in_an_increment(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    bench.zero("root", 4 * BLOCK, 2 * BLOCK)
    bench.discard("root", 8 * BLOCK, 3 * BLOCK)
    bench.write("root", 16 * BLOCK, BLOCK, 0)
    layers = protection.point()
    assert present_blocks(layers["root"]) == {4, 5, 8, 9, 10, 16}
    zeros = [extent for extent in layer_map(layers["root"]) if extent["present"] and extent["zero"]]
    assert sum(extent["length"] for extent in zeros) >= 5 * BLOCK
    assert protection.replica.contents() == bench.contents()


def test_c2_the_short_last_block_is_captured(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    size = SIZES["data"]
    bench.write("data", size - 512, 512, 9)
    layers = protection.point()
    assert present_blocks(layers["data"]) == {size // BLOCK}
    bench.zero("data", size - 4 * KIB, 4 * KIB)
    layers = protection.point()
    assert present_blocks(layers["data"]) == {size // BLOCK}
    assert protection.replica.contents() == bench.contents()


def test_c2_what_is_written_while_a_capture_copies_is_in_the_next_one(
    bench: SourceBench, protection: Protection
) -> None:
    protection.point()
    bench.write("root", 0, 2 * MIB, 2)
    before = bench.contents()
    with bench.open() as source:
        with bench.while_copying(lambda: bench.write("root", 2 * MIB - BLOCK, 2 * BLOCK, 3)):
            point, layers = protection.capture(source)
        protection.commit(point, layers)
        source.release(point.capture)
    assert protection.replica.contents() == before
    layers = protection.point()
    assert present_blocks(layers["root"]) == {31, 32}
    assert protection.replica.contents() == bench.contents()


def test_both_generations_record_until_the_newer_one_is_committed(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    first = protection.base
    assert first is not None
    with bench.open() as source:
        point, layers = protection.capture(source)
        expected = {ours(bench, disk, capture) for disk in SIZES for capture in (first.capture, point.capture)}
        assert bench.bitmaps() == expected
        protection.commit(point, layers)
        source.release(point.capture)
    assert bench.bitmaps() == {ours(bench, disk, point.capture) for disk in SIZES}


def test_c1_all_disks_are_of_one_instant(bench: SourceBench, protection: Protection) -> None:
    """A guest writes a mark to root, then to data, over and over: no layer may have data ahead of root."""
    for disk, size in SIZES.items():
        bench.zero(disk, 0, size)
    protection.point()
    stop = threading.Event()

    def guest() -> None:
        for mark in range(4096):
            bench.write("root", mark * 512, 512, 1)
            bench.write("data", mark * 512, 512, 1)
            if stop.wait(0.001):
                return

    thread = threading.Thread(target=guest)
    thread.start()
    try:
        seen = []
        for _ in range(6):
            protection.point()
            contents = protection.replica.contents()
            seen.append((contents["root"].count(1), contents["data"].count(1)))
    finally:
        stop.set()
        thread.join()
    assert all(data <= root <= data + 512 for root, data in seen), seen
    assert seen[-1][0] > seen[0][0], "the guest wrote nothing between the captures"


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("fate", ["present", "absent", "inconsistent"])
def test_after_a_crash_of_drsync_the_next_point_is_right(
    bench: SourceBench, protection: Protection, fate: str, committed: bool
) -> None:
    protection.point()
    bench.write("root", 0, 2 * BLOCK, 2)
    source = bench.open()
    point, layers = protection.capture(source)
    source.close()  # killed: nothing was released
    if committed:
        protection.commit(point, layers)
    bench.write("root", BLOCK, 2 * BLOCK, 3)
    break_bitmaps(bench, protection.base, fate)
    bench.write("data", 0, BLOCK, 4)
    before = protection.survey()
    assert before == protection.survey(), "asking again changes nothing"
    protection.point()
    assert protection.surveys == before
    assert protection.kinds() == (BOTH_INCREMENTAL if fate == "present" else BOTH_FULL)
    assert protection.replica.contents() == bench.contents()
    assert protection.base is not None
    assert bench.bitmaps() == {ours(bench, disk, protection.base.capture) for disk in SIZES}


def break_bitmaps(bench: SourceBench, base: Base | None, fate: str) -> None:
    assert base is not None
    if fate == "absent":
        for disk in SIZES:
            bench.remove_bitmap(disk, ours(bench, disk, base.capture).removeprefix(f"{disk}/"))
    elif fate == "inconsistent":  # on raw disks the bitmaps are gone then
        bench.restart()
        bench.crash()
        bench.start()


def test_bitmaps_survive_a_clean_restart_where_they_can_be_stored(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    bench.write("root", 0, BLOCK, 2)
    bench.restart()
    bench.write("root", 5 * BLOCK, BLOCK, 3)
    layers = protection.point()
    if bench.keeps_bitmaps:
        assert protection.kinds() == BOTH_INCREMENTAL
        assert present_blocks(layers["root"]) == {0, 5}
    else:
        assert protection.kinds() == BOTH_FULL
        assert {survey.reason for survey in protection.surveys} == {bench.missing}
    assert protection.replica.contents() == bench.contents()


def test_after_a_power_cut_the_reason_for_the_full_is_said(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    bench.restart()  # stored bitmaps are inconsistent only if they have been stored
    bench.crash()
    bench.start()
    protection.point()
    assert protection.kinds() == BOTH_FULL
    said = bench.inconsistent if bench.keeps_bitmaps else bench.missing
    assert {survey.reason for survey in protection.surveys} == {said}
    assert protection.replica.contents() == bench.contents()
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL


def test_c4_another_base_than_the_bitmaps_capture_makes_a_full(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    older = protection.base
    protection.point()
    protection.base = older  # as if the repository had been put back to an older state
    bench.write("root", 0, 512, 5)
    protection.point()
    assert protection.kinds() == BOTH_FULL
    assert {survey.reason for survey in protection.surveys} == {bench.missing}
    assert protection.replica.contents() == bench.contents()


def test_c4_disks_that_change_places_make_fulls(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    with bench.open(disks={"root": "data", "data": "root"}) as source:
        surveys = source.survey(protection.base)
    assert {survey.name: survey.kind for survey in surveys} == BOTH_FULL


def test_c4_without_a_base_everything_is_full(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    protection.base = None
    assert {survey.kind for survey in protection.survey()} == {Kind.FULL}
    assert bench.bitmaps() == set()


def test_a_full_that_is_asked_for_is_one(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    protection.point(full=True)
    assert protection.kinds() == BOTH_FULL
    assert {survey.reason for survey in protection.surveys} == {"a full was asked for"}
    assert protection.replica.contents() == bench.contents()


def test_a_disk_that_grew_is_captured_in_full_and_the_others_are_not(
    bench: SourceBench, protection: Protection
) -> None:
    protection.point()
    bench.resize("root", 6 * MIB)
    bench.write("root", 5 * MIB, BLOCK, 6)
    protection.point()
    assert protection.kinds() == {"root": Kind.FULL, "data": Kind.INCREMENTAL}
    assert [survey.reason for survey in protection.surveys] == ["", "disk grew from 4 MiB to 6 MiB"]
    assert protection.replica.contents() == bench.contents()
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL


def test_a_disk_that_shrank_is_captured_in_full(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    bench.resize("root", 3 * MIB)
    protection.point()
    assert protection.kinds() == {"root": Kind.FULL, "data": Kind.INCREMENTAL}
    assert protection.surveys[1].reason == "disk shrank from 4 MiB to 3 MiB"
    assert protection.replica.contents() == bench.contents()


def test_a_disk_that_changes_its_size_after_the_survey_fails_the_capture(
    bench: SourceBench, protection: Protection
) -> None:
    protection.point()
    with bench.open() as source:
        surveys = source.survey(protection.base)
        bench.resize("root", 6 * MIB)
        layers = protection.layers(surveys)
        with pytest.raises(CaptureFailed, match=r"(root|vda) is not as it was surveyed"):
            source.capture(new_capture_id(), protection.base, surveys, layers, timeout_s=60)


def test_a_new_disk_starts_with_a_full(bench: SourceBench, protection: Protection) -> None:
    protection.point(disks={"root": "root"})
    assert protection.kinds() == {"root": Kind.FULL}
    protection.point()
    assert protection.kinds() == {"root": Kind.INCREMENTAL, "data": Kind.FULL}
    assert protection.surveys[0].reason == "disk is not in the newest point"
    assert protection.replica.contents() == bench.contents()


def test_a_disk_that_is_no_longer_protected_loses_its_bitmap(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    protection.point(disks={"root": "root"})
    assert protection.base is not None
    assert bench.bitmaps() == {ours(bench, "root", protection.base.capture)}


def test_a_missing_disk_is_named_with_those_that_exist(bench: SourceBench) -> None:
    with bench.open(disks={"root": "root", "more": "nowhere"}) as source, pytest.raises(DiskMissing) as caught:
        source.survey(None)
    assert "nowhere" in str(caught.value)
    assert "data" in str(caught.value)


def test_c5_a_survey_clears_away_what_a_killed_drsync_left(
    bench: SourceBench, protection: Protection, tmp_path: Path
) -> None:
    protection.point()
    things = bench.things()
    bench.add_dead_capture(new_capture_id(), tmp_path / "dead.qcow2")
    assert bench.things() > things
    protection.survey()
    assert bench.things() == things
    bench.write("root", 0, 512, 3)
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()


def test_c6_what_is_not_ours_is_left_alone(bench: SourceBench, protection: Protection, tmp_path: Path) -> None:
    capture = new_capture_id()
    bench.add_bitmap("root", "backup-0")
    bench.add_bitmap("root", f"drsync-{TAG}")
    bench.add_bitmap("root", bench.bitmap("root", capture, tag=OTHER_TAG))
    bench.add_bitmap("data", bench.bitmap("data", capture, vm="web2"))
    bench.add_foreign_things()
    things = bench.things()
    assert len(things) >= 4
    protection.point()
    with bench.open() as source, pytest.raises(CaptureFailed, match="are free in"):
        protection.capture(source, full=True, keep_free_bytes=2**60)
    protection.point()
    bench.add_dead_capture(new_capture_id(), tmp_path / "dead.qcow2")
    protection.survey()
    assert things <= bench.things()
    assert protection.base is not None
    assert bench.bitmaps() - {ours(bench, disk, protection.base.capture) for disk in SIZES} == {
        thing.removeprefix("bitmap ") for thing in things if thing.startswith("bitmap ")
    }
    assert protection.replica.contents() == bench.contents()


def test_two_repositories_protect_one_vm_side_by_side(bench: SourceBench, protection: Protection) -> None:
    protection.point()
    bench.write("root", 0, BLOCK, 2)
    with bench.open(tag=OTHER_TAG) as source:
        surveys = source.survey(None)
        capture = new_capture_id()
        source.capture(capture, None, surveys, protection.layers(surveys), timeout_s=60)
        source.release(capture)
    layers = protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert present_blocks(layers["root"]) == {0}
    assert protection.replica.contents() == bench.contents()


class Watched:
    """An Instant that does something when it is entered and when it is left, and says what it saw."""

    def __init__(
        self, on_enter: Callable[[], None] = lambda: None, on_leave: Callable[[], None] = lambda: None
    ) -> None:
        self.on_enter = on_enter
        self.on_leave = on_leave
        self.entered: list[datetime] = []
        self.left = threading.Event()
        self.took_s = 0.0

    @contextmanager
    def __call__(self) -> Iterator[float]:
        self.on_enter()
        self.entered.append(datetime.now(UTC))
        started_s = time.monotonic()
        yield 60.0
        self.took_s = time.monotonic() - started_s
        self.on_leave()
        self.left.set()


def test_c7_the_instant_is_fixed_between_entering_and_leaving(
    bench: SourceBench, protection: Protection, tmp_path: Path
) -> None:
    protection.point()
    layers_then: list[str] = []

    def on_enter() -> None:
        bench.write("root", BLOCK, BLOCK, 5)
        layers_then.extend(path.name for path in (tmp_path / "spool").glob("1-*.qcow2"))

    watched = Watched(on_enter, lambda: bench.write("root", 3 * BLOCK, BLOCK, 6))
    with bench.open() as source:
        point, layers = protection.capture(source, instant=watched)
        protection.commit(point, layers)
        source.release(point.capture)
    assert len(watched.entered) == 1
    assert sorted(layers_then) == ["1-data.qcow2", "1-root.qcow2"], "the layers were not ready"
    assert protection.result is not None
    assert watched.entered[0] <= protection.result.time
    assert present_blocks(layers["root"]) == {1}
    layers = protection.point()
    assert present_blocks(layers["root"]) == {3}
    assert protection.replica.contents() == bench.contents()


def test_c7_the_instant_is_left_before_the_copying_is_waited_for(bench: SourceBench, protection: Protection) -> None:
    watched = Watched()

    def action() -> None:
        assert watched.left.wait(10)
        time.sleep(0.3)

    with bench.open() as source:
        started_s = time.monotonic()
        with bench.while_copying(action):
            protection.capture(source, instant=watched)
        took_s = time.monotonic() - started_s
    assert watched.took_s < took_s / 2


class InTheInstant(Exception):
    """What an instant of a test raises."""


def refuse() -> None:
    raise InTheInstant


@pytest.mark.parametrize("watched", [Watched(on_enter=refuse), Watched(on_leave=refuse)], ids=["entering", "leaving"])
def test_c7_what_the_instant_raises_comes_out_and_leaves_nothing(
    bench: SourceBench, protection: Protection, watched: Watched, tmp_path: Path
) -> None:
    protection.point()
    bench.write("root", 7 * BLOCK, BLOCK, 2)
    with bench.open() as source:
        before, things = source.survey(protection.base), bench.things()
        with pytest.raises(InTheInstant):
            protection.capture(source, instant=watched)
        assert bench.things() == things
        assert source.survey(protection.base) == before
    assert list((tmp_path / "spool").glob("1-*")) == []
    protection.point()
    assert protection.kinds() == BOTH_INCREMENTAL
    assert protection.replica.contents() == bench.contents()


def test_c7_a_capture_that_can_not_begin_has_no_instant(bench: SourceBench, protection: Protection) -> None:
    watched = Watched()
    with bench.open() as source:
        surveys = source.survey(None)
        layers = {name: path.parent / "nowhere" / path.name for name, path in protection.layers(surveys).items()}
        with pytest.raises(SpoolUnusable):
            source.capture(new_capture_id(), None, surveys, layers, timeout_s=60, instant=watched)
    assert watched.entered == []


def test_c8_a_guest_that_runs_is_paused_and_resumed_once(bench: SourceBench) -> None:
    with bench.open() as source:
        assert source.is_running() is bench.runs_guest
        assert source.pause(timeout_s=10) is bench.runs_guest
        assert source.pause(timeout_s=10) is False
        assert source.is_running() is False
        source.resume(timeout_s=10)
        source.resume(timeout_s=10)
        assert source.is_running() is bench.runs_guest


def test_progress_ends_where_it_said_it_would(bench: SourceBench, protection: Protection) -> None:
    class Seen:
        def __init__(self) -> None:
            self.steps: list[tuple[str, int]] = []
            self.done_bytes = 0

        def start(self, step: str, total_bytes: int) -> None:
            self.steps.append((step, total_bytes))

        def advance(self, done_bytes: int) -> None:
            self.done_bytes += done_bytes

    seen = Seen()
    with bench.open() as source:
        surveys = source.survey(None)
        source.capture(new_capture_id(), None, surveys, protection.layers(surveys), timeout_s=60, progress=seen)
    assert [step for step, _ in seen.steps] == ["capture"]
    assert seen.done_bytes == seen.steps[0][1] > 0


def test_a_closed_session_can_be_closed_again_and_nothing_else(bench: SourceBench) -> None:
    source = bench.open()
    source.close()
    source.close()
    with pytest.raises(SourceLost):
        source.survey(None)


def test_every_error_has_a_remedy(bench: SourceBench) -> None:
    with bench.open(disks={"root": "nowhere"}) as source, pytest.raises(DrsyncError) as caught:
        source.survey(None)
    assert "drsync config check" in caught.value.remedy
