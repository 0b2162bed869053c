"""The part of qcow2 that drsync reads and writes; QEMU's own tools say what is right."""

import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import qemu_img
from hypothesis import given
from hypothesis import strategies as st
from shipped_vm import OracleDisk, content, write_layer, write_raw

from drsync.model import BLOCK_SIZE, block_count, block_length
from drsync.qcow2 import ENTRY_ZERO, TABLE_BLOCKS, ImageReader, ImageWriter, NotReadable, create_image

MIB = 1024 * 1024
TABLE_BYTES = TABLE_BLOCKS * BLOCK_SIZE

pytestmark = pytest.mark.qemu

Mapping = dict[int, str]


def mapping_of(path: Path) -> Mapping:
    """What the reader says of each block that an image says anything of: "data", "zero"."""
    found: Mapping = {}
    fd = os.open(path, os.O_RDONLY)
    try:
        for table in ImageReader(fd).tables():
            found |= {table.first_block + int(n): "data" for n in np.flatnonzero(table.offsets)}
            found |= {table.first_block + int(n): "zero" for n in np.flatnonzero(table.zeros)}
    finally:
        os.close(fd)
    return found


def blocks_of(path: Path, size_bytes: int) -> dict[int, bytes]:
    """The bytes of each block that the reader finds data of."""
    found: dict[int, bytes] = {}
    fd = os.open(path, os.O_RDONLY)
    try:
        reader = ImageReader(fd)
        assert reader.size_bytes == size_bytes
        for table in reader.tables():
            for n in np.flatnonzero(table.offsets).tolist():
                number = table.first_block + n
                found[number] = os.pread(fd, block_length(number, size_bytes), int(table.offsets[n]))
    finally:
        os.close(fd)
    return found


def refused(path: Path) -> str:
    with pytest.raises(NotReadable) as caught:
        mapping_of(path)
    return str(caught.value)


def test_what_qemu_wrote_zeroed_and_left_alone_is_told_apart(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "a.qcow2", 10 * BLOCK_SIZE)
    qemu_img.io(path, "write -P 7 64k 128k", "write -z 256k 64k", "write -P 9 384k 64k", "discard 384k 64k")
    assert mapping_of(path) == {1: "data", 2: "data", 4: "zero", 6: "zero"}
    assert set(blocks_of(path, 10 * BLOCK_SIZE).values()) == {b"\7" * BLOCK_SIZE}


def test_the_reader_agrees_with_qemu_img_map_over_several_tables(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "a.qcow2", 3 * TABLE_BYTES - 512)
    last = block_count(3 * TABLE_BYTES - 512) - 1
    blocks = [0, TABLE_BLOCKS - 1, TABLE_BLOCKS, 2 * TABLE_BLOCKS + 5, last]
    qemu_img.io(path, *(f"write -P {n % 255 + 1} {n * BLOCK_SIZE} 512" for n in blocks[:3]))
    qemu_img.io(path, *(f"write -z {n * BLOCK_SIZE} 512" for n in blocks[3:]))
    said: Mapping = {}
    for extent in qemu_img.map_of(path):
        if extent["present"]:
            first, end = extent["start"] // BLOCK_SIZE, -(-(extent["start"] + extent["length"]) // BLOCK_SIZE)
            said |= dict.fromkeys(range(first, end), "zero" if extent["zero"] else "data")
    assert sorted(said) == blocks
    assert mapping_of(path) == said


def test_an_empty_image_has_no_tables(tmp_path: Path) -> None:
    assert mapping_of(qemu_img.create(tmp_path / "a.qcow2", 2**41)) == {}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["compat=0.10"], "is not qcow2 version 3"),
        (["cluster_size=4096"], "is not a plain image"),
        (["extended_l2=on"], "is not a plain image"),
        (["data_file=other.raw"], "is not a plain image"),
        (["compression_type=zstd"], "is not a plain image"),
    ],
)
def test_an_image_of_another_kind_is_refused(tmp_path: Path, options: list[str], problem: str) -> None:
    path = tmp_path / "a.qcow2"
    options = [option.replace("other.raw", str(tmp_path / "other.raw")) for option in options]
    qemu_img.create(path, MIB, *options)
    assert problem in refused(path)


def test_an_image_over_another_one_is_refused(tmp_path: Path) -> None:
    base = qemu_img.create(tmp_path / "base.qcow2", MIB)
    path = qemu_img.create(tmp_path / "a.qcow2", MIB, f"backing_file={base}", "backing_fmt=qcow2")
    assert "backing file" in refused(path)


def test_an_encrypted_image_is_refused(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "a.qcow2", MIB)
    patch(path, 32, struct.pack(">I", 2))  # LUKS; to make a real one, qemu-img measures the processor, and may give up
    assert "encryption 2" in refused(path)


def test_a_compressed_cluster_is_refused(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "a.qcow2", MIB)
    qemu_img.io(path, "write -c -P 7 64k 64k")
    assert refused(path) == "holds a compressed cluster behind block 0"


def test_an_image_that_qemu_did_not_close_is_refused(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "a.qcow2", MIB, "lazy_refcounts=on")
    patch(path, 72, struct.pack(">Q", 1))
    assert refused(path) == "was not closed by QEMU"


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("length", [0, 1, 103])
def test_a_file_shorter_than_a_header_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(b"QFI\xfb".ljust(length, b"\0")[:length])
    assert refused(path) == f"is {length} bytes long, shorter than a qcow2 header"


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"QFI\xfa"),
        (4, struct.pack(">I", 4)),
        (24, struct.pack(">Q", 2**63)),  # size
        (24, struct.pack(">Q", 2**64 - 1)),
        (36, struct.pack(">I", 0)),  # L1 entries
        (40, struct.pack(">Q", 2**64 - 8)),  # where L1 is
        (40, struct.pack(">Q", 2**62)),
        (72, struct.pack(">Q", 1 << 63)),  # incompatible features
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, offset: int, data: bytes) -> None:
    path = tmp_path / "a.qcow2"
    write_layer(path, 4 * BLOCK_SIZE, {0: content(1, BLOCK_SIZE)})
    patch(path, offset, data)
    refused(path)


@pytest.mark.parametrize("entry", [2**40, 2**55, 2 * BLOCK_SIZE + 512])
def test_a_table_entry_that_leads_out_of_the_file_or_between_clusters_is_refused(tmp_path: Path, entry: int) -> None:
    path = tmp_path / "a.qcow2"
    write_layer(path, 4 * BLOCK_SIZE, {0: content(1, BLOCK_SIZE)})
    l2_at = 3 * BLOCK_SIZE
    patch(path, l2_at + 8, struct.pack(">Q", entry | 1 << 63))
    assert refused(path) == "maps a block behind block 0 outside of its file"
    patch(path, BLOCK_SIZE, struct.pack(">Q", 2**40 | 1 << 63))
    assert refused(path) == f"has a table at {2**40} that lies outside of its file"


@given(st.data())
def test_any_damage_to_header_and_tables_is_read_as_something_or_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "a.qcow2")
        write_layer(path, 4 * BLOCK_SIZE, {0: content(1, BLOCK_SIZE), 1: None})
        at = data.draw(st.sampled_from([0, BLOCK_SIZE, 3 * BLOCK_SIZE])) + data.draw(st.integers(0, 103))
        patch(path, at, data.draw(st.binary(min_size=1, max_size=8)))
        try:
            found = mapping_of(path)
        except NotReadable:
            return
        assert len(found) <= 2 * TABLE_BLOCKS


@st.composite
def layers(draw: st.DrawFn) -> tuple[int, dict[int, bytes | None]]:
    """A disk of up to three tables, and what a layer of it holds."""
    size_bytes = draw(st.integers(1, 3 * TABLE_BLOCKS)) * BLOCK_SIZE - draw(st.sampled_from([0, 512, 65024]))
    last = block_count(size_bytes) - 1
    edges = [n for n in (0, TABLE_BLOCKS - 1, TABLE_BLOCKS, 2 * TABLE_BLOCKS, last) if n <= last]
    numbers = draw(st.sets(st.sampled_from(edges) | st.integers(0, last), max_size=8))
    kinds = st.sampled_from([0, 1, 2, 3])
    held = {n: content(draw(kinds), block_length(n, size_bytes)) for n in numbers}
    return size_bytes, {n: data if any(data) else None for n, data in held.items()}


@given(layers())
def test_what_was_written_is_read(layer: tuple[int, dict[int, bytes | None]]) -> None:
    size_bytes, held = layer
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "a.qcow2")
        write_layer(path, size_bytes, held)
        assert mapping_of(path) == {n: "zero" if data is None else "data" for n, data in held.items()}
        assert blocks_of(path, size_bytes) == {n: data for n, data in held.items() if data is not None}


@pytest.mark.parametrize("size_bytes", [512, BLOCK_SIZE, 10 * BLOCK_SIZE - 512, TABLE_BYTES, 2 * TABLE_BYTES + 512])
def test_qemu_finds_no_fault_in_a_written_image_and_reads_what_was_written(tmp_path: Path, size_bytes: int) -> None:
    last = block_count(size_bytes) - 1
    disk = OracleDisk(size_bytes)
    for number in {0, last, min(last, TABLE_BLOCKS - 1), min(last, TABLE_BLOCKS)}:
        disk.put(number, content(2 * number + 2, block_length(number, size_bytes)))
    path = tmp_path / "a.qcow2"
    write_layer(path, size_bytes, {**disk.blocks, **({1: None} if last > 1 else {})})
    qemu_img.check(path)
    assert qemu_img.info(path)["virtual-size"] == size_bytes
    qemu_img.assert_same(write_raw(disk, tmp_path / "raw"), path, "qcow2")


def test_an_image_with_more_clusters_than_one_refcount_block_counts_is_right(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    image = ImageWriter(fd, 5 * TABLE_BYTES)
    for index in range(5):  # 40,960 clusters, all of them holes of the file
        first = image.allocate(TABLE_BLOCKS)
        image.set_table(index, first + np.arange(TABLE_BLOCKS, dtype=np.uint64) * BLOCK_SIZE)
    image.finish()
    os.close(fd)
    qemu_img.check(path)
    assert mapping_of(path) == dict.fromkeys(range(5 * TABLE_BLOCKS), "data")


def test_a_file_is_no_image_before_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    image = ImageWriter(fd, MIB)
    image.set_table(0, np.full(3, ENTRY_ZERO, np.uint64))
    os.close(fd)
    refused(path)


@pytest.mark.parametrize("size_bytes", [0, 512, BLOCK_SIZE + 512, MIB, 2**41])
def test_a_created_image_is_empty_private_and_can_be_written_by_qemu(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "a.qcow2"
    create_image(path, size_bytes)
    assert path.stat().st_mode & 0o777 == 0o600
    qemu_img.check(path)
    assert qemu_img.info(path)["virtual-size"] == size_bytes
    assert mapping_of(path) == {}
    if size_bytes >= BLOCK_SIZE:
        qemu_img.io(path, "write -P 7 0 64k", f"write -z {size_bytes - 512} 512")
        qemu_img.check(path)
        assert mapping_of(path) == {0: "data", block_count(size_bytes) - 1: "zero"}


def test_an_existing_file_is_not_made_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        create_image(path, MIB)
    assert path.read_text() == "mine"
