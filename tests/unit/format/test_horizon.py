"""The index of a horizon: what it says comes back, and what breaks a rule is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from drsync.format import Malformed
from drsync.format.horizon import (
    HorizonIndex,
    HorizonMeta,
    MergedTable,
    PointTable,
    decode_horizon,
    encode_horizon,
)


def rows(count: int, width: int) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    return np.arange(count * width, dtype=np.uint64).astype(np.uint8).reshape(count, width)


def horizon(points: list[int], holes: list[tuple[int, int]], through: int, *, packs: int = 3) -> HorizonIndex:
    meta = HorizonMeta(
        number=7,
        previous="00" * 32,
        through=through,
        segment="11" * 32,
        time="2026-01-02T03:04:05+00:00",
        points=len(points),
        merged=len(holes),
        packs=packs,
        retired=2,
    )
    return HorizonIndex(
        meta=meta,
        points=PointTable(numbers=np.array(points, np.uint64), index_sha256=rows(len(points), 32)),
        merged=MergedTable(
            first=np.array([first for first, _ in holes], np.uint64),
            last=np.array([last for _, last in holes], np.uint64),
            ids=rows(len(holes), 16),
            index_sha256=rows(len(holes), 32),
            segment_sha256=rows(len(holes), 32),
        ),
        packs=rows(packs, 16),
        retired=rows(2, 16),
    )


def test_what_it_says_comes_back() -> None:
    made = horizon([1, 5, 9], [(2, 4), (6, 6)], 9)
    found = decode_horizon(encode_horizon(made))
    assert found.meta == made.meta
    assert encode_horizon(found) == encode_horizon(made)


def test_of_a_log_without_points_it_says_nothing_but_what_is_retired() -> None:
    assert decode_horizon(encode_horizon(horizon([], [], 0))).meta.through == 0


@pytest.mark.parametrize(
    ("points", "holes", "through", "problem"),
    [
        ([5, 1, 9], [], 9, "not in order"),
        ([1, 1, 9], [], 9, "not in order"),
        ([0, 9], [], 9, "not in order"),
        ([1, 10], [], 9, "behind it"),
        ([1, 5], [], 9, "does not survive"),
        ([], [], 9, "does not survive"),
        ([1, 9], [(4, 2)], 9, "overlap"),
        ([1, 9], [(2, 4), (4, 6)], 9, "overlap"),
        ([1, 9], [(0, 4)], 9, "outside"),
        ([1, 9], [(8, 9)], 9, "outside"),
        ([1, 9], [(8, 12)], 9, "outside"),
        ([1, 3, 9], [(2, 4)], 9, "stands for"),
        ([1, 4, 9], [(2, 4)], 9, "stands for"),
        ([2, 9], [(2, 4)], 9, "stands for"),
    ],
)
def test_f31_f33_what_contradicts_itself_is_refused(
    points: list[int], holes: list[tuple[int, int]], through: int, problem: str
) -> None:
    with pytest.raises(Malformed, match=problem):
        decode_horizon(encode_horizon(horizon(points, holes, through)))


@pytest.mark.parametrize("field", ["points", "merged", "packs", "retired", "number", "through"])
@pytest.mark.parametrize("value", [-1, 2**63, 2**64])
def test_f10_counts_that_the_bytes_do_not_bear_out_are_refused(field: str, value: int) -> None:
    made = horizon([1, 9], [(2, 4)], 9)
    lying = HorizonIndex(
        meta=structs.replace(made.meta, **{field: value}),
        points=made.points,
        merged=made.merged,
        packs=made.packs,
        retired=made.retired,
    )
    with pytest.raises(Malformed):
        decode_horizon(encode_horizon(lying))


@given(st.binary(max_size=400))
def test_junk_is_malformed(junk: bytes) -> None:
    with pytest.raises(Malformed):
        decode_horizon(junk)


@given(st.integers(0, 700), st.integers(0, 255))
def test_a_changed_byte_is_malformed_or_read_within_bounds(at: int, value: int) -> None:
    raw = bytearray(encode_horizon(horizon([1, 5, 9], [(2, 4), (6, 6)], 9)))
    raw[at % len(raw)] = value
    try:
        found = decode_horizon(bytes(raw))
    except Malformed:
        return
    assert len(encode_horizon(found)) <= len(raw) + 64
