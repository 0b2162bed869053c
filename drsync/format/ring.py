"""The key ring: all root keys of a repository, and the slots that open it (docs/format.md, "Key ring").

    slot: recovery key, passphrase ──HPKE──▶ ring key ──AES-GCM──▶ authority, root keys of all generations
    slot: KMS ───────────────────────────────┘

Each ring has a key of its own. A slot of a person has a public key, so that a new ring can be wrapped for it by who
does not have its secret: a rotation needs one slot's secret, not all of them. Whoever writes to the bucket knows the
public keys, too; but not the authority, which all rings have, and which each slot's proof binds to its secret.
"""

import secrets
import unicodedata
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from drsync.format import Malformed
from drsync.format.keys import KEY_BYTES, MAX_GENERATIONS, RootKey, RootKeys, derive
from drsync.format.record import decode_record
from drsync.model import is_name

RING_FORMAT: Final = 1
MAX_RING_BYTES: Final = 128 * 1024
MAX_SLOTS: Final = 32
RECOVERY: Final = "recovery"
PASSPHRASE: Final = "passphrase"  # noqa: S105  the name of a kind
KMS: Final = "kms"
MIN_PASSPHRASE: Final = 12
"""Characters. scrypt makes each guess cost 0.4 s and 128 MiB; what is shorter is guessed nevertheless."""
_MAX_LOG2_N: Final = 20
_MAX_R: Final = 16
_MAX_P: Final = 4
_MAX_SCRYPT_BYTES: Final = 1 << 30
_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_RING_NONCE: Final = bytes(12)  # a ring key seals exactly one ring


class ScryptCost(msgspec.Struct, frozen=True, kw_only=True):
    """How a passphrase becomes a secret (RFC 7914)."""

    salt: str
    log2_n: int = 17
    r: int = 8
    p: int = 1

    @classmethod
    def new(cls) -> "ScryptCost":
        return cls(salt=secrets.token_hex(16))

    def secret_of(self, passphrase: str) -> bytes:
        """The secret of a slot.

        Raises:
            Malformed: it would take more than a gibibyte, or be no work at all; nothing was tried.
        """
        in_bounds = 10 <= self.log2_n <= _MAX_LOG2_N and 1 <= self.r <= _MAX_R and 1 <= self.p <= _MAX_P
        salt = unhex(self.salt, 16)
        if not in_bounds or 128 * self.r << self.log2_n > _MAX_SCRYPT_BYTES:
            raise Malformed("its scrypt takes more or less than any slot's may")
        text = unicodedata.normalize("NFC", passphrase).encode()
        return Scrypt(salt=salt, length=KEY_BYTES, n=1 << self.log2_n, r=self.r, p=self.p).derive(text)


class Slot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One way to open the ring, as it is in the clear. Fields and kinds that are not known are passed over."""

    name: str
    kind: str
    added: str
    wrapped: str = ""
    """The ring key: by HPKE for `public`, or by KMS. Base64."""
    public: str = ""
    """X25519, hex. Not of a KMS slot."""
    proof: str = ""
    """What only who has the slot's secret could make of the authority. Not of a KMS slot."""
    scrypt: ScryptCost | None = None
    """Of a passphrase."""
    key: str = ""
    """The ARN of the KMS key."""
    region: str = ""


class Ring(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of a ring: what is in the clear, and authenticated by the second one."""

    format: int
    repository: str
    number: int
    checks: list[str]
    """Of each root key, the oldest first: tells which generation a host has, and whether it is the right one."""
    slots: list[Slot]


class _Sealed(msgspec.Struct, frozen=True, kw_only=True):
    authority: str
    roots: list[str]


@dataclass(frozen=True, slots=True)
class RingSecret:
    """What a ring keeps; never shown."""

    authority: bytes = field(repr=False)
    roots: RootKeys

    @classmethod
    def first(cls, roots: RootKeys) -> "RingSecret":
        return cls(secrets.token_bytes(KEY_BYTES), roots)

    def rotated(self) -> "RingSecret":
        """With a root key more."""
        return RingSecret(self.authority, RootKeys((*self.roots.generations, RootKey.generate())))


def personal_slot(
    name: str,
    kind: str,
    secret: bytes,
    repository_id: bytes,
    authority: bytes,
    *,
    added: str,
    scrypt: ScryptCost | None = None,
) -> Slot:
    """A slot whose secret somebody has; what it wraps comes with the ring."""
    public = _private_key(secret, repository_id).public_key().public_bytes_raw()
    proof = _proof(secret, repository_id, authority)
    return Slot(name=name, kind=kind, added=added, public=public.hex(), proof=proof.hex(), scrypt=scrypt)


def encode_ring(
    repository_id: bytes,
    number: int,
    secret: RingSecret,
    slots: Sequence[Slot],
    wrap_by_kms: Callable[[Slot, bytes], bytes],
) -> bytes:
    """A new ring, with a key of its own that is wrapped for each of `slots`.

    Raises:
        Malformed: a slot's public key is none, or there is more than a ring takes; nothing must be stored.
    """
    ring_key = secrets.token_bytes(KEY_BYTES)
    wrapped = [
        msgspec.structs.replace(
            slot, wrapped=b64encode(_wrap(slot, ring_key, repository_id, number, wrap_by_kms)).decode()
        )
        for slot in slots
    ]
    ring = Ring(
        format=RING_FORMAT,
        repository=repository_id.hex(),
        number=number,
        checks=secret.roots.checks(repository_id),
        slots=wrapped,
    )
    clear = msgspec.json.encode(ring)
    plain = _Sealed(authority=secret.authority.hex(), roots=[root.secret.hex() for root in secret.roots.generations])
    sealed = _cipher(ring_key, repository_id).encrypt(_RING_NONCE, msgspec.json.encode(plain), clear)
    raw = clear + b"\n" + b64encode(sealed) + b"\n"
    if len(slots) > MAX_SLOTS or secret.roots.newest > MAX_GENERATIONS or len(raw) > MAX_RING_BYTES:
        raise Malformed(f"{len(slots)} slots and {secret.roots.newest} root keys are more than a key ring takes")
    return raw


def decode_ring(raw: bytes, repository_id: bytes, number: int) -> Ring:
    """What a ring says in the clear; nothing of it is authenticated before `open_ring`.

    Raises:
        Malformed: it is not this repository's ring of this number, or breaks a rule of docs/format.md.
    """
    ring = decode_record(raw.partition(b"\n")[0], Ring)
    if not 1 <= ring.format <= RING_FORMAT:
        raise Malformed(f"its format {ring.format} is not one that this drsync knows")
    if (ring.repository, ring.number) != (repository_id.hex(), number):
        raise Malformed("it is another ring than its name says")
    if not 1 <= len(ring.checks) <= MAX_GENERATIONS or not 1 <= len(ring.slots) <= MAX_SLOTS:
        raise Malformed("it has no root key or no slot, or too many")
    for check in ring.checks:
        unhex(check, 16)
    if not all(is_name(slot.name) for slot in ring.slots) or len({s.name for s in ring.slots}) != len(ring.slots):
        raise Malformed("a slot has a name that none has, or two have one")
    return ring


def open_ring(raw: bytes, ring: Ring, ring_key: bytes) -> RingSecret:
    """What a ring keeps.

    Raises:
        Malformed: it was changed, or its parts do not fit each other.
    """
    clear, _, rest = raw.partition(b"\n")
    repository_id = bytes.fromhex(ring.repository)
    try:
        plain = _cipher(ring_key, repository_id).decrypt(_RING_NONCE, b64decode(rest.strip(), validate=True), clear)
    except (InvalidTag, ValueError) as err:
        raise Malformed("it was changed") from err
    sealed = decode_record(plain, _Sealed)
    if not 1 <= len(sealed.roots) <= MAX_GENERATIONS:
        raise Malformed("it has no root key, or too many")
    roots = RootKeys(tuple(RootKey(unhex(root, KEY_BYTES)) for root in sealed.roots))
    if roots.checks(repository_id) != ring.checks:
        raise Malformed("its root keys are not those that it tells of")
    return RingSecret(unhex(sealed.authority, KEY_BYTES), roots)


def open_with_secret(raw: bytes, ring: Ring, slot: Slot, secret: bytes) -> RingSecret | None:
    """What a ring keeps, by the secret of a slot; None if it is not this slot's.

    Raises:
        Malformed: the secret is the slot's, but the ring was changed, or made by somebody who had no slot of it.
    """
    repository_id = bytes.fromhex(ring.repository)
    private = _private_key(secret, repository_id)
    if private.public_key().public_bytes_raw().hex() != slot.public:
        return None
    try:
        wrapped = b64decode(slot.wrapped, validate=True)
        ring_key = _SUITE.decrypt(wrapped, private, info=_info(slot, repository_id, ring.number))
    except (InvalidTag, ValueError) as err:
        raise Malformed(f"what it has for slot {slot.name} was changed") from err
    opened = open_ring(raw, ring, ring_key)
    if not compare_digest(_proof(secret, repository_id, opened.authority).hex().encode(), slot.proof.encode()):
        raise Malformed(f"it was made by somebody who had none of its slots: slot {slot.name} does not vouch for it")
    return opened


def unhex(digits: str, length: int) -> bytes:
    """The bytes in a text.

    Raises:
        Malformed: they are not so many.
    """
    try:
        raw = bytes.fromhex(digits)
    except ValueError as err:
        raise Malformed("it has a value that is not in hex") from err
    if len(raw) != length:
        raise Malformed(f"it has a value of {len(raw)} bytes instead of {length}")
    return raw


def _wrap(
    slot: Slot, ring_key: bytes, repository_id: bytes, number: int, wrap_by_kms: Callable[[Slot, bytes], bytes]
) -> bytes:
    if slot.kind == KMS:
        return wrap_by_kms(slot, ring_key)
    public = X25519PublicKey.from_public_bytes(unhex(slot.public, KEY_BYTES))
    try:
        return _SUITE.encrypt(ring_key, public, info=_info(slot, repository_id, number))
    except ValueError as err:  # a point of low order
        raise Malformed(f"the public key of slot {slot.name} is none") from err


def _info(slot: Slot, repository_id: bytes, number: int) -> bytes:
    return b"drsync slot\0" + repository_id + number.to_bytes(8, "little") + slot.name.encode()


def _private_key(secret: bytes, repository_id: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(derive(secret, repository_id, b"drsync slot key"))


def _proof(secret: bytes, repository_id: bytes, authority: bytes) -> bytes:
    return derive(secret, repository_id, b"drsync slot proof" + authority)


def _cipher(ring_key: bytes, repository_id: bytes) -> AESGCM:
    return AESGCM(derive(ring_key, repository_id, b"drsync key ring"))
