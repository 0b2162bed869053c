"""Encodes blocks into an object: frames back to back in a buffer, and the rows that describe them.

blocks ─▶ Frames (one buffer, one object's keys) ─▶ store_pack
             └ RowsBuilder a disk: rows and zero runs, in any order
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from drsync.errors import EncodingWrong
from drsync.format import Malformed, names, seal
from drsync.format.frame import HASH_BYTES, FrameOpener, FrameSealer, disk_binding
from drsync.format.segment import DiskRows, PackEntry, encode_pack
from drsync.model import BLOCK_SIZE, block_length
from drsync.repository import VmObjects

_CHECK_EVERY: Final = 64
"""One frame of so many is opened again before its object is stored: costs 1 to 2 % of the encoding."""


class Frames:
    """The frames of one object, growing in a buffer; the first one and then every 64th are read back.

    A compressor with a mistake, or memory that flips bits, must not write for months what nobody can
    read (restic 0.16.0 had such a compressor).
    """

    def __init__(self, objects: VmObjects, header: seal.Header, out: memoryview) -> None:
        self.header = header
        self.end = seal.FRAMES_START
        """Where the next frame goes."""
        self._vm = objects.vm
        self._repository_id = objects.repository_id
        self._keys = objects.object_keys(header)
        self._sealer = FrameSealer(self._keys)
        self._out = out
        self._count = 0

    def hash_block(self, plain: memoryview) -> bytes:
        return self._sealer.hash_block(plain)

    def binding(self, disk: str) -> bytes:
        return disk_binding(self._repository_id, disk)

    def add(self, plain: memoryview, binding: bytes, block: int) -> int:
        """Seal a block behind the others; its stored length.

        Raises:
            EncodingWrong: it was read back, and is not the block any more.
        """
        length = self._sealer.seal_into(self._out, self.end, plain, binding, block)
        if self._count % _CHECK_EVERY == 0:
            self._check(plain, binding, block, length)
        self._count += 1
        self.end += length
        return length

    def _check(self, plain: memoryview, binding: bytes, block: int, length: int) -> None:
        frame = self._out[self.end : self.end + length]
        try:
            came_back = FrameOpener(self._keys).open(frame, self.end, binding, block, len(plain))
        except Malformed as err:
            raise EncodingWrong(vm=self._vm, problem=err) from err
        if came_back != bytes(plain):
            raise EncodingWrong(vm=self._vm, problem=f"block {block} is another one")


class RowsBuilder:
    """Collects the rows of one disk in one object."""

    def __init__(self, disk: str, size_bytes: int) -> None:
        self.disk = disk
        self.changed_bytes = 0
        self._size_bytes = size_bytes
        self._blocks: list[int] = []
        self._lengths: list[int] = []
        self._hashes: list[bytes] = []
        self._zeros: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """How many blocks have frames."""
        return len(self._blocks)

    @property
    def zero_runs(self) -> int:
        """How many zero runs there are, before neighbours are joined."""
        return len(self._zeros)

    def seal(self, block: int, raw: memoryview, frames: Frames, digest: bytes | None = None) -> None:
        """Add a block, whose bytes begin in `raw`; its hash, if it is known already."""
        plain = raw[: block_length(block, self._size_bytes)]
        self._hashes.append(frames.hash_block(plain) if digest is None else digest)
        self._lengths.append(frames.add(plain, frames.binding(self.disk), block))
        self._blocks.append(block)
        self.changed_bytes += len(plain)

    def note_zeros(self, first: Sequence[int], count: Sequence[int]) -> None:
        """Add runs of blocks that now read as zeros."""
        for block, blocks in zip(first, count, strict=True):
            self._zeros.append((block, blocks))
            length = min((block + blocks) * BLOCK_SIZE, self._size_bytes) - block * BLOCK_SIZE
            self.changed_bytes += length

    def rows(self) -> DiskRows:
        zeros = np.array(_joined(sorted(self._zeros)), np.uint32).reshape(-1, 2)
        return DiskRows(
            disk=self.disk,
            blocks=np.array(self._blocks, np.uint32),
            lengths=np.array(self._lengths, np.uint32),
            hashes=np.frombuffer(b"".join(self._hashes), np.uint8).reshape(-1, HASH_BYTES),
            zero_first=zeros[:, 0],
            zero_count=zeros[:, 1],
        )


def _joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs in order, neighbours joined."""
    joined: list[tuple[int, int]] = []
    for first, count in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined


def store_pack(
    objects: VmObjects,
    header: seal.Header,
    out: memoryview,
    frames_end: int,
    rows: Sequence[DiskRows],
    *,
    first: int,
    last: int,
) -> PackEntry:
    """Seal the frames in `out` as a pack and store it; the entry of the segment that will list it.

    `first` and `last` are the positions that all its rows and zero runs lie between.

    Raises:
        StoreError: it could not be stored.
    """
    sealed = seal.seal(out, frames_end, header, encode_pack(rows), objects.object_keys(header))
    object_id = bytes.fromhex(header.object)
    objects.store.create(names.pack(objects.vm, object_id), out[: sealed.length], sha256=sealed.sha256)
    return PackEntry(
        object_id=object_id, length=sealed.length, index_sha256=sealed.index_sha256, first=first, last=last
    )
