"""Disk images as VM Import would read them: what qemu-img writes, what is damaged, and what is huge."""

import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from drsync_localstack.blocks import BLOCK_BYTES
from drsync_localstack.disk_format import BadImage, Disk, blocks_of, open_disk
from hypothesis import given
from hypothesis import strategies as st

MIB, TIB = 2**20, 2**40
GRAIN = 64 * 1024
AT_END = 2**64 - 1


@dataclass(slots=True)
class Image:
    """An object in memory; says how much was read at most in one piece."""

    data: bytes
    size_bytes: int = 0
    longest_read: int = field(default=0)

    def __post_init__(self) -> None:
        self.size_bytes = self.size_bytes or len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        self.longest_read = max(self.longest_read, length)
        return self.data[offset : offset + length]


def content(disk: Disk) -> bytes:
    """The whole disk."""
    made = bytearray(disk.size_bytes)
    for start, data in disk.pieces:
        assert start + len(data) <= disk.size_bytes
        made[start : start + len(data)] = data
    return bytes(made)


def raw_with(size: int, *at: int, seed: int = 1) -> bytes:
    """A disk that has data at some places."""
    made = bytearray(size)
    for start in at:
        made[start : start + 5000] = random.Random(seed + start).randbytes(5000)
    return bytes(made)


def qemu_image(raw: bytes, directory: Path, image_format: str, *options: str) -> bytes:
    source, image = directory / "source.raw", directory / "image"
    source.write_bytes(raw)
    more = ["-o", ",".join(options)] if options else []
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", image_format, *more, source, image], check=True)
    return image.read_bytes()


# --- What qemu-img writes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image_format", "options"),
    [
        ("RAW", "raw", ()),
        ("VMDK", "vmdk", ("subformat=streamOptimized",)),
        ("VHD", "vpc", ("subformat=dynamic", "force_size=on")),
        ("VHD", "vpc", ("subformat=fixed", "force_size=on")),
        ("vmdk", "vmdk", ("subformat=streamOptimized",)),
    ],
)
def test_what_qemu_img_writes_is_read_bit_by_bit(
    tmp_path: Path, name: str, image_format: str, options: tuple[str, ...]
) -> None:
    raw = raw_with(40 * MIB, 0, 3 * MIB + 100, 33 * MIB, 40 * MIB - 5000)
    disk = open_disk(Image(qemu_image(raw, tmp_path, image_format, *options)), name)
    assert disk.size_bytes == len(raw)
    assert content(disk) == raw


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_a_vhd_whose_last_block_is_cut_off_by_the_disks_end_is_read(tmp_path: Path, subformat: str) -> None:
    raw = raw_with(5 * MIB + 512, 0, 5 * MIB)[: 5 * MIB + 512]
    disk = open_disk(Image(qemu_image(raw, tmp_path, "vpc", f"subformat={subformat}", "force_size=on")), "VHD")
    assert content(disk)[: len(raw)] == raw


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vhdx", "vpc"])
def test_what_is_another_format_is_no_raw_disk(tmp_path: Path, image_format: str) -> None:
    image = qemu_image(raw_with(MIB, 0), tmp_path, image_format)
    with pytest.raises(BadImage, match="Unsupported specified file format"):
        open_disk(Image(image), "RAW")


@pytest.mark.parametrize("subformat", ["monolithicSparse", "monolithicFlat"])
def test_only_a_stream_optimised_vmdk_is_one(tmp_path: Path, subformat: str) -> None:
    image = qemu_image(raw_with(MIB, 0), tmp_path, "vmdk", f"subformat={subformat}")
    with pytest.raises(BadImage, match="Unsupported"):
        open_disk(Image(image), "VMDK")


@pytest.mark.parametrize("name", ["QCOW2", "VHDX", "OVA", ""])
def test_a_format_that_is_not_known_is_refused(name: str) -> None:
    with pytest.raises(BadImage, match="Unsupported specified file format"):
        open_disk(Image(bytes(MIB)), name)


@pytest.mark.parametrize("name", ["RAW", "VMDK", "VHD"])
def test_an_empty_object_is_refused(name: str) -> None:
    with pytest.raises(BadImage):
        content(open_disk(Image(b""), name))


# --- VMDK, made by hand ----------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Vmdk:
    """A stream-optimised VMDK as it should be, with places where a test puts something else."""

    capacity: int = 64 * MIB
    grain: int = GRAIN
    flags: int = 0x30001
    method: int = 1
    overhead: int = 1
    version: int = 3
    directory_at: int = AT_END
    grains: dict[int, bytes] = field(default_factory=dict)
    table_of: Callable[[int, int], int] = lambda _number, at: at
    with_footer: bool = True
    with_end: bool = True

    def build(self) -> bytes:
        out = bytearray(self.header(self.directory_at).ljust(512 * self.overhead, b"\0"))
        per_table = 512
        directory = [0] * (-(-self.capacity // self.grain // per_table) or 1)
        tables: dict[int, list[int]] = {}
        for number in sorted(self.grains):
            at = len(out) // 512
            packed = self.grains[number]
            self._pad(out, struct.pack("<QI", number * self.grain // 512, len(packed)) + packed)
            tables.setdefault(number // per_table, [0] * per_table)[number % per_table] = self.table_of(number, at)
        for number, table in tables.items():
            self._pad(out, struct.pack("<QII", 4, 0, 1))
            directory[number] = len(out) // 512
            self._pad(out, struct.pack("<512I", *table))
        self._pad(out, struct.pack("<QII", -(-len(directory) * 4 // 512), 0, 2))
        directory_at = len(out) // 512
        self._pad(out, struct.pack(f"<{len(directory)}I", *directory))
        if self.with_footer:
            self._pad(out, struct.pack("<QII", 1, 0, 3))
            self._pad(out, self.header(directory_at))
        if self.with_end:
            self._pad(out, bytes(512))
        return bytes(out)

    def header(self, directory_at: int) -> bytes:
        return struct.pack(
            "<4sIIQQQQIQQQB4sH",
            b"KDMV", self.version, self.flags, self.capacity // 512, self.grain // 512, 0, 0, 512,
            0, directory_at, self.overhead, 0, b"\n \r\n", self.method,
        )  # fmt: skip

    @staticmethod
    def _pad(out: bytearray, data: bytes) -> None:
        out += data
        out += bytes(-len(out) % 512)


DATA = random.Random(5).randbytes(1000) + bytes(GRAIN - 1000)
PACKED = zlib.compress(DATA)


def vmdk(grains: dict[int, bytes] | None = None, **wrong: Any) -> Disk:
    made = Vmdk(grains={1: PACKED, 700: PACKED} if grains is None else grains, **wrong)
    return open_disk(Image(made.build()), "VMDK")


def test_a_vmdk_made_by_hand_is_read() -> None:
    made = content(vmdk())
    assert made[GRAIN : 2 * GRAIN] == made[700 * GRAIN : 701 * GRAIN] == DATA
    assert made.count(0) == len(made) - 2 * (GRAIN - DATA.count(0))


def test_a_vmdk_without_any_data_is_read() -> None:
    assert content(vmdk({})) == bytes(64 * MIB)


def test_a_vmdk_of_2_tib_costs_what_its_data_does() -> None:
    last = 2 * TIB // GRAIN - 1
    image = Image(Vmdk(capacity=2 * TIB, grains={0: PACKED, last: PACKED}).build())
    disk = open_disk(image, "VMDK")
    assert disk.size_bytes == 2 * TIB
    assert list(disk.pieces) == [(0, DATA), (last * GRAIN, DATA)]
    assert image.longest_read <= 2 * MIB


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"flags": 1}, "stream-optimized"),
        ({"method": 0}, "stream-optimized"),
        ({"grain": 0x200 * 8192}, "grains of 8192 sectors"),
        ({"overhead": 2**40}, "too early"),
        ({"capacity": 32 * TIB}, "not supported"),
        ({"capacity": 0}, "not supported"),
        ({"with_end": False}, "too early"),
        ({"with_footer": False}, "footer"),
        ({"directory_at": 2**40}, "too early|directory"),
    ],
    ids=str,
)
def test_a_vmdk_with_a_wrong_header_or_end_is_refused(wrong: dict[str, int], message: str) -> None:
    built = Vmdk(grains={1: PACKED}, **{**wrong, **({"overhead": 1} if "overhead" in wrong else {})}).build()  # type: ignore[arg-type]
    if "overhead" in wrong:
        built = Vmdk(overhead=wrong["overhead"]).header(AT_END).ljust(512, b"\0") + built[512:]
    with pytest.raises(BadImage, match=message):
        content_cheaply(open_disk(Image(built), "VMDK"))


def content_cheaply(disk: Disk) -> None:
    for _ in disk.pieces:
        pass


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("grains", "message"),
    [
        ({1: PACKED[:-20]}, "cut off|short"),
        ({1: PACKED[:-2]}, "cut off|short"),
        ({1: flipped(PACKED, len(PACKED) - 1)}, "incorrect data check"),
        ({1: flipped(PACKED, 0)}, "Bad VMDK"),
        ({1: b"no deflate at all"}, "Bad VMDK"),
        ({1: zlib.compress(bytes(GRAIN + 1))}, "too large"),
        ({1: zlib.compress(bytes(64 * MIB))}, "too large"),
        ({1: zlib.compress(DATA[:-1])}, "short"),
        ({1: b"x" * (3 * GRAIN)}, "grain at sector 128"),
        ({64 * MIB // GRAIN: PACKED}, "grain at sector"),
    ],
)
def test_a_damaged_grain_is_refused_and_no_bomb_is_unpacked(grains: dict[int, bytes], message: str) -> None:
    if 64 * MIB // GRAIN in grains:
        image = Vmdk(grains={}).build()
        marker = struct.pack("<QI", 64 * MIB // 512, len(PACKED)) + PACKED
        disk = open_disk(Image(image[:512] + marker.ljust(-(-len(marker) // 512) * 512, b"\0") + image[512:]), "VMDK")
    else:
        disk = vmdk(grains)
    with pytest.raises(BadImage, match=message):
        content_cheaply(disk)


def test_a_grain_between_two_places_is_refused() -> None:
    built = bytearray(Vmdk(grains={1: PACKED}).build())
    struct.pack_into("<Q", built, 512, 5)  # sector 5 is no grain's
    with pytest.raises(BadImage, match="grain at sector 5"):
        content_cheaply(open_disk(Image(bytes(built)), "VMDK"))


@pytest.mark.parametrize("entry", [0, 1, 2**31])
def test_tables_that_do_not_tell_where_the_grains_are_make_no_disk(entry: int) -> None:
    """Who opens the image by its tables, as hypervisors do, would see another disk than who reads it as a stream."""
    with pytest.raises(BadImage, match="tables"):
        content_cheaply(vmdk(table_of=lambda number, at: entry if number == 700 else at))


def test_a_grain_that_comes_twice_is_refused() -> None:
    built = Vmdk(grains={1: PACKED}).build()
    first = built[512 : 512 + -(-(12 + len(PACKED)) // 512) * 512]
    with pytest.raises(BadImage, match="tables"):
        content_cheaply(open_disk(Image(built[:512] + first + built[512:]), "VMDK"))


@given(cut=st.integers(0, 3000), at=st.integers(0, 2999), value=st.integers(1, 255))
def test_nothing_but_bad_image_comes_of_a_cut_off_and_damaged_vmdk(cut: int, at: int, value: int) -> None:
    built = bytearray(Vmdk(grains={0: PACKED, 3: PACKED}).build()[: max(cut, at + 1)])
    built[min(at, len(built) - 1)] ^= value
    try:
        disk = open_disk(Image(bytes(built)), "VMDK")
        pieces = list(disk.pieces)
    except BadImage:
        return
    assert all(start >= 0 and start + len(data) <= disk.size_bytes for start, data in pieces)


# --- VHD, made by hand -----------------------------------------------------------------------------------------------


def checked(header: bytes, at: int) -> bytes:
    """A header of a VHD with its checksum."""
    bare = header[:at] + bytes(4) + header[at + 4 :]
    return header[:at] + struct.pack(">I", ~sum(bare) & 0xFFFFFFFF) + header[at + 4 :]


def footer(size: int, *, kind: int = 3, sparse_at: int = 512) -> bytes:
    packed = struct.pack(
        ">8sIIQI4sI4sQQII", b"conectix", 2, 0x10000, sparse_at, 0, b"test", 0, b"Wi2k", size, size, 0, kind
    )
    return checked(packed.ljust(512, b"\0"), 64)


def dynamic(size: int, blocks: dict[int, bytes], block_bytes: int = 2 * MIB, entries: int | None = None) -> bytes:
    count = -(-size // block_bytes) if entries is None else entries
    sparse = checked(
        struct.pack(">8sQQIII", b"cxsparse", AT_END, 1536, 0x10000, count, block_bytes).ljust(1024, b"\0"), 36
    )
    table, body = [0xFFFFFFFF] * count, bytearray()
    start = 1536 + -(-count * 4 // 512) * 512
    for number, data in blocks.items():
        table[number] = (start + len(body)) // 512
        body += b"\xff" * 512 + data
    packed = struct.pack(f">{count}I", *table)
    front = footer(size) + sparse + packed.ljust(start - 1536, b"\xff")
    return front + bytes(body) + footer(size)


BLOCK = random.Random(6).randbytes(2 * MIB)


def test_a_dynamic_vhd_made_by_hand_is_read_whatever_the_order_of_its_blocks() -> None:
    made = content(open_disk(Image(dynamic(9 * MIB, {4: BLOCK, 1: BLOCK})), "VHD"))
    assert made == bytes(2 * MIB) + BLOCK + bytes(4 * MIB) + BLOCK[:MIB]


def test_a_dynamic_vhd_of_2_tib_costs_what_its_data_does() -> None:
    image = Image(dynamic(2 * TIB, {2**20 - 1: BLOCK}))
    disk = open_disk(image, "VHD")
    assert [(start, len(data)) for start, data in disk.pieces] == [(2 * TIB - 2 * MIB, 2 * MIB)]
    assert image.longest_read <= 2 * MIB


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (flipped(dynamic(4 * MIB, {}), -20 + len(dynamic(4 * MIB, {}))), "footer's checksum"),
        (flipped(dynamic(4 * MIB, {}), 520), "no header of a dynamic disk"),
        (dynamic(4 * MIB, {}, entries=1), "Bad VHD: 1 blocks"),
        (dynamic(4 * MIB, {}, block_bytes=4 * MIB), "Bad VHD"),
        (dynamic(4 * MIB, {0: BLOCK})[: -MIB - 512] + footer(4 * MIB), "too early"),
        (footer(4 * MIB, sparse_at=2**63), "too early"),
        (footer(4 * MIB, kind=4), "only fixed and dynamic"),
        (footer(4 * MIB, kind=2), "too early"),
        (bytes(MIB) + footer(0, kind=2), "not supported"),
        (bytes(MIB) + footer(32 * TIB, kind=3), "not supported"),
        (bytes(100), "not a VHD"),
        (bytes(MIB), "not a VHD"),
    ],
)
def test_a_damaged_vhd_is_refused(image: bytes, message: str) -> None:
    with pytest.raises(BadImage, match=message):
        content_cheaply(open_disk(Image(image), "VHD"))


# --- RAW and the cutting of blocks ----------------------------------------------------------------------------------


def test_a_raw_object_that_ends_before_its_size_is_refused() -> None:
    with pytest.raises(BadImage, match="too early"):
        content_cheaply(open_disk(Image(b"x" * MIB, size_bytes=2 * MIB), "RAW"))


def test_a_raw_object_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadImage, match="not supported"):
        open_disk(Image(b"x" * 512, size_bytes=16 * TIB + 512), "RAW")


@given(pieces=st.lists(st.tuples(st.integers(0, 4 * BLOCK_BYTES), st.integers(0, 3 * BLOCK_BYTES)), max_size=5))
def test_pieces_are_cut_at_the_bounds_of_blocks_and_nothing_gets_lost(pieces: list[tuple[int, int]]) -> None:
    given_pieces = [(start, bytes([n + 1]) * length) for n, (start, length) in enumerate(pieces)]
    wanted, made = bytearray(8 * BLOCK_BYTES), bytearray(8 * BLOCK_BYTES)
    for start, data in given_pieces:
        wanted[start : start + len(data)] = data
    for index, within, data in blocks_of(given_pieces):
        assert 0 < len(data) <= BLOCK_BYTES - within
        at = index * BLOCK_BYTES + within
        made[at : at + len(data)] = data
    assert made == wanted
