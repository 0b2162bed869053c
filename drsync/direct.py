"""File access past the page cache (O_DIRECT), for bytes that nobody will read again soon.

Packs and restored disks are large and pass once. Through the page
cache they would push out what the host's VMs need, and wait for memory to be
found and for an fsync that comes all at once. Not every file system can do it
(tmpfs can't): then plain access is used, with the same result.
"""

import errno
import fcntl
import mmap
import os
from typing import Final

ALIGNMENT: Final = 4096
"""Offsets, lengths and addresses are multiples of this: the largest sector size in use."""


def aligned_buffer(size_bytes: int) -> memoryview:
    """A new buffer at an aligned address; pages of it that are never used are never there."""
    return memoryview(mmap.mmap(-1, size_bytes))


def open_direct(fd: int) -> int:
    """A second descriptor of the file behind `fd` that goes past the page cache; a plain one where that can't be."""
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    again = f"/proc/self/fd/{fd}"
    try:
        return os.open(again, access | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
        return os.open(again, access | os.O_CLOEXEC)


def set_direct(fd: int, *, on: bool) -> bool:
    """Switch an open file to go past the page cache, or back; whether the file system can."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
        return False
    return True


def write_whole(fd: int, body: memoryview) -> None:
    """Write all of `body` where `fd` stands; what is aligned of it past the page cache, if it is in an aligned buffer.

    Raises:
        OSError: as write(2), but for EINVAL of unaligned access, which is written plainly.
    """
    rest = body
    if len(body) >= 256 * ALIGNMENT and set_direct(fd, on=True):
        try:
            while len(rest) >= ALIGNMENT:
                rest = rest[os.write(fd, rest[: len(rest) // ALIGNMENT * ALIGNMENT]) :]
        except OSError as err:
            if err.errno != errno.EINVAL:  # the buffer is not aligned
                raise
        finally:
            set_direct(fd, on=False)
    while rest:
        rest = rest[os.write(fd, rest) :]
