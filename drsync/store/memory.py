"""Objects in memory: the twin of the real stores, for tests and for trying things out."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from drsync.errors import LocksMissing, ObjectDamaged, ObjectExists, ObjectMissing, StoreDenied, StoreUnavailable
from drsync.model import Clock
from drsync.store import Bytes, ObjectInfo, Tail, Unfinished
from drsync.store.key import check_folder, check_key, check_prefix
from drsync.store.lock import Lock, LockMode, LockPolicy, LockSupport


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    data: bytes
    modified: datetime


class MemoryStore:
    """An ObjectStore that lives as long as the process. `clock` stamps the objects.

    With `lock` it also is an ObjectLocks, whose objects are locked when they are created.
    """

    def __init__(self, clock: Clock, *, lock: LockPolicy | None = None) -> None:
        self._clock = clock
        self._policy = lock
        self._locks: dict[str, Lock] = {}
        self._lock = threading.Lock()
        self._objects: dict[str, _Stored] = {}

    @property
    def url(self) -> str:
        return "memory:"

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        check_key(key, self.url)
        data = bytes(body)
        if hashlib.sha256(data).digest() != sha256:
            # As S3 answers it: the bytes may have been changed on the way, so sending them again may help.
            raise StoreUnavailable(url=self.url, problem=f"the bytes sent for {key} do not match their checksum")
        stored = _Stored(data=data, modified=self._clock.now())
        with self._lock:
            if self._objects.setdefault(key, stored) is not stored:
                raise ObjectExists(key=key, url=self.url)
            self._locks.pop(key, None)  # of one that was deleted
            if self._policy is not None:
                self._locks[key] = Lock(mode=self._policy.mode, until=self._clock.now() + self._policy.period)

    def lock_support(self) -> LockSupport:
        return LockSupport(enabled=self._policy is not None, versioned=self._policy is not None)

    def lock_of(self, key: str) -> Lock | None:
        self._find(key)
        return self._locks.get(key)

    def extend_lock(self, key: str, lock: Lock) -> None:
        self._find(key)
        if self._policy is None:
            raise LocksMissing(url=self.url, problem="it was made without locks")
        with self._lock:
            before = self._locks.get(key)
            if before is not None and before.until > self._clock.now():
                if before.mode is LockMode.COMPLIANCE and lock.mode is LockMode.GOVERNANCE:
                    raise StoreDenied(url=self.url, operation=f"lock {key}", problem="it would weaken its lock")
                lock = Lock(mode=lock.mode, until=max(before.until, lock.until))
            self._locks[key] = lock

    def replace(self, key: str, body: Bytes) -> None:
        check_key(key, self.url)
        stored = _Stored(data=bytes(body), modified=self._clock.now())
        with self._lock:
            self._objects[key] = stored

    def get(self, key: str, *, limit_bytes: int) -> bytes:
        data = self._find(key)
        if len(data) > limit_bytes:
            raise ObjectDamaged(key=key, problem=f"it has {len(data)} bytes, more than the {limit_bytes} it may have")
        return data

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        data = self._find(key)
        if offset + length > len(data):
            raise ObjectDamaged(key=key, problem=f"it ends at byte {len(data)}, before {offset + length}")
        return data[offset : offset + length]

    def get_tail(self, key: str, length: int) -> Tail:
        data = self._find(key)
        return Tail(data=data[max(0, len(data) - length) :], object_size_bytes=len(data))

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix, self.url)
        with self._lock:
            keys = sorted(key for key in self._objects if key.startswith(prefix) and key > after)
        for key in keys:
            stored = self._objects.get(key)
            if stored is not None:
                yield ObjectInfo(key=key, size_bytes=len(stored.data), modified=stored.modified)

    def folders(self, prefix: str) -> Iterator[str]:
        check_folder(prefix, self.url)
        with self._lock:
            rests = [key[len(prefix) :] for key in self._objects if key.startswith(prefix)]
        found = sorted({rest[: rest.index("/") + 1] for rest in rests if "/" in rest})
        yield from (name[:-1] for name in found)

    def now(self) -> datetime:
        return self._clock.now()

    def delete(self, key: str) -> None:
        check_key(key, self.url)
        with self._lock:
            self._objects.pop(key, None)

    def unfinished(self) -> Iterator[Unfinished]:
        yield from ()  # its writers don't die by themselves

    def abandon(self, unfinished: Unfinished) -> None:
        pass

    def _find(self, key: str) -> bytes:
        check_key(key, self.url)
        stored = self._objects.get(key)
        if stored is None:
            raise ObjectMissing(key=key, url=self.url)
        return stored.data
