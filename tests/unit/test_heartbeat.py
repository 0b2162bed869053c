"""Heartbeats: docs/format.md, "Heartbeat"."""

import json
from base64 import b64decode, b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from faulty import Fault, FaultyStore
from hypothesis import given
from hypothesis import strategies as st
from shipped_vm import ShippedVm, objects_of

from drsync.errors import ObjectMissing, StoreUnavailable
from drsync.format import names
from drsync.heartbeat import Seen, read_heartbeats, write_heartbeat
from drsync.repository import Repository, open_repository

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
WEB = Seen(seq=42, checked_at=NOON)
HOST = names.heartbeat("host")


@pytest.fixture
def vm(tmp_path: Path) -> ShippedVm:
    return ShippedVm(tmp_path)


@pytest.fixture
def repository(vm: ShippedVm) -> Repository:
    return vm.repository


def stored(repository: Repository, host: str = "host") -> dict[str, str]:
    found: dict[str, str] = json.loads(objects_of(repository.store)[names.heartbeat(host)])["vms"]
    return found


def store(repository: Repository, vms: object, host: str = "host") -> None:
    body = {"format": 1, "host": host, "vms": vms}
    repository.store.replace(names.heartbeat(host), json.dumps(body).encode())


def sealed(repository: Repository, plain: bytes) -> str:
    """An entry of `web` that authenticates, with whatever a holder of the key puts there."""
    key = AESGCM(repository.vm("web").key.of_heartbeat())
    return b64encode(bytes(12) + key.encrypt(bytes(12), plain, b"drsync heartbeat\0" + repository.id + b"web")).decode()


def test_what_a_host_says_is_read(repository: Repository) -> None:
    write_heartbeat(repository, "host", {"web": WEB, "db": Seen(seq=7, checked_at=NOON)})
    beats = read_heartbeats(repository)
    assert beats.of("web") == WEB
    assert beats.of("db") == Seen(seq=7, checked_at=NOON)
    assert beats.of("other") is None


def test_a_host_overwrites_its_own_heartbeat(repository: Repository) -> None:
    write_heartbeat(repository, "host", {"web": WEB})
    write_heartbeat(repository, "host", {"web": Seen(seq=43, checked_at=NOON)})
    assert [name for name in objects_of(repository.store) if name.startswith("host/")] == [HOST]
    assert read_heartbeats(repository).of("web") == Seen(seq=43, checked_at=NOON)


def test_of_several_hosts_the_one_that_knows_the_newest_segment_counts(repository: Repository) -> None:
    later = NOON + timedelta(hours=1)
    for host, seq, checked_at in [("a", 9, later), ("b", 10, NOON), ("c", 10, NOON - timedelta(hours=1))]:
        write_heartbeat(repository, host, {"web": Seen(seq=seq, checked_at=checked_at)})
    assert read_heartbeats(repository).of("web") == Seen(seq=10, checked_at=NOON)


def test_an_entry_is_made_as_the_format_says(repository: Repository) -> None:
    write_heartbeat(repository, "host", {"web": WEB})
    raw = b64decode(stored(repository)["web"])
    bound = b"drsync heartbeat\0" + repository.id + b"web"
    plain = AESGCM(repository.vm("web").key.of_heartbeat()).decrypt(raw[:12], raw[12:], bound)
    assert json.loads(plain) == {"seq": 42, "checked_at": "2026-01-02T12:00:00Z"}


def test_f21_an_entry_of_another_vm_or_repository_counts_as_not_there(repository: Repository, tmp_path: Path) -> None:
    write_heartbeat(repository, "host", {"web": WEB})
    entry = stored(repository)["web"]
    store(repository, {"db": entry})
    assert read_heartbeats(repository).seen == {}
    other = ShippedVm(tmp_path).repository
    store(other, {"web": entry})
    assert read_heartbeats(other).seen == {}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"\xff",
        b'{"format":1,"host":"host","vms":{"web":1}}',
        b'{"format":1,"host":"host","vms":{"web":"\xff"}}',
        b'{"format":1,"host":"host","more":' + b"[" * 100_000,
        b" " * (16 * 1024 * 1024 + 1),
    ],
)
def test_f21_whatever_lies_where_a_heartbeat_should_hides_no_other_one(repository: Repository, raw: bytes) -> None:
    write_heartbeat(repository, "zebra", {"web": WEB})
    repository.store.replace(HOST, raw)
    assert read_heartbeats(repository).seen == {"web": WEB}


@given(text=st.text() | st.binary(max_size=80).map(lambda raw: b64encode(raw).decode()))
def test_f21_any_entry_that_does_not_authenticate_counts_as_not_there(text: str) -> None:
    repository = ShippedVm(Path("/nowhere")).repository
    store(repository, {"web": text, "../x": text, "": text})
    assert read_heartbeats(repository).seen == {}


@pytest.mark.parametrize(
    "plain", [b"", b"{}", b"\xff", b'{"seq":"x","checked_at":"2026-01-02T12:00:00Z"}', b'{"seq":1,"checked_at":"x"}']
)
def test_f21_an_entry_that_authenticates_and_says_nonsense_counts_as_not_there(
    repository: Repository, plain: bytes
) -> None:
    store(repository, {"web": sealed(repository, plain)})
    assert read_heartbeats(repository).seen == {}


def test_a_time_without_a_zone_is_utc(repository: Repository) -> None:
    store(repository, {"web": sealed(repository, b'{"seq":42,"checked_at":"2026-01-02T12:00:00"}')})
    assert read_heartbeats(repository).of("web") == WEB


def test_a_heartbeat_that_vanishes_while_it_is_read_is_not_there(vm: ShippedVm, repository: Repository) -> None:
    write_heartbeat(repository, "host", {"web": WEB})
    write_heartbeat(repository, "zebra", {"web": WEB})
    gone = Fault("get", key=HOST, error=lambda: ObjectMissing(key=HOST, url="memory:"))
    with FaultyStore(repository.store, gone) as faulty:
        assert read_heartbeats(open_repository(faulty, vm.root, "key")).seen == {"web": WEB}


def test_a_store_that_does_not_answer_is_no_empty_answer(vm: ShippedVm, repository: Repository) -> None:
    write_heartbeat(repository, "host", {"web": WEB})
    with FaultyStore(repository.store, Fault("get", key=HOST)) as faulty, pytest.raises(StoreUnavailable):
        read_heartbeats(open_repository(faulty, vm.root, "key"))


def test_f3_a_heartbeat_shows_the_names_of_its_vms_and_nothing_of_them(repository: Repository) -> None:
    write_heartbeat(repository, "host", {"web": WEB})
    text = objects_of(repository.store)[HOST]
    assert b"42" not in text.replace(stored(repository)["web"].encode(), b"")
    assert b"checked_at" not in text
