"""A world of which one seed decides everything: random bytes, the order of threads, the clock, what fails.

    with deterministic(seed):            # random ids, keys and nonces come from the seed; executors run at once
        store = StormyStore(seed, MemoryStore(clock))
        store.begin("step 17", Weather(fails=0.1))

What of the standard library would make two runs differ is replaced while it lasts: where `secrets` takes its
bytes from, and ThreadPoolExecutor, whose tasks run at once in the thread that submits them. Nothing of drsync is.
(What several threads do to each other is for the tests that have them.)
"""

import concurrent.futures
import hashlib
import random
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, ParamSpec, TypeVar

import pytest
from crashing import When
from figures import count

from drsync.errors import StoreUnavailable
from drsync.store import Bytes, ObjectInfo, ObjectStore, Tail, Unfinished
from drsync.store.memory import MemoryStore

_P = ParamSpec("_P")
_R = TypeVar("_R")


@contextmanager
def deterministic(seed: str) -> Iterator[None]:
    """Within it, equal seeds do equal things."""
    drawn = random.Random(f"secrets of {seed}")

    def submit_now(
        executor: concurrent.futures.Executor, call: Callable[_P, _R], /, *args: _P.args, **options: _P.kwargs
    ) -> "concurrent.futures.Future[_R]":
        future: concurrent.futures.Future[_R] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        try:
            result = call(*args, **options)
        except BaseException as err:  # noqa: BLE001 - as an executor does
            future.set_exception(err)
        else:
            future.set_result(result)
        return future

    state = random.getstate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_bytes", lambda size=None: drawn.randbytes(32 if size is None else size))
        patch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", submit_now)
        random.seed(f"waits of {seed}")
        try:
            yield
        finally:
            random.setstate(state)


class WorldClock:
    """The true time: goes on by a second whenever it is asked."""

    def __init__(self) -> None:
        self._now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        self._monotonic_s = 1000.0

    def now(self) -> datetime:
        self.advance(1)
        return self._now

    def monotonic_s(self) -> float:
        self.advance(1)
        return self._monotonic_s

    def advance(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)
        self._monotonic_s += seconds


class WrongClock:
    """A host's clock, which somebody sets; its monotonic side is true."""

    def __init__(self, true: WorldClock) -> None:
        self._true = true
        self._wrong = timedelta(0)

    def now(self) -> datetime:
        return self._true.now() + self._wrong

    def monotonic_s(self) -> float:
        return self._true.monotonic_s()

    def set(self, wrong: timedelta) -> None:
        self._wrong = wrong


class Trouble(StrEnum):
    """What the store does to one call."""

    REFUSED = "an error before it is done"
    REPLY_LOST = "an error after it was done"
    HALF_BODY = "an error after a half of the body"
    DAMAGED_ON_THE_WAY = "bytes that change on their way"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """How the store is while one thing is done."""

    fails: float = 0.0
    """The part of calls that fail in a way that a retry may help."""
    lies: float = 0.0
    """The part of replies with a byte that was changed on the way, which nobody but drsync notices."""


CALM: Final = Weather()
OUTAGE: Final = Weather(fails=1.0)


class StormyStore:
    """An ObjectStore around the in-memory one that fails as the seed says, and keeps all versions.

    What becomes of a call is decided by the seed, by what is done now (`begin`), by method, key, and how often that
    was called: not by the order of calls.
    """

    def __init__(self, seed: str, clock: WorldClock) -> None:
        self._seed = seed
        self._clock = clock
        self._truth = MemoryStore(clock)
        self._history: list[tuple[str, bytes | None]] = []
        self._weather = CALM
        self._now = ""
        self._seen: Counter[tuple[str, str]] = Counter()
        self.troubles: Counter[Trouble] = Counter()

    @property
    def url(self) -> str:
        return "memory:"

    @property
    def calm(self) -> ObjectStore:
        """What is really there, without any weather."""
        return self._truth

    def begin(self, what: str, weather: Weather) -> None:
        """From now on `what` is done, in this weather."""
        self._now, self._weather = what, weather
        self._seen.clear()

    def state(self) -> tuple[str, Weather, Counter[tuple[str, str]]]:
        """What is done now: for `resume`."""
        return self._now, self._weather, self._seen.copy()

    def resume(self, state: tuple[str, Weather, Counter[tuple[str, str]]]) -> None:
        """Go on with what was done before something came between."""
        self._now, self._weather, self._seen = state[0], state[1], state[2].copy()

    @property
    def version(self) -> int:
        """A moment that `as_of` can go back to."""
        return len(self._history)

    def as_of(self, version: int) -> ObjectStore:
        """The objects as they were at that moment, as a versioned bucket can show them; a copy."""
        copy = MemoryStore(self._clock)
        for key, data in self._history[:version]:
            if data is None:
                copy.delete(key)
            else:
                copy.replace(key, data)
        return copy

    def spoil(self, key: str, data: bytes) -> None:
        """Somebody overwrites an object."""
        self._truth.replace(key, data)
        self._history.append((key, data))

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        trouble = self._trouble("create", key)
        if trouble is Trouble.HALF_BODY:
            trouble = Trouble.REFUSED  # S1: all or nothing
        self._refuse(trouble)
        body = self._changed("create", key, bytes(body)) if trouble is Trouble.DAMAGED_ON_THE_WAY else bytes(body)
        self._truth.create(key, body, sha256=sha256)  # S4: it refuses what was changed
        self._history.append((key, body))
        self._lose(trouble)

    def replace(self, key: str, body: Bytes) -> None:
        trouble = self._trouble("replace", key)
        self._refuse(trouble)
        self._truth.replace(key, body)
        self._history.append((key, bytes(body)))
        self._lose(trouble)

    def get(self, key: str, *, limit_bytes: int) -> bytes:
        return self._reply("get", key, lambda: self._truth.get(key, limit_bytes=limit_bytes))

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        return self._reply("get_range", key, lambda: self._truth.get_range(key, offset, length))

    def get_tail(self, key: str, length: int) -> Tail:
        size = 0

        def read() -> bytes:
            nonlocal size
            tail = self._truth.get_tail(key, length)
            size = tail.object_size_bytes
            return tail.data

        return Tail(data=self._reply("get_tail", key, read), object_size_bytes=size)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        trouble = self._trouble("list", prefix)
        self._refuse(trouble)
        found = list(self._truth.list(prefix, after=after))
        half = len(found) // 2 if trouble in {Trouble.REPLY_LOST, Trouble.HALF_BODY} else len(found)
        yield from found[:half]
        self._lose(trouble)

    def folders(self, prefix: str) -> Iterator[str]:
        trouble = self._trouble("folders", prefix)
        self._refuse(trouble)
        yield from self._truth.folders(prefix)
        self._lose(trouble)

    def now(self) -> datetime:
        return self._truth.now()

    def delete(self, key: str) -> None:
        trouble = self._trouble("delete", key)
        self._refuse(trouble)
        self._truth.delete(key)
        self._history.append((key, None))
        self._lose(trouble)

    def unfinished(self) -> Iterator[Unfinished]:
        return self._truth.unfinished()

    def abandon(self, unfinished: Unfinished) -> None:
        self._truth.abandon(unfinished)

    def _reply(self, method: str, key: str, read: Callable[[], bytes]) -> bytes:
        trouble = self._trouble(method, key)
        self._refuse(trouble)
        data = read()
        if trouble is Trouble.DAMAGED_ON_THE_WAY and data:
            return self._changed(method, key, data)
        self._lose(trouble)
        return data

    def _refuse(self, trouble: Trouble | None) -> None:
        if trouble is Trouble.REFUSED:
            raise StoreUnavailable(url=self.url, problem=trouble)

    def _lose(self, trouble: Trouble | None) -> None:
        if trouble in {Trouble.REPLY_LOST, Trouble.HALF_BODY}:
            raise StoreUnavailable(url=self.url, problem=trouble)

    def _trouble(self, method: str, key: str) -> Trouble | None:
        self._seen[method, key] += 1
        dice = self._dice(method, key)
        drawn = dice.random()
        found: Trouble | None = None
        if drawn < self._weather.fails:
            found = dice.choice([Trouble.REFUSED, Trouble.REFUSED, Trouble.REPLY_LOST, Trouble.HALF_BODY])
        elif drawn < self._weather.fails + self._weather.lies:
            found = Trouble.DAMAGED_ON_THE_WAY
        if found is not None:
            self.troubles[found] += 1
            count("faults injected and survived")
        return found

    def _changed(self, method: str, key: str, data: bytes) -> bytes:
        at = self._dice(method, key).randrange(len(data))
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

    def _dice(self, method: str, key: str) -> random.Random:
        return random.Random(f"{self._seed} {self._now} {method} {key} {self._seen[method, key]}")


class Interruption:
    """Something else happens before or after one step of a cycle: stands where crashing.Bomb does.

    With `only`, steps are just the calls of this method.
    """

    def __init__(self, step: int, happens: Callable[[], None], *, when: When = "before", only: str = "") -> None:
        self._step = step
        self._happens = happens
        self._when = when
        self._only = only
        self._calls = 0
        self.fired_at = ""

    def around(self, name: str, call: Callable[[], Any]) -> Any:
        if self._only and not name.endswith(self._only):
            return call()
        self._calls += 1
        due = self._calls == self._step
        if due and self._when == "before":
            self._fire(name)
        result = call()
        if due and self._when == "after":
            self._fire(name)
        return result

    def _fire(self, name: str) -> None:
        self.fired_at = f"{self._when} {name}"
        self._happens()


def digest_of(store: ObjectStore) -> str:
    """One hash of all objects and their names."""
    digest = hashlib.sha256()
    for info in store.list(""):
        digest.update(info.key.encode() + b"\0" + store.get(info.key, limit_bytes=2**30))
    return digest.hexdigest()
