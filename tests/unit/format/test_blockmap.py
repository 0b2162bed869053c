"""Block maps: docs/format.md, "Block maps"."""

import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import json as fast_json

from drsync.format import Malformed
from drsync.format.blockmap import (
    MAX_OLDER_MAPS,
    MAX_PAGE_BYTES,
    NO_CONTAINER,
    NO_PAGE,
    PAGE_BLOCKS,
    THIS_MAP,
    MapDisk,
    MapMeta,
    OlderMaps,
    Page,
    PageContainer,
    PageSealer,
    PageTable,
    decode_map,
    decode_page,
    encode_map,
    encode_page,
    map_index_bound,
    open_page,
    page_binding,
    page_blocks,
    page_count,
)
from drsync.format.frame import MAX_FRAME_BYTES, FrameOpener, FrameSealer, disk_binding
from drsync.format.keys import VmKey
from drsync.format.seal import FRAMES_START, MAX_OBJECT_BYTES
from drsync.model import BLOCK_SIZE, MAX_DISK_BYTES

KEYS = VmKey(b"k" * 32).of_object(b"o" * 16)
REPOSITORY = b"r" * 16
BINDING = page_binding(REPOSITORY, "root")
NEWEST = 1000


def page_of(frames: dict[int, tuple[int, int, int]], *, blocks: int, containers: int) -> Page:
    """A page from {block: (container, offset, length)}."""
    page = Page(
        containers=[PageContainer(number=n % 3 * 100, object_id=bytes([n % 251]) * 16) for n in range(containers)],
        held_by=np.full(blocks, NO_CONTAINER, np.int32),
        offsets=np.zeros(blocks, np.uint32),
        lengths=np.zeros(blocks, np.uint32),
    )
    for block, (container, offset, length) in frames.items():
        page.held_by[block], page.offsets[block], page.lengths[block] = container, offset, length
    return page


@st.composite
def pages(draw: st.DrawFn) -> Page:
    blocks = draw(st.one_of(st.integers(1, 40), st.just(PAGE_BLOCKS)))
    containers = draw(st.integers(1, 6))
    ends = [FRAMES_START] * containers
    frames: dict[int, tuple[int, int, int]] = {}
    for block in sorted(draw(st.sets(st.integers(0, blocks - 1), max_size=30))):
        container, length = draw(st.integers(0, containers - 1)), draw(st.integers(1, MAX_FRAME_BYTES))
        offset = ends[container] + draw(st.sampled_from([0, 0, 1, 5_000_000]))
        frames[block] = container, offset, length
        ends[container] = offset + length
    return page_of(frames, blocks=blocks, containers=containers)


def assert_same(left: Page, right: Page) -> None:
    assert left.containers == right.containers
    for name in ("held_by", "offsets", "lengths"):
        assert np.array_equal(getattr(left, name), getattr(right, name)), name


@given(pages())
def test_a_page_reads_as_it_was_written(page: Page) -> None:
    plain = encode_page(page)
    assert len(plain) <= MAX_PAGE_BYTES
    assert_same(decode_page(plain, len(page.held_by), NEWEST), page)


@given(pages(), st.data())
def test_f10_a_page_that_is_cut_or_extended_is_refused(page: Page, data: st.DataObject) -> None:
    plain = encode_page(page)
    cut = data.draw(st.integers(0, len(plain) - 1))
    for damaged in (plain[:cut], plain + b"\0"):
        with pytest.raises(Malformed):
            decode_page(damaged, len(page.held_by), NEWEST)


@given(st.binary(max_size=300), st.integers(1, 20))
def test_f10_anything_else_is_refused_or_within_bounds(plain: bytes, blocks: int) -> None:
    try:
        page = decode_page(plain, blocks, NEWEST)
    except Malformed:
        return
    held = page.held_by != NO_CONTAINER
    assert np.all(page.held_by < len(page.containers))
    assert np.all(page.lengths[held] <= MAX_FRAME_BYTES)
    assert np.all(page.offsets[held].astype(np.int64) + page.lengths[held] <= MAX_OBJECT_BYTES)


def plain_page(*, count: int = 1, number: int = 7, container: int = 1, gap: int = 8, length: int = 100) -> bytes:
    """The plain bytes of a page of one block, written down by hand."""
    return struct.pack("<IQ16sHII", count, number, b"i" * 16, container, gap, length)


def test_f25_a_page_is_the_bytes_that_the_format_says() -> None:
    page = page_of({0: (0, 8, 100)}, blocks=1, containers=1)
    page = Page(
        containers=[PageContainer(number=7, object_id=b"i" * 16)],
        held_by=page.held_by,
        offsets=page.offsets,
        lengths=page.lengths,
    )
    assert encode_page(page) == plain_page()
    two = page_of({0: (0, 0x08, 0x10203), 1: (0, 0x1020B, 0x10405)}, blocks=2, containers=1)
    assert encode_page(two)[-20:] == bytes.fromhex("0101 0000 0800 0000 0000 0000 0305 0204 0101 0000")


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"count": 2**32 - 1},
        {"number": NEWEST + 1},
        {"container": 2},
        {"container": 65535},
        {"gap": 7},
        {"gap": MAX_OBJECT_BYTES - 99},
        {"gap": 2**32 - 1},
        {"length": 0},
        {"length": MAX_FRAME_BYTES + 1},
    ],
)
def test_f25_a_page_that_breaks_a_bound_is_refused(wrong: dict[str, int]) -> None:
    decode_page(plain_page(), 1, NEWEST)
    with pytest.raises(Malformed):
        decode_page(plain_page(**wrong), 1, NEWEST)


def test_frames_that_overlap_are_not_written() -> None:
    with pytest.raises(Malformed):
        encode_page(page_of({0: (0, 8, 100), 1: (0, 107, 100)}, blocks=2, containers=1))


def test_a_page_of_which_each_block_has_a_container_of_its_own_fits() -> None:
    every = {n: (n, FRAMES_START, MAX_FRAME_BYTES) for n in range(PAGE_BLOCKS)}
    page = page_of(every, blocks=PAGE_BLOCKS, containers=PAGE_BLOCKS)
    plain = encode_page(page)
    assert len(plain) <= MAX_PAGE_BYTES
    assert_same(decode_page(plain, PAGE_BLOCKS, NEWEST), page)


def used_page(random: np.random.Generator) -> Page:
    """60 % of a page hold data, in packs of 512 frames; of those 5 % were written since, by 60 points."""
    allocated = np.flatnonzero(np.repeat(random.random(PAGE_BLOCKS // 64) < 0.6, 64))
    lengths = np.where(random.random(len(allocated)) < 0.4, 65_571, random.integers(9_000, 65_500, len(allocated)))
    held_by = np.arange(len(allocated), dtype=np.int32) // 512
    offsets = np.zeros(len(allocated), np.int64)
    packs = int(held_by.max(initial=0)) + 1
    for pack in range(packs):
        at = held_by == pack
        offsets[at] = FRAMES_START + np.cumsum(lengths[at]) - lengths[at]
    later = random.random(len(allocated)) < 0.05
    held_by[later] = packs + random.integers(0, 60, int(later.sum()))
    for point in range(packs, packs + 60):
        at = held_by == point
        offsets[at] = FRAMES_START + np.cumsum(lengths[at] + random.integers(0, 2**21, int(at.sum()))) - lengths[at]
    page = page_of({}, blocks=PAGE_BLOCKS, containers=0)
    page.held_by[allocated], page.offsets[allocated], page.lengths[allocated] = held_by, offsets, lengths
    containers = [PageContainer(number=0 if n < packs else n, object_id=random.bytes(16)) for n in range(packs + 60)]
    return Page(containers=containers, held_by=page.held_by, offsets=page.offsets, lengths=page.lengths)


def test_a_block_takes_at_most_four_bytes() -> None:
    random = np.random.default_rng(1)
    sealer, pages = PageSealer(KEYS), 16
    for number in range(pages):
        page = used_page(random)
        sealer.add(page, BINDING, number)
        assert_same(decode_page(encode_page(page), PAGE_BLOCKS, NEWEST), page)
    per_block = len(sealer.buffer) / (pages * PAGE_BLOCKS)
    assert 1 < per_block <= 4, f"{per_block:.2f} bytes a block"


def sealed_page() -> tuple[bytes, int]:
    sealer = PageSealer(KEYS)
    page = page_of({0: (0, 8, 100), 3: (1, 8, 50)}, blocks=5, containers=2)
    sealer.add(page, BINDING, 8)
    offset, length = sealer.add(page, BINDING, 9)
    assert offset + length == len(sealer.buffer)
    return bytes(sealer.buffer[offset:]), offset


def test_f24_a_page_opens_only_where_it_belongs() -> None:
    stored, offset = sealed_page()
    decode_page(open_page(KEYS, stored, offset, BINDING, 9), 5, NEWEST)
    other = VmKey(b"k" * 32).of_object(b"p" * 16)
    wrong: list[Callable[[], bytes]] = [
        lambda: open_page(other, stored, offset, BINDING, 9),
        lambda: open_page(KEYS, stored, offset + 1, BINDING, 9),
        lambda: open_page(KEYS, stored, offset, BINDING, 8),
        lambda: open_page(KEYS, stored, offset, page_binding(REPOSITORY, "data"), 9),
        lambda: open_page(KEYS, stored, offset, page_binding(b"s" * 16, "root"), 9),
        lambda: open_page(KEYS, stored[:-1], offset, BINDING, 9),
        lambda: open_page(KEYS, b"", offset, BINDING, 9),
    ]
    for attempt in wrong:
        with pytest.raises(Malformed, match="does not authenticate"):
            attempt()


def test_f24_a_changed_page_does_not_open() -> None:
    stored, offset = sealed_page()
    for at in range(len(stored)):
        with pytest.raises(Malformed):
            open_page(KEYS, stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :], offset, BINDING, 9)


def test_f24_a_frame_is_no_page_and_a_page_no_frame() -> None:
    out = memoryview(bytearray(2 * BLOCK_SIZE))
    length = FrameSealer(KEYS).seal_into(out, 8, memoryview(bytes(BLOCK_SIZE)), disk_binding(REPOSITORY, "root"), 9)
    with pytest.raises(Malformed):
        open_page(KEYS, bytes(out[8 : 8 + length]), 8, BINDING, 9)
    stored, offset = sealed_page()
    with pytest.raises(Malformed):
        FrameOpener(KEYS).open(memoryview(stored), offset, disk_binding(REPOSITORY, "root"), 9, BLOCK_SIZE)


def test_f10_a_page_that_claims_more_than_a_page_has_is_not_decompressed() -> None:
    import zstandard
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    packed = zstandard.ZstdCompressor().compress(bytes(64 * MAX_PAGE_BYTES))
    stored = AESGCM(KEYS.frame).encrypt(struct.pack("<IQ", 0, 8), packed, BINDING + struct.pack("<Q", 0))
    tracemalloc.start()
    with pytest.raises(Malformed, match="claims"):
        open_page(KEYS, stored, 8, BINDING, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_PAGE_BYTES


SIZE = 2 * PAGE_BLOCKS * BLOCK_SIZE + 512
OLDER = OlderMaps(
    numbers=np.array([3, 5], np.uint64),
    ids=np.arange(32, dtype=np.uint8).reshape(2, 16),
    generations=np.array([1, 2], np.uint64),
)
NONE_OLDER = OlderMaps(numbers=OLDER.numbers[:0], ids=OLDER.ids[:0], generations=OLDER.generations[:0])


def meta(**fields: object) -> MapMeta:
    usual: dict[str, object] = {
        "seq": 9,
        "segment": "ab" * 32,
        "parent": 8,
        "older": 2,
        "disks": [MapDisk(name="data", size_bytes=BLOCK_SIZE), MapDisk(name="root", size_bytes=SIZE)],
    }
    return fast_json.decode(fast_json.encode(usual | fields), type=MapMeta)


def table(*rows: tuple[int, int, int]) -> PageTable:
    columns = np.array(rows, np.uint32).reshape(-1, 3)
    return PageTable(sources=columns[:, 0], offsets=columns[:, 1], lengths=columns[:, 2])


DATA = table((THIS_MAP, 8, 20))
ROOT = table((THIS_MAP + 2, 4000, 30), (NO_PAGE, 0, 0), (THIS_MAP, 28, 40))


def test_f23_an_index_reads_as_it_was_written() -> None:
    index = encode_map(meta(), OLDER, [DATA, ROOT])
    assert len(index) <= map_index_bound(len(fast_json.encode(meta())), 4)
    found, older, tables = decode_map(index, 68)
    assert found == meta()
    assert older.numbers.tolist() == [3, 5]
    assert older.ids.tobytes() == bytes(range(32))
    assert older.generations.tolist() == [1, 2]
    assert [t.sources.tolist() for t in tables] == [[1], [3, 0, 1]]
    assert [t.offsets.tolist() for t in tables] == [[8], [4000, 0, 28]]
    assert [t.lengths.tolist() for t in tables] == [[20], [30, 0, 40]]
    empty = encode_map(
        meta(older=0, disks=[]),
        NONE_OLDER,
        [],
    )
    assert decode_map(empty, FRAMES_START)[2] == []


def test_f10_an_index_that_is_cut_or_extended_is_refused() -> None:
    index = encode_map(meta(), OLDER, [DATA, ROOT])
    for damaged in (*(index[:n] for n in range(len(index))), index + b"\0"):
        with pytest.raises(Malformed):
            decode_map(damaged, 68)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seq": 0},
        {"seq": 2**63},
        {"seq": 4},  # older maps are newer then
        {"parent": 9},
        {"parent": 0},
        {"older": 1},
        {"older": -1},
        {"older": MAX_OLDER_MAPS + 1},
        {"disks": [{"name": "root", "size_bytes": SIZE}] * 2},
        {"disks": [{"name": "../x", "size_bytes": SIZE}]},
        {"disks": [{"name": "root", "size_bytes": -1}]},
        {"disks": [{"name": "root", "size_bytes": MAX_DISK_BYTES + 1}]},
        {"disks": [{"name": f"d{n}", "size_bytes": MAX_DISK_BYTES} for n in range(64)]},
        {"disks": [{"name": f"d{n}", "size_bytes": 0} for n in range(65)]},
    ],
)
def test_f23_metadata_that_breaks_a_rule_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(Malformed):
        decode_map(encode_map(meta(**wrong), OLDER, [DATA, ROOT]), 68)


def test_f23_an_unknown_field_is_refused() -> None:
    text = fast_json.encode(meta())[:-1] + b',"more":1}'
    index = encode_map(meta(), OLDER, [DATA, ROOT])
    rest = index[4 + len(fast_json.encode(meta())) :]
    with pytest.raises(Malformed):
        decode_map(struct.pack("<I", len(text)) + text + rest, 68)


@pytest.mark.parametrize(
    "data",
    [
        (THIS_MAP + 3, 8, 20),  # a map that it does not name
        (NO_PAGE, 8, 0),
        (NO_PAGE, 0, 20),
        (THIS_MAP, 8, 16),  # a tag and nothing
        (THIS_MAP, 8, MAX_PAGE_BYTES + 1),
        (THIS_MAP, 9, 20),  # own pages must lie back to back
        (THIS_MAP + 1, 7, 20),
        (THIS_MAP + 1, MAX_OBJECT_BYTES, 20),
        (THIS_MAP + 1, 8, 20),  # then the other one would have to lie at 8
    ],
)
def test_f24_a_page_that_lies_nowhere_is_refused(data: tuple[int, int, int]) -> None:
    with pytest.raises(Malformed):
        decode_map(encode_map(meta(), OLDER, [table(data), ROOT]), 68)


def test_f7_the_pages_take_exactly_the_bytes_before_the_header() -> None:
    for end in (8, 67, 69):
        with pytest.raises(Malformed):
            decode_map(encode_map(meta(), OLDER, [DATA, ROOT]), end)


def test_a_disk_has_as_many_pages_as_it_takes() -> None:
    assert [page_count(n) for n in (0, 1, BLOCK_SIZE * PAGE_BLOCKS, SIZE)] == [0, 1, 1, 3]
    assert [page_blocks(n, SIZE) for n in range(3)] == [PAGE_BLOCKS, PAGE_BLOCKS, 1]
