"""What segments, packs, maps and pin records have in common: one object, sealed (docs/format.md, "Objects").

    0              magic "DRSYNC1\\n"
    8              frames, back to back
    frames_end     header: JSON, in the clear (kind, repository, VM, object id, number)
                   index:  zstd, then AES-256-GCM with the index key; associated data = header
    end - 56       footer: u32 header length | u32 index length | u64 object length |
                           SHA-256 of all bytes before the footer | magic

The index is at the end so that an object is written in one pass and read by one
ranged GET. What the index says is authenticated; frames authenticate themselves.
"""

import hashlib
import re
import struct
from dataclasses import dataclass
from typing import Final, Literal

import msgspec
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from drsync.format import FORMAT_VERSION, Malformed
from drsync.format.keys import FIRST_GENERATION, MAX_GENERATIONS, ObjectKeys
from drsync.format.record import decode_record

MAGIC: Final = b"DRSYNC1\n"
FRAMES_START: Final = len(MAGIC)
_FOOTER: Final = struct.Struct("<IIQ32s8s")
FOOTER_BYTES: Final = _FOOTER.size
MAX_HEADER_BYTES: Final = 4096
MAX_INDEX_BYTES: Final = 64 * 1024 * 1024
MAX_OBJECT_BYTES: Final = 256 * 1024 * 1024
TAIL_BYTES: Final = 64 * 1024
"""What a first ranged GET asks for: holds the index of any point of up to about 2,000 blocks."""
_OBJECT_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_INDEX_NONCE: Final = bytes(12)  # the index key seals exactly one index


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an object says of itself in the clear; authenticated as associated data of its index."""

    kind: Literal["segment", "pack", "map", "merged", "horizon", "pin", "damage"]
    repository: str
    vm: str
    object: str
    seq: int
    """The number of a segment, horizon or pin record, of the last segment that a merged one stands for, of the point
    that a map shows, or of the segment that is damaged; 0 for a pack."""
    format: int = FORMAT_VERSION
    generation: int = FIRST_GENERATION
    """Of the root key that the object's keys come from; left out of the JSON if it is the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """An object that is ready to be stored."""

    length: int
    sha256: bytes
    index_sha256: bytes
    """SHA-256 of the sealed index: what the next segment, or the segment that lists a pack, refers to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The authenticated end of an object."""

    header: Header
    index: bytes
    index_sha256: bytes
    frames_end: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """The last bytes of an object: where its parts lie. Not authenticated by itself."""

    header_length: int
    index_length: int
    object_length: int
    sha256: bytes

    @property
    def tail_length(self) -> int:
        """Bytes from the header to the end."""
        return self.header_length + self.index_length + FOOTER_BYTES


def seal(buffer: memoryview, frames_end: int, header: Header, index: bytes, keys: ObjectKeys) -> Sealed:
    """Finish the object whose frames lie in `buffer[8:frames_end]`: write magic, header, index, footer.

    `buffer` must have room for `sealed_bound(len(index))` bytes behind the frames.

    Raises:
        Malformed: it would be larger than a reader takes; nothing must be stored.
    """
    buffer[:FRAMES_START] = MAGIC
    head = encode_header(header)
    packed = zstandard.ZstdCompressor(level=3).compress(index)
    sealed = AESGCM(keys.index).encrypt(_INDEX_NONCE, packed, head)
    if len(head) > MAX_HEADER_BYTES or max(len(index), len(sealed)) > MAX_INDEX_BYTES:
        raise Malformed(f"its index of {len(index)} bytes is larger than the {MAX_INDEX_BYTES} that fit")
    at = frames_end
    for part in (head, sealed):
        buffer[at : at + len(part)] = part
        at += len(part)
    digest = hashlib.sha256(buffer[:at])
    footer = _FOOTER.pack(len(head), len(sealed), at + FOOTER_BYTES, digest.digest(), MAGIC)
    buffer[at : at + FOOTER_BYTES] = footer
    digest.update(footer)
    return Sealed(length=at + FOOTER_BYTES, sha256=digest.digest(), index_sha256=hashlib.sha256(sealed).digest())


def encode_header(header: Header) -> bytes:
    """The JSON of a header; before a rotation it is as it was before there were generations."""
    fields = msgspec.structs.asdict(header)
    if header.generation == FIRST_GENERATION:
        del fields["generation"]
    return msgspec.json.encode(fields)


def sealed_bound(index_bytes: int) -> int:
    """Room that header, sealed index and footer of an index of `index_bytes` can take."""
    return MAX_HEADER_BYTES + index_bytes + index_bytes // 128 + 1024 + FOOTER_BYTES


def check_unkeyed(data: bytes, footer: Footer) -> None:
    """Check the parts of a whole object that nothing is read from, and its SHA-256, which has no key.

    Raises:
        Malformed: they are not as they were written; what authenticates is good all the same.
    """
    if hashlib.sha256(memoryview(data)[:-FOOTER_BYTES]).digest() != footer.sha256:
        raise Malformed("its bytes do not match its SHA-256")
    if data[:FRAMES_START] != MAGIC:
        raise Malformed("it does not begin like an object of drsync")


def parse_footer(tail: bytes, object_length: int) -> Footer:
    """The footer at the end of `tail`, checked against the object's real length.

    Raises:
        Malformed: it is not a footer, or the object was cut or extended.
    """
    if len(tail) < FOOTER_BYTES:
        raise Malformed(f"it is {len(tail)} bytes long, shorter than a footer")
    header_length, index_length, length, sha256, magic = _FOOTER.unpack(tail[-FOOTER_BYTES:])
    if magic != MAGIC:
        raise Malformed("it does not end like an object of drsync")
    if object_length > MAX_OBJECT_BYTES:
        raise Malformed(f"it is {object_length} bytes long, longer than any object")
    if length != object_length:
        raise Malformed(f"it is {object_length} bytes long and should be {length}")
    if not 0 < header_length <= MAX_HEADER_BYTES or not 0 < index_length <= MAX_INDEX_BYTES:
        raise Malformed(f"its header of {header_length} or index of {index_length} bytes is out of bounds")
    footer = Footer(header_length=header_length, index_length=index_length, object_length=length, sha256=sha256)
    if FRAMES_START + footer.tail_length > object_length:
        raise Malformed("its header and index are longer than itself")
    return footer


def open_index(tail: bytes, footer: Footer, keys: ObjectKeys) -> Opened:
    """Header and index from the last `footer.tail_length` bytes of an object, authenticated.

    Raises:
        Malformed: the index is not what the holder of the key sealed under this header.
    """
    start = len(tail) - footer.tail_length
    head = tail[start : start + footer.header_length]
    sealed = tail[start + footer.header_length : -FOOTER_BYTES]
    try:
        packed = AESGCM(keys.index).decrypt(_INDEX_NONCE, sealed, head)
    except InvalidTag as err:
        raise Malformed("its index does not authenticate") from err
    return Opened(
        header=parse_header(head),
        index=_decompress(packed),
        index_sha256=hashlib.sha256(sealed).digest(),
        frames_end=footer.object_length - footer.tail_length,
        length=footer.object_length,
    )


def header_of(tail: bytes, footer: Footer) -> Header:
    """The header, before it is authenticated: only for finding the object id that the keys need.

    Raises:
        Malformed: it is not a header.
    """
    start = len(tail) - footer.tail_length
    return parse_header(tail[start : start + footer.header_length])


def parse_header(head: bytes) -> Header:
    """A header from its JSON.

    Raises:
        Malformed: it is not a header, or is one of a newer format.
    """
    header = decode_record(head, Header)
    if not _OBJECT_ID.fullmatch(header.object):
        raise Malformed("its header has no object id")
    if not 1 <= header.format <= FORMAT_VERSION:
        raise Malformed(f"its format {header.format} is not one that this drsync knows")
    if not FIRST_GENERATION <= header.generation <= MAX_GENERATIONS:
        raise Malformed(f"its key is of generation {header.generation}, which none has")
    return header


def _decompress(packed: bytes) -> bytes:
    try:
        size = zstandard.frame_content_size(packed)
        if not 0 < size <= MAX_INDEX_BYTES:  # 0 is what a frame to skip tells, of any size, and then no bound holds
            raise Malformed(f"its index claims {size} bytes")
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
    except zstandard.ZstdError as err:
        raise Malformed("its index does not decompress") from err
