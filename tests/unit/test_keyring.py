"""The key ring in a store: opened, changed, raced for, and cut off in the middle; in memory and in a directory."""

import hashlib
import secrets
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crashing import Crash
from fake_clock import FakeClock
from faulty import Effect, Fault, FaultyStore
from key_service import MemoryKms
from shipped_vm import objects_of

from drsync.errors import (
    KeyFileExists,
    KmsUnusable,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    SlotExists,
    SlotNeeded,
    StoreDenied,
    UnknownSlot,
    WrongKey,
    WrongRecoveryKey,
)
from drsync.format import names
from drsync.format.keys import HostKeys, RecoveryKey, RootKey, RootKeys
from drsync.format.ring import MAX_SLOTS, ScryptCost
from drsync.hostkeys import HostKeyFile
from drsync.keyfile import read_key_file, write_key_file
from drsync.keyring import NO_RING, Keyring, OpenRing, Unlock
from drsync.repository import create_repository, read_record
from drsync.store import ObjectStore
from drsync.store.directory import DirectoryStore
from drsync.store.memory import MemoryStore
from drsync.store.retry import RetryingStore

PHRASE = "six words that nobody can guess"


def cheap() -> ScryptCost:
    return ScryptCost(salt=secrets.token_hex(16), log2_n=10)


class Lab:
    """A repository, its recovery key, and a host that has its key file."""

    def __init__(self, store: ObjectStore, place: Path) -> None:
        self.store = store
        self.kms = MemoryKms()
        self.root = RootKey.generate()
        self.recovery = create_repository(store, self.root, FakeClock())
        self.id = bytes.fromhex(read_record(store).id)
        self.path = place / "key"
        write_key_file(self.path, self.root)

    def ring(self, store: ObjectStore | None = None) -> Keyring:
        store = store or self.store
        return Keyring(store, read_record(store), FakeClock(), lambda: self.kms, new_cost=cheap)

    def host(self, store: ObjectStore | None = None, path: Path | None = None) -> HostKeyFile:
        return HostKeyFile(path or self.path, store or self.store, FakeClock(), lambda: self.kms)

    def unlock(self, store: ObjectStore | None = None) -> Unlock:
        return lambda: self.ring(store).open_with_recovery(self.recovery)

    def opened(self) -> OpenRing:
        return self.unlock()()

    @property
    def roots(self) -> RootKeys:
        return self.opened().roots

    @property
    def held(self) -> RootKeys:
        held = read_key_file(self.path)
        assert isinstance(held, RootKeys)
        return held


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return MemoryStore(FakeClock()) if request.param == "memory" else DirectoryStore(tmp_path / "repository")


@pytest.fixture
def lab(store: ObjectStore, tmp_path: Path) -> Lab:
    return Lab(store, tmp_path)


def test_a_repository_whose_keys_were_never_changed_has_no_ring_and_one_slot(lab: Lab) -> None:
    slots, checks, number = lab.ring().told()
    assert ([slot.name for slot in slots], len(checks), number) == (["recovery"], 1, NO_RING)
    assert lab.opened().number == NO_RING
    assert lab.roots == RootKeys((lab.root,))


def test_each_kind_of_slot_opens_what_the_others_do(lab: Lab) -> None:
    ring = lab.ring()
    second, made = ring.add_recovery(lab.unlock(), "safe")
    assert made.number == 1
    ring.add_passphrase(lab.unlock(), "ops", PHRASE)
    ring.add_kms(lab.unlock(), "aws", lab.kms.make_key(), "eu-central-1")
    assert [slot.name for slot in ring.told()[0]] == ["recovery", "safe", "ops", "aws"]
    assert ring.newest() == 3
    opened = [
        ring.open_with_recovery(lab.recovery),
        ring.open_with_recovery(second),
        ring.open_with_passphrase(PHRASE),
        ring.open_with_kms(),
        ring.open_with_kms("aws"),
    ]
    assert {one.roots for one in opened} == {RootKeys((lab.root,))}
    assert len({one.secret.authority for one in opened}) == 1


def test_any_slot_can_rotate_and_all_of_them_open_the_new_key(lab: Lab) -> None:
    ring = lab.ring()
    ring.add_passphrase(lab.unlock(), "ops", PHRASE)
    ring.add_kms(lab.unlock(), "aws", lab.kms.make_key(), "")
    unlocks: list[Unlock] = [lab.unlock(), lambda: ring.open_with_passphrase(PHRASE), ring.open_with_kms]
    for generation, unlock in enumerate(unlocks, 2):
        done = ring.rotate(unlock)
        assert (done.ring.roots.newest, done.by_other) == (generation, False)
        assert {one().roots for one in unlocks} == {done.ring.roots}
    assert lab.roots.generations[0] == lab.root
    assert len(set(lab.roots.generations)) == 4


def test_a_wrong_key_or_passphrase_is_named_and_tells_what_there_is(lab: Lab) -> None:
    ring = lab.ring()
    ring.add_passphrase(lab.unlock(), "ops", PHRASE)
    with pytest.raises(WrongRecoveryKey, match=r"the recovery key .* no slot of ring 1 takes it.* ops \(passphrase\)"):
        ring.open_with_recovery(RecoveryKey.generate())
    with pytest.raises(WrongRecoveryKey, match="the passphrase does not open"):
        ring.open_with_passphrase("another one altogether")
    with pytest.raises(UnknownSlot, match="no slot of KMS"):
        ring.open_with_kms()
    with pytest.raises(UnknownSlot, match="no slot ops that KMS opens"):
        ring.open_with_kms("ops")


def test_before_there_is_a_ring_no_passphrase_opens(lab: Lab) -> None:
    with pytest.raises(UnknownSlot):
        lab.ring().open_with_passphrase(PHRASE)
    with pytest.raises(UnknownSlot):
        lab.ring().open_with_kms()


def test_a_removed_slot_opens_no_newer_ring_and_an_older_one_only_when_asked_for(lab: Lab) -> None:
    ring = lab.ring()
    ring.add_passphrase(lab.unlock(), "ops", PHRASE)
    assert [slot.name for slot in ring.remove(lab.unlock(), "ops").slots] == ["recovery"]
    ring.rotate(lab.unlock())
    with pytest.raises(WrongRecoveryKey, match="--ring 2"):
        ring.open_with_passphrase(PHRASE)
    old = ring.open_with_passphrase(PHRASE, number=1)
    assert old.roots == RootKeys((lab.root,)), "what was made until then stays open to who has the old ring"


def test_the_last_recovery_slot_cannot_be_removed(lab: Lab) -> None:
    ring = lab.ring()
    ring.add_passphrase(lab.unlock(), "ops", PHRASE)
    ring.add_kms(lab.unlock(), "aws", lab.kms.make_key(), "")
    before = objects_of(lab.store)
    with pytest.raises(SlotNeeded, match="recovery is the last recovery slot"):
        ring.remove(lab.unlock(), "recovery")
    assert objects_of(lab.store) == before
    second, _ = ring.add_recovery(lab.unlock(), "safe")
    ring.remove(lab.unlock(), "recovery")
    with pytest.raises(SlotNeeded, match="safe"):
        ring.remove(lambda: ring.open_with_recovery(second), "safe")
    with pytest.raises(WrongRecoveryKey):
        ring.open_with_recovery(lab.recovery)


def test_names_are_unique_and_slots_are_bounded(lab: Lab) -> None:
    ring = lab.ring()
    with pytest.raises(SlotExists, match="recovery can't be added"):
        ring.add_recovery(lab.unlock(), "recovery")
    with pytest.raises(UnknownSlot, match="no slot ops to remove; it has recovery"):
        ring.remove(lab.unlock(), "ops")
    assert ring.newest() == NO_RING
    for n in range(1, MAX_SLOTS):
        ring.add_recovery(lab.unlock(), f"s{n}")
    with pytest.raises(SlotExists, match=f"there are {MAX_SLOTS}"):
        ring.add_recovery(lab.unlock(), "more")


CHANGES: dict[str, Callable[[Lab, Keyring, Unlock], object]] = {
    "add": lambda lab, ring, unlock: ring.add_passphrase(unlock, "ops", PHRASE),
    "remove": lambda lab, ring, unlock: ring.remove(unlock, "safe"),
    "rotate": lambda lab, ring, unlock: ring.rotate(unlock),
}


@pytest.mark.parametrize("change", CHANGES)
def test_of_two_that_change_the_keys_at_once_both_changes_are_in_the_end(change: str, lab: Lab) -> None:
    lab.ring().add_recovery(lab.unlock(), "safe")

    class Late(FaultyStore):
        """Another one's change is stored just before ours."""

        others = 1

        def create(self, key: str, body: Any, *, sha256: bytes) -> None:
            if self.others:
                self.others -= 1
                lab.ring().add_recovery(lab.unlock(), "late")
            super().create(key, body, sha256=sha256)

    late = Late(lab.store)
    CHANGES[change](lab, lab.ring(late), lab.unlock())
    names_now = {slot.name for slot in lab.opened().slots}
    assert lab.ring().newest() == 3
    assert "late" in names_now
    assert ("ops" in names_now, "safe" in names_now, lab.roots.newest) == {
        "add": (True, True, 1),
        "remove": (False, False, 1),
        "rotate": (False, True, 2),
    }[change]


def test_of_two_rotations_at_once_one_makes_the_key_and_both_end_with_it(lab: Lab, tmp_path: Path) -> None:
    other = tmp_path / "other-host"
    write_key_file(other, lab.root)

    class Late(FaultyStore):
        others = 1

        def create(self, key: str, body: Any, *, sha256: bytes) -> None:
            if self.others:
                self.others -= 1
                lab.host(path=other).rotate(lab.unlock())
            super().create(key, body, sha256=sha256)

    done = lab.host(Late(lab.store)).rotate(lab.unlock())
    assert (done.made, done.by_other, done.generation) == (False, True, 2)
    assert lab.ring().newest() == 1
    assert read_key_file(other) == lab.held == lab.roots


def test_who_always_loses_the_race_is_told(lab: Lab) -> None:
    class Always(FaultyStore):
        def create(self, key: str, body: Any, *, sha256: bytes) -> None:
            lab.ring().add_recovery(lab.unlock(), f"s{secrets.token_hex(4)}")
            super().create(key, body, sha256=sha256)

    with pytest.raises(ObjectExists):
        lab.ring(Always(lab.store)).add_passphrase(lab.unlock(), "ops", PHRASE)


def test_a_lost_reply_is_no_second_rotation(lab: Lab) -> None:
    fault = Fault("create", key="keys/ring", effect=Effect.REPLY_LOST)
    with FaultyStore(lab.store, fault) as faulty:
        done = lab.host(RetryingStore(faulty, clock=FakeClock())).rotate(lab.unlock())
    assert (done.generation, done.made) == (2, True)
    assert lab.ring().newest() == 1
    assert lab.held == lab.roots


@pytest.mark.parametrize("effect", [Effect.REFUSED, Effect.REPLY_LOST])
def test_a_crash_at_the_create_leaves_the_old_ring_or_the_new_one(effect: Effect, lab: Lab) -> None:
    fault = Fault("create", key="keys/ring", effect=effect, error=Crash)
    with FaultyStore(lab.store, fault) as faulty, pytest.raises(Crash):
        lab.host(faulty).rotate(lab.unlock())
    made = effect is Effect.REPLY_LOST
    assert lab.roots.newest == (2 if made else 1)
    assert lab.held == RootKeys((lab.root,)), "this host goes on under its old key"
    done = lab.host().rotate(lab.unlock())
    assert (done.generation, done.made) == (2, not made), "the same command again ends it, and makes no third key"
    assert lab.held == lab.roots


@pytest.mark.parametrize("step", ["unlink", "open", "fsync", "replace", "sync_directory"])
def test_a_crash_at_each_step_of_writing_the_key_file_leaves_the_old_or_the_new_one(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(MemoryStore(FakeClock()), tmp_path)
    fired: list[str] = []

    def crash(*_: object, **__: object) -> None:
        fired.append(step)
        raise Crash

    with monkeypatch.context() as dying:
        match step:
            case "unlink" | "replace":
                dying.setattr(Path, step, crash)
            case "open" | "fsync":
                dying.setattr(f"drsync.keyfile.os.{step}", crash)
            case _:
                dying.setattr("drsync.keyfile.sync_directory", crash)
        with pytest.raises(Crash):
            lab.host().rotate(lab.unlock())
    assert fired
    assert lab.roots.newest == 2, "the ring comes first"
    assert lab.held == (lab.roots if step == "sync_directory" else RootKeys((lab.root,)))
    assert lab.host().rotate(lab.unlock()).made == (step == "sync_directory")
    assert lab.held == lab.roots


def test_what_a_killed_rotation_left_beside_the_key_file_is_no_hindrance(lab: Lab) -> None:
    left = lab.path.with_name("key.new")
    left.write_text("half a")
    assert lab.host().rotate(lab.unlock()).made
    assert lab.held == lab.roots
    assert not left.exists()
    assert lab.path.stat().st_mode & 0o777 == 0o600


def test_a_dry_run_opens_and_changes_nothing(lab: Lab) -> None:
    ring = lab.ring()
    before, key_file = objects_of(lab.store), lab.path.read_bytes()
    ring.add_recovery(lab.unlock(), "safe", dry_run=True)
    ring.add_passphrase(lab.unlock(), "ops", PHRASE, dry_run=True)
    assert lab.host().rotate(lab.unlock(), dry_run=True).generation == 2
    with pytest.raises(SlotNeeded):
        ring.remove(lab.unlock(), "recovery", dry_run=True)
    with pytest.raises(WrongRecoveryKey):
        ring.rotate(lambda: ring.open_with_recovery(RecoveryKey.generate()), dry_run=True)
    assert (objects_of(lab.store), lab.path.read_bytes()) == (before, key_file)


def test_without_kms_the_offline_slots_open_and_a_rotation_is_refused_until_its_slot_is_gone(lab: Lab) -> None:
    """Rule 25: denied, or the key deleted."""
    ring = lab.ring()
    key = lab.kms.make_key()
    ring.add_kms(lab.unlock(), "aws", key, "")
    for problem in ("may not", "no such key"):
        lab.kms.denied = {key} if problem == "may not" else set()
        if problem == "no such key":
            del lab.kms.keys[key]
        with pytest.raises(KmsUnusable, match=f"slot aws: KMS can't decrypt with key {key}: .*{problem}") as caught:
            ring.open_with_kms()
        assert caught.value.remedy.startswith("drsync key recover --unlock recovery")
        assert lab.roots == RootKeys((lab.root,))
        before = objects_of(lab.store)
        with pytest.raises(KmsUnusable, match="can't encrypt"):
            ring.rotate(lab.unlock())
        assert objects_of(lab.store) == before
    ring.remove(lab.unlock(), "aws")
    assert ring.rotate(lab.unlock()).ring.roots.newest == 2


def test_a_slot_of_kms_that_would_not_open_is_not_added(lab: Lab) -> None:
    with pytest.raises(KmsUnusable, match="no such key"):
        lab.ring().add_kms(lab.unlock(), "aws", "arn:aws:kms:eu-central-1:000000000000:key/none", "")
    assert lab.ring().newest() == NO_RING


def test_another_repositorys_kms_slot_does_not_open_this_one(lab: Lab, tmp_path: Path) -> None:
    key = lab.kms.make_key()
    lab.ring().add_kms(lab.unlock(), "aws", key, "")
    (tmp_path / "other").mkdir()
    other = Lab(MemoryStore(FakeClock()), tmp_path / "other")
    other.kms = lab.kms
    other.ring().add_kms(other.unlock(), "aws", key, "")
    mine = lab.ring().told()[0][-1]
    theirs = other.ring().told()[0][-1]
    with pytest.raises(KmsUnusable, match="another key"):
        lab.kms.unwrap(mine, b64decode(theirs.wrapped), {"drsync:repository": lab.id.hex()})


def test_the_second_slot_of_kms_is_tried_when_the_first_one_fails(lab: Lab) -> None:
    first, second = lab.kms.make_key(), lab.kms.make_key()
    lab.ring().add_kms(lab.unlock(), "eu", first, "")
    lab.ring().add_kms(lab.unlock(), "us", second, "")
    lab.kms.denied.add(first)
    assert lab.ring().open_with_kms().roots == RootKeys((lab.root,))
    with pytest.raises(KmsUnusable):
        lab.ring().open_with_kms("eu")


def test_a_changed_ring_is_named_and_an_older_one_can_be_asked_for(lab: Lab) -> None:
    lab.ring().add_passphrase(lab.unlock(), "ops", PHRASE)
    lab.ring().rotate(lab.unlock())
    name = names.ring(lab.id, 2)
    raw = lab.store.get(name, limit_bytes=2**20)
    lab.store.replace(name, raw[:-20] + b"AAAAAAAAAAAAAAAAAAA\n")
    with pytest.raises(ObjectDamaged, match=name):
        lab.opened()
    with pytest.raises(ObjectDamaged, match=name):
        lab.ring().open_with_passphrase(PHRASE)
    assert lab.ring().open_with_recovery(lab.recovery, number=1).roots == RootKeys((lab.root,))
    assert lab.ring().open_with_recovery(lab.recovery, number=0).roots == RootKeys((lab.root,))


def test_what_lies_among_the_rings_and_is_none_is_named(lab: Lab) -> None:
    body = b"x"
    lab.store.create(f"{names.ring_prefix(lab.id)}1.json", body, sha256=hashlib.sha256(body).digest())
    with pytest.raises(ObjectDamaged, match="its name is not a key ring's"):
        lab.ring().newest()


def test_a_ring_of_another_repository_is_refused(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Lab(MemoryStore(FakeClock()), tmp_path / "other")
    other.ring().rotate(other.unlock())
    raw = other.store.get(names.ring(other.id, 1), limit_bytes=2**20)
    lab.store.create(names.ring(lab.id, 1), raw, sha256=hashlib.sha256(raw).digest())
    with pytest.raises(ObjectDamaged, match="another ring than its name says"):
        lab.opened()


# Key files


def test_recover_brings_a_key_file_up_to_date_and_overwrites_nothing_else(lab: Lab) -> None:
    with pytest.raises(KeyFileExists):
        lab.host().recover(lab.opened())
    lab.ring().rotate(lab.unlock())
    assert lab.host().recover(lab.opened()) == lab.roots == lab.held
    with pytest.raises(KeyFileExists):
        lab.host().recover(lab.opened())
    lab.path.unlink()
    lab.host().recover(lab.opened())
    assert lab.held == lab.roots


@pytest.mark.parametrize("content", ["precious", f"drsync-root-key:{'00' * 32}\n", f"drsync-host-key:{'00' * 16}\n"])
def test_recover_leaves_a_file_alone_that_is_not_this_repositorys(content: str, lab: Lab) -> None:
    lab.ring().rotate(lab.unlock())
    lab.path.write_text(content)
    lab.path.chmod(0o600)
    with pytest.raises(KeyFileExists):
        lab.host().recover(lab.opened())
    assert lab.path.read_text() == content


def test_a_host_with_keys_of_some_vms_gets_the_newer_ones_of_these_and_no_others(lab: Lab, tmp_path: Path) -> None:
    host = tmp_path / "host-key"
    exported = lab.host().export(["web", "db"], host)
    assert read_key_file(host) == exported
    assert isinstance(exported, HostKeys)
    lab.ring().rotate(lab.unlock())
    found = lab.host(path=host).recover(lab.opened())
    assert found == lab.roots.of_vms(lab.id, ["web", "db"])
    assert read_key_file(host) == found
    with pytest.raises(KeyFileExists):
        lab.host(path=host).recover(lab.opened())


def test_rotate_on_a_host_with_keys_of_some_vms_leaves_it_with_those(lab: Lab, tmp_path: Path) -> None:
    host = tmp_path / "host-key"
    lab.host().export(["web"], host)
    assert lab.host(path=host).rotate(lab.unlock()).generation == 2
    assert read_key_file(host) == lab.roots.of_vms(lab.id, ["web"])


def test_rotate_where_there_is_no_key_file_writes_one(lab: Lab) -> None:
    lab.path.unlink()
    assert lab.host().rotate(lab.unlock()).made
    assert lab.held == lab.roots


def test_rotate_refuses_when_a_ring_was_lost(lab: Lab) -> None:
    """Else two keys of one generation would come to be, and what is under the lost one would be lost."""
    older = objects_of(lab.store)
    lab.host().rotate(lab.unlock())
    store = MemoryStore(FakeClock())
    for key, body in older.items():
        store.create(key, body, sha256=hashlib.sha256(body).digest())
    with pytest.raises(ObjectMissing, match=r"keys/ring-.*0001"):
        lab.host(store).rotate(lab.unlock(store))
    assert objects_of(store) == older


def test_rotate_refuses_another_repositorys_key_file(lab: Lab) -> None:
    lab.path.unlink()
    write_key_file(lab.path, RootKey.generate())
    with pytest.raises(WrongKey):
        lab.host().rotate(lab.unlock())
    assert lab.ring().newest() == NO_RING


def test_a_host_learns_of_a_rotation_without_any_secret_and_without_trusting_it(lab: Lab) -> None:
    record = read_record(lab.store)
    assert lab.host().newest_generation(record) == 1
    lab.ring().rotate(lab.unlock())
    assert lab.host().newest_generation(record) == 2
    lab.store.replace(names.ring(lab.id, 1), b"junk")
    for tail in ("ffff", "0", "x"):
        lab.store.replace(f"{names.generation_prefix(lab.id)}{tail}", b"junk")
    assert lab.host().newest_generation(record) == 256, "a false alarm, and nothing breaks"


def test_a_host_that_may_not_look_at_names_is_not_told(lab: Lab) -> None:
    record = read_record(lab.store)
    lab.ring().rotate(lab.unlock())
    denied = StoreDenied(url="x", operation="list", problem="y")
    fault = Fault("list", key="keys/generation", error=lambda: denied)
    with FaultyStore(lab.store, fault) as faulty:
        assert lab.host(faulty).newest_generation(record) == 1


def test_a_crash_before_hosts_are_told_is_made_up_for_by_the_next_rotate(lab: Lab) -> None:
    fault = Fault("create", key="keys/generation", error=Crash)
    with FaultyStore(lab.store, fault) as faulty, pytest.raises(Crash):
        lab.host(faulty).rotate(lab.unlock())
    record = read_record(lab.store)
    assert lab.host().newest_generation(record) == 1
    assert not lab.host().rotate(lab.unlock()).made
    assert lab.host().newest_generation(record) == 2
    assert lab.held == lab.roots
