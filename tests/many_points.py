"""A repository with very many points: real segments, sealed and chained, of one block each; and a store for them.

Made for what grows with the number of points, not for what grows with bytes: a frame holds a block that
compresses to nothing, so a million points fit in memory.
"""

from bisect import bisect_right, insort
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from fake_clock import FakeClock

from drsync.config import parse_config
from drsync.errors import ObjectExists, ObjectMissing
from drsync.format import names, seal
from drsync.format.frame import FrameSealer, disk_binding
from drsync.format.keys import RootKey
from drsync.format.segment import DiskMeta, DiskRows, PointMeta, SegmentMeta, encode_segment, pack_table
from drsync.heartbeat import Seen, write_heartbeat
from drsync.keyfile import write_key_file
from drsync.model import BLOCK_SIZE, CaptureId, Clock, Consistency, Kind, new_capture_id
from drsync.repository import Repository, VmObjects, create_repository, open_repository
from drsync.session import Session
from drsync.store import Bytes, ObjectInfo, ObjectStore, Tail, Unfinished

LATER_S = 40 * 86400.0
"""So much later the points are looked at: retention drops most of them."""
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
DEFINITION: Mapping[str, object] = {"source": "libvirt", "xml": "<domain type='kvm'>" + "<!-- -->" * 100 + "</domain>"}
DISK = "vda"
DISK_BYTES = 100 * 2**30


class CrowdedStore:
    """An ObjectStore in memory whose listings do not look at all of its keys: for millions of objects."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._objects: dict[str, bytes] = {}
        self._modified: dict[str, datetime] = {}
        self._folders: dict[str, list[str]] = {}
        """The names right below each folder, in order; those of folders end with a slash."""

    @property
    def url(self) -> str:
        return "memory:crowded"

    @property
    def stored_bytes(self) -> int:
        return sum(map(len, self._objects.values()))

    def put(self, key: str, data: bytes, modified: datetime) -> None:
        """Store an object as of a time."""
        if key not in self._objects:
            self._enter(key)
        self._objects[key], self._modified[key] = data, modified

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        if key in self._objects:
            raise ObjectExists(key=key, url=self.url)
        self.put(key, bytes(body), self._clock.now())

    def replace(self, key: str, body: Bytes) -> None:
        self.put(key, bytes(body), self._clock.now())

    def get(self, key: str, *, limit_bytes: int) -> bytes:
        return self._find(key)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        return self._find(key)[offset : offset + length]

    def get_tail(self, key: str, length: int) -> Tail:
        data = self._find(key)
        return Tail(data=data[max(0, len(data) - length) :], object_size_bytes=len(data))

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        folder = prefix[: prefix.rfind("/") + 1]
        for key in self._walk(folder, after):
            if key.startswith(prefix):
                yield ObjectInfo(key=key, size_bytes=len(self._objects[key]), modified=self._modified[key])

    def folders(self, prefix: str) -> Iterator[str]:
        yield from (name[:-1] for name in self._folders.get(prefix, []) if name.endswith("/"))

    def now(self) -> datetime:
        return self._clock.now()

    def delete(self, key: str) -> None:
        if self._objects.pop(key, None) is not None:
            folder, name = key[: key.rfind("/") + 1], key[key.rfind("/") + 1 :]
            below = self._folders[folder]
            del below[bisect_right(below, name) - 1]

    def unfinished(self) -> Iterator[Unfinished]:
        yield from ()

    def abandon(self, unfinished: Unfinished) -> None:
        pass

    def _walk(self, folder: str, after: str) -> Iterator[str]:
        below = self._folders.get(folder, [])
        start = bisect_right(below, after[len(folder) :]) if after.startswith(folder) else 0
        for name in below[max(0, start - 1) :]:
            key = folder + name
            if name.endswith("/"):
                yield from self._walk(key, after)
            elif key > after:
                yield key

    def _enter(self, key: str) -> None:
        parts = key.split("/")
        for depth in range(len(parts)):
            folder = "".join(f"{part}/" for part in parts[:depth])
            name = parts[depth] + ("/" if depth < len(parts) - 1 else "")
            below = self._folders.setdefault(folder, [])
            if not below or below[-1] < name:
                below.append(name)
            elif below[min(len(below) - 1, max(0, bisect_right(below, name) - 1))] != name:
                insort(below, name)

    def _find(self, key: str) -> bytes:
        if key not in self._objects:
            raise ObjectMissing(key=key, url=self.url)
        return self._objects[key]


class LogFiller:
    """Writes the log of one VM, point after point, past drsync's own way of shipping."""

    def __init__(self, objects: VmObjects, store: CrowdedStore, *, every: timedelta = timedelta(minutes=5)) -> None:
        self._objects = objects
        self._store = store
        self._every = every
        self._previous = ""
        self._base: CaptureId | None = None
        self._seq = 0
        self._out = memoryview(bytearray(256 * 1024))
        self._binding = disk_binding(objects.repository_id, DISK)
        self._none = np.zeros(0, np.uint32)

    def append(self) -> None:
        """One more point: a block has changed."""
        self._seq += 1
        time, block = BEGAN + self._seq * self._every, self._seq % 1000
        header = self._objects.new_header("segment", self._seq)
        keys = self._objects.key.of_object(bytes.fromhex(header.object))
        plain = bytes([self._seq % 256]) * BLOCK_SIZE
        sealer = FrameSealer(keys)
        length = sealer.seal_into(self._out, seal.FRAMES_START, memoryview(plain), self._binding, block)
        hashes = np.frombuffer(sealer.hash_block(memoryview(plain)), np.uint8).reshape(1, -1)
        rows = DiskRows(
            disk=DISK,
            blocks=np.array([block], np.uint32),
            lengths=np.array([length], np.uint32),
            hashes=hashes,
            zero_first=self._none,
            zero_count=self._none,
        )
        capture = new_capture_id()
        index = encode_segment(self._meta(capture, time, rows), pack_table([]), [rows])
        sealed = seal.seal(self._out, seal.FRAMES_START + length, header, index, keys)
        self._store.put(names.segment(self._objects.vm, self._seq), bytes(self._out[: sealed.length]), time)
        self._previous, self._base = sealed.index_sha256.hex(), capture

    def _meta(self, capture: CaptureId, time: datetime, rows: DiskRows) -> SegmentMeta:
        disk = DiskMeta(
            name=DISK,
            size_bytes=DISK_BYTES,
            kind=Kind.FULL if self._base is None else Kind.INCREMENTAL,
            reason="" if self._base else "there is no point yet",
            changed_bytes=BLOCK_SIZE,
            persistent_bitmap=True,
        )
        point = PointMeta(
            capture=capture,
            base=self._base,
            time=time.isoformat(),
            consistency=Consistency.CRASH,
            disks=[disk],
            definition=dict(DEFINITION),
        )
        return SegmentMeta(
            seq=self._seq,
            epoch=1,
            writer="0123456789abcdef",
            previous=self._previous,
            point=point,
            packs=0,
            contents=[rows.extent],
        )


def crowd(vms: int, points: int) -> tuple[CrowdedStore, Repository, RootKey]:
    """A repository of so many VMs, `vm-0000` and on, with so many points each."""
    clock, root = FakeClock(), RootKey.generate()
    clock.advance(LATER_S)
    store = CrowdedStore(clock)
    create_repository(store, root, clock)
    repository = open_repository(store, root, "key")
    for number in range(vms):
        filler = LogFiller(repository.vm(f"vm-{number:04}"), store)
        for _ in range(points):
            filler.append()
    return store, repository, root


def open_session(directory: Path, root: RootKey, store: ObjectStore) -> Session:
    """A session of a host that has no VMs of its own, on a repository in `store`."""
    key_file = directory / "key"
    if not key_file.exists():
        write_key_file(key_file, root)
    text = (
        f'[repository]\nurl = "file://{directory}/none"\nkey_file = "{key_file}"\n[spool]\npath = "{directory}/spool"\n'
    )
    text += "[retention]\nlast = 10\ndaily = 7\n"
    clock = FakeClock()
    clock.advance(LATER_S)
    session = Session(parse_config(text.encode(), directory / "drsync.toml", host_name="alpha"), clock)
    session.store = store
    return session


def beat(repository: Repository, hosts: int, vms: int, points: int) -> None:
    """Heartbeats of so many hosts, which share the VMs."""
    for host in range(hosts):
        seen = {f"vm-{n:04}": Seen(seq=points, checked_at=BEGAN) for n in range(host, vms, hosts)}
        write_heartbeat(repository, f"host-{host:03}", seen)
