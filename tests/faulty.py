"""A store that fails as a test scripts it, around a real one or the in-memory twin.

    with FaultyStore(store, Fault("create", effect=Effect.REPLY_LOST)) as faulty:
        RetryingStore(faulty).create(...)

Leaving the `with` block checks that every fault has fired: a test whose fault
never happened proves nothing.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from types import TracebackType
from typing import Literal, Self

from figures import count

from drsync.errors import StoreUnavailable
from drsync.store import Bytes, ObjectInfo, ObjectStore, Tail, Unfinished

Method = Literal["create", "replace", "get", "get_range", "get_tail", "list", "delete"]


class Effect(Enum):
    """What goes wrong."""

    REFUSED = "raised before the store is reached"
    REPLY_LOST = "raised after the store has done it; a listing, after its first `at` keys"
    CUT = "only the first `at` bytes are stored, or come back; a listing ends behind its first `at` keys"
    CORRUPT = "bit 0 of byte `at` is changed when it is stored, or comes back"


def _unavailable() -> BaseException:
    return StoreUnavailable(url="faulty:", problem="scripted")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: at the `call`-th call (from 1) of `method` whose key starts with `key`."""

    method: Method
    call: int = 1
    effect: Effect = Effect.REFUSED
    key: str = ""
    at: int = 0
    error: Callable[[], BaseException] = _unavailable
    """What REFUSED and REPLY_LOST raise; to play a crash, something that is no Exception."""


class FaultyStore:
    """An ObjectStore around `inner` with scripted faults; `calls` counts the calls of each method."""

    def __init__(self, inner: ObjectStore, *faults: Fault) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._seen = [0] * len(faults)
        self._faults = faults
        self.calls: Counter[Method] = Counter()

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def not_fired(self) -> list[Fault]:
        """The faults that have not happened (yet)."""
        return [fault for fault, seen in zip(self._faults, self._seen, strict=True) if seen < fault.call]

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        fault = self._due("create", key)
        damaged = _damage(bytes(body), fault)
        if damaged is not None:
            self._inner.create(key, damaged, sha256=hashlib.sha256(damaged).digest())
        else:
            self._inner.create(key, body, sha256=sha256)
        _lose_reply(fault)

    def replace(self, key: str, body: Bytes) -> None:
        fault = self._due("replace", key)
        damaged = _damage(bytes(body), fault)
        self._inner.replace(key, body if damaged is None else damaged)
        _lose_reply(fault)

    def get(self, key: str, *, limit_bytes: int) -> bytes:
        fault = self._due("get", key)
        return _damaged_reply(self._inner.get(key, limit_bytes=limit_bytes), fault)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        fault = self._due("get_range", key)
        return _damaged_reply(self._inner.get_range(key, offset, length), fault)

    def get_tail(self, key: str, length: int) -> Tail:
        fault = self._due("get_tail", key)
        tail = self._inner.get_tail(key, length)
        return Tail(data=_damaged_reply(tail.data, fault), object_size_bytes=tail.object_size_bytes)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        fault = self._due("list", prefix)
        for number, info in enumerate(self._inner.list(prefix, after=after)):
            if fault is not None and number == fault.at:
                _lose_reply(fault)
                if fault.effect is Effect.CUT:
                    return
            yield info
        _lose_reply(fault)

    def folders(self, prefix: str) -> Iterator[str]:
        fault = self._due("list", prefix)
        yield from self._inner.folders(prefix)
        _lose_reply(fault)

    def now(self) -> datetime:
        return self._inner.now()

    def delete(self, key: str) -> None:
        fault = self._due("delete", key)
        self._inner.delete(key)
        _lose_reply(fault)

    def unfinished(self) -> Iterator[Unfinished]:
        return self._inner.unfinished()

    def abandon(self, unfinished: Unfinished) -> None:
        self._inner.abandon(unfinished)

    def _due(self, method: Method, key: str) -> Fault | None:
        """Count a call; the fault that is due at it, if it is not of the kind that is raised at once."""
        with self._lock:
            self.calls[method] += 1
            due = None
            for number, fault in enumerate(self._faults):
                if fault.method == method and key.startswith(fault.key):
                    self._seen[number] += 1
                    if self._seen[number] == fault.call:
                        due = fault
        if due is not None and due.effect is Effect.REFUSED:
            raise due.error()
        return due

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            assert self.not_fired == [], f"these faults never happened: {self.not_fired}"
            count("faults injected and survived", len(self._faults))


def _lose_reply(fault: Fault | None) -> None:
    if fault is not None and fault.effect is Effect.REPLY_LOST:
        raise fault.error()


def _damage(data: bytes, fault: Fault | None) -> bytes | None:
    """What becomes of `data`, or None if nothing happens to it."""
    if fault is not None and fault.effect is Effect.CUT:
        return data[: fault.at]
    if fault is not None and fault.effect is Effect.CORRUPT:
        return data[: fault.at] + bytes([data[fault.at] ^ 1]) + data[fault.at + 1 :]
    return None


def _damaged_reply(data: bytes, fault: Fault | None) -> bytes:
    _lose_reply(fault)
    damaged = _damage(data, fault)
    return data if damaged is None else damaged
