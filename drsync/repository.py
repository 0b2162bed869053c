"""A repository: its record, its keys, and the objects of one VM in it.

A host's keys may be the root keys, which open everything, or those of some VMs (`Repository.holds`).
"""

import hashlib
import hmac
import secrets
from base64 import b64decode, b64encode
from functools import lru_cache

import msgspec

from drsync.errors import (
    KeyMissing,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    RepositoryExists,
    RepositoryMissing,
    RepositoryTooNew,
    StoreUnsafe,
    WrongKey,
    WrongRecoveryKey,
)
from drsync.format import FEATURES, FORMAT_VERSION, Malformed, names, seal
from drsync.format.keys import (
    FIRST_GENERATION,
    Keys,
    ObjectKeys,
    RecoveryKey,
    RootKey,
    RootKeys,
    VmKey,
    VmKeys,
    new_object_id,
)
from drsync.format.record import decode_record
from drsync.model import BLOCK_SIZE, Clock, is_name
from drsync.store import ObjectStore
from drsync.store.probe import create_in_a_race

_MAX_RECORD_BYTES = 64 * 1024
_NUMBERED = {"segment", "horizon", "pin"}
"""Kinds whose names are their numbers; those of others end with their object ids."""


class RepositoryRecord(msgspec.Struct, frozen=True, kw_only=True):
    """repo.json: what this repository is. Unknown fields are taken, unknown features are not."""

    format: int
    features: list[str]
    id: str
    block_size: int
    created: str
    key_check: str


class RecoverySlot(msgspec.Struct, frozen=True, kw_only=True):
    """keys/recovery-<id>.json: the root key, wrapped by the recovery key."""

    kind: str
    wrapped: str


class Repository:
    """An open repository: its key has been checked."""

    def __init__(
        self, store: ObjectStore, record: RepositoryRecord, keys: Keys | RootKey, key_path: object = "of this host"
    ) -> None:
        """`key_path` is where messages say that a key is missing."""
        self.store = store
        self.record = record
        self.id = bytes.fromhex(record.id)
        self._keys = _all_of(keys)
        self._key_path = key_path

    @property
    def tag(self) -> str:
        """Eight hex digits that tell this repository's bitmaps and nodes in QEMU from others'."""
        return self.record.id[:8]

    def vm(self, name: str) -> "VmObjects":
        """The part of the repository that belongs to the VM `name`, which may be empty yet.

        Raises:
            KeyMissing: this host has keys of other VMs only.
        """
        try:
            keys = self._keys.of_vm(self.id, name)
        except LookupError as err:
            held = self._keys.described
            raise KeyMissing(path=self._key_path, wanted=f"key of VM {name}", held=held, vm=name) from err
        return VmObjects(self.store, self.id, name, keys, self._key_path)

    def holds(self, vm: str) -> bool:
        """Whether there is a key of this VM here."""
        return isinstance(self._keys, RootKeys) or vm in self._keys.vms

    @property
    def generation(self) -> int:
        """The newest generation of keys that this host has."""
        return self._keys.newest

    def vm_names(self) -> list[str]:
        """The VMs that have objects here, whether configured on this host or not."""
        # Whoever can write here can make any other name; no VM has it.
        return [name for name in self.store.folders(names.VM_PREFIX) if is_name(name)]


class VmObjects:
    """The objects of one VM: reads their indexes and knows their keys. Safe to call from several threads."""

    def __init__(
        self,
        store: ObjectStore,
        repository_id: bytes,
        vm: str,
        keys: VmKeys | VmKey,
        key_path: object = "of this host",
    ) -> None:
        self.store = store
        self.repository_id = repository_id
        self.vm = vm
        self.keys = VmKeys((keys,)) if isinstance(keys, VmKey) else keys
        self._key_path = key_path
        self._writes_under = self.keys.newest
        self._keys_of = lru_cache(maxsize=4096)(self.keys.of_object)

    @property
    def generation(self) -> int:
        """That of the key which new objects are made under."""
        return self._writes_under

    @property
    def key(self) -> VmKey:
        """What new objects are made under."""
        return self.keys.of(self._writes_under)

    def under(self, generation: int) -> "VmObjects":
        """The same, making new objects under an older key: one that others, who have to read them, have."""
        other = VmObjects(self.store, self.repository_id, self.vm, self.keys, self._key_path)
        other._writes_under = min(generation, self.keys.newest)
        return other

    def through(self, store: ObjectStore) -> "VmObjects":
        """The same objects, read and written through `store`, which has the same ones but other limits."""
        other = VmObjects(store, self.repository_id, self.vm, self.keys, self._key_path)
        other._writes_under = self._writes_under
        return other

    def generation_of(self, name: str, kind: str) -> int:
        """The generation of the key that an object without a number is under; one read, if there are several.

        Raises:
            ObjectMissing, ObjectDamaged: it is not there, or not an object of this VM of that name.
        """
        if self.keys.newest == FIRST_GENERATION:
            return FIRST_GENERATION
        return self.read_index(name, kind).header.generation

    def keys_of(self, object_id: bytes, generation: int) -> ObjectKeys:
        """The keys of an object that is under the root key of a generation.

        Raises:
            KeyMissing: this host's keys are older.
        """
        try:
            return self._keys_of(object_id, generation)
        except LookupError as err:
            raise KeyMissing(
                path=self._key_path,
                wanted=f"key of generation {generation} of VM {self.vm}",
                held=f"those up to {self.keys.newest}",
                vm=self.vm,
            ) from err

    def new_header(self, kind: str, seq: int = 0, *, generation: int | None = None) -> seal.Header:
        """The header of an object that is about to be made; its id is new.

        It is under the newest key, unless others have to read it, who may have older ones (see `under`), or it
        stands in a log that goes on under an older one (F48).
        """
        return msgspec.convert(
            {
                "kind": kind,
                "repository": self.repository_id.hex(),
                "vm": self.vm,
                "object": new_object_id().hex(),
                "seq": seq,
                "generation": self._writes_under if generation is None else generation,
            },
            seal.Header,
        )

    def object_keys(self, header: seal.Header) -> ObjectKeys:
        return self.keys_of(bytes.fromhex(header.object), header.generation)

    def seal_alone(self, header: seal.Header, index: bytes) -> tuple[memoryview, seal.Sealed]:
        """An object that has an index and no frames; its bytes are the first `length` of the buffer.

        Raises:
            Malformed: it would be larger than a reader takes; nothing must be stored.
        """
        buffer = memoryview(bytearray(seal.FRAMES_START + seal.sealed_bound(len(index))))
        return buffer, seal.seal(buffer, seal.FRAMES_START, header, index, self.object_keys(header))

    def read_index(self, name: str, kind: str, *, seq: int = 0) -> seal.Opened:
        """The authenticated header and index of the object `name`, which must be a `kind` with number `seq`.

        Raises:
            ObjectMissing: it is not there.
            ObjectDamaged: it is not an object of this VM that belongs under this name.
            KeyMissing: it is under a newer key than this host has.
        """
        tail = self.store.get_tail(name, seal.TAIL_BYTES)
        try:
            footer = seal.parse_footer(tail.data, tail.object_size_bytes)
            data = tail.data
            if footer.tail_length > len(data):
                start = tail.object_size_bytes - footer.tail_length
                data = self.store.get_range(name, start, footer.tail_length)
            return self._open(name, kind, seq, data, footer)
        except Malformed as err:
            raise ObjectDamaged(key=name, problem=err) from err

    def open_whole(self, name: str, kind: str, data: bytes, *, seq: int = 0) -> seal.Opened:
        """As `read_index`, of an object that was read as a whole; its SHA-256 is checked too.

        Raises:
            ObjectDamaged: it is not an object of this VM that belongs under this name.
        """
        try:
            footer = seal.parse_footer(data, len(data))
            seal.check_unkeyed(data, footer)
            return self._open(name, kind, seq, data, footer)
        except Malformed as err:
            raise ObjectDamaged(key=name, problem=err) from err

    def open_end(self, name: str, kind: str, data: bytes, *, seq: int = 0) -> seal.Opened:
        """As `read_index`, of an object that was read as a whole: what else may be wrong with it is not looked at.

        Raises:
            ObjectDamaged: it is not an object of this VM that belongs under this name.
        """
        try:
            return self._open(name, kind, seq, data, seal.parse_footer(data, len(data)))
        except Malformed as err:
            raise ObjectDamaged(key=name, problem=err) from err

    def _open(self, name: str, kind: str, seq: int, data: bytes, footer: seal.Footer) -> seal.Opened:
        claimed = seal.header_of(data, footer)
        expected = (kind, self.repository_id.hex(), self.vm, seq)
        if (claimed.kind, claimed.repository, claimed.vm, claimed.seq) != expected:
            raise Malformed(f"it is {claimed.kind} {claimed.seq} of VM {claimed.vm!r}, not what its name says")
        if kind not in _NUMBERED and not name.endswith(claimed.object):
            raise Malformed("it is another object than its name says")
        return seal.open_index(data, footer, self.object_keys(claimed))


def create_repository(
    store: ObjectStore, root: RootKey, clock: Clock, *, bare_store: ObjectStore | None = None
) -> RecoveryKey:
    """Make a repository in an empty place; the recovery key is nowhere else but in what this returns.

    The recovery slot is written first and repo.json last, so that there is
    never a repository that its recovery key does not open. With `bare_store`, the
    same store without retries, several threads race to write the slot: there are
    stores that keep what is there, yet let two writers of the same moment both win.

    Raises:
        RepositoryExists: there is one already; nothing was changed.
        StoreUnsafe: the store overwrites what it was told only to create.
    """
    if find_record(store) is not None:
        raise RepositoryExists(url=store.url)
    identifier = secrets.token_bytes(16)
    recovery = RecoveryKey.generate()
    slot = RecoverySlot(kind="recovery", wrapped=b64encode(recovery.wrap(root, identifier)).decode())
    record = RepositoryRecord(
        format=FORMAT_VERSION,
        features=[],
        id=identifier.hex(),
        block_size=BLOCK_SIZE,
        created=clock.now().isoformat(),
        key_check=root.check(identifier).hex(),
    )
    _create_slot(store, bare_store, names.recovery_slot(identifier), slot)
    _probe(store, names.recovery_slot(identifier))
    try:
        _create(store, names.REPOSITORY, record)
    except ObjectExists as err:
        raise RepositoryExists(url=store.url) from err
    return recovery


def _create_slot(store: ObjectStore, bare_store: ObjectStore | None, name: str, slot: RecoverySlot) -> None:
    if bare_store is None:
        _create(store, name, slot)
        return
    body = msgspec.json.encode(slot)
    create_in_a_race(bare_store, name, body, hashlib.sha256(body).digest())


def _probe(store: ObjectStore, taken: str) -> None:
    """Find out, before there is a repository, whether the store keeps what is there: everything stands on that."""
    body = b"whoever reads this has a store that overwrites"
    try:
        store.create(taken, body, sha256=hashlib.sha256(body).digest())
    except ObjectExists:
        return
    raise StoreUnsafe(url=store.url)


def _create(store: ObjectStore, name: str, record: msgspec.Struct) -> None:
    body = msgspec.json.encode(record)
    store.create(name, body, sha256=hashlib.sha256(body).digest())


def open_repository(store: ObjectStore, keys: Keys | RootKey, key_path: object) -> Repository:
    """The repository in `store`, if `keys` are its keys, or those of VMs in it.

    Raises:
        RepositoryMissing, RepositoryTooNew: it can't be used.
        WrongKey: they are another repository's; `key_path` is named in the message.
    """
    record = read_record(store)
    if not is_key_of(_all_of(keys), record):
        raise WrongKey(path=key_path, url=store.url)
    return Repository(store, record, keys, key_path)


def _all_of(keys: Keys | RootKey) -> Keys:
    """The only root key that there is counts as all of them."""
    return RootKeys((keys,)) if isinstance(keys, RootKey) else keys


def is_key_of(keys: Keys, record: RepositoryRecord) -> bool:
    """Whether these are a repository's keys, as its record tells; keys of VMs say themselves whose they are."""
    identifier = bytes.fromhex(record.id)
    if isinstance(keys, RootKeys):
        return hmac.compare_digest(keys.generations[0].check(identifier).hex(), record.key_check)
    return keys.repository_id == identifier


def recover_root_key(store: ObjectStore, recovery: RecoveryKey) -> RootKey:
    """The root key of a repository whose keys were never changed, from its recovery slot (keyring.py for all others).

    Raises:
        WrongRecoveryKey: `recovery` is not this repository's.
    """
    record, what = read_record(store), "recovery key"
    identifier = bytes.fromhex(record.id)
    try:
        raw = store.get(names.recovery_slot(identifier), limit_bytes=_MAX_RECORD_BYTES)
        root = recovery.unwrap(b64decode(decode_record(raw, RecoverySlot).wrapped), identifier)
    except ValueError as err:  # Malformed is one, and base64's complaint
        raise WrongRecoveryKey(what=what, url=store.url, problem=err) from err
    if not hmac.compare_digest(root.check(identifier).hex(), record.key_check):
        raise WrongRecoveryKey(what=what, url=store.url, problem="it opens a slot of another repository")
    return root


def read_record(store: ObjectStore) -> RepositoryRecord:
    """What repo.json says, if this drsync can work with it.

    Raises:
        RepositoryMissing: there is none.
        RepositoryTooNew: it needs a newer drsync.
        ObjectDamaged: it is not a repository's record.
    """
    record = find_record(store)
    if record is None:
        raise RepositoryMissing(url=store.url)
    if record.format > FORMAT_VERSION:
        raise RepositoryTooNew(url=store.url, needed=f"format {record.format}")
    unknown = sorted(set(record.features) - FEATURES)
    if unknown or record.block_size != BLOCK_SIZE:
        raise RepositoryTooNew(url=store.url, needed=", ".join(unknown) or f"blocks of {record.block_size} bytes")
    return record


def find_record(store: ObjectStore) -> RepositoryRecord | None:
    """repo.json, or None if there is none.

    Raises:
        ObjectDamaged: it is not a repository's record.
    """
    try:
        raw = store.get(names.REPOSITORY, limit_bytes=_MAX_RECORD_BYTES)
    except ObjectMissing:
        return None
    try:
        record = decode_record(raw, RepositoryRecord)
        if len(bytes.fromhex(record.id)) != 16 or len(bytes.fromhex(record.key_check)) != 16 or record.format < 1:
            raise Malformed("it breaks a rule of docs/format.md")
    except ValueError as err:  # Malformed is one, and what fromhex raises
        raise ObjectDamaged(key=names.REPOSITORY, problem="it is not a repository's record") from err
    return record
