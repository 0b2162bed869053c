"""What a capture brings: which blocks to send, and which runs are zeros now."""

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shipped_vm import DiskStep, ShippedVm, Step, content, write_layer

from drsync.changes import Change, changes_of, differences, nonzero_rows, zero_runs
from drsync.direct import aligned_buffer
from drsync.format.frame import FrameSealer
from drsync.image import load_image
from drsync.model import BLOCK_SIZE
from drsync.qcow2 import TABLE_BLOCKS
from drsync.source.layer import Layer

SIZE = 12 * BLOCK_SIZE


def naive_runs(zeros: list[bool], first_block: int) -> list[tuple[int, int]]:
    runs, at = [], first_block
    for value, group in groupby(zeros):
        count = len(list(group))
        if value:
            runs.append((at, count))
        at += count
    return runs


@given(st.lists(st.booleans(), max_size=50), st.integers(0, 2**32))
def test_zero_runs_are_the_runs_of_zeros(zeros: list[bool], first_block: int) -> None:
    first, count = zero_runs(np.array(zeros, np.bool_), first_block)
    assert list(zip(first.tolist(), count.tolist(), strict=True)) == naive_runs(zeros, first_block)


@given(st.lists(st.sampled_from([None, 0, 1, 65535]), min_size=1, max_size=8))
def test_a_block_with_a_single_byte_set_holds_something(set_bytes: list[int | None]) -> None:
    raw = bytearray(16 * BLOCK_SIZE)
    raw[-1] = 1  # behind the blocks that are asked for
    for block, at in enumerate(set_bytes):
        if at is not None:
            raw[block * BLOCK_SIZE + at] = 1
    found = nonzero_rows(memoryview(raw), len(set_bytes))
    assert found.tolist() == [at is not None for at in set_bytes]


def told(change: Change) -> tuple[list[int], list[tuple[int, int]]]:
    return change.blocks.tolist(), list(zip(change.zero_first.tolist(), change.zero_count.tolist(), strict=True))


@pytest.fixture
def layer(tmp_path: Path) -> Layer:
    path = tmp_path / "layer.qcow2"
    size = (2 * TABLE_BLOCKS + 4) * BLOCK_SIZE
    data = content(1, BLOCK_SIZE)
    write_layer(path, size, {1: data, 2: None, 3: None, 5: None, 2 * TABLE_BLOCKS: data, 2 * TABLE_BLOCKS + 3: None})
    return Layer(path, size)


def test_an_increment_tells_blocks_and_zeros_table_by_table(layer: Layer) -> None:
    with layer:
        found = [told(change) for change in changes_of(layer, full=False)]
    assert found == [
        ([1], [(2, 2), (5, 1)]),
        ([2 * TABLE_BLOCKS], [(2 * TABLE_BLOCKS + 3, 1)]),
    ]


def test_a_full_starts_from_nothing_so_its_zeros_need_not_be_told(layer: Layer) -> None:
    with layer:
        found = [told(change) for change in changes_of(layer, full=True)]
    assert found == [([1], []), ([2 * TABLE_BLOCKS], [])]


def test_the_offsets_are_where_the_bytes_lie(layer: Layer) -> None:
    raw = aligned_buffer(BLOCK_SIZE)
    with layer:
        for change in changes_of(layer, full=True):
            layer.read_blocks(change.offsets, raw)
            assert raw == content(1, BLOCK_SIZE)


CONTENTS = st.dictionaries(st.integers(0, 11), st.sampled_from([1, 2, 3]), max_size=12)


@pytest.mark.parametrize("size", [SIZE, SIZE - 512, SIZE + BLOCK_SIZE - 512, 5 * BLOCK_SIZE + 512])
def test_differences_are_exactly_what_differs(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    @given(before=CONTENTS, now=CONTENTS)
    def check(before: dict[int, int], now: dict[int, int]) -> None:
        directory = tmp_path_factory.mktemp("differences")
        vm = ShippedVm(directory)
        vm.capture(Step(disks={"root": DiskStep(size_bytes=SIZE, writes=before)}))
        known = vm.disks["root"].copy()
        known.resize(size)
        blocks = -(-size // BLOCK_SIZE)
        layer = {n: content(kind, BLOCK_SIZE) for n, kind in now.items() if n < blocks}
        wanted = known.copy()
        wanted.blocks = {n: data[: min(BLOCK_SIZE, size - n * BLOCK_SIZE)] for n, data in layer.items()}
        write_layer(directory / "now.qcow2", size, dict(layer))
        sealer = FrameSealer(vm.log.objects.object_keys(vm.log.objects.new_header("pack")))
        with Layer(directory / "now.qcow2", size) as opened:
            changes = list(differences(opened, "root", size, load_image(vm.log, 1), sealer))
        sent = {n for change in changes for n in change.blocks.tolist()}
        zeroed = {n for c in changes for first, count in told(c)[1] for n in range(first, first + count)}
        # A block of another length is sent again: its frame would not fit the disk.
        refit = {n for n in known.blocks if n == min(blocks, SIZE // BLOCK_SIZE) - 1 and size != SIZE}
        differing = {n for n in wanted.blocks if wanted.blocks[n] != known.blocks.get(n)}
        assert differing <= sent <= differing | refit
        assert zeroed == known.blocks.keys() - wanted.blocks.keys()

    check()
