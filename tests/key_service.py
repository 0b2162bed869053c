"""A KeyService in memory: what KMS does, and how it fails."""

import json
import secrets
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from drsync.errors import KmsUnusable
from drsync.format.ring import Slot


@dataclass
class MemoryKms:
    """Keys by name; `denied` are those that these credentials may not use."""

    keys: dict[str, bytes] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    def make_key(self) -> str:
        name = f"arn:aws:kms:eu-central-1:000000000000:key/{secrets.token_hex(8)}"
        self.keys[name] = secrets.token_bytes(32)
        return name

    def wrap(self, slot: Slot, plain: bytes, context: dict[str, str]) -> bytes:
        nonce = secrets.token_bytes(12)
        return nonce + self._cipher(slot, "encrypt").encrypt(nonce, plain, _bound(context))

    def unwrap(self, slot: Slot, wrapped: bytes, context: dict[str, str]) -> bytes:
        cipher = self._cipher(slot, "decrypt")
        try:
            return cipher.decrypt(wrapped[:12], wrapped[12:], _bound(context))
        except InvalidTag as err:
            raise self._refused(slot, "decrypt", "it was wrapped by another key") from err

    def _cipher(self, slot: Slot, operation: str) -> AESGCM:
        self.calls.append(operation)
        if slot.key in self.denied:
            raise self._refused(slot, operation, "these credentials may not")
        if slot.key not in self.keys:
            raise self._refused(slot, operation, "there is no such key")
        return AESGCM(self.keys[slot.key])

    def _refused(self, slot: Slot, operation: str, problem: str) -> KmsUnusable:
        return KmsUnusable(slot=slot.name, key=slot.key, operation=operation, problem=problem)


def _bound(context: dict[str, str]) -> bytes:
    return json.dumps(context, sort_keys=True).encode()
