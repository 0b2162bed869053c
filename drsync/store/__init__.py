"""Where objects live: the contract that every store keeps.

An object is an immutable run of bytes under a key such as
``vm/web/log/000000000000002a``. Keys are relative to the repository's prefix.
The only key that is ever overwritten is the heartbeat (`replace`).

Rules that the rest of drsync stands on, checked for every store by
tests/contract/test_store.py:

- S1  `create` either stores all bytes or nothing; a reader never sees a part.
- S2  `create` of a key that exists raises ObjectExists and changes nothing,
      also when two callers race: exactly one wins.
- S3  when `create` returns, the bytes survive a crash of the machine (a local
      store has fsynced file and directory).
- S4  a store that checks `sha256` refuses bytes that do not match it.
- S5  `list` is complete and in the order of the keys, at the latest from the
      moment that `create` returned; a listing that fails raises, it is never
      cut short silently.
- S6  failures are StoreErrors; StoreUnavailable if a retry may help.
- S7  when `delete` returns, nobody reads or lists the object any more, also after
      a crash of the machine. Its key is free again: a late `create` would succeed
      there, so names are never reused, and a writer that may be late has to look
      whether its place is still its own (log.py).
- S8  what a dead writer left half stored is no object: readers and listings do
      not see it, `unfinished` does, and `abandon` frees what it takes.
- S9  `now` is the clock that stamps the objects (`ObjectInfo.modified`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeAlias

Bytes: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """What a listing tells of an object."""

    key: str
    size_bytes: int
    modified: datetime
    """When the store took it, by the store's clock, in UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """An object that was begun to be stored, and not ended (yet)."""

    key: str
    """What it was to be, where the store knows."""
    upload: str
    """What names it among others of that key."""
    began: datetime
    """By the store's clock, in UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """The end of an object, and how large the whole is."""

    data: bytes
    object_size_bytes: int


class ObjectStore(Protocol):
    """A place for immutable objects. Safe to call from several threads."""

    @property
    def url(self) -> str:
        """How messages name this store; never holds a secret."""
        ...

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        """Store `body` under a key that does not exist yet.

        `sha256` is the digest of `body`, which the caller has already: a store
        hands it on as the checksum that the far side verifies.

        Raises:
            ObjectExists: the key is taken; its object is unchanged.
            StoreUnavailable: it is unknown whether the object was stored;
                calling again with the same bytes is safe (retry.py settles it).
        """
        ...

    def replace(self, key: str, body: Bytes) -> None:
        """Store `body` under a key, whether it exists or not; readers see old or new, nothing between."""
        ...

    def get(self, key: str, *, limit_bytes: int) -> bytes:
        """The whole object.

        Raises:
            ObjectMissing: no such key.
            ObjectDamaged: it is larger than `limit_bytes`, which no object of
                its kind can be; nothing of it was kept in memory.
        """
        ...

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """`length` bytes of the object from `offset` on.

        Raises:
            ObjectMissing: no such key.
            ObjectDamaged: the object ends before `offset + length`.
        """
        ...

    def get_tail(self, key: str, length: int) -> Tail:
        """The last `length` bytes of the object, or all of it if it is shorter; one request.

        Raises:
            ObjectMissing: no such key.
        """
        ...

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        """The objects whose keys start with `prefix` and sort behind `after`, in key order."""
        ...

    def folders(self, prefix: str) -> Iterator[str]:
        """What stands between `prefix`, which ends with a slash, and the next slash of the keys there.

        Each once, in the order of the keys, and as complete as `list`; but a thousand of them are one
        request, however many objects they have.
        """
        ...

    def now(self) -> datetime:
        """The store's own time, in UTC; ages of objects are reckoned from it, never from a host's clock.

        Raises:
            StoreUnavailable, StoreMisconfigured: it does not tell.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove the object; that it is not there is no error.

        Raises:
            StoreDenied: these credentials may not, or the object is locked: it is still there.
            StoreUnavailable: it is unknown whether it is; calling again is safe.
        """
        ...

    def unfinished(self) -> Iterator[Unfinished]:
        """What was begun below this store's prefix and not ended, by whomever; some of it may be under way."""
        ...

    def abandon(self, unfinished: Unfinished) -> None:
        """Free what an unfinished object takes; that it is not there is no error.

        Raises:
            StoreDenied: these credentials may not.
        """
        ...
