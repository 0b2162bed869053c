"""A damage record: what somebody who read an object found to be lost (docs/format.md, "Damage records")."""

from typing import Final

import msgspec

from drsync.format import Malformed
from drsync.format.columns import Columns, with_metadata
from drsync.format.record import decode_record
from drsync.model import is_name

MAX_RUNS: Final = 1_000_000
"""Runs of lost blocks that one record tells of: more than an object has rows."""
_MAX_BLOCK: Final = 2**32


class DamageMeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is lost."""

    seq: int
    """The segment that is damaged, or that lists the damaged pack."""
    object: str
    """The damaged object's id; empty if it is a segment whose index is lost, and with it that."""
    pack: bool
    problem: str
    time: str
    """When it was found, by the finder's clock, RFC 3339."""
    whole: bool
    """Nothing of it can be had by its index: it is missing, or its index is lost."""
    disks: dict[str, list[tuple[int, int]]]
    """The blocks that are lost, or may be: runs of first block and number of blocks, by disk."""


def encode_damage(meta: DamageMeta) -> bytes:
    """The index of a damage record."""
    return with_metadata(meta)


def decode_damage(index: bytes, frames_end: int) -> DamageMeta:
    """What a damage record's index says.

    Raises:
        Malformed: it breaks a rule of docs/format.md.
    """
    columns = Columns(index)
    meta = decode_record(columns.metadata(), DamageMeta)
    columns.end()
    if frames_end != len(b"DRSYNC1\n"):
        raise Malformed("a damage record has no frames")
    if meta.object and (len(meta.object) != 32 or not _is_hex(meta.object)):
        raise Malformed("its object id is none")
    if sum(map(len, meta.disks.values())) > MAX_RUNS:
        raise Malformed("it tells of more runs than an object has")
    for name, runs in meta.disks.items():
        if not is_name(name) or any(first < 0 or count < 1 or first + count > _MAX_BLOCK for first, count in runs):
            raise Malformed("its blocks are none that a disk has")
    return meta


def _is_hex(text: str) -> bool:
    return all(digit in "0123456789abcdef" for digit in text)
