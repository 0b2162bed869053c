"""Snapshots and volumes: who has which blocks, and in which state a snapshot is.

Known (EBS direct API reference, botocore's model; issues of awslabs/coldsnap):
- a snapshot is pending until CompleteSnapshot, takes blocks only then, can be read only afterwards;
- a block has 524288 bytes and a SHA-256; the same index may be written again, the last write counts;
- CompleteSnapshot's count is that of blocks written, its checksum the SHA-256 of all blocks' digests in index order;
  it answers `pending`;
- a child has its parent's blocks where it has none of its own, and nothing takes a block away;
- Encrypted and ParentSnapshotId exclude each other; a client token with other parameters is a conflict;
- a snapshot that is not completed `Timeout` minutes after its last block fails (state `error`);
- ListChangedBlocks tells blocks that were written, between snapshots of one lineage;
- block tokens live for 7 days, page tokens for 60 minutes; 100 snapshots may be pending.

Guesses: all messages; which `Reason` goes with which mistake; that a rewritten block is listed as changed when its
bytes are the same; that the limit of pending snapshots is ConcurrentLimitExceededException (of all operations only
StartSnapshot has that error); that a snapshot which isn't visible yet is no valid parent either.
"""

import hashlib
import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from drsync_localstack.blocks import BLOCK_BYTES, BLOCKS_PER_GIB, Block, BlockStore
from drsync_localstack.faults import Faults
from drsync_localstack.refusal import Refused, invalid

MAX_VOLUME_GIB = 65536
"""64 TiB (known)."""


class State(Enum):
    """A snapshot's state, as DescribeSnapshots has it. Moves: pending → completed, pending → error."""

    PENDING = "pending"
    COMPLETED = "completed"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Place:
    """An account in a Region: nothing is seen from another one."""

    account: str
    region: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequest:
    """What StartSnapshot was given; equal requests with the same token are the same snapshot."""

    volume_gib: int
    parent: str = ""
    description: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    encrypted: bool | None = None
    kms_key: str = ""
    timeout_min: int = 60


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """One snapshot: the blocks that it has of its own, and those of its parent."""

    id: str
    place: Place
    request: StartRequest
    lineage: str
    """Snapshots and volumes that descend from one another share it."""
    started_at: float
    inherited: Mapping[int, Block] = field(default_factory=dict)
    own: dict[int, Block] = field(default_factory=dict)
    state: State = State.PENDING
    last_write_at: float = 0.0
    completes_at: float | None = None
    """When CompleteSnapshot takes effect; None before it was called."""

    @property
    def blocks(self) -> dict[int, Block]:
        """All its blocks."""
        return {**self.inherited, **self.own}


@dataclass(slots=True, kw_only=True)
class Volume:
    """A volume's blocks: those of the snapshot that it was made from, and those written since."""

    lineage: str
    blocks: dict[int, Block]


class Catalog:
    """All snapshots and volumes. Every method may be called from any thread."""

    def __init__(self, store: BlockStore, faults: Faults, now: Callable[[], float] = time.time) -> None:
        self.store = store
        self.faults = faults
        self._now = now
        self._lock = threading.RLock()
        self._snapshots: dict[str, Snapshot] = {}
        self._by_token: dict[tuple[Place, str], Snapshot] = {}
        self._volumes: dict[str, Volume] = {}
        self._writes = itertools.count(1)

    def start(self, place: Place, request: StartRequest, token: str = "") -> tuple[Snapshot, bool]:
        """StartSnapshot: the snapshot, and whether it is new (else the token was seen before)."""
        with self._lock:
            if token and (known := self._by_token.get((place, token))) is not None:
                if known.request != request:
                    raise Refused("ConflictException", "The client token was used with other parameters.", status=409)
                return known, False
            parent = self._check_start(place, request)
            self._check_pending_limit(place)
            snapshot = self._new(place, request, parent)
            if token:
                self._by_token[place, token] = snapshot
            return snapshot, True

    def put(self, place: Place, snapshot_id: str, index: int, data: bytes, digest: bytes) -> None:
        """PutSnapshotBlock, with the digest that the caller has sent."""
        with self._lock:
            snapshot = self._writable(place, snapshot_id)
        if len(data) != BLOCK_BYTES:
            raise invalid(f"A block has {BLOCK_BYTES} bytes, not {len(data)}.", "INVALID_BLOCK")
        if not 0 <= index < snapshot.request.volume_gib * BLOCKS_PER_GIB:
            raise invalid(f"The volume has no block {index}.", "INVALID_BLOCK")
        if hashlib.sha256(data).digest() != digest:
            raise invalid("The checksum is not that of the data.")
        with self._lock:
            self._writable(place, snapshot_id)  # it may have been deleted while the digest was reckoned
            snapshot.own[index] = self._write(data)
            snapshot.last_write_at = self._now()

    def complete(self, place: Place, snapshot_id: str, count: int, aggregate: bytes | None) -> Snapshot:
        """CompleteSnapshot, with the count and the aggregate checksum that the caller has sent."""
        with self._lock:
            snapshot = self._writable(place, snapshot_id)
            if count != len(snapshot.own):
                raise invalid(f"ChangedBlocksCount is {count}, but {len(snapshot.own)} blocks were written.")
            if aggregate is not None and aggregate != aggregate_of(snapshot.own):
                raise invalid("The checksum is not that of all blocks' checksums.")
            snapshot.completes_at = self._now() + self.faults.settings.completion_delay_s
            return snapshot

    def readable(self, place: Place, snapshot_id: str) -> Snapshot:
        """A snapshot whose blocks can be read: one that is completed."""
        with self._lock:
            snapshot = self.find(place, snapshot_id)
            if snapshot.state is not State.COMPLETED:
                raise invalid(f"The snapshot '{snapshot_id}' is {snapshot.state.value}.", "INVALID_SNAPSHOT_ID")
            return snapshot

    def changed(
        self, place: Place, first: str | None, second: str
    ) -> tuple[Snapshot, list[tuple[int, Block | None, Block | None]]]:
        """The second snapshot, and the blocks that differ, each as the first and the second have it."""
        with self._lock:
            new = self.readable(place, second)
            old = self.readable(place, first) if first else None
            if old is not None and old.lineage != new.lineage:
                raise invalid(f"'{first}' and '{second}' are not of one lineage.", "UNRELATED_SNAPSHOTS")
            before, after = old.blocks if old else {}, new.blocks
        pairs = ((index, before.get(index), after.get(index)) for index in sorted(before.keys() | after.keys()))
        return new, [(index, a, b) for index, a, b in pairs if a != b]

    def find(self, place: Place, snapshot_id: str) -> Snapshot:
        """A snapshot that can be seen, in the state that it is in by now."""
        with self._lock:
            snapshot = self._snapshots.get(snapshot_id)
            if snapshot is None or snapshot.place != place:
                raise not_found(snapshot_id)
            if self._now() < snapshot.started_at + self.faults.settings.visibility_delay_s:
                self.faults.note("visibility_delay_s")
                raise not_found(snapshot_id)
            self._age(snapshot)
            return snapshot

    def states(self, place: Place) -> dict[str, State]:
        """The state of each snapshot by now."""
        with self._lock:
            mine = [snapshot for snapshot in self._snapshots.values() if snapshot.place == place]
            for snapshot in mine:
                self._age(snapshot)
            return {snapshot.id: snapshot.state for snapshot in mine}

    def is_hidden(self, snapshot_id: str) -> bool:
        """Whether a snapshot is not visible yet."""
        snapshot = self._snapshots.get(snapshot_id)
        return snapshot is not None and (self._now() < snapshot.started_at + self.faults.settings.visibility_delay_s)

    def add_import(self, place: Place, volume_gib: int, description: str) -> Snapshot:
        """A pending snapshot that the service itself fills: with `write_import`, then `finish_import`."""
        with self._lock:
            return self._new(place, StartRequest(volume_gib=volume_gib, description=description), None)

    def write_import(self, snapshot: Snapshot, index: int, data: bytes) -> None:
        """Put a block into a snapshot that an import makes."""
        with self._lock:
            snapshot.own[index] = self._write(data)
            snapshot.last_write_at = self._now()

    def finish_import(self, snapshot: Snapshot) -> None:
        """The import is done."""
        with self._lock:
            snapshot.completes_at = self._now()
            self._age(snapshot)

    def add_of_volume(self, place: Place, snapshot_id: str, volume_id: str, base: str | None, volume_gib: int) -> None:
        """CreateSnapshot, CreateSnapshots: a snapshot with a volume's blocks of now, completed after a while."""
        with self._lock:
            volume = self.volume(volume_id, base)
            self._snapshots[snapshot_id] = Snapshot(
                id=snapshot_id,
                place=place,
                request=StartRequest(volume_gib=volume_gib),
                lineage=volume.lineage,
                started_at=self._now(),
                inherited=dict(volume.blocks),
                completes_at=self._now() + self.faults.settings.completion_delay_s,
            )
            self._age(self._snapshots[snapshot_id])

    def volume(self, volume_id: str, base: str | None) -> Volume:
        """A volume's content; `base` is the snapshot that it was made from, if any."""
        with self._lock:
            if volume_id not in self._volumes:
                snapshot = self._snapshots.get(base or "")
                lineage, blocks = (snapshot.lineage, snapshot.blocks) if snapshot else (volume_id, {})
                self._volumes[volume_id] = Volume(lineage=lineage, blocks=blocks)
            return self._volumes[volume_id]

    def write_volume(self, volume: Volume, index: int, data: bytes) -> None:
        """Write a block of a volume, as its instance would."""
        with self._lock:
            volume.blocks[index] = self._write(data)

    def forget_volume(self, volume_id: str) -> None:
        """A volume was deleted."""
        with self._lock:
            self._volumes.pop(volume_id, None)
            self._sweep()

    def delete(self, snapshot_id: str) -> None:
        """Forget a snapshot, and the blocks that nobody else has. Its children keep what they have of it."""
        with self._lock:
            self._snapshots.pop(snapshot_id, None)
            self._by_token = {token: known for token, known in self._by_token.items() if known.id != snapshot_id}
            self._sweep()

    def _check_start(self, place: Place, request: StartRequest) -> Snapshot | None:
        if not 1 <= request.volume_gib <= MAX_VOLUME_GIB:
            raise invalid(f"VolumeSize is 1 to {MAX_VOLUME_GIB} GiB.", "INVALID_VOLUME_SIZE")
        if not 10 <= request.timeout_min <= 4320:
            raise invalid("Timeout is 10 to 4320 minutes.")
        if not request.parent:
            return None
        if request.encrypted is not None:
            raise invalid("Encrypted and ParentSnapshotId can't be given together.", "INVALID_DEPENDENCY_REQUEST")
        parent = self.readable(place, request.parent)
        if request.volume_gib < parent.request.volume_gib:
            raise invalid("The volume is smaller than that of the parent.", "INVALID_VOLUME_SIZE")
        return parent

    def _check_pending_limit(self, place: Place) -> None:
        limit = self.faults.settings.pending_limit
        if sum(state is State.PENDING for state in self.states(place).values()) >= limit:
            self.faults.note("pending_limit")
            raise Refused("ConcurrentLimitExceededException", f"There are {limit} pending snapshots already.")

    def _new(self, place: Place, request: StartRequest, parent: Snapshot | None) -> Snapshot:
        snapshot_id = f"snap-{secrets.token_hex(9)[:17]}"
        snapshot = Snapshot(
            id=snapshot_id,
            place=place,
            request=request,
            lineage=parent.lineage if parent else snapshot_id,
            started_at=self._now(),
            last_write_at=self._now(),
            inherited=parent.blocks if parent else {},
        )
        self._snapshots[snapshot_id] = snapshot
        return snapshot

    def _writable(self, place: Place, snapshot_id: str) -> Snapshot:
        snapshot = self.find(place, snapshot_id)
        if snapshot.state is State.ERROR:
            raise invalid(f"The snapshot '{snapshot_id}' has timed out.", "WRITE_REQUEST_TIMEOUT")
        if snapshot.state is not State.PENDING or snapshot.completes_at is not None:
            raise invalid(f"The snapshot '{snapshot_id}' is complete.", "INVALID_SNAPSHOT_ID")
        return snapshot

    def _age(self, snapshot: Snapshot) -> None:
        """Move a pending snapshot on, if its time has come."""
        if snapshot.state is not State.PENDING:
            return
        now = self._now()
        if snapshot.completes_at is not None:
            if now >= snapshot.completes_at:
                snapshot.state = State.COMPLETED
        elif now > snapshot.last_write_at + snapshot.request.timeout_min * 60:
            snapshot.state = State.ERROR

    def _write(self, data: bytes) -> Block:
        return Block(self.store.add(data), next(self._writes))

    def _sweep(self) -> None:
        holders: list[Iterable[Block]] = [volume.blocks.values() for volume in self._volumes.values()]
        for snapshot in self._snapshots.values():
            holders += [snapshot.inherited.values(), snapshot.own.values()]
        self.store.keep_only(block.digest for block in itertools.chain.from_iterable(holders))


def aggregate_of(blocks: Mapping[int, Block]) -> bytes:
    """The aggregate checksum of LINEAR aggregation: over the raw digests, in the order of their indexes (known)."""
    return hashlib.sha256(b"".join(blocks[index].digest for index in sorted(blocks))).digest()


def not_found(snapshot_id: str) -> Refused:
    """EBS direct's answer for a snapshot that isn't there, or not yet."""
    message = f"The snapshot '{snapshot_id}' does not exist."
    return Refused("ResourceNotFoundException", message, status=404, reason="SNAPSHOT_NOT_FOUND")
