"""A repository's key ring: opened by a slot, changed by writing the next ring.

    keys/recovery-<id>       the root key of generation 1: all there is until the keys are changed for the first time
    keys/ring-<id>-1, 2, …   all root keys and all slots; the highest number counts

    keys/generation-<id>-2, … tell hosts of later root keys, who may see names there and read nothing

Like the log, rings are numbered and created, never overwritten: one create is the whole change, and of two that
change the keys at once, one wins. The other one opens what the winner made, and does its change to that.
"""

import hashlib
from base64 import b64decode
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from drsync.errors import (
    KmsUnusable,
    ObjectDamaged,
    ObjectExists,
    SlotExists,
    SlotNeeded,
    UnknownSlot,
    WrongRecoveryKey,
)
from drsync.format import Malformed, names
from drsync.format.keys import FIRST_GENERATION, KEY_BYTES, MAX_GENERATIONS, RecoveryKey, RootKeys
from drsync.format.ring import (
    KMS,
    MAX_RING_BYTES,
    MAX_SLOTS,
    PASSPHRASE,
    RECOVERY,
    Ring,
    RingSecret,
    ScryptCost,
    Slot,
    decode_ring,
    encode_ring,
    open_ring,
    open_with_secret,
    personal_slot,
)
from drsync.model import Clock
from drsync.repository import RepositoryRecord, recover_root_key
from drsync.store import ObjectStore

NO_RING: Final = 0
_TRIES: Final = 8
_KINDS: Final = frozenset({RECOVERY, PASSPHRASE, KMS})


class KeyService(Protocol):
    """Wraps and unwraps 32 bytes without giving its key away: AWS KMS, or its twin in tests."""

    def wrap(self, slot: Slot, plain: bytes, context: dict[str, str]) -> bytes:
        """`plain`, encrypted under the slot's key; only the same `context` opens it.

        Raises:
            KmsUnusable: denied, no such key, or nobody answers.
        """
        ...

    def unwrap(self, slot: Slot, wrapped: bytes, context: dict[str, str]) -> bytes:
        """What was wrapped.

        Raises:
            KmsUnusable: denied, the key is deleted or disabled, it was wrapped by another key, or nobody answers.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRing:
    """A ring that somebody had a slot's secret for."""

    number: int
    """NO_RING: the repository has none yet; this is what the first one begins with."""
    slots: Sequence[Slot]
    secret: RingSecret

    @property
    def roots(self) -> RootKeys:
        return self.secret.roots

    def slot(self, name: str) -> Slot:
        """The slot of this name.

        Raises:
            UnknownSlot: there is none.
        """
        for slot in self.slots:
            if slot.name == name:
                return slot
        raise UnknownSlot(slot=name, use="to remove", known=described(self.slots))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """What a rotation came to."""

    ring: OpenRing
    by_other: bool
    """Another rotation of the same moment was first: its key is the new one, and no second one was made."""


Unlock = Callable[[], OpenRing]
"""Opens the newest ring; called again if somebody else has changed it meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    number: int
    raw: bytes
    ring: Ring


def described(slots: Sequence[Slot]) -> str:
    """Which slots there are, for a message."""
    return ", ".join(f"{s.name} ({s.kind})" if s.name != s.kind else s.name for s in slots)


class Keyring:
    """The key ring of one repository."""

    def __init__(
        self,
        store: ObjectStore,
        record: RepositoryRecord,
        clock: Clock,
        open_kms: Callable[[], KeyService],
        *,
        new_cost: Callable[[], ScryptCost] = ScryptCost.new,
    ) -> None:
        """`new_cost` says how much a guess of a new slot's passphrase shall cost."""
        self._store = store
        self._record = record
        self._id = bytes.fromhex(record.id)
        self._clock = clock
        self._open_kms = open_kms
        self._new_cost = new_cost

    def newest(self) -> int:
        """The number of the newest ring, or NO_RING.

        Raises:
            ObjectDamaged: something among the rings is none.
        """
        newest = NO_RING
        for info in self._store.list(names.ring_prefix(self._id)):
            try:
                newest = max(newest, names.number_of_ring(info.key))
            except Malformed as err:
                raise ObjectDamaged(key=info.key, problem=err) from err
        return newest

    def told(self) -> tuple[Sequence[Slot], Sequence[str], int]:
        """Slots, checks of the root keys, and number of the newest ring, as it says in the clear.

        Nobody vouches for them: whoever can write the bucket could have made it.
        """
        stored = self._stored(None)
        if stored is None:
            return [Slot(name=RECOVERY, kind=RECOVERY, added=self._record.created)], [self._record.key_check], NO_RING
        return stored.ring.slots, stored.ring.checks, stored.number

    def announced(self) -> int:
        """The newest generation of root keys that hosts were told of; names are listed, and nothing is read.

        Nobody vouches for it, so it is good for a warning and nothing else.
        """
        newest = FIRST_GENERATION
        for info in self._store.list(names.generation_prefix(self._id)):
            with suppress(Malformed):  # whoever put it there
                newest = max(newest, names.generation_told(info.key))
        return min(newest, MAX_GENERATIONS)

    def open_with_recovery(self, recovery: RecoveryKey, *, number: int | None = None) -> OpenRing:
        """The newest ring, or ring `number`, by a recovery key.

        Raises:
            WrongRecoveryKey: no slot of it takes this key.
            ObjectDamaged: the ring is not as it was written.
        """
        stored = self._stored(number)
        if stored is None:
            roots = RootKeys((recover_root_key(self._store, recovery),))
            secret = RingSecret.first(roots)
            slot = self._personal(RECOVERY, RECOVERY, recovery.secret, secret, added=self._record.created)
            return OpenRing(number=NO_RING, slots=[slot], secret=secret)
        for slot in stored.ring.slots:
            if slot.kind == RECOVERY and (opened := self._by_secret(stored, slot, recovery.secret)) is not None:
                return opened
        raise self._wrong("recovery key", stored)

    def open_with_passphrase(self, passphrase: str, *, number: int | None = None) -> OpenRing:
        """The newest ring, or ring `number`, by the passphrase of one of its slots; 0.4 s and 128 MiB for each.

        Raises:
            WrongRecoveryKey: no slot of it takes this passphrase.
            ObjectDamaged: the ring is not as it was written.
        """
        stored = self._stored(number)
        if stored is None:
            raise UnknownSlot(slot="that takes a passphrase", use="yet", known=RECOVERY)
        for slot in stored.ring.slots:
            if slot.kind == PASSPHRASE and slot.scrypt is not None:
                try:
                    secret = slot.scrypt.secret_of(passphrase)
                except Malformed as err:
                    raise self._damaged(stored.number, err) from err
                if (opened := self._by_secret(stored, slot, secret)) is not None:
                    return opened
        raise self._wrong("passphrase", stored)

    def open_with_kms(self, name: str | None = None, *, number: int | None = None) -> OpenRing:
        """The newest ring, or ring `number`, by its KMS slot `name`, or else by the first that KMS opens.

        Raises:
            KmsUnusable: KMS opens none of them; the error is of the last one that was tried.
            UnknownSlot: there is none.
            ObjectDamaged: the ring is not as it was written.
        """
        stored = self._stored(number)
        slots = [] if stored is None else [s for s in stored.ring.slots if s.kind == KMS and name in {None, s.name}]
        if stored is None or not slots:
            known = RECOVERY if stored is None else described(stored.ring.slots)
            raise UnknownSlot(slot=name or "of KMS", use="that KMS opens" if name else "", known=known)
        for slot in slots:
            try:
                return self._by_kms(stored, slot)
            except KmsUnusable:
                if slot is slots[-1]:
                    raise
        raise UnknownSlot(slot=name, use="that KMS opens", known=described(stored.ring.slots))

    def add_recovery(self, unlock: Unlock, name: str, *, dry_run: bool = False) -> tuple[RecoveryKey, OpenRing]:
        """A recovery slot more; its key, which is nowhere else, and the ring that has it.

        Raises:
            SlotExists: the name is taken, or there are as many slots as there can be.
        """
        recovery = RecoveryKey.generate()
        ring = self._add(
            unlock, name, lambda ring: self._personal(name, RECOVERY, recovery.secret, ring.secret), dry_run
        )
        return recovery, ring

    def add_passphrase(self, unlock: Unlock, name: str, passphrase: str, *, dry_run: bool = False) -> OpenRing:
        """A slot that takes a passphrase; the ring that has it.

        Raises:
            SlotExists: the name is taken, or there are as many slots as there can be.
        """
        cost = self._new_cost()
        secret = cost.secret_of(passphrase)
        return self._add(
            unlock, name, lambda ring: self._personal(name, PASSPHRASE, secret, ring.secret, scrypt=cost), dry_run
        )

    def add_kms(self, unlock: Unlock, name: str, key: str, region: str, *, dry_run: bool = False) -> OpenRing:
        """A slot that KMS opens, by the key of this ARN; the ring that has it.

        Raises:
            SlotExists: the name is taken, or there are as many slots as there can be.
            KmsUnusable: KMS does not encrypt and decrypt with that key.
        """
        slot = Slot(name=name, kind=KMS, added=self._now(), key=key, region=region)
        kms, probe = self._open_kms(), bytes(KEY_BYTES)
        kms.unwrap(slot, kms.wrap(slot, probe, self._context()), self._context())
        return self._add(unlock, name, lambda _: slot, dry_run)

    def remove(self, unlock: Unlock, name: str, *, dry_run: bool = False) -> OpenRing:
        """Leave a slot out of all rings from now on.

        Raises:
            UnknownSlot: there is none of this name.
            SlotNeeded: it is the last recovery slot.
        """

        def without(ring: OpenRing) -> OpenRing:
            removed = ring.slot(name)
            rest = [slot for slot in ring.slots if slot is not removed]
            if not any(slot.kind == RECOVERY for slot in rest):
                raise SlotNeeded(slot=name)
            return OpenRing(number=ring.number, slots=rest, secret=ring.secret)

        return self._change(unlock, without, dry_run=dry_run)

    def rotate(self, unlock: Unlock, *, dry_run: bool = False) -> Rotation:
        """A new root key, for all objects that are made from now on.

        Raises:
            KmsUnusable: there is a slot of KMS, which does not wrap the new ring; nothing was changed.
        """
        seen: list[int] = []

        def rotated(ring: OpenRing) -> OpenRing:
            seen.append(ring.roots.newest)
            if seen[-1] > seen[0]:
                raise _RotatedByOther(ring)
            return OpenRing(number=ring.number, slots=ring.slots, secret=ring.secret.rotated())

        try:
            return Rotation(ring=self._change(unlock, rotated, dry_run=dry_run), by_other=False)
        except _RotatedByOther as other:
            return Rotation(ring=other.ring, by_other=True)

    def _add(self, unlock: Unlock, name: str, make: Callable[[OpenRing], Slot], dry_run: bool) -> OpenRing:
        def with_slot(ring: OpenRing) -> OpenRing:
            if any(slot.name == name for slot in ring.slots):
                raise SlotExists(slot=name, problem="there is one of that name")
            if len(ring.slots) >= MAX_SLOTS:
                raise SlotExists(slot=name, problem=f"there are {len(ring.slots)}, and no more can be")
            return OpenRing(number=ring.number, slots=[*ring.slots, make(ring)], secret=ring.secret)

        return self._change(unlock, with_slot, dry_run=dry_run)

    def _change(self, unlock: Unlock, change: Callable[[OpenRing], OpenRing], *, dry_run: bool) -> OpenRing:
        """Do a change to the newest ring, and store what it comes to as the next one."""
        for left in reversed(range(_TRIES)):
            changed = change(unlock())
            if dry_run:
                return changed
            number = changed.number + 1
            try:
                self._create(number, changed)
            except ObjectExists:  # somebody else was first: their ring is what the change is to be done to
                if not left:
                    raise
            else:
                self.announce(changed.roots.newest)
                return OpenRing(number=number, slots=changed.slots, secret=changed.secret)
        raise AssertionError("unreachable")

    def announce(self, generation: int) -> None:
        """Tell hosts, who can't read rings, that there is a root key of this generation, unless they were told."""
        if generation == FIRST_GENERATION:
            return
        body = msgspec.json.encode({"generation": generation})
        with suppress(ObjectExists):
            self._store.create(names.generation(self._id, generation), body, sha256=hashlib.sha256(body).digest())

    def _create(self, number: int, ring: OpenRing) -> None:
        name = names.ring(self._id, number)
        unknown = [slot.name for slot in ring.slots if slot.kind not in _KINDS]
        try:
            if unknown:
                raise Malformed(f"slot {unknown[0]} is of a kind that only a newer drsync can keep")
            raw = encode_ring(self._id, number, ring.secret, ring.slots, self._wrap)
        except Malformed as err:
            raise ObjectDamaged(key=name, problem=err) from err
        self._store.create(name, raw, sha256=hashlib.sha256(raw).digest())

    def _wrap(self, slot: Slot, ring_key: bytes) -> bytes:
        return self._open_kms().wrap(slot, ring_key, self._context())

    def _context(self) -> dict[str, str]:
        return {"drsync:repository": self._record.id}

    def _stored(self, number: int | None) -> _Stored | None:
        """Ring `number`, or the newest one; None if that is NO_RING."""
        number = self.newest() if number is None else number
        if number == NO_RING:
            return None
        name = names.ring(self._id, number)
        raw = self._store.get(name, limit_bytes=MAX_RING_BYTES)
        try:
            return _Stored(number=number, raw=raw, ring=decode_ring(raw, self._id, number))
        except Malformed as err:
            raise ObjectDamaged(key=name, problem=err) from err

    def _by_secret(self, stored: _Stored, slot: Slot, secret: bytes) -> OpenRing | None:
        try:
            opened = open_with_secret(stored.raw, stored.ring, slot, secret)
        except Malformed as err:
            raise self._damaged(stored.number, err) from err
        return None if opened is None else self._checked(stored, opened)

    def _by_kms(self, stored: _Stored, slot: Slot) -> OpenRing:
        try:
            wrapped = b64decode(slot.wrapped, validate=True)
            ring_key = self._open_kms().unwrap(slot, wrapped, self._context())
            return self._checked(stored, open_ring(stored.raw, stored.ring, ring_key))
        except ValueError as err:  # Malformed is one, and base64's complaint
            raise self._damaged(stored.number, err) from err

    def _checked(self, stored: _Stored, secret: RingSecret) -> OpenRing:
        """An opened ring, if its first root key is the one that the repository was made with (F5)."""
        if stored.ring.checks[0] != self._record.key_check:
            raise self._damaged(stored.number, "its first root key is not this repository's")
        return OpenRing(number=stored.number, slots=stored.ring.slots, secret=secret)

    def _personal(
        self,
        name: str,
        kind: str,
        secret: bytes,
        ring: RingSecret,
        *,
        added: str = "",
        scrypt: ScryptCost | None = None,
    ) -> Slot:
        return personal_slot(name, kind, secret, self._id, ring.authority, added=added or self._now(), scrypt=scrypt)

    def _now(self) -> str:
        return self._clock.now().isoformat()

    def _wrong(self, what: str, stored: _Stored) -> WrongRecoveryKey:
        older = f"; ring {stored.number - 1} may: --ring {stored.number - 1}"
        problem = f"no slot of ring {stored.number} takes it, which has {described(stored.ring.slots)}{older}"
        return WrongRecoveryKey(what=what, url=self._store.url, problem=problem)

    def _damaged(self, number: int, problem: object) -> ObjectDamaged:
        return ObjectDamaged(key=names.ring(self._id, number), problem=problem)


class _RotatedByOther(Exception):
    """Somebody else has rotated since we looked."""

    def __init__(self, ring: OpenRing) -> None:
        self.ring = ring
        super().__init__()
