"""A store that writes and reads at a pace: for stores that take an object in one go, such as a directory."""

from collections.abc import Iterator
from datetime import datetime

from drsync.model import Pace
from drsync.store import Bytes, ObjectInfo, ObjectStore, Tail, Unfinished


class PacedStore:
    """An ObjectStore around `inner` whose writes wait for `pace`, and whose reads wait for `read_pace`.

    An object that is read as a whole, or from its end, is paid for when its length is known: behind the read.
    """

    def __init__(self, inner: ObjectStore, pace: Pace, read_pace: Pace) -> None:
        self._inner = inner
        self._pace = pace
        self._read_pace = read_pace

    @property
    def url(self) -> str:
        return self._inner.url

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        self._pace.take(memoryview(body).nbytes)
        self._inner.create(key, body, sha256=sha256)

    def replace(self, key: str, body: Bytes) -> None:
        self._pace.take(memoryview(body).nbytes)
        self._inner.replace(key, body)

    def get(self, key: str, *, limit_bytes: int) -> bytes:
        data = self._inner.get(key, limit_bytes=limit_bytes)
        self._read_pace.take(len(data))
        return data

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        self._read_pace.take(length)
        return self._inner.get_range(key, offset, length)

    def get_tail(self, key: str, length: int) -> Tail:
        tail = self._inner.get_tail(key, length)
        self._read_pace.take(len(tail.data))
        return tail

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        return self._inner.list(prefix, after=after)

    def folders(self, prefix: str) -> Iterator[str]:
        return self._inner.folders(prefix)

    def now(self) -> datetime:
        return self._inner.now()

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def unfinished(self) -> Iterator[Unfinished]:
        return self._inner.unfinished()

    def abandon(self, unfinished: Unfinished) -> None:
        self._inner.abandon(unfinished)
