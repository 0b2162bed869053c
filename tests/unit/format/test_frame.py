"""Frames: docs/format.md, "Frames"."""

import struct

import numpy as np
import pytest
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from shipped_vm import content

from drsync.format import Malformed
from drsync.format.frame import HASH_BYTES, MAX_FRAME_BYTES, TAG_BYTES, FrameOpener, FrameSealer, disk_binding
from drsync.format.keys import ObjectKeys, RootKey
from drsync.model import BLOCK_SIZE

REPOSITORY = b"r" * 16
VM = RootKey(bytes(32)).of_vm(REPOSITORY, "web")
KEYS = VM.of_object(b"o" * 16)
ROOT_DISK = disk_binding(REPOSITORY, "root")
blocks = st.builds(content, st.integers(1, 20), st.sampled_from([1, 512, 4096, BLOCK_SIZE - 512, BLOCK_SIZE]))


def sealed(block: bytes, *, offset: int = 8, number: int = 3, keys: ObjectKeys = KEYS) -> bytes:
    out = memoryview(bytearray(offset + MAX_FRAME_BYTES))
    length = FrameSealer(keys).seal_into(out, offset, memoryview(block), ROOT_DISK, number)
    assert not any(out[:offset])
    assert not any(out[offset + length :])
    return bytes(out[offset : offset + length])


def opened(
    frame: bytes,
    length: int,
    *,
    offset: int = 8,
    number: int = 3,
    binding: bytes = ROOT_DISK,
    keys: ObjectKeys = KEYS,
) -> bytes:
    return FrameOpener(keys).open(memoryview(frame), offset, binding, number, length)


@given(blocks, st.integers(8, 2**20), st.integers(0, 2**32 - 1))
def test_a_frame_opens_to_its_block(block: bytes, offset: int, number: int) -> None:
    frame = sealed(block, offset=offset, number=number)
    assert opened(frame, len(block), offset=offset, number=number) == block


def test_f11_a_frame_is_made_as_the_format_says() -> None:
    block = content(2, BLOCK_SIZE)
    nonce = struct.pack("<IQ", 0, 4711)
    bound = REPOSITORY + b"root\0" + struct.pack("<Q", 3)
    packed = AESGCM(KEYS.frame).decrypt(nonce, sealed(block, offset=4711), bound)
    assert zstandard.ZstdDecompressor().decompress(packed) == block


@pytest.mark.parametrize("number", range(2, 40, 2))
def test_no_frame_is_longer_than_the_limit(number: int) -> None:
    assert len(sealed(content(number, BLOCK_SIZE))) <= MAX_FRAME_BYTES


@pytest.mark.parametrize(
    "moved",
    [
        {"offset": 9},
        {"offset": 8 + 2**32},
        {"number": 4},
        {"number": 3 + 2**32},
        {"binding": disk_binding(REPOSITORY, "root2")},
        {"binding": disk_binding(REPOSITORY, "roo")},
        {"binding": disk_binding(b"s" * 16, "root")},
        {"keys": VM.of_object(b"p" * 16)},
        {"keys": RootKey(bytes(32)).of_vm(REPOSITORY, "web2").of_object(b"o" * 16)},
        {"keys": RootKey(bytes(32)).of_vm(b"s" * 16, "web").of_object(b"o" * 16)},
    ],
)
def test_f11_a_frame_that_was_moved_does_not_open(moved: dict[str, object]) -> None:
    block = content(1, BLOCK_SIZE)
    with pytest.raises(Malformed, match="does not authenticate"):
        opened(sealed(block), len(block), **moved)  # type: ignore[arg-type]  # one of its parameters


@given(st.data())
def test_f11_a_frame_that_was_changed_cut_or_extended_does_not_open(data: st.DataObject) -> None:
    block = content(2, 512)
    frame = sealed(block)
    at = data.draw(st.integers(0, len(frame) - 1))
    flipped = frame[:at] + bytes([frame[at] ^ (1 << data.draw(st.integers(0, 7)))]) + frame[at + 1 :]
    for wrong in (flipped, frame[:at], frame + b"\0", b"\0" + frame, frame[1:]):
        with pytest.raises(Malformed):
            opened(wrong, len(block))


@pytest.mark.parametrize("claimed", [0, 1, BLOCK_SIZE - 1, BLOCK_SIZE + 1, 2**40])
def test_f11_a_frame_must_be_as_long_as_its_block(claimed: int) -> None:
    with pytest.raises(Malformed, match="bytes long"):
        opened(sealed(content(1, BLOCK_SIZE)), claimed)


def frame_of(packed: bytes) -> bytes:
    """A frame that authenticates, of whatever a holder of the key puts there."""
    return AESGCM(KEYS.frame).encrypt(struct.pack("<IQ", 0, 8), packed, ROOT_DISK + struct.pack("<Q", 3))


def test_f10_a_frame_that_claims_to_be_huge_is_refused_before_it_is_decompressed() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(2**28))
    assert len(bomb) < MAX_FRAME_BYTES
    with pytest.raises(Malformed, match="bytes long"):
        opened(frame_of(bomb), BLOCK_SIZE)
    lying = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**20))
    with pytest.raises(Malformed, match="bytes long"):
        opened(frame_of(lying), BLOCK_SIZE)


@given(st.binary(max_size=200))
def test_whatever_authenticates_is_a_block_or_malformed(packed: bytes) -> None:
    skippable = struct.pack("<II", 0x184D2A50, len(packed)) + packed
    for tried in (packed, skippable):
        with pytest.raises(Malformed):
            opened(frame_of(tried), BLOCK_SIZE)


def test_a_frame_shorter_than_its_tag_does_not_open() -> None:
    for length in range(TAG_BYTES + 1):
        with pytest.raises(Malformed):
            opened(bytes(length), BLOCK_SIZE)


def test_the_hash_is_keyed_blake3_and_the_same_for_all_objects_of_a_vm() -> None:
    block = content(1, BLOCK_SIZE)
    other = VM.of_object(b"p" * 16)
    expected = blake3(block, key=KEYS.content).digest(HASH_BYTES)
    assert FrameSealer(KEYS).hash_block(memoryview(block)) == expected
    assert FrameSealer(other).hash_block(memoryview(block)) == FrameOpener(other).hash_block(block) == expected
    assert expected != blake3(block).digest(HASH_BYTES)


def test_f3_equal_blocks_make_frames_that_have_nothing_in_common() -> None:
    block = content(1, BLOCK_SIZE)
    frames = [sealed(block), sealed(block, offset=9), sealed(block, keys=VM.of_object(b"p" * 16))]
    columns = np.array([list(frame) for frame in frames])
    assert (columns[0] == columns[1]).mean() < 0.5
    assert (columns[0] == columns[2]).mean() < 0.5


def test_a_message_tells_the_place_and_not_the_content() -> None:
    block = b"SECRET" * 1000
    with pytest.raises(Malformed) as caught:
        opened(sealed(block), len(block), offset=16)
    assert str(caught.value) == "the frame of block 3 at offset 16 does not authenticate"
