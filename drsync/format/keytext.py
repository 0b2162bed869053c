"""The text of a key file: the root keys, or the keys of some VMs (docs/format.md, "Key file").

    drsync-root-key:<64 hex>                                    generation 1, and all there is before a rotation
    drsync-root-key:<generation>:<64 hex>:<8 hex>               each later one

    drsync-host-key:<repository id>                             or the keys of VMs
    drsync-vm-key:<VM>:<generation>:<64 hex>:<8 hex>

The last digits are a check of the line: under a key that was copied wrongly, points would be made that nobody can read.
"""

import hashlib
from typing import Final

from drsync.format import Malformed
from drsync.format.keys import (
    KEY_BYTES,
    MAX_GENERATIONS,
    OBJECT_ID_BYTES,
    HostKeys,
    Keys,
    RootKey,
    RootKeys,
    VmKey,
    VmKeys,
)
from drsync.model import is_name

MAX_KEY_FILE_BYTES: Final = 4 * 1024 * 1024
"""10,000 VMs of two generations."""
_ROOT: Final = "drsync-root-key"
_HOST: Final = "drsync-host-key"
_VM: Final = "drsync-vm-key"
_CHECK_BYTES: Final = 4


def encode_keys(keys: Keys) -> str:
    """What a key file holds."""
    if isinstance(keys, RootKeys):
        first, *later = keys.generations
        return first.to_text() + "".join(_line(_ROOT, b"", number, key.secret) for number, key in enumerate(later, 2))
    lines = [f"{_HOST}:{keys.repository_id.hex()}\n"]
    for vm, of_vm in sorted(keys.vms.items()):
        word = f"{_VM}:{vm}"
        lines += [_line(word, keys.repository_id, n, key.secret) for n, key in enumerate(of_vm.generations, 1)]
    return "".join(lines)


def decode_keys(text: str) -> Keys:
    """The keys in the text of a key file.

    Raises:
        Malformed: the text is not a key file's; the message does not hold it.
    """
    lines = text.split("\n")
    if len(lines) > 1 and lines[-1].strip():
        raise Malformed("is not a drsync key file, or is cut: its last line does not end")
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise Malformed("is not a drsync key file")
    if lines[0].startswith(f"{_HOST}:"):
        return _host_keys(lines)
    roots = [RootKey.from_text(lines[0])]
    for number, line in enumerate(lines[1:], 2):
        roots.append(RootKey(_secret(line, _ROOT, b"", number)))
    return RootKeys(tuple(roots))


def _host_keys(lines: list[str]) -> HostKeys:
    repository_id = _unhex(lines[0].partition(":")[2], OBJECT_ID_BYTES)
    found: dict[str, list[VmKey]] = {}
    for line in lines[1:]:
        vm = line.removeprefix(f"{_VM}:").partition(":")[0]
        if not is_name(vm):
            raise Malformed("has a line that no key file has")
        keys = found.setdefault(vm, [])
        keys.append(VmKey(_secret(line, f"{_VM}:{vm}", repository_id, len(keys) + 1)))
    return HostKeys(repository_id, {vm: VmKeys(tuple(keys)) for vm, keys in found.items()})


def _line(word: str, repository_id: bytes, generation: int, secret: bytes) -> str:
    return f"{word}:{generation}:{secret.hex()}:{_check(word, repository_id, generation, secret)}\n"


def _secret(line: str, word: str, repository_id: bytes, generation: int) -> bytes:
    """The key in a line, which must be of this generation: they stand in order, none is left out."""
    if generation > MAX_GENERATIONS or not line.startswith(f"{word}:{generation}:"):
        raise Malformed("has a line that no key file has, or lacks one: a generation is missing")
    digits, _, check = line.removeprefix(f"{word}:{generation}:").partition(":")
    secret = _unhex(digits, KEY_BYTES)
    if check != _check(word, repository_id, generation, secret):
        raise Malformed("has a line whose check does not match: it was changed or copied wrongly")
    return secret


def _check(word: str, repository_id: bytes, generation: int, secret: bytes) -> str:
    said = f"{word}:{generation}:".encode() + repository_id + secret
    return hashlib.sha256(said).hexdigest()[: 2 * _CHECK_BYTES]


def _unhex(digits: str, length: int) -> bytes:
    try:
        raw = bytes.fromhex(digits)
    except ValueError:
        raw = b""
    if len(raw) != length:
        raise Malformed("is not a drsync key file")
    return raw
