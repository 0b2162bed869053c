"""A capture that fails loses nothing and leaves nothing (rule C3): every source, every way to fail."""

from collections.abc import Callable
from pathlib import Path

import pytest
from source_bench import KIB, MIB, SourceBench, present_blocks
from source_protection import BOTH_FULL, BOTH_INCREMENTAL, Protection, ours

from drsync.errors import CaptureFailed, CaptureTimeout, SourceLost, SpoolUnusable
from drsync.model import Kind, new_capture_id
from drsync.source import Source

pytestmark = pytest.mark.qemu

BLOCK = 64 * KIB
Break = Callable[[SourceBench, Protection, Source], None]


def fails_by_read_errors(bench: SourceBench, protection: Protection, source: Source) -> None:
    with bench.read_errors(), pytest.raises(CaptureFailed, match=r"Input/output error|a disk can't be read"):
        protection.capture(source, full=True)


def fails_by_time(bench: SourceBench, protection: Protection, source: Source) -> None:
    with bench.slowness(), pytest.raises(CaptureTimeout, match=r"not done in 0\.2 s"):
        protection.capture(source, full=True, timeout_s=0.2)


def fails_for_want_of_room(bench: SourceBench, protection: Protection, source: Source) -> None:
    with pytest.raises(CaptureFailed, match="are free in"):
        protection.capture(source, full=True, keep_free_bytes=2**60)


def fails_on_an_existing_layer(bench: SourceBench, protection: Protection, source: Source) -> None:
    surveys = source.survey(protection.base)
    layers = protection.layers(surveys)
    layers["root"].write_text("precious")
    with pytest.raises(SpoolUnusable, match="exists"):
        source.capture(new_capture_id(), protection.base, surveys, layers, timeout_s=60)
    assert layers["root"].read_text() == "precious"
    layers["root"].unlink()


def fails_without_a_spool(bench: SourceBench, protection: Protection, source: Source) -> None:
    surveys = source.survey(protection.base)
    layers = {name: path.parent / "nowhere" / path.name for name, path in protection.layers(surveys).items()}
    with pytest.raises(SpoolUnusable, match="No such file"):
        source.capture(new_capture_id(), protection.base, surveys, layers, timeout_s=60)


def fails_as_the_base_vanished(bench: SourceBench, protection: Protection, source: Source) -> None:
    surveys = source.survey(protection.base)
    assert protection.base is not None
    name = ours(bench, "data", protection.base.capture).removeprefix("data/")
    bench.remove_bitmap("data", name)
    with pytest.raises(CaptureFailed):
        source.capture(new_capture_id(), protection.base, surveys, protection.layers(surveys), timeout_s=60)


@pytest.mark.parametrize(
    "fail",
    [
        fails_by_read_errors,
        fails_by_time,
        fails_for_want_of_room,
        fails_on_an_existing_layer,
        fails_without_a_spool,
    ],
)
def test_c3_a_failed_capture_loses_nothing(
    bench: SourceBench, protection: Protection, tmp_path: Path, fail: Break
) -> None:
    protection.point()
    bench.write("root", 7 * BLOCK, BLOCK, 2)
    with bench.open() as source:
        before = source.survey(protection.base)
        things = bench.things()
        fail(bench, protection, source)
        assert bench.things() == things
        assert source.survey(protection.base) == before
        assert list((tmp_path / "spool").glob("[1-9]*")) == []
        bench.write("root", 9 * BLOCK, BLOCK, 2)
        point, layers = protection.capture(source)
    protection.commit(point, layers)
    assert protection.kinds() == BOTH_INCREMENTAL
    assert present_blocks(layers["root"]) == {7, 9}
    assert protection.replica.contents() == bench.contents()


def test_c3_a_refused_transaction_leaves_nothing_behind(
    bench: SourceBench, protection: Protection, tmp_path: Path
) -> None:
    protection.point()
    with bench.open() as source:
        fails_as_the_base_vanished(bench, protection, source)
        assert protection.base is not None
        assert bench.bitmaps() == {ours(bench, "root", protection.base.capture)}
        assert not {thing for thing in bench.things() if thing.startswith(("job ", "node drsync"))}
        assert list((tmp_path / "spool").glob("[1-9]*")) == []
    protection.point()
    assert protection.kinds() == {"root": Kind.INCREMENTAL, "data": Kind.FULL}
    assert protection.replica.contents() == bench.contents()


def test_qemu_that_ends_in_the_middle_is_told_and_the_next_point_is_right(
    bench: SourceBench, protection: Protection, tmp_path: Path
) -> None:
    protection.point()
    bench.restart()
    bench.write("root", 0, 2 * MIB, 2)
    with bench.open() as source:
        with bench.while_copying(bench.crash), pytest.raises(SourceLost) as caught:
            protection.capture(source, full=True)
        assert caught.value.retryable
        assert list((tmp_path / "spool").glob("[1-9]*")) == []
        with pytest.raises(SourceLost):
            source.survey(protection.base)
        with pytest.raises(SourceLost):
            source.release(new_capture_id())
    bench.start()
    protection.point()
    assert protection.kinds() == BOTH_FULL
    assert protection.replica.contents() == bench.contents()
