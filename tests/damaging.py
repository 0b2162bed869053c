"""Damage to objects of a repository, region by region: what disks, buckets and people do to bytes.

"rehashed" damage has the unkeyed SHA-256 of the footer made anew, as a person would who has no key.
"""

import random
from collections.abc import Callable, Mapping
from typing import Final

from forged import rehashed

from drsync.format.seal import FOOTER_BYTES, FRAMES_START, parse_footer

Damage = Callable[[bytes, random.Random], bytes | None]


def flipped(data: bytes, at: int) -> bytes:
    """One bit of byte `at` is another one."""
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def _frames_end(data: bytes) -> int:
    footer = parse_footer(data, len(data))
    return len(data) - footer.header_length - footer.index_length - FOOTER_BYTES


def _in_frames(data: bytes, chance: random.Random) -> int:
    end = _frames_end(data)
    return chance.randrange(FRAMES_START, end) if end > FRAMES_START else 0


def _in_header(data: bytes, chance: random.Random) -> int:
    return _frames_end(data) + chance.randrange(parse_footer(data, len(data)).header_length)


def _in_index(data: bytes, chance: random.Random) -> int:
    return len(data) - FOOTER_BYTES - 1 - chance.randrange(parse_footer(data, len(data)).index_length)


REGIONS: Final[Mapping[str, Damage]] = {
    "gone": lambda data, chance: None,
    "cut": lambda data, chance: data[: chance.randrange(len(data))],
    "extended": lambda data, chance: data + b"\0",
    "magic": lambda data, chance: flipped(data, chance.randrange(FRAMES_START)),
    "frame": lambda data, chance: flipped(data, _in_frames(data, chance)),
    "frame, rehashed": lambda data, chance: rehashed(flipped(data, _in_frames(data, chance))),
    "header, rehashed": lambda data, chance: rehashed(flipped(data, _in_header(data, chance))),
    "index, rehashed": lambda data, chance: rehashed(flipped(data, _in_index(data, chance))),
    "footer": lambda data, chance: flipped(data, len(data) - 1 - chance.randrange(FOOTER_BYTES)),
    "zeroed": lambda data, chance: bytes(len(data)),
}


def damaged(
    objects: Mapping[str, bytes], names: list[str], chance: random.Random
) -> tuple[dict[str, bytes], list[str]]:
    """A repository whose objects `names` are damaged somehow, and how."""
    changed, told = dict(objects), []
    for name in names:
        how = chance.choice(sorted(REGIONS))
        data = REGIONS[how](objects[name], chance)
        told.append(f"{name}: {how}")
        if data is None:
            del changed[name]
        else:
            changed[name] = data
    return changed, told
