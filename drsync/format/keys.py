"""Keys: root key → VM key → the keys of one object (docs/format.md, "Keys").

    root key ──HKDF(repository id, VM name)──▶ VM key ──HKDF(object id)──▶ frame key
                                                                      └──▶ index key
             ──HKDF(repository id)──▶ key check, stored in repo.json

A host can be given just the VM keys of its own VMs. Object ids are random 128
bits, so no key encrypts twice under one nonce, whatever is forked or rolled back.

A rotation adds a root key: generation 2, 3 … New objects are made under the newest
one, and say so; those that are there stay under theirs.
"""

import base64
import hashlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from drsync.format import Malformed

KEY_BYTES: Final = 32
OBJECT_ID_BYTES: Final = 16
_RECOVERY_CHECK_BYTES: Final = 3  # 35 bytes are 56 base32 digits, without padding
_BASE32: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")
_KEY_FILE_WORD: Final = "drsync-root-key"
FIRST_GENERATION: Final = 1
MAX_GENERATIONS: Final = 256


def derive(key: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-SHA-256."""
    return HKDF(SHA256(), KEY_BYTES, salt, info).derive(key)


def new_object_id() -> bytes:
    """An object id that no other object has."""
    return secrets.token_bytes(OBJECT_ID_BYTES)


@dataclass(frozen=True, slots=True)
class ObjectKeys:
    """The keys of one object; never shown."""

    frame: bytes = field(repr=False)
    index: bytes = field(repr=False)
    content: bytes = field(repr=False)
    """Keys the hashes of plain blocks. The same for all objects of a VM, so that hashes can be compared."""


@dataclass(frozen=True, slots=True)
class VmKey:
    """Opens all objects of one VM in one repository; never shown."""

    secret: bytes = field(repr=False)

    def of_object(self, object_id: bytes) -> ObjectKeys:
        return ObjectKeys(
            derive(self.secret, object_id, b"drsync frame"),
            derive(self.secret, object_id, b"drsync index"),
            derive(self.secret, b"", b"drsync content hash"),
        )

    def of_heartbeat(self) -> bytes:
        return derive(self.secret, b"", b"drsync heartbeat")


@dataclass(frozen=True, slots=True)
class VmKeys:
    """A VM's keys of all generations, the oldest first; never shown."""

    generations: tuple[VmKey, ...] = field(repr=False)

    @property
    def newest(self) -> int:
        """The generation that new objects are made under."""
        return len(self.generations)

    def of(self, generation: int) -> VmKey:
        """The key of a generation.

        Raises:
            LookupError: there is none.
        """
        if not FIRST_GENERATION <= generation <= self.newest:
            raise LookupError(generation)
        return self.generations[generation - 1]

    def of_object(self, object_id: bytes, generation: int) -> ObjectKeys:
        """The keys of an object that was made under a generation.

        Hashes are always keyed by the first one, so that a resync can compare across a rotation; they are
        seen by those alone who open the index.

        Raises:
            LookupError: there is no key of that generation.
        """
        keys = self.of(generation).of_object(object_id)
        if generation == FIRST_GENERATION:
            return keys
        return ObjectKeys(keys.frame, keys.index, self.generations[0].of_object(object_id).content)


@dataclass(frozen=True, slots=True)
class RootKey:
    """Opens everything in a repository; never shown."""

    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> "RootKey":
        return cls(secrets.token_bytes(KEY_BYTES))

    def of_vm(self, repository_id: bytes, vm: str) -> VmKey:
        return VmKey(derive(self.secret, repository_id, b"drsync vm\0" + vm.encode()))

    def check(self, repository_id: bytes) -> bytes:
        """A value that tells, without the data, whether this is the repository's key."""
        return derive(self.secret, repository_id, b"drsync key check")[:16]

    def to_text(self) -> str:
        """The line that a key file holds."""
        return f"{_KEY_FILE_WORD}:{self.secret.hex()}\n"

    @classmethod
    def from_text(cls, text: str) -> "RootKey":
        """The key in the text of a key file.

        Raises:
            Malformed: the text is not a key file's; the message does not hold it.
        """
        word, _, digits = text.strip().partition(":")
        try:
            secret = bytes.fromhex(digits)
        except ValueError:
            secret = b""
        if word != _KEY_FILE_WORD or len(secret) != KEY_BYTES:
            raise Malformed("is not a drsync key file")
        return cls(secret)


@dataclass(frozen=True, slots=True)
class RootKeys:
    """A repository's root keys of all generations, the oldest first; never shown."""

    generations: tuple[RootKey, ...] = field(repr=False)

    @property
    def newest(self) -> int:
        return len(self.generations)

    @property
    def described(self) -> str:
        """What is held, for a message."""
        return "the root key" if self.newest == 1 else f"the root keys of generations 1 to {self.newest}"

    def of_vm(self, repository_id: bytes, vm: str) -> VmKeys:
        return VmKeys(tuple(root.of_vm(repository_id, vm) for root in self.generations))

    def of_vms(self, repository_id: bytes, vms: Iterable[str]) -> "HostKeys":
        """The keys of these VMs alone, for a host that shall read no others."""
        return HostKeys(repository_id, {vm: self.of_vm(repository_id, vm) for vm in sorted(set(vms))})

    def checks(self, repository_id: bytes) -> list[str]:
        """The check (hex) of each generation."""
        return [root.check(repository_id).hex() for root in self.generations]

    def begins(self, other: "RootKeys") -> bool:
        """Whether `other` is these keys, and perhaps more."""
        return other.generations[: self.newest] == self.generations


@dataclass(frozen=True, slots=True)
class HostKeys:
    """The keys of some VMs of one repository, and of no others; never shown."""

    repository_id: bytes
    vms: Mapping[str, VmKeys] = field(repr=False)

    @property
    def newest(self) -> int:
        return max((keys.newest for keys in self.vms.values()), default=FIRST_GENERATION)

    @property
    def described(self) -> str:
        """What is held, for a message."""
        named = sorted(self.vms)
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        return f"keys of {', '.join(named[:8]) or 'no VM'}{more} alone"

    def of_vm(self, repository_id: bytes, vm: str) -> VmKeys:
        """The keys of a VM.

        Raises:
            LookupError: it has none.
        """
        if repository_id != self.repository_id:
            raise LookupError(vm)
        return self.vms[vm]

    def of_vms(self, repository_id: bytes, vms: Iterable[str]) -> "HostKeys":
        """As RootKeys.of_vms.

        Raises:
            LookupError: it has no key of one of them.
        """
        return HostKeys(repository_id, {vm: self.of_vm(repository_id, vm) for vm in sorted(set(vms))})


Keys: TypeAlias = RootKeys | HostKeys
"""What a key file holds."""


@dataclass(frozen=True, slots=True)
class RecoveryKey:
    """A second key, kept on paper: it unwraps the root key that the repository holds in its recovery slot."""

    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> "RecoveryKey":
        return cls(secrets.token_bytes(KEY_BYTES))

    def to_text(self) -> str:
        """56 letters and digits in groups of four; the last ones are a check of the others."""
        digits = base64.b32encode(self.secret + self._checksum()).decode()
        return "-".join(digits[i : i + 4] for i in range(0, len(digits), 4))

    @classmethod
    def from_text(cls, text: str) -> "RecoveryKey":
        """The key that a person typed; spaces, dashes and case do not matter.

        Raises:
            Malformed: it is not a recovery key, or has a typing error.
        """
        digits = "".join(text.split()).replace("-", "").upper().replace("0", "O").replace("1", "I")
        try:
            raw = base64.b32decode(digits)
        except ValueError:
            raw = b""
        if len(raw) != KEY_BYTES + _RECOVERY_CHECK_BYTES:
            usable = sum(digit in _BASE32 for digit in digits)
            raise Malformed(f"of its {len(digits)} letters and digits {usable} can be used, a recovery key has 56")
        key = cls(raw[:KEY_BYTES])
        if key._checksum() != raw[KEY_BYTES:]:
            raise Malformed("its check digits do not match: there is a typing error")
        return key

    def _checksum(self) -> bytes:
        return hashlib.sha256(b"drsync recovery key" + self.secret).digest()[:_RECOVERY_CHECK_BYTES]

    def wrap(self, root: RootKey, repository_id: bytes) -> bytes:
        """The root key, encrypted: 12 bytes of nonce, then AES-256-GCM."""
        nonce = secrets.token_bytes(12)
        return nonce + AESGCM(self._wrapping_key(repository_id)).encrypt(nonce, root.secret, b"drsync root key")

    def unwrap(self, wrapped: bytes, repository_id: bytes) -> RootKey:
        """The root key that `wrap` encrypted.

        Raises:
            Malformed: it is another repository's, or was changed.
        """
        try:
            secret = AESGCM(self._wrapping_key(repository_id)).decrypt(wrapped[:12], wrapped[12:], b"drsync root key")
        except (InvalidTag, ValueError) as err:
            raise Malformed("it is another repository's") from err
        if len(secret) != KEY_BYTES:
            raise Malformed("it wraps something else than a root key")
        return RootKey(secret)

    def _wrapping_key(self, repository_id: bytes) -> bytes:
        return derive(self.secret, repository_id, b"drsync recovery slot")
