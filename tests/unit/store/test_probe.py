import hashlib
import threading

import pytest
from fake_clock import FakeClock
from faulty import Fault, FaultyStore

from drsync.errors import ObjectExists, ObjectMissing, StoreDenied, StoreUnavailable, StoreUnsafe
from drsync.store import Bytes
from drsync.store.memory import MemoryStore
from drsync.store.probe import create_in_a_race, probe_create_only

BODY = b'{"id": "0123"}'
SHA256 = hashlib.sha256(BODY).digest()


class Overwriting(MemoryStore):
    """A store that ignores If-None-Match, as some do."""

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        self.replace(key, body)


def test_a_store_that_refuses_a_second_create_passes() -> None:
    store = MemoryStore(FakeClock())
    store.create("repo.json", BODY, sha256=SHA256)
    probe_create_only(store, "repo.json", BODY, SHA256)
    assert store.get("repo.json", limit_bytes=100) == BODY


def test_a_store_that_takes_a_second_create_is_unsafe_and_keeps_the_object() -> None:
    store = Overwriting(FakeClock())
    store.create("repo.json", BODY, sha256=SHA256)
    with pytest.raises(StoreUnsafe) as raised:
        probe_create_only(store, "repo.json", BODY, SHA256)
    assert "docs/stores.md" in raised.value.remedy
    assert store.get("repo.json", limit_bytes=100) == BODY


class LookingFirst(MemoryStore):
    """A store that looks whether the key is free and then writes: no second create passes, but a race does."""

    def __init__(self) -> None:
        super().__init__(FakeClock())
        self._looked = threading.Barrier(2)

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        try:
            self.get(key, limit_bytes=1000)
        except ObjectMissing:
            self._looked.wait(timeout=10)
            self.replace(key, body)
        else:
            raise ObjectExists(key=key, url=self.url)


def test_a_store_that_only_looks_first_passes_the_probe_and_fails_in_a_race() -> None:
    store = LookingFirst()
    store.replace("repo.json", BODY)
    probe_create_only(store, "repo.json", BODY, SHA256)
    with pytest.raises(StoreUnsafe):
        create_in_a_race(store, "new.json", BODY, SHA256, racers=2)


def test_in_a_race_exactly_one_creates_the_object() -> None:
    store = MemoryStore(FakeClock())
    create_in_a_race(store, "repo.json", BODY, SHA256)
    assert store.get("repo.json", limit_bytes=100) == BODY
    with pytest.raises(ObjectExists):
        create_in_a_race(store, "repo.json", BODY, SHA256)


def test_a_loser_that_is_told_to_try_again_is_a_loser() -> None:
    faults = [Fault("create", number + 1) for number in range(7)]
    with FaultyStore(MemoryStore(FakeClock()), *faults) as faulty:
        create_in_a_race(faulty, "repo.json", BODY, SHA256, racers=8)


def test_if_nobody_succeeds_the_reason_is_told() -> None:
    store = MemoryStore(FakeClock())
    faults = [Fault("create", number + 1) for number in range(2)]
    with FaultyStore(store, *faults) as faulty, pytest.raises(StoreUnavailable):
        create_in_a_race(faulty, "repo.json", BODY, SHA256, racers=2)
    store.replace("repo.json", BODY)
    denied = Fault("create", error=lambda: StoreDenied(url="x", operation="x", problem="x"))
    with FaultyStore(store, denied) as faulty, pytest.raises(StoreDenied):
        create_in_a_race(faulty, "repo.json", BODY, SHA256, racers=2)
