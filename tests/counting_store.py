"""A store that counts what a bucket would charge for: requests, by kind, and bytes."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from drsync.store import Bytes, ObjectInfo, ObjectStore, Tail, Unfinished

PAGE_KEYS: Final = 1000
"""What S3 tells in one request of a listing."""


@dataclass(slots=True)
class Requests:
    """What was asked of a store, as S3 counts it."""

    put: int = 0
    get: int = 0
    list: int = 0
    delete: int = 0
    """S3 takes nothing for them."""
    sent_bytes: int = 0
    read_bytes: int = 0
    keys: Counter[str] = field(default_factory=Counter)
    """How often each key was asked for."""

    @property
    def total(self) -> int:
        return self.put + self.get + self.list

    def __str__(self) -> str:
        return f"{self.put} PUT, {self.get} GET, {self.list} LIST"


class CountingStore:
    """An ObjectStore around `inner`; `so_far` is what it counts to."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self.so_far = Requests()

    @contextmanager
    def counted(self) -> Iterator[Requests]:
        """What is asked inside of the block."""
        with self._lock:
            self.so_far = Requests()
        yield self.so_far

    @property
    def url(self) -> str:
        return self._inner.url

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        self._count(key, put=1, sent_bytes=memoryview(body).nbytes)
        self._inner.create(key, body, sha256=sha256)

    def replace(self, key: str, body: Bytes) -> None:
        self._count(key, put=1, sent_bytes=memoryview(body).nbytes)
        self._inner.replace(key, body)

    def get(self, key: str, *, limit_bytes: int) -> bytes:
        self._count(key, get=1)  # what is not there is charged for, too
        data = self._inner.get(key, limit_bytes=limit_bytes)
        with self._lock:
            self.so_far.read_bytes += len(data)
        return data

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        self._count(key, get=1, read_bytes=length)
        return self._inner.get_range(key, offset, length)

    def get_tail(self, key: str, length: int) -> Tail:
        self._count(key, get=1)
        tail = self._inner.get_tail(key, length)
        with self._lock:
            self.so_far.read_bytes += len(tail.data)
        return tail

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        self._count(prefix, list=1)
        for number, info in enumerate(self._inner.list(prefix, after=after)):
            if number and number % PAGE_KEYS == 0:
                self._count(prefix, list=1)
            yield info

    def folders(self, prefix: str) -> Iterator[str]:
        self._count(prefix, list=1)
        for number, name in enumerate(self._inner.folders(prefix)):
            if number and number % PAGE_KEYS == 0:
                self._count(prefix, list=1)
            yield name

    def now(self) -> datetime:
        self._count("", list=1)  # S3 tells it with a listing
        return self._inner.now()

    def delete(self, key: str) -> None:
        with self._lock:
            self.so_far.delete += 1
        self._inner.delete(key)

    def unfinished(self) -> Iterator[Unfinished]:
        self._count("", list=1)
        yield from self._inner.unfinished()

    def abandon(self, unfinished: Unfinished) -> None:
        self._inner.abandon(unfinished)

    def _count(
        self, key: str, *, put: int = 0, get: int = 0, list: int = 0, sent_bytes: int = 0, read_bytes: int = 0
    ) -> None:
        with self._lock:
            self.so_far.put += put
            self.so_far.get += get
            self.so_far.list += list
            self.so_far.sent_bytes += sent_bytes
            self.so_far.read_bytes += read_bytes
            self.so_far.keys[key] += 1
