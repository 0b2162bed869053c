"""What goes through the fence's two pipes. Both sides use it; all lengths are bounded and checked.

outside → inside   first: u32 length | JSON `Task`; then answers: u8 0 = bytes, 1 = refused | u32 length | bytes
inside → outside   u8 'R' | u16 disk | u64 offset | u32 length     a range of a disk is asked for
                   u8 'F' | u32 length | JSON `Facts`              the facts so far; 'E' the same, and the end
"""

import struct
from typing import BinaryIO, Final

import msgspec

READ: Final = b"R"
FACTS: Final = b"F"
END: Final = b"E"
RANGE: Final = struct.Struct("<HQI")
LENGTH: Final = struct.Struct("<I")
ANSWER: Final = struct.Struct("<BI")
MAX_READ: Final = 1024 * 1024
"""Of one range."""


class TaskDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk that can be asked for; its number is its place in the list."""

    name: str
    size_bytes: int


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be looked at, and within which limits."""

    disks: list[TaskDisk]
    memory_bytes: int
    cpu_s: int
    reader: str
    """Which implementation reads file systems: `dissect`, `libguestfs`, or none."""
    directory: str
    """Where temporary files may be; libguestfs finds its disks' sockets there (nbd_export.py)."""


class Broken(Exception):
    """The other side has gone, or does not keep to this page."""


def exactly(pipe: BinaryIO, length: int) -> bytes:
    """`length` bytes.

    Raises:
        Broken: the pipe ends before.
    """
    data = pipe.read(length)
    if len(data) < length:
        raise Broken("the pipe has ended")
    return data
