"""The VMDK that is sent to VM Import: QEMU and the plug-in's reader find the disk in it; empty space is free."""

import random
import struct
import tracemalloc
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import pytest
import qemu_img
from drsync_localstack.disk_format import open_disk
from hypothesis import example, given
from hypothesis import strategies as st

from drsync.model import BLOCK_SIZE
from drsync.target.ec2 import vmdk
from drsync.target.ec2.vmdk import ImageTooLarge, Position, VmdkStream
from drsync.units import GiB, MiB, TiB

TABLE_BLOCKS = 512


class Memory:
    """An image in memory, as the plug-in reads it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size_bytes = len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def data_of(block: int, size: int = BLOCK_SIZE) -> bytes:
    """Some that is compressible, some that is not."""
    source = random.Random(block)
    return source.randbytes(size) if block % 3 else (f"{block} ".encode() * size)[:size]


def image_of(size_bytes: int, blocks: Mapping[int, bytes]) -> bytes:
    return b"".join(VmdkStream(size_bytes, "test").pieces(sorted(blocks.items())))


def length_of(size_bytes: int, block: int) -> int:
    return min(BLOCK_SIZE, size_bytes - block * BLOCK_SIZE)


def same_disk(tmp_path: Path, image: bytes, size_bytes: int, blocks: Mapping[int, bytes]) -> None:
    """Check with qemu-img that the image is sound and is this disk."""
    (tmp_path / "disk.vmdk").write_bytes(image)
    with (tmp_path / "disk.raw").open("wb") as raw:
        raw.truncate(-(-size_bytes // 512) * 512)
        for block, data in blocks.items():
            raw.seek(block * BLOCK_SIZE)
            raw.write(data)
    qemu_img.run("qemu-img", "check", "-q", "-f", "vmdk", tmp_path / "disk.vmdk")
    qemu_img.run("qemu-img", "compare", "-q", "-f", "vmdk", "-F", "raw", tmp_path / "disk.vmdk", tmp_path / "disk.raw")


@pytest.mark.parametrize(
    ("size_bytes", "numbers"),
    [
        (100 * MiB, [0, 1, 5, 511, 512, 1023, 1599]),
        (100 * MiB, range(1600)),
        (1 * MiB + 512, [3, 16]),
        (65 * MiB, [1039]),
        (512, [0]),
        (40 * MiB, []),
    ],
)
def test_qemu_finds_the_disk_in_the_image(tmp_path: Path, size_bytes: int, numbers: list[int]) -> None:
    blocks = {number: data_of(number, length_of(size_bytes, number)) for number in numbers}
    same_disk(tmp_path, image_of(size_bytes, blocks), size_bytes, blocks)


def test_qemu_converts_the_image_back(tmp_path: Path) -> None:
    blocks = {number: data_of(number) for number in (0, 7, 600)}
    (tmp_path / "disk.vmdk").write_bytes(image_of(64 * MiB, blocks))
    qemu_img.run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", tmp_path / "disk.vmdk", tmp_path / "back.raw")
    raw = (tmp_path / "back.raw").read_bytes()
    wanted = bytearray(64 * MiB)
    for number, data in blocks.items():
        wanted[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE] = data
    assert raw == wanted


def test_what_is_zero_is_left_out() -> None:
    zeros = {number: bytes(BLOCK_SIZE) for number in range(1000)}
    assert image_of(1 * GiB, zeros) == image_of(1 * GiB, {})
    assert len(image_of(1 * GiB, {})) < 72 * 1024


def sparse_blocks(count: int) -> Iterator[tuple[int, bytes]]:
    """Blocks all over a disk of 2 TiB; each has its own number in its beginning."""
    step, noise = 2 * TiB // BLOCK_SIZE // count, random.Random(1).randbytes(1024)
    for number in range(count):
        yield number * step, number.to_bytes(4, "big") + noise + bytes(BLOCK_SIZE - 1028)


def test_a_disk_of_2_tib_with_1_gib_of_data_costs_what_the_data_does() -> None:
    """16384 blocks of data, each in a table of its own or two: the worst that can be."""
    tracemalloc.start()
    stream, length, largest = VmdkStream(2 * TiB, "test"), 0, 0
    for piece in stream.pieces(sparse_blocks(16384)):
        length += len(piece)
        largest = max(largest, len(piece))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    grain, table = 1536 + 512, 512 + 2048
    assert length < 16384 * (grain + table) + 2 * TiB // (32 * MiB) * 4 + 128 * 1024
    assert largest < 2 * MiB
    assert peak < 32 * MiB


def test_qemu_finds_the_few_blocks_of_a_disk_of_2_tib(tmp_path: Path) -> None:
    last = 2 * TiB // BLOCK_SIZE - 1
    blocks = {number: bytes([n + 1]) * BLOCK_SIZE for n, number in enumerate([0, 1, 5_000_000, last])}
    image = image_of(2 * TiB, blocks)
    assert len(image) < 512 * 1024
    (tmp_path / "disk.vmdk").write_bytes(image)
    reads = [(number, data[0]) for number, data in blocks.items()] + [(2, 0), (4_999_999, 0), (last - 1, 0)]
    commands = [part for n, value in reads for part in ("-c", f"read -P {value} {n * BLOCK_SIZE} {BLOCK_SIZE}")]
    told = qemu_img.run("qemu-io", "-r", "-f", "vmdk", *commands, tmp_path / "disk.vmdk")
    assert told.count(f"read {BLOCK_SIZE}/{BLOCK_SIZE} bytes") == len(reads)
    assert "failed" not in told


disks = st.integers(1, 40 * MiB // 512).map(lambda sectors: sectors * 512)


@st.composite
def contents(draw: st.DrawFn) -> tuple[int, dict[int, bytes]]:
    size_bytes = draw(disks)
    numbers = draw(st.sets(st.integers(0, (size_bytes - 1) // BLOCK_SIZE), max_size=30))
    zeros = draw(st.sets(st.sampled_from(sorted(numbers)))) if numbers else set()
    return size_bytes, {
        n: bytes(length_of(size_bytes, n)) if n in zeros else data_of(n, length_of(size_bytes, n)) for n in numbers
    }


@given(contents(), st.integers(1, 5), st.integers(0, 40))
@example((33 * MiB, {n: data_of(n) for n in range(500, 528)}), 2, 1)
def test_any_disk_comes_back_from_its_image_also_when_it_was_written_in_two_goes(
    content: tuple[int, dict[int, bytes]], workers: int, cut_after: int
) -> None:
    size_bytes, blocks = content
    in_order = sorted(blocks.items())
    whole = b"".join(VmdkStream(size_bytes, "test", workers=workers).pieces(in_order))
    disk = open_disk(Memory(whole), "VMDK")
    assert disk.size_bytes == size_bytes
    found = {start // BLOCK_SIZE: data for start, data in disk.pieces}
    assert found == {number: data for number, data in blocks.items() if any(data)}

    first = VmdkStream(size_bytes, "test")
    pieces = first.pieces(in_order)
    begun = b"".join(islice(pieces, cut_after + 1))
    position = first.position
    pieces.close()
    if begun == whole:
        return
    rest = VmdkStream(size_bytes, "test", start=position)
    assert position.sectors * 512 == len(begun)
    assert begun + b"".join(rest.pieces((n, d) for n, d in in_order if n >= position.next_block)) == whole


def test_the_position_tells_what_the_rest_needs() -> None:
    blocks = [(number, data_of(number)) for number in range(500, 540)]
    stream = VmdkStream(64 * MiB, "test")
    pieces = stream.pieces(blocks)
    assert len(next(pieces)) == 64 * 1024
    assert stream.position == Position(next_block=0, sectors=128)
    next(pieces)
    position = stream.position
    assert (position.next_block, list(position.tables), list(position.grains)) == (516, [0], list(range(512, 516)))


@pytest.mark.parametrize(
    "blocks",
    [[(1, 0), (1, 0)], [(2, 0), (1, 0)], [(16, 0)], [(-1, 0)], [(0, -1)], [(0, 1)], [(15, 0), (3, 0)]],
    ids=str,
)
def test_blocks_that_are_not_in_order_or_not_the_disks_are_refused(blocks: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="block"):
        for _ in VmdkStream(1 * MiB, "test").pieces((n, b"x" * (BLOCK_SIZE + more)) for n, more in blocks):
            pass


def test_an_image_that_would_be_more_than_2_tib_is_refused() -> None:
    nearly = Position(next_block=5, sectors=vmdk.MAX_IMAGE_BYTES // 512 - 100)
    with pytest.raises(ImageTooLarge):
        list(VmdkStream(8 * TiB, "test", start=nearly).pieces([(5, data_of(1))]))


def test_an_error_while_blocks_are_read_ends_the_stream_and_its_threads() -> None:
    def broken() -> Iterator[tuple[int, bytes]]:
        yield from ((number, data_of(number)) for number in range(100))
        raise OSError("the repository is gone")

    with pytest.raises(OSError, match="is gone"):
        list(VmdkStream(1 * GiB, "test").pieces(broken()))


def test_the_header_says_what_vmware_wants() -> None:
    image = image_of(100 * MiB, {0: data_of(0)})
    magic, version, flags = struct.unpack_from("<4sII", image)
    assert (magic, version, flags) == (b"KDMV", 3, 0x30001)
    assert b'createType="streamOptimized"' in image[512 : 21 * 512]
    assert image[-512:] == bytes(512)
    footer = image[-1024:-512]
    assert footer[:56] == image[:56]
    assert footer[64:] == image[64:512]
