"""A store that tries again: transient errors only, within a time limit, and without doing anything twice."""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from drsync.errors import DrsyncError, LocksMissing, ObjectExists, ObjectMissing, StoreFull
from drsync.model import Clock, SystemClock
from drsync.store import Bytes, ObjectInfo, ObjectStore, Tail, Unfinished
from drsync.store.lock import Lock, LockSupport, ObjectLocks
from drsync.units import MiB

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_PAGE_KEYS = 1000
"""A listing is read in steps of this many keys: what S3 answers at once."""

_COMPARE_BYTES = 8 * MiB
"""A stored object is compared in pieces of this size, so that memory stays bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long to go on. Waits are random below a limit that doubles from try to try."""

    attempts: int = 10
    time_limit_s: float = 120.0
    """No try starts later than this after the first one started."""
    first_wait_s: float = 0.2
    longest_wait_s: float = 20.0
    log_every_s: float = 5.0
    """At most one line in the log in this time, so that an outage under many threads does not fill it."""


class RetryingStore:
    """An ObjectStore around `inner` that repeats what failed with a retryable StoreError.

    What is repeated changes nothing a second time: reads; `replace`; `delete`; and
    `create`, because of how it settles a lost reply: if the key exists, the stored
    bytes are compared with `body`. The same bytes are one's own success, others
    are ObjectExists. (Objects of drsync hold random bits, so nobody else's are the same.)

    A full store is not waited for: room does not come back within seconds.

    `sleep` waits for so many seconds; it may raise to give up at once.
    """

    def __init__(
        self,
        inner: ObjectStore,
        *,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
        policy: RetryPolicy | None = None,
    ) -> None:
        self._inner = inner
        self._clock = clock or SystemClock()
        self._sleep = sleep
        self._policy = policy or RetryPolicy()
        self._lock = threading.Lock()
        self._logged_s: float | None = None
        self._not_logged = 0

    @property
    def url(self) -> str:
        return self._inner.url

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        try:
            self._call("create", key, lambda: self._inner.create(key, body, sha256=sha256))
        except ObjectExists:
            if not self._holds(key, memoryview(body).nbytes, sha256):
                raise

    def replace(self, key: str, body: Bytes) -> None:
        self._call("replace", key, lambda: self._inner.replace(key, body))

    def get(self, key: str, *, limit_bytes: int) -> bytes:
        return self._call("get", key, lambda: self._inner.get(key, limit_bytes=limit_bytes))

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        return self._call("get", key, lambda: self._inner.get_range(key, offset, length))

    def get_tail(self, key: str, length: int) -> Tail:
        return self._call("get", key, lambda: self._inner.get_tail(key, length))

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        listing = _Listing(self._inner, prefix, after)
        while page := self._call("list", prefix, listing.next_page):
            yield from page

    def folders(self, prefix: str) -> Iterator[str]:
        yield from self._call("list", prefix, lambda: list(self._inner.folders(prefix)))

    def lock_support(self) -> LockSupport:
        if not isinstance(self._inner, ObjectLocks):
            return LockSupport(enabled=False, versioned=False)
        return self._call("look at the locks of", "the bucket", self._inner.lock_support)

    def lock_of(self, key: str) -> Lock | None:
        locks = self._inner
        if not isinstance(locks, ObjectLocks):
            return None
        return self._call("look at the lock of", key, lambda: locks.lock_of(key))

    def extend_lock(self, key: str, lock: Lock) -> None:
        locks = self._inner
        if not isinstance(locks, ObjectLocks):
            raise LocksMissing(url=self.url, problem="only S3 buckets can")
        self._call("lock", key, lambda: locks.extend_lock(key, lock))

    def now(self) -> datetime:
        return self._call("ask for the time", "", self._inner.now)

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self._inner.delete(key))

    def unfinished(self) -> Iterator[Unfinished]:
        yield from self._call("list unfinished", "", lambda: list(self._inner.unfinished()))

    def abandon(self, unfinished: Unfinished) -> None:
        self._call("abandon", unfinished.key, lambda: self._inner.abandon(unfinished))

    def _holds(self, key: str, size_bytes: int, sha256: bytes) -> bool:
        """Whether the object under `key` has these bytes. Digests are compared: fast, and no copy of `body`."""
        try:
            if self.get_tail(key, 1).object_size_bytes != size_bytes:
                return False
            digest = hashlib.sha256()
            for offset in range(0, size_bytes, _COMPARE_BYTES):
                digest.update(self.get_range(key, offset, min(_COMPARE_BYTES, size_bytes - offset)))
        except ObjectMissing:  # deleted in between: it was there, and it is not for us to say whose it was
            return False
        return digest.digest() == sha256

    def _call(self, operation: str, key: str, function: Callable[[], _T]) -> _T:
        started_s = self._clock.monotonic_s()

        def is_over(state: RetryCallState) -> bool:
            next_try_s = self._clock.monotonic_s() - started_s + state.upcoming_sleep
            return state.attempt_number >= self._policy.attempts or next_try_s > self._policy.time_limit_s

        retrying = Retrying(
            retry=retry_if_exception(_is_transient),
            stop=is_over,
            wait=wait_random_exponential(multiplier=self._policy.first_wait_s, max=self._policy.longest_wait_s),
            sleep=self._sleep,
            before_sleep=lambda state: self._announce(operation, key, state),
            reraise=True,
        )
        return retrying(function)

    def _announce(self, operation: str, key: str, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        now_s = self._clock.monotonic_s()
        with self._lock:
            if self._logged_s is not None and now_s - self._logged_s < self._policy.log_every_s:
                self._not_logged += 1
                return
            not_logged, self._not_logged, self._logged_s = self._not_logged, 0, now_s
        log.warning(
            "%s; trying again in %.1f s: operation=%s key=%s try=%d retries_not_logged=%d",
            error,
            state.upcoming_sleep,
            operation,
            key,
            state.attempt_number + 1,
            not_logged,
        )


class _Listing:
    """A listing read page by page, which can start again behind the last page that was complete."""

    def __init__(self, store: ObjectStore, prefix: str, after: str) -> None:
        self._store = store
        self._prefix = prefix
        self._after = after
        self._running: Iterator[ObjectInfo] | None = None

    def next_page(self) -> list[ObjectInfo]:
        """The next keys; none at the end."""
        running = self._running or self._store.list(self._prefix, after=self._after)
        self._running = None  # an iterator that has raised is over
        page = list(islice(running, _PAGE_KEYS))
        self._running = running
        if page:
            self._after = page[-1].key
        return page


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, DrsyncError) and error.retryable and not isinstance(error, StoreFull)
