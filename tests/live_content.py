"""What a live view says of a whole disk."""

import numpy as np

from drsync.model import BLOCK_SIZE
from drsync.source import LiveView


def content_of(view: LiveView, disk: str, size_bytes: int) -> tuple[bytes, set[int], set[int]]:
    """What a view says of a disk: its bytes where it belongs to the view, and which blocks hold data or are zeros."""
    blocks = -(-size_bytes // BLOCK_SIZE)
    reader = view.reader(disk)
    try:
        presence = reader.presence(0, blocks)
        held = np.flatnonzero(presence.holds)
        content = bytearray(blocks * BLOCK_SIZE)
        for numbers, raw in reader.read(held):
            for row, block in enumerate(numbers.tolist()):
                content[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = raw[row * BLOCK_SIZE : (row + 1) * BLOCK_SIZE]
    finally:
        reader.close()
    assert not any(content[size_bytes:])
    return bytes(content[:size_bytes]), set(held.tolist()), set(np.flatnonzero(presence.zeros).tolist())
