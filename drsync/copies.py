"""Finds the bytes of a damaged frame in another frame of the same block: the guest had the same in it at another time.

    damaged frame ─▶ its row ─▶ keyed hash ─▶ rows of the same disk and block with that hash ─▶ a frame that opens

Such frames are there where a guest wrote back what had been there before, and where a capture sent a block again
because the repository had lost it (heal.py). The hash is 16 bytes of a keyed BLAKE3, checked against what was
opened: what is found is what was lost. Nothing of this is needed until something is damaged; then it reads the
indexes of the log.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from drsync.errors import ObjectDamaged, ObjectMissing
from drsync.format import Malformed, names
from drsync.format.frame import FrameOpener, disk_binding
from drsync.format.segment import DiskRows, decode_pack, position
from drsync.log import Log, Segment
from drsync.model import block_length
from drsync.packs import FAILURES, PackIndexes
from drsync.repository import VmObjects
from drsync.window import Container, PlacedRows, place

_LOGGER = logging.getLogger(__name__)


class Copies:
    """Other frames of one VM's blocks. May be used from several threads."""

    def __init__(self, objects: VmObjects) -> None:
        self._log = Log(objects)
        self._indexes = PackIndexes()
        self._lock = threading.Lock()
        self._segments: Sequence[Segment] | None = None
        self._rows: dict[str, dict[str, PlacedRows]] = {}

    def find(self, container: Container, disk: str, block: int, size_bytes: int) -> bytes | None:
        """What the damaged frame of a block in `container` held; None if no other frame has it.

        `size_bytes` is the disk's size at the point that is read.

        Raises:
            StoreUnavailable, StoreDenied: it could not be looked for.
        """
        with self._lock:
            digest = self._hash_of(container, disk, block)
            if digest is None:
                return None
            for held_by, offset, length in self._candidates(disk, block, digest):
                if held_by.object_id == container.object_id:
                    continue
                plain = self._open(held_by, disk, block, offset, length, block_length(block, size_bytes))
                if plain is not None and self._hashes(held_by, plain) == digest:
                    _LOGGER.warning(
                        "vm=%s block %d of %s is lost in %s: read from %s",
                        self._log.vm,
                        block,
                        disk,
                        container.name,
                        held_by.name,
                    )
                    return plain
        return None

    def _hash_of(self, container: Container, disk: str, block: int) -> bytes | None:
        """What the index of a damaged object says of a block; None if it can't be read, either."""
        if container.name not in self._rows:
            try:
                rows = self._read_rows(container)
            except (*FAILURES, Malformed):
                rows = []
            self._rows[container.name] = place(rows)
        placed = self._rows[container.name].get(disk)
        found = _row_of(placed, block) if placed is not None else None
        return placed.rows.hashes[found].tobytes() if placed is not None and found is not None else None

    def _read_rows(self, container: Container) -> Sequence[DiskRows]:
        if container.seq:
            return self._log.read(container.seq).rows
        opened = self._log.objects.read_index(container.name, "pack")
        return decode_pack(opened.index, opened.frames_end)

    def _candidates(self, disk: str, block: int, digest: bytes) -> Iterator[tuple[Container, int, int]]:
        """Object, offset and length of frames that hold the same; the newest first."""
        for segment in reversed(self._all()):
            point = segment.meta.point
            number = next((n for n, d in enumerate(point.disks) if d.name == disk), None) if point is not None else None
            if number is None:
                continue
            own = place(segment.rows).get(disk)
            held_by = Container(name=segment.name, object_id=segment.object_id, generation=segment.generation)
            yield from _matching(own, block, digest, held_by)
            at = np.uint64(position(number, block))
            for pack in np.flatnonzero((segment.packs.first <= at) & (segment.packs.last >= at)).tolist():
                try:
                    opened = self._indexes.open(self._log.objects, segment, pack)
                except FAILURES:
                    continue
                object_id = segment.packs.ids[pack].tobytes()
                name = names.pack(self._log.vm, object_id)
                held_by = Container(name=name, object_id=object_id, generation=opened.generation)
                yield from _matching(opened.rows.get(disk), block, digest, held_by)

    def _all(self) -> Sequence[Segment]:
        """Every segment that can be read, and those that stand for others."""
        if self._segments is None:
            found: list[Segment] = []
            horizon = self._log.horizon()
            for merged in horizon.merged():
                with suppress(*FAILURES):
                    found.append(self._log.read_merged(merged))
            for info in self._log.objects.store.list(names.log_prefix(self._log.vm)):
                with suppress(*FAILURES, Malformed):
                    seq = names.seq_of_segment(info.key)
                    if seq > horizon.through or horizon.merged_at(seq) is None:  # else it is about to be deleted
                        found.append(self._log.read(seq))
            self._segments = found
        return self._segments

    def _open(self, held_by: Container, disk: str, block: int, offset: int, length: int, wanted: int) -> bytes | None:
        objects = self._log.objects
        try:
            frame = memoryview(objects.store.get_range(held_by.name, offset, length))
            opener = FrameOpener(objects.keys_of(held_by.object_id, held_by.generation))
            return opener.open(frame, offset, disk_binding(objects.repository_id, disk), block, wanted)
        except (ObjectDamaged, ObjectMissing, Malformed):
            return None

    def _hashes(self, held_by: Container, plain: bytes) -> bytes:
        return FrameOpener(self._log.objects.keys_of(held_by.object_id, held_by.generation)).hash_block(plain)


def _row_of(placed: PlacedRows, block: int) -> int | None:
    row = int(np.searchsorted(placed.rows.blocks, block))
    there = row < len(placed.rows.blocks) and int(placed.rows.blocks[row]) == block
    return row if there else None


def _matching(
    placed: PlacedRows | None, block: int, digest: bytes, held_by: Container
) -> Iterator[tuple[Container, int, int]]:
    row = _row_of(placed, block) if placed is not None else None
    if placed is not None and row is not None and placed.rows.hashes[row].tobytes() == digest:
        yield held_by, int(placed.offsets[row]), int(placed.rows.lengths[row])
