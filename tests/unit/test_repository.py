"""A repository: its record, its keys, what belongs to which VM."""

import hashlib
import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from fake_clock import FakeClock
from faulty import Effect, Fault, FaultyStore
from shipped_vm import DiskStep, ShippedVm, Step, objects_of, store_of

from drsync.errors import (
    ObjectDamaged,
    ObjectMissing,
    RepositoryExists,
    RepositoryMissing,
    RepositoryTooNew,
    StoreUnavailable,
    WrongKey,
    WrongRecoveryKey,
)
from drsync.format import names, seal
from drsync.format.keys import RecoveryKey, RootKey, RootKeys
from drsync.model import BLOCK_SIZE
from drsync.repository import VmObjects, create_repository, find_record, open_repository, read_record, recover_root_key
from drsync.store import ObjectStore
from drsync.store.memory import MemoryStore

STEP = Step(disks={"root": DiskStep(size_bytes=4 * BLOCK_SIZE, writes={0: 1})})


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(FakeClock())


@pytest.fixture
def root() -> RootKey:
    return RootKey.generate()


def change_record(store: ObjectStore, **fields: object) -> None:
    record: dict[str, Any] = json.loads(store.get(names.REPOSITORY, limit_bytes=10_000))
    store.replace(names.REPOSITORY, json.dumps(record | fields).encode())


def test_a_new_repository_opens_with_its_key_and_its_recovery_key(store: MemoryStore, root: RootKey) -> None:
    recovery = create_repository(store, root, FakeClock())
    repository = open_repository(store, root, "key")
    assert recover_root_key(store, recovery) == root
    assert repository.vm_names() == []
    assert repository.record.created == "2026-01-02T03:04:05+00:00"
    assert repository.tag == repository.record.id[:8]


def test_f4_the_record_is_what_the_format_says(store: MemoryStore, root: RootKey) -> None:
    create_repository(store, root, FakeClock())
    record = json.loads(store.get(names.REPOSITORY, limit_bytes=10_000))
    identifier = bytes.fromhex(record["id"])
    assert record == {
        "format": 1,
        "features": [],
        "id": identifier.hex(),
        "block_size": 65536,
        "created": "2026-01-02T03:04:05+00:00",
        "key_check": root.check(identifier).hex(),
    }
    assert sorted(objects_of(store)) == [names.recovery_slot(identifier), names.REPOSITORY]


def test_an_existing_repository_is_not_made_anew(store: MemoryStore, root: RootKey) -> None:
    create_repository(store, root, FakeClock())
    before = objects_of(store)
    with pytest.raises(RepositoryExists):
        create_repository(store, RootKey.generate(), FakeClock())
    assert objects_of(store) == before


def test_of_two_that_make_a_repository_at_once_one_wins_and_its_recovery_key_opens_it(root: RootKey) -> None:
    """The loser sees that the place is empty, and is slower from there on."""
    store = MemoryStore(FakeClock())
    winner: list[RecoveryKey] = []

    class Slow(FaultyStore):
        def create(self, key: str, body: Any, *, sha256: bytes) -> None:
            if not winner:
                winner.append(create_repository(store, root, FakeClock()))
            super().create(key, body, sha256=sha256)

    with pytest.raises(RepositoryExists):
        create_repository(Slow(store), RootKey.generate(), FakeClock())
    assert recover_root_key(store, winner[0]) == root
    open_repository(store, root, "key")


@pytest.mark.parametrize("call", [1, 2])
def test_f18_a_crash_while_a_repository_is_made_leaves_none_and_it_can_be_made_again(
    store: MemoryStore, root: RootKey, call: int
) -> None:
    with FaultyStore(store, Fault("create", call=call)) as faulty, pytest.raises(StoreUnavailable):
        create_repository(faulty, root, FakeClock())
    assert find_record(store) is None
    recovery = create_repository(store, root, FakeClock())
    assert recover_root_key(store, recovery) == root


def test_a_place_without_a_repository_is_told(store: MemoryStore, root: RootKey) -> None:
    with pytest.raises(RepositoryMissing):
        open_repository(store, root, "key")
    with pytest.raises(RepositoryMissing):
        recover_root_key(store, RecoveryKey.generate())


def test_f5_another_repositorys_key_is_refused(store: MemoryStore, root: RootKey) -> None:
    create_repository(store, root, FakeClock())
    with pytest.raises(WrongKey) as caught:
        open_repository(store, RootKey.generate(), "/etc/key")
    assert "/etc/key" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"format": 2}, "format 2"),
        ({"features": ["tape"]}, "tape"),
        ({"features": ["zebra", "ant"]}, "ant, zebra"),
        ({"block_size": 4096}, "blocks of 4096 bytes"),
    ],
)
def test_f4_a_repository_that_needs_more_than_this_drsync_knows_is_refused(
    store: MemoryStore, root: RootKey, fields: dict[str, object], needed: str
) -> None:
    create_repository(store, root, FakeClock())
    change_record(store, **fields)
    with pytest.raises(RepositoryTooNew) as caught:
        open_repository(store, root, "key")
    assert caught.value.fields["needed"] == needed


def test_f4_a_field_that_is_not_known_is_passed_over(store: MemoryStore, root: RootKey) -> None:
    create_repository(store, root, FakeClock())
    change_record(store, comment="made in the spring")
    open_repository(store, root, "key")


@pytest.mark.parametrize(
    "fields",
    [
        {"format": 0},
        {"format": "1"},
        {"id": "ab" * 15},
        {"id": "zz" * 16},
        {"id": "ab" * 16 + "/../x"},
        {"key_check": ""},
        {"features": None},
    ],
)
def test_a_record_that_is_none_is_refused(store: MemoryStore, root: RootKey, fields: dict[str, object]) -> None:
    create_repository(store, root, FakeClock())
    change_record(store, **fields)
    with pytest.raises(ObjectDamaged, match=r"repo\.json"):
        open_repository(store, root, "key")


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b'{"x":' + b"[" * 60_000, b" " * 70_000])
def test_whatever_lies_where_the_record_should_is_refused(store: MemoryStore, root: RootKey, raw: bytes) -> None:
    create_repository(store, root, FakeClock())
    store.replace(names.REPOSITORY, raw)
    with pytest.raises(ObjectDamaged, match=r"repo\.json"):
        read_record(store)


def test_another_recovery_key_is_refused(store: MemoryStore, root: RootKey) -> None:
    create_repository(store, root, FakeClock())
    with pytest.raises(WrongRecoveryKey):
        recover_root_key(store, RecoveryKey.generate())


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b'{"kind":"recovery","wrapped":"AAAA"}', b'{"kind":"recovery","wrapped":"\xc3\xa4"}', b"[" * 60_000],
)
def test_a_slot_that_was_changed_is_refused(store: MemoryStore, root: RootKey, raw: bytes) -> None:
    recovery = create_repository(store, root, FakeClock())
    store.replace(names.recovery_slot(open_repository(store, root, "key").id), raw)
    with pytest.raises(WrongRecoveryKey):
        recover_root_key(store, recovery)


def test_a_slot_that_is_missing_is_named(store: MemoryStore, root: RootKey) -> None:
    recovery = create_repository(store, root, FakeClock())
    copy = store_of({names.REPOSITORY: objects_of(store)[names.REPOSITORY]})
    with pytest.raises(ObjectMissing, match="keys/recovery-"):
        recover_root_key(copy, recovery)


def test_another_repositorys_slot_under_this_ones_name_is_refused(store: MemoryStore, root: RootKey) -> None:
    create_repository(store, root, FakeClock())
    other_store = MemoryStore(FakeClock())
    other = create_repository(other_store, RootKey.generate(), FakeClock())
    other_slot = next(data for name, data in objects_of(other_store).items() if name.startswith("keys/"))
    store.replace(names.recovery_slot(open_repository(store, root, "key").id), other_slot)
    with pytest.raises(WrongRecoveryKey):
        recover_root_key(store, other)


def test_the_names_of_vms_are_found_whatever_they_sort_like(tmp_path: Path) -> None:
    vm = ShippedVm(tmp_path)
    expected = ["a", "a-b", "a.b", "a_b", "web", "web-1", "web0"]
    for name in expected:
        ShippedVm(tmp_path, root=vm.root, repository=vm.repository, vm=name).run([STEP, STEP])
    assert sorted(vm.repository.vm_names()) == expected


def test_f2_what_is_no_name_is_no_vm(tmp_path: Path) -> None:
    vm = ShippedVm(tmp_path).run([STEP])
    for name in ("vm/Web/log/x", "vm/_/x", "vm/" + "a" * 64 + "/x", "vm/x"):
        vm.store.replace(name, b"")
    assert vm.repository.vm_names() == ["web"]


def test_f8_a_pack_under_another_packs_name_is_refused(tmp_path: Path) -> None:
    vm = ShippedVm(tmp_path)
    vm.capture(Step(disks={"root": DiskStep(size_bytes=8 * BLOCK_SIZE, writes=dict.fromkeys(range(8), 1))}))
    first, second = (name for name in objects_of(vm.store) if "/pack/" in name)
    objects = vm.repository.vm("web")
    vm.store.replace(first, objects_of(vm.store)[second])
    with pytest.raises(ObjectDamaged, match="another object than its name says"):
        objects.read_index(first, "pack")


@pytest.mark.parametrize("length", [65_000, 66_000, 5_000_000])
def test_an_index_that_is_longer_than_the_first_read_is_read_by_a_second_one(tmp_path: Path, length: int) -> None:
    faulty = FaultyStore(ShippedVm(tmp_path).store)
    objects = VmObjects(faulty, bytes(16), "web", RootKeys((RootKey.generate(),)).of_vm(bytes(16), "web"))
    header = objects.new_header("pack")
    index = secrets.token_bytes(length)
    buffer = memoryview(bytearray(8 + seal.sealed_bound(length)))
    sealed = seal.seal(buffer, 8, header, index, objects.object_keys(header))
    name = names.pack("web", bytes.fromhex(header.object))
    faulty.create(name, buffer[: sealed.length], sha256=sealed.sha256)
    assert objects.read_index(name, "pack").index == index
    assert (faulty.calls["get_tail"], faulty.calls["get_range"]) == (1, length > seal.TAIL_BYTES)


def test_a_reply_that_is_cut_is_damage(tmp_path: Path) -> None:
    vm = ShippedVm(tmp_path).run([STEP])
    with FaultyStore(vm.store, Fault("get_tail", effect=Effect.CUT, at=30)) as faulty:
        objects = open_repository(faulty, vm.root, "key").vm("web")
        with pytest.raises(ObjectDamaged, match="shorter than a footer"):
            objects.read_index(names.segment("web", 1), "segment", seq=1)


@pytest.mark.parametrize("at", [0, 7])
def test_f7_who_reads_a_whole_object_checks_its_hash_and_its_beginning(tmp_path: Path, at: int) -> None:
    vm = ShippedVm(tmp_path).run([STEP])
    name = names.segment("web", 1)
    data = bytearray(objects_of(vm.store)[name])
    data[at] ^= 1
    objects = vm.repository.vm("web")
    with pytest.raises(ObjectDamaged, match="do not match its SHA-256"):
        objects.open_whole(name, "segment", bytes(data), seq=1)
    data[-40:-8] = hashlib.sha256(data[:-56]).digest()
    with pytest.raises(ObjectDamaged, match="does not begin like"):
        objects.open_whole(name, "segment", bytes(data), seq=1)
