"""Hypothesis strategies: histories of a VM's disks, and what indexes hold."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from shipped_vm import WRITTEN_ZEROS, ZEROED, DiskStep, Step

from drsync.format.frame import HASH_BYTES, MAX_FRAME_BYTES
from drsync.format.segment import DiskRows, PackEntry, position
from drsync.model import BLOCK_SIZE, block_count
from drsync.ship import ShipLimits

NAMES = ("data", "root", "swap-1")
SECTOR = 512

names = st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,62}\Z", alphabet=st.characters(max_codepoint=127))


@st.composite
def sizes(draw: st.DrawFn, *, max_blocks: int = 10) -> int:
    """Bytes of a disk: often not a multiple of a block."""
    cut = draw(st.sampled_from([0, 0, SECTOR, BLOCK_SIZE // 2, BLOCK_SIZE - SECTOR]))
    return draw(st.integers(1, max_blocks)) * BLOCK_SIZE - cut


@st.composite
def disk_steps(draw: st.DrawFn, size_bytes: int) -> DiskStep:
    contents = st.sampled_from([ZEROED, WRITTEN_ZEROS, *range(1, 9)])
    blocks = st.integers(0, block_count(size_bytes) - 1)
    return DiskStep(
        size_bytes=size_bytes,
        writes=draw(st.dictionaries(blocks, contents, max_size=8)),
        whole=draw(st.sampled_from([False, False, True])),
        explicit_zeros=draw(st.booleans()),
    )


@st.composite
def histories(draw: st.DrawFn, *, max_steps: int = 6) -> list[Step]:
    """Captures of a VM with up to three disks that come, go, grow and shrink, in objects of any size."""
    steps: list[Step] = []
    present = {NAMES[0]: draw(sizes())}
    for _ in range(draw(st.integers(1, max_steps))):
        change = draw(st.sampled_from(["same", "same", "same", "resized", "other disks"]))
        if change == "resized":
            present[draw(st.sampled_from(sorted(present)))] = draw(sizes())
        elif change == "other disks":
            chosen = draw(st.sets(st.sampled_from(NAMES), min_size=1))
            present = {name: present.get(name) or draw(sizes()) for name in sorted(chosen)}
        step = Step(
            disks={name: draw(disk_steps(size)) for name, size in present.items()},
            compare=draw(st.sampled_from([True, True, False])),
            limits=draw(limits),
            taken_over=draw(st.sampled_from([False, False, False, True])),
        )
        steps.append(step)
    return [replace(steps[0], taken_over=False), *steps[1:]]


@st.composite
def busy_histories(draw: st.DrawFn, *, max_steps: int = 12) -> list[Step]:
    """Captures of the same disks again and again, in small packs most of whose blocks are overwritten later."""
    sizes_of = {"data": 9 * BLOCK_SIZE - SECTOR, "root": 14 * BLOCK_SIZE}
    contents = st.sampled_from([ZEROED, *range(2, 40, 2), 3, 5])
    steps: list[Step] = []
    for number in range(draw(st.integers(4, max_steps))):
        whole = number == 0 or draw(st.integers(0, 9)) == 0
        disks = {
            name: DiskStep(
                size_bytes=size,
                writes=draw(st.dictionaries(st.integers(0, block_count(size) - 1), contents, max_size=9)),
                whole=whole,
            )
            for name, size in sizes_of.items()
        }
        limits_ = ShipLimits(object_blocks=draw(st.integers(2, 4)), object_zero_runs=64, workers=1)
        steps.append(Step(disks=disks, limits=limits_, compare=draw(st.integers(0, 5)) > 0))
    return steps


limits = st.builds(
    ShipLimits,
    object_blocks=st.sampled_from([1, 2, 3, 64]),
    object_zero_runs=st.sampled_from([1, 3, 64]),
    workers=st.sampled_from([1, 3]),
)


@st.composite
def disk_rows(draw: st.DrawFn, disk: str = "root", *, blocks: int = 400) -> DiskRows:
    """Rows and zero runs that do not overlap, of a disk of `blocks` blocks."""
    held = draw(st.lists(st.sampled_from(["row", "zero", "nothing"]), max_size=min(blocks, 40)))
    start = draw(st.integers(0, blocks - len(held)))
    rows = [start + n for n, kind in enumerate(held) if kind == "row"]
    zeros = [start + n for n, kind in enumerate(held) if kind == "zero"]
    lengths = draw(st.lists(st.integers(1, MAX_FRAME_BYTES), min_size=len(rows), max_size=len(rows)))
    hashes = draw(st.binary(min_size=len(rows) * HASH_BYTES, max_size=len(rows) * HASH_BYTES))
    return DiskRows(
        disk=disk,
        blocks=np.array(rows, np.uint32),
        lengths=np.array(lengths, np.uint32),
        hashes=np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES),
        zero_first=np.array(zeros, np.uint32),
        zero_count=np.ones(len(zeros), np.uint32),
    )


@st.composite
def pack_entries(draw: st.DrawFn) -> list[PackEntry]:
    """Packs that follow each other in the order of a point."""
    ends = sorted(draw(st.sets(st.integers(0, position(3, 2**32 - 1)), max_size=12)))
    return [
        PackEntry(
            object_id=draw(st.binary(min_size=16, max_size=16)),
            length=draw(st.integers(0, 2**28)),
            index_sha256=draw(st.binary(min_size=32, max_size=32)),
            first=first,
            last=last,
        )
        for first, last in zip(ends[::2], ends[1::2], strict=False)
    ]
