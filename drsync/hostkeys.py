"""What a host's key file and the repository's key ring have to do with each other.

ring ──recover──▶ key file            all root keys, or those of the VMs that the file has already
ring ◀──rotate── slot's secret ──▶ key file
key file ──export──▶ a host's key file with the keys of some VMs
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from drsync.errors import (
    KeyFileExists,
    KeyFileMissing,
    KeyMissing,
    ObjectMissing,
    StoreDenied,
    WrongKey,
)
from drsync.format import names
from drsync.format.keys import HostKeys, Keys, RootKeys
from drsync.keyfile import read_key_file, replace_key_file, write_key_file
from drsync.keyring import Keyring, KeyService, OpenRing, Rotation, Unlock
from drsync.model import Clock
from drsync.repository import RepositoryRecord, is_key_of, read_record
from drsync.store import ObjectStore

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotated:
    """What `rotate` came to, or would come to."""

    generation: int
    """The one that new objects are made under from now on."""
    ring: int
    slots: Sequence[str]
    """What opens the new ring."""
    made: bool
    """False: the new key was there already, and this host's key file lacked it."""
    by_other: bool
    """A rotation of the same moment was first."""


class HostKeyFile:
    """A host's key file, beside the key ring of its repository."""

    def __init__(
        self, path: Path, store: ObjectStore, clock: Clock, open_kms: Callable[[], KeyService] | None = None
    ) -> None:
        """`open_kms` is AWS's KMS unless given."""
        self.path = path
        self._store = store
        self._clock = clock
        self._open_kms = open_kms or _aws_kms

    def keyring(self) -> Keyring:
        """The repository's key ring.

        Raises:
            RepositoryMissing, RepositoryTooNew: there is no repository that can be used.
        """
        return Keyring(self._store, read_record(self._store), self._clock, self._open_kms)

    def newest_generation(self, record: RepositoryRecord) -> int:
        """The newest generation of root keys that hosts were told of; 1 if this host may not even list names.

        Nobody vouches for it, so it is good for a warning and nothing else.
        """
        try:
            return Keyring(self._store, record, self._clock, self._open_kms).announced()
        except StoreDenied as err:
            _LOGGER.info("can't tell whether the repository's key was rotated: %s", err)
            return 1

    def recover(self, opened: OpenRing) -> Keys:
        """Write the key file from an opened ring, or bring the one that is there up to date; what it holds now.

        Raises:
            KeyFileExists: there is one already that lacks nothing, or is not of this repository.
        """
        if not self.path.exists():
            write_key_file(self.path, opened.roots)
            return opened.roots
        try:
            held = read_key_file(self.path)
        except KeyFileMissing as err:
            raise KeyFileExists(path=self.path) from err
        record = read_record(self._store)
        renewed = _renewed(held, opened.roots, bytes.fromhex(record.id))
        is_newer = not isinstance(held, RootKeys) or held.begins(opened.roots)
        if not is_key_of(held, record) or renewed == held or not is_newer:
            raise KeyFileExists(path=self.path)
        replace_key_file(self.path, renewed)
        return renewed

    def rotate(self, unlock: Unlock, *, dry_run: bool = False) -> Rotated:
        """A new root key for what is made from now on; the key file here gets it, too.

        The ring comes first, and is one create. A crash behind it leaves a key file that lacks the new key: the
        next `rotate` writes it, and makes no other one.

        Raises:
            WrongKey: the key file is of another repository.
            ObjectMissing: the key file has newer keys than the ring: a ring was lost, and must be brought back first.
            KmsUnusable: KMS does not wrap the new ring; nothing was changed.
        """
        held, opened = self._held(), unlock()
        self._check_whole(held, opened)
        if held is not None and opened.roots.newest > held.newest:  # of a rotation that this host has not seen
            if not dry_run:
                self.keyring().announce(opened.roots.newest)
                self._renew(held, opened)
            return _rotated(opened, made=False)
        done: Rotation = self.keyring().rotate(unlock, dry_run=dry_run)
        if not dry_run:
            self._renew(held, done.ring)
        return _rotated(done.ring, made=not done.by_other, by_other=done.by_other)

    def export(self, vms: Sequence[str], output: Path, *, dry_run: bool = False) -> HostKeys:
        """Write a key file for a host that has the keys of these VMs and no others; what it holds.

        Raises:
            KeyMissing: this host has no key of one of them.
            WrongKey: the key file here is of another repository.
            KeyFileExists: there is a file at `output`.
        """
        record, keys = read_record(self._store), read_key_file(self.path)
        if not is_key_of(keys, record):
            raise WrongKey(path=self.path, url=self._store.url)
        for vm in vms:
            if isinstance(keys, HostKeys) and vm not in keys.vms:
                raise KeyMissing(path=self.path, wanted=f"key of VM {vm}", held=keys.described, vm=vm)
        exported = keys.of_vms(bytes.fromhex(record.id), vms)
        if output.exists():
            raise KeyFileExists(path=output)
        if not dry_run:
            write_key_file(output, exported)
        return exported

    def _held(self) -> Keys | None:
        """What the key file holds; None if there is none."""
        if not self.path.exists():
            return None
        held = read_key_file(self.path)
        if not is_key_of(held, read_record(self._store)):
            raise WrongKey(path=self.path, url=self._store.url)
        return held

    def _check_whole(self, held: Keys | None, opened: OpenRing) -> None:
        """Another key of the same generation must not come to be: what was made under the lost one would be lost."""
        roots = held if isinstance(held, RootKeys) else None
        if (held is not None and held.newest > opened.roots.newest) or (roots and not roots.begins(opened.roots)):
            record = read_record(self._store)
            raise ObjectMissing(key=names.ring(bytes.fromhex(record.id), opened.number + 1), url=self._store.url)

    def _renew(self, held: Keys | None, ring: OpenRing) -> None:
        identifier = bytes.fromhex(read_record(self._store).id)
        if held is None:
            write_key_file(self.path, ring.roots)
        else:
            replace_key_file(self.path, _renewed(held, ring.roots, identifier))


def _renewed(held: Keys, roots: RootKeys, repository_id: bytes) -> Keys:
    """The present keys of what a key file holds: everything, or the same VMs."""
    return roots if isinstance(held, RootKeys) else roots.of_vms(repository_id, held.vms)


def _rotated(ring: OpenRing, *, made: bool, by_other: bool = False) -> Rotated:
    slots = [slot.name for slot in ring.slots]
    return Rotated(generation=ring.roots.newest, ring=ring.number, slots=slots, made=made, by_other=by_other)


def _aws_kms() -> KeyService:
    from drsync.kms import AwsKms  # noqa: PLC0415 - boto3 is large, and few need it for this

    return AwsKms()
