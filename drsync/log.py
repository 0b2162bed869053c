"""A VM's log: numbered, immutable segments; each commits a point, or fences.

The log is the lock. A segment is created, never overwritten: of two writers
that try the same number, one wins and the other learns that it is fenced. No
clock and no lease take part. Each segment carries the hash of the index before
it, so the log is a chain that can be checked from any segment whose hash is known.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from drsync.errors import ChainBroken, Fenced, ObjectDamaged, ObjectExists, ObjectMissing, PointLost
from drsync.format import Malformed, names, seal
from drsync.format.segment import (
    DiskRows,
    PackTable,
    PointMeta,
    SegmentMeta,
    decode_segment,
    encode_segment,
    pack_table,
)
from drsync.repository import VmObjects
from drsync.store import ObjectInfo

FIRST_SEQ = 1
_READERS = 8
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A segment as it was read from the repository: authenticated, its rows checked against its disks."""

    name: str
    object_id: bytes
    meta: SegmentMeta
    packs: PackTable
    rows: Sequence[DiskRows]
    index_sha256: bytes
    frames_end: int
    length: int

    @property
    def seq(self) -> int:
        return self.meta.seq

    @property
    def stored_bytes(self) -> int:
        """What the point takes in the repository: its segment and its packs."""
        return self.length + int(self.packs.lengths.sum(dtype=np.uint64))


class Log:
    """Reads one VM's log."""

    def __init__(self, objects: VmObjects) -> None:
        self.objects = objects
        self.vm = objects.vm

    def listed(self, *, after: int = 0) -> Iterator[tuple[int, ObjectInfo]]:
        """The segments behind `after` as the store lists them, in order; gaps are not checked.

        Raises:
            ObjectDamaged: something in the log is not a segment.
        """
        start = names.segment(self.vm, after) if after else ""
        for info in self.objects.store.list(names.log_prefix(self.vm), after=start):
            try:
                yield names.seq_of_segment(info.key), info
            except Malformed as err:
                raise ObjectDamaged(key=info.key, problem=err) from err

    def numbers(self, *, after: int = 0) -> list[int]:
        """The numbers of the segments behind `after`, in order.

        Raises:
            ChainBroken: a number is missing in between.
        """
        found: list[int] = []
        for expected, (seq, _) in enumerate(self.listed(after=after), after + 1):
            if seq != expected:
                raise ChainBroken(vm=self.vm, seq=expected, problem=f"segment {expected} is missing, {seq} is there")
            found.append(seq)
        return found

    def newest(self, *, after: int = 0) -> int:
        """The number of the newest segment; `after` is one that is known to exist, or 0. 0 = the log is empty."""
        numbers = self.numbers(after=after)
        return numbers[-1] if numbers else after

    def read(self, seq: int) -> Segment:
        """Segment `seq`, authenticated.

        Raises:
            ObjectMissing, ObjectDamaged: there is no such segment, or not as it was written.
        """
        name = names.segment(self.vm, seq)
        return self.decode(name, seq, self.objects.read_index(name, "segment", seq=seq))

    def decode(self, name: str, seq: int, opened: seal.Opened) -> Segment:
        """The segment whose index was opened.

        Raises:
            ObjectDamaged: the index breaks a rule of the format.
        """
        try:
            meta, packs, rows = decode_segment(opened.index, opened.frames_end)
            if meta.seq != seq:
                raise Malformed(f"its index is of segment {meta.seq}")
        except Malformed as err:
            raise ObjectDamaged(key=name, problem=err) from err
        return Segment(
            name=name,
            object_id=bytes.fromhex(opened.header.object),
            meta=meta,
            packs=packs,
            rows=rows,
            index_sha256=opened.index_sha256,
            frames_end=opened.frames_end,
            length=opened.length,
        )

    def chain(self, first: int, last: int, *, previous: str = "") -> Iterator[Segment]:
        """Segments `first` to `last` in order, each checked to follow the one before.

        `previous` is the hash (hex) of the index of segment `first - 1`. Several are read at once.

        Raises:
            ChainBroken: a segment does not follow the one before it.
        """
        with ThreadPoolExecutor(_READERS, thread_name_prefix="log") as readers:
            for start in range(first, last + 1, _READERS * 4):
                numbers = range(start, min(start + _READERS * 4, last + 1))
                for segment in readers.map(self.read, numbers):
                    if segment.meta.previous != previous:
                        raise ChainBroken(
                            vm=self.vm, seq=segment.seq, problem="it does not follow the segment before it"
                        )
                    previous = segment.index_sha256.hex()
                    yield segment


class LogWriter:
    """The right to append to one VM's log, until somebody else takes it."""

    def __init__(self, log: Log, writer: str, head: Segment | None) -> None:
        self.log = log
        self.writer = writer
        self.head = head
        self.epoch = head.meta.epoch if head else 1

    @property
    def next_seq(self) -> int:
        return self.head.seq + 1 if self.head else FIRST_SEQ

    def meta(
        self, point: PointMeta | None, packs: int, rows: Sequence[DiskRows], rounds: Sequence[int] = ()
    ) -> SegmentMeta:
        """The metadata of the next segment."""
        return SegmentMeta(
            seq=self.next_seq,
            epoch=self.epoch,
            writer=self.writer,
            previous=self.head.index_sha256.hex() if self.head else "",
            point=point,
            packs=packs,
            contents=[r.extent for r in rows],
            rounds=list(rounds) if len(rounds) > 1 else [],
        )

    def append(self, buffer: memoryview, sealed: seal.Sealed) -> Segment:
        """Commit the segment that lies sealed in `buffer`; it is the new head.

        Raises:
            Fenced: another writer has this number: nothing of ours was stored.
            StoreUnavailable: it is unknown whether it was committed; opening the
                writer again finds out.
        """
        name = names.segment(self.log.vm, self.next_seq)
        try:
            self.log.objects.store.create(name, buffer[: sealed.length], sha256=sealed.sha256)
        except ObjectExists as err:
            other = self.log.read(self.next_seq)
            if other.index_sha256 != sealed.index_sha256:  # else it is this one (F20): no two seal alike
                raise Fenced(vm=self.log.vm, writer=other.meta.writer, epoch=other.meta.epoch) from err
        self.head = self.log.read(self.next_seq)
        return self.head

    def fence(self) -> Segment:
        """Take the VM over: append an empty segment with the next epoch.

        Raises:
            Fenced: somebody else appended at the same moment.
        """
        self.epoch += 1
        objects = self.log.objects
        header = objects.new_header("segment", self.next_seq)
        meta = self.meta(None, 0, [])
        index = encode_segment(meta, pack_table([]), [])
        buffer = memoryview(bytearray(seal.FRAMES_START + seal.sealed_bound(len(index))))
        sealed = seal.seal(buffer, seal.FRAMES_START, header, index, objects.object_keys(header))
        segment = self.append(buffer, sealed)
        _LOGGER.warning("vm=%s took over, epoch=%d segment=%d", self.log.vm, self.epoch, segment.seq)
        return segment


def open_writer(log: Log, writer: str, *, known_seq: int = 0, wrote_before: bool = False) -> LogWriter:
    """The right to append to `log` as `writer`.

    A writer that never wrote this VM takes it over from another one; a writer
    that did (`wrote_before`) and finds somebody else's segment at the head was
    fenced, and must not take it back by itself. `known_seq` is a segment that
    is known to exist: the search for the head starts there.

    Raises:
        Fenced: another writer took the VM over.
        PointLost: segment `known_seq` is not there any more.
    """
    newest = log.newest(after=known_seq)
    try:
        head = log.read(newest) if newest else None
    except ObjectMissing as err:
        raise PointLost(vm=log.vm, found=log.newest(), expected=known_seq) from err
    granted = LogWriter(log, writer, head)
    if head is not None and head.meta.writer != writer:
        if wrote_before:
            raise Fenced(vm=log.vm, writer=head.meta.writer, epoch=head.meta.epoch)
        granted.fence()
    return granted
