"""Objects: docs/format.md, "Objects"."""

import hashlib
import json
import struct

import msgspec
import pytest
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from drsync.format import Malformed, seal
from drsync.format.keys import ObjectKeys, RootKey
from drsync.format.seal import (
    FOOTER_BYTES,
    FRAMES_START,
    MAGIC,
    MAX_INDEX_BYTES,
    MAX_OBJECT_BYTES,
    Header,
    Opened,
    encode_header,
)

REPOSITORY = b"r" * 16
VM = RootKey(bytes(32)).of_vm(REPOSITORY, "web")
HEADER = Header(kind="segment", repository=REPOSITORY.hex(), vm="web", object="ab" * 16, seq=42)
KEYS = VM.of_object(bytes.fromhex(HEADER.object))
FRAMES = b"the frames"
INDEX = b"the index" * 10
FOOTER = struct.Struct("<IIQ32s8s")


def made(frames: bytes = FRAMES, index: bytes = INDEX) -> bytes:
    end = FRAMES_START + len(frames)
    buffer = memoryview(bytearray(end + seal.sealed_bound(len(index))))
    buffer[FRAMES_START:end] = frames
    sealed = seal.seal(buffer, end, HEADER, index, KEYS)
    data = bytes(buffer[: sealed.length])
    assert sealed.sha256 == hashlib.sha256(data).digest()
    return data


def opened(data: bytes, keys: ObjectKeys = KEYS) -> Opened:
    return seal.open_index(data, seal.parse_footer(data, len(data)), keys)


def footer_of(*, header: int = 1, index: int = 1, length: int = 1000, magic: bytes = MAGIC) -> bytes:
    return FOOTER.pack(header, index, length, bytes(32), magic)


@given(st.binary(max_size=500), st.binary(min_size=1, max_size=2000))  # F10: an empty one is refused
def test_what_was_sealed_is_opened(frames: bytes, index: bytes) -> None:
    data = made(frames, index)
    found = opened(data)
    assert (found.header, found.index, found.length) == (HEADER, index, len(data))
    assert data[FRAMES_START : found.frames_end] == frames
    assert seal.header_of(data, seal.parse_footer(data, len(data))) == HEADER


def test_an_object_is_laid_out_as_the_format_says() -> None:
    data = made()
    header_length, index_length, length, sha256, magic = FOOTER.unpack(data[-56:])
    frames_end = 8 + len(FRAMES)
    header = data[frames_end : frames_end + header_length]
    sealed = data[frames_end + header_length : -56]
    assert data[:8] == magic == b"DRSYNC1\n"
    assert (length, sha256) == (len(data), hashlib.sha256(data[:-56]).digest())
    assert json.loads(header) == {
        "kind": "segment",
        "repository": REPOSITORY.hex(),
        "vm": "web",
        "object": "ab" * 16,
        "seq": 42,
        "format": 1,
    }
    assert len(sealed) == index_length
    packed = AESGCM(KEYS.index).decrypt(bytes(12), sealed, header)
    assert zstandard.ZstdDecompressor().decompress(packed) == INDEX
    assert opened(data).index_sha256 == hashlib.sha256(sealed).digest()


def test_the_end_of_an_object_is_enough_to_open_its_index() -> None:
    data = made(bytes(10_000))
    footer = seal.parse_footer(data[-FOOTER_BYTES:], len(data))
    tail = data[-footer.tail_length :]
    assert seal.open_index(tail, footer, KEYS) == opened(data)
    assert seal.header_of(tail, footer) == HEADER


@given(st.data())
def test_f9_a_flipped_bit_behind_the_frames_is_noticed(data: st.DataObject) -> None:
    """Except in the SHA-256, which has no key, and is checked by who reads all of it."""
    good = made()
    start = 8 + len(FRAMES)
    at = data.draw(st.integers(start, len(good) - 1).filter(lambda n: not -40 <= n - len(good) < -8))
    wrong = good[:at] + bytes([good[at] ^ (1 << data.draw(st.integers(0, 7)))]) + good[at + 1 :]
    with pytest.raises(Malformed):
        opened(wrong)


@given(st.integers(0, 500), st.binary(min_size=1, max_size=100))
def test_f7_an_object_that_was_cut_or_extended_is_noticed(cut: int, more: bytes) -> None:
    good = made()
    for wrong in (good[: cut % len(good)], good[1 + cut % len(good) :], good + more, good + good):
        with pytest.raises(Malformed):
            opened(wrong)


def test_f7_bytes_put_between_the_frames_are_noticed_even_with_a_footer_that_fits() -> None:
    """Where the frames end is told by the lengths in the index (see decode_segment)."""
    good = made()
    longer = good[:8] + b"x" + good[8:-56]
    header_length, index_length, length, _, magic = FOOTER.unpack(good[-56:])
    footer = FOOTER.pack(header_length, index_length, length + 1, hashlib.sha256(longer).digest(), magic)
    assert opened(longer + footer).frames_end == 8 + len(FRAMES) + 1


def test_f9_an_index_opens_with_its_own_keys_and_header_only() -> None:
    for keys in (VM.of_object(b"x" * 16), RootKey(bytes(32)).of_vm(REPOSITORY, "web2").of_object(b"\xab" * 16)):
        with pytest.raises(Malformed, match="does not authenticate"):
            opened(made(), keys)
    for changed in ({"seq": 43}, {"vm": "wec"}, {"kind": "pack"}, {"object": "ac" * 16}, {"generation": 2}):
        head = encode_header(HEADER)
        other = encode_header(msgspec.structs.replace(HEADER, **changed))
        data = made().replace(head, other)
        length = FOOTER.unpack(data[-56:])
        data = data[:-56] + FOOTER.pack(len(other), length[1], len(data), bytes(32), MAGIC)
        with pytest.raises(Malformed, match="does not authenticate"):
            opened(data)


@pytest.mark.parametrize(
    ("footer", "length"),
    [
        (b"", 0),
        (bytes(55), 55),
        (footer_of(magic=b"DRSYNC2\n"), 1000),
        (footer_of(length=1001), 1000),
        (footer_of(header=0), 1000),
        (footer_of(header=4097), 10_000_000),
        (footer_of(index=0), 1000),
        (footer_of(index=2**32 - 1, length=2**27), 2**27),
        (footer_of(header=900, index=100), 1000),
        (footer_of(header=4096, index=MAX_INDEX_BYTES), 1000),
        (footer_of(length=MAX_OBJECT_BYTES + 1), MAX_OBJECT_BYTES + 1),
        (footer_of(length=2**64 - 1), 2**64 - 1),
    ],
)
def test_f10_a_footer_out_of_bounds_is_refused(footer: bytes, length: int) -> None:
    with pytest.raises(Malformed):
        seal.parse_footer(footer, length)


@given(st.binary(max_size=100), st.integers(0, 2**64 - 1))
def test_any_bytes_are_a_footer_that_fits_or_malformed(tail: bytes, length: int) -> None:
    candidates = [tail, tail[:48].ljust(48, b"\0") + MAGIC, tail[:8].ljust(8, b"\0") + footer_of(length=length)[8:]]
    for candidate in candidates:
        try:
            footer = seal.parse_footer(candidate, length)
        except Malformed:
            continue
        assert FRAMES_START + footer.tail_length <= length <= MAX_OBJECT_BYTES


def header_with(**changed: object) -> bytes:
    return json.dumps(json.loads(encode_header(HEADER)) | changed).encode()


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"{}",
        b"[" * 4000,
        header_with(kind="heartbeat"),
        header_with(seq="42"),
        header_with(more=1),
        header_with(object=""),
        header_with(object="ab" * 15),
        header_with(object="AB" * 16),
        header_with(object="ab " * 16),
        header_with(object="../../../../../../../../etc/pass"),
        header_with(format=0),
        header_with(format=2),
        header_with(vm=None),
        header_with(vm="\ud800"),
        encode_header(HEADER).replace(b"web", b"\xff\xfe"),
    ],
)
def test_what_is_no_header_is_refused(head: bytes) -> None:
    with pytest.raises(Malformed):
        seal.parse_header(head)


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_a_header_or_malformed(head: bytes) -> None:
    with pytest.raises(Malformed):
        seal.parse_header(head)


def sealed_by_hand(packed: bytes) -> bytes:
    """An object whose index authenticates, with whatever a holder of the key puts there."""
    head = encode_header(HEADER)
    sealed = AESGCM(KEYS.index).encrypt(bytes(12), packed, head)
    body = MAGIC + head + sealed
    return body + FOOTER.pack(len(head), len(sealed), len(body) + 56, hashlib.sha256(body).digest(), MAGIC)


def test_f10_an_index_that_decompresses_to_more_than_the_limit_is_refused_before_it_does() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(MAX_INDEX_BYTES + 1))
    assert len(bomb) < 100_000
    with pytest.raises(Malformed, match="claims 67108865 bytes"):
        opened(sealed_by_hand(bomb))
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    with pytest.raises(Malformed, match="claims -1 bytes"):
        opened(sealed_by_hand(unknown))


@given(st.binary(max_size=300))
def test_whatever_authenticates_is_an_index_or_malformed(packed: bytes) -> None:
    with pytest.raises(Malformed):
        opened(sealed_by_hand(packed))


def test_f19_an_index_that_no_reader_would_take_is_not_sealed() -> None:
    index = bytes(MAX_INDEX_BYTES + 1)
    with pytest.raises(Malformed, match="larger than"):
        seal.seal(memoryview(bytearray(10_000)), FRAMES_START, HEADER, index, KEYS)


def test_f3_nothing_of_the_index_is_in_the_clear() -> None:
    data = made(index=b"SECRETS" * 100)
    assert b"SECRETS" not in data
    assert hashlib.sha256(b"SECRETS" * 100).digest() not in data
