"""Every source keeps C5, C9 and C10 of drsync/source/__init__.py: the reference in memory, and real QEMU."""

import numpy as np
import pytest
from source_bench import KIB, SIZES, SourceBench

from drsync.model import Kind, NoPace, block_count, new_capture_id
from drsync.source import Base, BaseDisk, DiskSurvey, LiveView, Source

pytestmark = pytest.mark.qemu

BLOCK = 64 * KIB


def record(source: Source, base: Base | None = None) -> tuple[list[DiskSurvey], Base]:
    surveys = list(source.survey(base))
    capture = new_capture_id()
    definition = source.begin_recording(capture, surveys)
    disks = [BaseDisk(name=d.name, size_bytes=d.size_bytes) for d in surveys]
    return surveys, Base(capture=capture, disks=disks, definition=definition)


def blocks_of(view: LiveView, disk: str) -> dict[int, bytes]:
    """What a view says of the blocks that belong to it."""
    reader = view.reader(disk)
    presence = reader.presence(0, block_count(SIZES[disk]))
    found = {int(block): bytes(BLOCK) for block in np.flatnonzero(presence.zeros)}
    for numbers, raw in reader.read(np.flatnonzero(presence.holds)):
        for row, block in enumerate(numbers.tolist()):
            found[block] = bytes(raw[row * BLOCK : (row + 1) * BLOCK])
    reader.settle()
    reader.close()
    return found


def block(content: bytes, number: int) -> bytes:
    return content[number * BLOCK : (number + 1) * BLOCK].ljust(BLOCK, b"\0")


def test_c9_what_was_not_written_since_recording_began_is_read_as_it_is(live_bench: SourceBench) -> None:
    live_bench.write("root", 0, BLOCK, 2)
    live_bench.zero("root", 5 * BLOCK, BLOCK)
    with live_bench.open() as source:
        surveys, base = record(source)
        source.check_live(surveys)
        live_bench.write("root", 8 * BLOCK, BLOCK, 3)
        view = source.open_live(None, surveys, pace=NoPace())
        live_bench.write("root", 9 * BLOCK, BLOCK, 4)
        live_bench.zero("data", 3 * BLOCK, BLOCK)
        read = {disk: blocks_of(view, disk) for disk in SIZES}
        view.close()
        view.close()
        after = source.survey(base)
        assert {(d.name, d.kind, d.copy_bytes) for d in after} == {
            ("root", Kind.INCREMENTAL, 2 * BLOCK),
            ("data", Kind.INCREMENTAL, BLOCK),
        }
    now = live_bench.contents()
    for disk, size in SIZES.items():
        assert set(read[disk]) == set(range(block_count(size)))
        written = {"root": {8, 9}, "data": {3}}[disk]
        assert all(read[disk][n] == block(now[disk], n) for n in read[disk] if n not in written)


def test_c10_a_view_of_an_increment_tells_of_every_block_written_since(live_bench: SourceBench) -> None:
    with live_bench.open() as source:
        _, base = record(source)
        live_bench.write("root", 3 * BLOCK + 512, 1024, 7)
        live_bench.zero("root", 6 * BLOCK, BLOCK)
        live_bench.discard("root", 9 * BLOCK, BLOCK)
        live_bench.write("data", SIZES["data"] - 512, 512, 8)
        surveys, _ = record(source, base)
        assert {d.kind for d in surveys} == {Kind.INCREMENTAL}
        view = source.open_live(base, surveys, pace=NoPace())
        read = {disk: blocks_of(view, disk) for disk in SIZES}
        view.close()
    now = live_bench.contents()
    assert set(read["root"]) >= {3, 6, 9}
    assert len(read["root"]) < block_count(SIZES["root"]) / 2
    assert set(read["data"]) == {SIZES["data"] // BLOCK}
    assert all(content == block(now[disk], n) for disk in SIZES for n, content in read[disk].items())


def test_c5_a_view_that_nobody_closed_is_taken_away_by_the_next_survey(live_bench: SourceBench) -> None:
    with live_bench.open() as source:
        before = live_bench.things()
        surveys, _ = record(source)
        view = source.open_live(None, surveys, pace=NoPace())
    with live_bench.open() as source:
        source.survey(None)
        assert live_bench.things() == before
    view.close()
