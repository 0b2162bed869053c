"""What a holder of the keys could write into a repository, or a bug: objects that authenticate and break a rule."""

import hashlib
from collections.abc import Callable, Sequence

from msgspec import structs

from drsync.format import names, seal
from drsync.format.frame import FrameSealer, disk_binding
from drsync.format.segment import DiskRows, PackEntry, PointMeta, SegmentMeta, encode_pack, encode_segment, pack_table
from drsync.log import Log


def rehashed(data: bytes) -> bytes:
    """An object with the SHA-256 of its footer made anew: it has no key, so everybody can."""
    return data[:-40] + hashlib.sha256(data[:-56]).digest() + data[-8:]


def reseal(log: Log, seq: int, change: Callable[[SegmentMeta], SegmentMeta], packs: Sequence[PackEntry] = ()) -> None:
    """Put another segment, without frames of its own, where segment `seq` is."""
    segment = log.read(seq)
    assert sum(len(r.blocks) for r in segment.rows) == 0, "its frames would be lost"
    entries = packs or [segment.packs.entry(n) for n in range(len(segment.packs))]
    meta = change(structs.replace(segment.meta, packs=len(entries)))
    index = encode_segment(meta, pack_table(entries), segment.rows)
    _put(log, "segment", seq, names.segment(log.vm, seq), b"", index)


def change_point(change: Callable[[PointMeta], PointMeta]) -> Callable[[SegmentMeta], SegmentMeta]:
    """A change of a segment's metadata that changes its point."""

    def changed(meta: SegmentMeta) -> SegmentMeta:
        assert meta.point is not None
        return structs.replace(meta, point=change(meta.point))

    return changed


def put_pack(log: Log, rows: Sequence[DiskRows], blocks: Sequence[bytes], first: int, last: int) -> PackEntry:
    """Store a pack of these rows, whose lengths are filled in; the entry of a segment that lists it."""
    objects = log.objects
    header = objects.new_header("pack")
    sealer = FrameSealer(objects.object_keys(header))
    out = memoryview(bytearray(8 + sum(len(b) + 1024 for b in blocks)))
    at, plain = 8, iter(blocks)
    for row in rows:
        for n, block in enumerate(row.blocks.tolist()):
            binding = disk_binding(objects.repository_id, row.disk)
            row.lengths[n] = sealer.seal_into(out, at, memoryview(next(plain)), binding, block)
            at += int(row.lengths[n])
    name = names.pack(log.vm, bytes.fromhex(header.object))
    sealed = _put(log, "pack", 0, name, bytes(out[8:at]), encode_pack(rows), header=header)
    return PackEntry(
        object_id=bytes.fromhex(header.object),
        length=sealed.length,
        index_sha256=sealed.index_sha256,
        first=first,
        last=last,
    )


def _put(
    log: Log, kind: str, seq: int, name: str, frames: bytes, index: bytes, *, header: seal.Header | None = None
) -> seal.Sealed:
    header = header or log.objects.new_header(kind, seq)
    end = seal.FRAMES_START + len(frames)
    buffer = memoryview(bytearray(end + seal.sealed_bound(len(index))))
    buffer[seal.FRAMES_START : end] = frames
    sealed = seal.seal(buffer, end, header, index, log.objects.object_keys(header))
    log.objects.store.replace(name, bytes(buffer[: sealed.length]))
    return sealed
