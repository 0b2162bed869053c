"""`drsync init` when the store fails: never a repository without its key."""

import threading
from pathlib import Path

import pytest
from fake_clock import FakeClock
from faulty import Effect, Fault, FaultyStore

from drsync.config import parse_config
from drsync.errors import ObjectExists, ObjectMissing, StoreUnavailable, StoreUnsafe
from drsync.format import names
from drsync.keyfile import read_key_file
from drsync.repository import find_record, open_repository
from drsync.session import Session
from drsync.store import Bytes, ObjectStore
from drsync.store.memory import MemoryStore


class Overwriting(MemoryStore):
    """A store that says yes to a second create."""

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        self.replace(key, body)


class LookingFirst(MemoryStore):
    """A store that refuses a second create, but lets two of the same moment both succeed."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self._looked = threading.Barrier(2)

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        try:
            self.get(key, limit_bytes=2**20)
        except ObjectMissing:
            self._looked.wait(timeout=10)
            self.replace(key, body)
        else:
            raise ObjectExists(key=key, url=self.url)


def session(place: Path, store: ObjectStore, clock: FakeClock) -> Session:
    text = f'[repository]\nurl = "file://{place}/repository"\nkey_file = "{place}/key"\n'
    opened = Session(parse_config(text.encode(), place / "drsync.toml"), clock)
    opened.__dict__["raw_store"] = opened.__dict__["store"] = store  # what the cached properties would open
    return opened


def test_a_lost_reply_keeps_the_key_of_a_repository_that_may_be_there(tmp_path: Path) -> None:
    clock = FakeClock()
    store = MemoryStore(clock)
    lost = Fault("create", 1, Effect.REPLY_LOST, key=names.REPOSITORY)
    with FaultyStore(store, lost) as faulty, pytest.raises(StoreUnavailable):
        session(tmp_path, faulty, clock).init()
    assert open_repository(store, read_key_file(tmp_path / "key"), tmp_path / "key")


def test_a_store_that_overwrites_gets_no_repository_and_leaves_no_key(tmp_path: Path) -> None:
    clock = FakeClock()
    store = Overwriting(clock)
    with pytest.raises(StoreUnsafe):
        session(tmp_path, store, clock).init()
    assert find_record(store) is None
    assert not (tmp_path / "key").exists()


def test_a_store_in_which_two_writers_of_a_moment_both_win_gets_no_repository(tmp_path: Path) -> None:
    clock = FakeClock()
    store = LookingFirst(clock)
    with pytest.raises(StoreUnsafe):
        session(tmp_path, store, clock).init()
    assert find_record(store) is None
    assert not (tmp_path / "key").exists()
