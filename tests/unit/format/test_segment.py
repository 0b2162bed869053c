"""Indexes: docs/format.md, "Index"."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import json as fast_json
from msgspec import structs
from strategies import disk_rows, pack_entries

from drsync.format import Malformed
from drsync.format.frame import HASH_BYTES, MAX_FRAME_BYTES
from drsync.format.seal import FRAMES_START
from drsync.format.segment import (
    DiskMeta,
    DiskRows,
    PackEntry,
    PackTable,
    PointMeta,
    SegmentMeta,
    check_bounds,
    check_rows,
    decode_pack,
    decode_segment,
    encode_pack,
    encode_segment,
    index_bound,
    pack_table,
    position,
)
from drsync.model import BLOCK_SIZE, MAX_DISK_BYTES, CaptureId, Consistency, Kind

DISKS = [
    DiskMeta(
        name=name,
        size_bytes=400 * BLOCK_SIZE - 512,
        kind=Kind.FULL,
        reason="",
        changed_bytes=0,
        persistent_bitmap=True,
    )
    for name in ("data", "root")
]
POINT = PointMeta(
    capture=CaptureId("0" * 16),
    base=None,
    time="2026-01-02T03:04:05+00:00",
    consistency=Consistency.CRASH,
    disks=DISKS,
    definition={"machine": "q35"},
)


def rows_of(
    disk: str = "root",
    blocks: tuple[int, ...] = (),
    zeros: tuple[tuple[int, int], ...] = (),
    length: int = 100,
) -> DiskRows:
    return DiskRows(
        disk=disk,
        blocks=np.array(blocks, np.uint32),
        lengths=np.full(len(blocks), length, np.uint32),
        hashes=np.zeros((len(blocks), HASH_BYTES), np.uint8),
        zero_first=np.array([first for first, _ in zeros], np.uint32),
        zero_count=np.array([count for _, count in zeros], np.uint32),
    )


def meta_of(rows: list[DiskRows], packs: int = 0, point: PointMeta | None = POINT) -> SegmentMeta:
    return SegmentMeta(
        seq=42,
        epoch=1,
        writer="w" * 16,
        previous="ab" * 32,
        point=point,
        packs=packs,
        contents=[r.extent for r in rows],
    )


def frames_end(rows: list[DiskRows]) -> int:
    return FRAMES_START + sum(int(r.lengths.sum()) for r in rows)


def same(left: list[DiskRows], right: list[DiskRows]) -> bool:
    return [_columns(r) for r in left] == [_columns(r) for r in right]


def _columns(rows: DiskRows) -> tuple[object, ...]:
    columns = (rows.blocks, rows.lengths, rows.hashes, rows.zero_first, rows.zero_count)
    return (rows.disk, *((c.dtype, c.shape, c.tobytes()) for c in columns))


def packs_of(table: PackTable) -> list[PackEntry]:
    return [table.entry(n) for n in range(len(table))]


@given(disk_rows("data"), disk_rows("root"), pack_entries())
def test_a_segments_index_is_decoded_to_what_was_encoded(
    data: DiskRows, root: DiskRows, entries: list[PackEntry]
) -> None:
    rows = [data, root]
    meta = meta_of(rows, len(entries))
    index = encode_segment(meta, pack_table(entries), rows)
    found_meta, found_packs, found_rows = decode_segment(index, frames_end(rows))
    assert found_meta == meta
    assert packs_of(found_packs) == entries
    assert same(found_rows, rows)
    runs = sum(len(r.zero_first) for r in rows)
    bound = index_bound(len(fast_json.encode(meta)), len(entries), sum(len(r.blocks) for r in rows), runs)
    assert len(index) <= bound


@given(disk_rows("data"), disk_rows("root"))
def test_a_packs_index_is_decoded_to_what_was_encoded(data: DiskRows, root: DiskRows) -> None:
    rows = [root, data]
    assert same(decode_pack(encode_pack(rows), frames_end(rows)), rows)


def test_an_index_is_laid_out_as_the_format_says() -> None:
    rows = [rows_of("data", (1, 5), ((2, 3),)), rows_of("root", (7,))]
    entry = PackEntry(object_id=b"o" * 16, length=1000, index_sha256=b"s" * 32, first=1, last=position(1, 2))
    index = encode_segment(meta_of(rows, 1), pack_table([entry]), rows)
    (length,) = struct.unpack_from("<I", index)
    meta = json.loads(index[4 : 4 + length])
    assert meta["contents"] == [
        {"disk": "data", "rows": 2, "zero_runs": 1},
        {"disk": "root", "rows": 1, "zero_runs": 0},
    ]
    assert meta["packs"] == 1
    assert index[4 + length :] == b"".join(
        [
            b"o" * 16,
            struct.pack("<Q", 1000),
            b"s" * 32,
            struct.pack("<QQ", 1, 1 << 32 | 2),
            struct.pack("<IIII", 1, 5, 100, 100),
            bytes(32),
            struct.pack("<II", 2, 3),
            struct.pack("<II", 7, 100),
            bytes(16),
        ]
    )


def test_f13_a_segment_that_only_fences_has_no_blocks() -> None:
    fence = meta_of([], point=None)
    assert decode_segment(encode_segment(fence, pack_table([]), []), FRAMES_START)[0] == fence
    rows = [rows_of("root", (1,))]
    with pytest.raises(Malformed, match="no point"):
        decode_segment(encode_segment(meta_of(rows, point=None), pack_table([]), rows), frames_end(rows))
    with pytest.raises(Malformed, match="no point"):
        rows = [rows_of("root", (), ((0, 1),))]
        decode_segment(encode_segment(meta_of(rows, point=None), pack_table([]), rows), frames_end(rows))


@pytest.mark.parametrize(
    "rows",
    [
        [rows_of("root", (5, 4))],
        [rows_of("root", (5, 5))],
        [rows_of("root", (400,))],
        [rows_of("root", (2**32 - 1,))],
        [rows_of("root", (), ((399, 2),))],
        [rows_of("root", (), ((0, 2**32 - 1),))],
        [rows_of("root", (), ((2**32 - 1, 2**32 - 1),))],
        [rows_of("root", (), ((5, 0),))],
        [rows_of("root", (), ((5, 2), (6, 1)))],
        [rows_of("root", (), ((7, 1), (5, 1)))],
        [rows_of("root", (5,), ((4, 2),))],
        [rows_of("root", (5,), ((5, 1),))],
        [rows_of("root", (4,), ((2, 3),))],
        [rows_of("root", (4,)), rows_of("root", (5,))],
        [rows_of("other", (4,))],
        [rows_of("../root", (4,))],
    ],
)
def test_f13_rows_out_of_order_overlapping_or_outside_of_their_disk_are_refused(rows: list[DiskRows]) -> None:
    with pytest.raises(Malformed):
        check_rows(rows, DISKS)
    with pytest.raises(Malformed):
        decode_segment(encode_segment(meta_of(rows), pack_table([]), rows), frames_end(rows))


def test_f13_rows_may_touch_and_fill_their_disk() -> None:
    check_rows([rows_of("root", (0, 399), ((1, 5), (6, 393)))], DISKS)


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_f10_a_frame_of_a_length_that_no_frame_has_is_refused(length: int) -> None:
    rows = [rows_of("root", (1,), length=length)]
    with pytest.raises(Malformed, match="length that no frame has"):
        decode_pack(encode_pack(rows), frames_end(rows))


@pytest.mark.parametrize("off", [-1, 1, 2**40])
def test_f7_frames_must_take_exactly_the_bytes_that_are_there(off: int) -> None:
    rows = [rows_of("root", (1, 2))]
    with pytest.raises(Malformed, match="its frames take"):
        decode_pack(encode_pack(rows), frames_end(rows) + off)


def entries_at(*bounds: tuple[int, int]) -> list[PackEntry]:
    return [
        PackEntry(object_id=bytes(16), length=100, index_sha256=bytes(32), first=first, last=last)
        for first, last in bounds
    ]


@pytest.mark.parametrize("bounds", [[(5, 4)], [(0, 5), (5, 6)], [(0, 5), (4, 6)], [(7, 8), (0, 5)]])
def test_f14_packs_that_do_not_follow_each_other_are_refused(bounds: list[tuple[int, int]]) -> None:
    index = encode_segment(meta_of([], len(bounds)), pack_table(entries_at(*bounds)), [])
    with pytest.raises(Malformed, match="packs are not in order"):
        decode_segment(index, FRAMES_START)


OVERLAPPING: Final = [(0, 5), (9, 12), (3, 10), (11, 11), (0, 12)]


def test_f14_packs_of_another_round_may_lie_over_those_before() -> None:
    meta = structs.replace(meta_of([], 5), rounds=[2, 2, 1])
    decoded, packs, _ = decode_segment(encode_segment(meta, pack_table(entries_at(*OVERLAPPING)), []), FRAMES_START)
    assert decoded.rounds == [2, 2, 1]
    assert decoded.round_bounds == [(0, 2), (2, 4), (4, 5)]
    assert len(packs) == 5


def test_f14_a_segment_of_one_round_is_what_it_was_before_there_were_rounds() -> None:
    index = encode_segment(meta_of([], 1), pack_table(entries_at((0, 5))), [])
    assert b"rounds" not in index
    assert decode_segment(index, FRAMES_START)[0].round_bounds == [(0, 1)]


@pytest.mark.parametrize(
    ("rounds", "problem"),
    [
        ([5], "rounds are none, empty or too many"),
        ([2, 3, 0], "rounds are none, empty or too many"),
        ([6, -1], "rounds are none, empty or too many"),
        ([1] * 4097, "rounds are none, empty or too many"),
        ([2, 2], "its rounds have 4 packs and it lists 5"),
        ([2, 4], "its rounds have 6 packs and it lists 5"),
        ([3, 2], "packs are not in order"),
        ([1, 4], "packs are not in order"),
    ],
)
def test_f14_rounds_that_do_not_fit_their_packs_are_refused(rounds: list[int], problem: str) -> None:
    meta = structs.replace(meta_of([], 5), rounds=rounds)
    with pytest.raises(Malformed, match=problem):
        decode_segment(encode_segment(meta, pack_table(entries_at(*OVERLAPPING)), []), FRAMES_START)


def test_f10_a_pack_that_is_longer_than_any_object_is_refused() -> None:
    entry = PackEntry(object_id=bytes(16), length=2**28 + 1, index_sha256=bytes(32), first=0, last=1)
    with pytest.raises(Malformed, match="longer than any object"):
        decode_segment(encode_segment(meta_of([], 1), pack_table([entry]), []), FRAMES_START)


def test_f14_rows_must_lie_where_the_segment_says() -> None:
    rows = [rows_of("data", (3, 9), ((1, 2),)), rows_of("root", (4,), ((6, 3),))]
    (fits,) = entries_at((position(0, 1), position(1, 8)))
    check_bounds(rows, DISKS, fits)
    for bounds in (
        (position(0, 2), position(1, 8)),
        (position(0, 1), position(1, 7)),
        (position(1, 0), position(1, 8)),
    ):
        with pytest.raises(Malformed, match="outside of where its segment says"):
            check_bounds(rows, DISKS, *entries_at(bounds))


Change = Callable[[dict[str, Any]], None]


def with_meta(change: Change) -> bytes:
    """The index of a segment without blocks, its metadata changed as a holder of the key could."""
    meta = json.loads(fast_json.encode(meta_of([])))
    change(meta)
    text = json.dumps(meta).encode()
    return struct.pack("<I", len(text)) + text


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(more=1),
        lambda m: m.pop("previous"),
        lambda m: m.update(seq=None),
        lambda m: m.update(packs=1),
        lambda m: m.update(packs=-1),
        lambda m: m.update(packs=2**32),
        lambda m: m.update(packs=2**63),
        lambda m: m.update(contents=[{"disk": "root", "rows": 2**32, "zero_runs": 0}]),
        lambda m: m.update(contents=[{"disk": "root", "rows": 0, "zero_runs": 2**62}]),
        lambda m: m.update(contents=[{"disk": "root", "rows": -1, "zero_runs": 0}]),
        lambda m: m.update(contents=[{"disk": f"d{n}", "rows": 0, "zero_runs": 0} for n in range(10_000)]),
        lambda m: m["point"].update(disks=[m["point"]["disks"][0]] * 2),
        lambda m: m["point"].update(disks=[m["point"]["disks"][0] | {"name": f"d{n}"} for n in range(65)]),
        lambda m: m["point"]["disks"][0].update(name="../../etc/passwd"),
        lambda m: m["point"]["disks"][0].update(name=""),
        lambda m: m["point"]["disks"][0].update(name="a\0b"),
        lambda m: m["point"]["disks"][0].update(size_bytes=-1),
        lambda m: m["point"]["disks"][0].update(size_bytes=MAX_DISK_BYTES + 1),
        lambda m: m["point"]["disks"][0].update(size_bytes=2**200),
        lambda m: m["point"]["disks"][0].update(kind="differential"),
        lambda m: m["point"].update(consistency="none"),
    ],
)
def test_f10_metadata_that_claims_what_cannot_be_is_refused_at_no_cost(change: Change) -> None:
    index = with_meta(change)
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            decode_segment(index, FRAMES_START)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(index) + 1024 * 1024
    finally:
        tracemalloc.stop()


def test_metadata_that_is_nested_too_deep_or_not_utf_8_is_refused() -> None:
    text = fast_json.encode(meta_of([]))
    for wrong in (
        text.replace(b'{"machine":"q35"}', b'{"machine":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        text.replace(b"q35", b"\xff\xfe"),
    ):
        with pytest.raises(Malformed):
            decode_segment(struct.pack("<I", len(wrong)) + wrong, FRAMES_START)


@given(st.data())
def test_an_index_that_was_cut_or_extended_is_refused(data: st.DataObject) -> None:
    rows = [rows_of("root", (1, 2), ((3, 1),))]
    index = encode_segment(meta_of(rows), pack_table([]), rows)
    cut = data.draw(st.integers(0, len(index) - 1))
    for wrong in (index[:cut], index + b"\0", index + index):
        with pytest.raises(Malformed):
            decode_segment(wrong, frames_end(rows))


@given(st.binary(max_size=400), st.integers(0, 2**64 - 1))
def test_any_bytes_are_an_index_or_malformed(raw: bytes, end: int) -> None:
    framed = struct.pack("<I", len(raw)) + raw
    contents = b'{"contents":[{"disk":"root","rows":3,"zero_runs":2}]}'
    for index in (raw, framed, struct.pack("<I", len(contents)) + contents + raw):
        with pytest.raises(Malformed):
            decode_segment(index, end)
        try:
            decode_pack(index, end)
        except Malformed:
            continue
        assert len(index) == 4 + len(contents) + 3 * 24 + 2 * 8


def test_the_largest_index_is_refused_or_read_in_bounded_memory() -> None:
    runs = 1_000_000
    rows = [rows_of("root")]
    text = fast_json.encode(meta_of(rows))
    text = text.replace(b'"zero_runs":0', b'"zero_runs":%d' % runs)
    index = struct.pack("<I", len(text)) + text + bytes(8 * runs)
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            decode_segment(index, FRAMES_START)
        assert tracemalloc.get_traced_memory()[1] < 12 * len(index)
    finally:
        tracemalloc.stop()
