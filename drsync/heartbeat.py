"""A host's heartbeat: when each of its VMs was last seen to be what its newest point shows.

An idle VM gets no new points; its lag is reckoned from the heartbeat. It also
says which point was committed last, so that a log that lost its newest points
is noticed. Entries are sealed with the VM's key: whoever can write the bucket
can't make a VM look protected that is not.
"""

import secrets
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from drsync.errors import ObjectDamaged, ObjectMissing
from drsync.format import Malformed, names
from drsync.format.keys import FIRST_GENERATION
from drsync.format.record import decode_record
from drsync.repository import Repository, VmObjects

_MAX_BYTES = 16 * 1024 * 1024
_MAX_HOSTS = 10_000
_NONCE_BYTES = 12


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a host knows of one VM."""

    seq: int
    """The newest segment."""
    checked_at: datetime
    """When the VM was last seen to be what the newest point shows."""


class _Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    host: str
    vms: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeats:
    """The newest that any host says of each VM."""

    seen: Mapping[str, Seen]

    def of(self, vm: str) -> Seen | None:
        return self.seen.get(vm)


def write_heartbeat(repository: Repository, host: str, seen: Mapping[str, Seen]) -> None:
    """Overwrite this host's heartbeat."""
    sealed = {vm: _seal(repository.vm(vm), entry) for vm, entry in seen.items()}
    body = msgspec.json.encode(_Heartbeat(format=1, host=host, vms=sealed))
    repository.store.replace(names.heartbeat(host), body)


def read_heartbeats(repository: Repository) -> Heartbeats:
    """What all hosts say; an entry that does not authenticate counts as not there."""
    newest: dict[str, tuple[int, Seen]] = {}
    for number, info in enumerate(repository.store.list(names.HEARTBEAT_PREFIX)):
        if number >= _MAX_HOSTS:
            break
        for vm, generation, entry in _entries(repository, info.key):
            known = newest.get(vm)
            if known is None or _rank(generation, entry) > _rank(*known):
                newest[vm] = generation, entry
    return Heartbeats(seen={vm: entry for vm, (_, entry) in newest.items()})


def _rank(generation: int, entry: Seen) -> tuple[int, int, datetime]:
    """What is under a newer key counts more: who has stolen an older one can't outdo it."""
    return generation, entry.seq, entry.checked_at


def _entries(repository: Repository, key: str) -> list[tuple[str, int, Seen]]:
    try:
        heartbeat = decode_record(repository.store.get(key, limit_bytes=_MAX_BYTES), _Heartbeat)
    except (Malformed, ObjectMissing, ObjectDamaged):  # not a heartbeat, gone, or too large to be one
        return []
    mine = [(repository.vm(vm), text) for vm, text in heartbeat.vms.items() if repository.holds(vm)]
    opened = [(objects.vm, *_open(objects, text)) for objects, text in mine]
    return [(vm, generation, entry) for vm, generation, entry in opened if entry is not None]


def _binding(objects: VmObjects) -> bytes:
    return b"drsync heartbeat\0" + objects.repository_id + objects.vm.encode()


def _seal(objects: VmObjects, entry: Seen) -> str:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    cipher = AESGCM(objects.key.of_heartbeat())
    sealed = b64encode(nonce + cipher.encrypt(nonce, msgspec.json.encode(entry), _binding(objects))).decode()
    generation = objects.generation
    return sealed if generation == FIRST_GENERATION else f"{generation}:{sealed}"


def _open(objects: VmObjects, text: str) -> tuple[int, Seen | None]:
    """The generation of the key that an entry is under, and the entry; None if it does not authenticate."""
    number, colon, sealed = text.rpartition(":")
    try:
        generation = int(number) if colon else FIRST_GENERATION
        raw = b64decode(sealed)
        cipher = AESGCM(objects.keys.of(generation).of_heartbeat())
        plain = cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], _binding(objects))
        entry = decode_record(plain, Seen)
    except (InvalidTag, ValueError, LookupError):  # Malformed is a ValueError; a key that is not here a LookupError
        return FIRST_GENERATION, None
    return generation, (
        entry
        if entry.checked_at.tzinfo is not None
        else msgspec.structs.replace(entry, checked_at=entry.checked_at.replace(tzinfo=UTC))
    )
