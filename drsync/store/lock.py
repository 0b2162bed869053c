"""Locks: until when an object can't be destroyed, by anybody (S3 Object Lock). The contract of stores that have them.

A lock belongs to an object's version: it keeps its bytes, not its name. In a
bucket with versions a delete without a version's id only puts a mark over the
object, which the lock allows: the object is gone from listings, and its bytes are
there until the lock has ended *and* somebody, or a rule of the bucket, deletes the
version. So `ObjectStore.delete` works on locked objects, and can be undone
(docs/security.md, "What was deleted comes back").

Rules, checked by tests/contract/test_lock.py:

- L1  What a store with a LockPolicy creates is locked from its first instant, for the policy's whole period.
      What `replace` writes (the heartbeat) is not: each of its versions would stay.
- L2  `extend_lock` never makes a lock end earlier, and never weakens its mode.
- L3  No object is destroyed before its lock's end with the rights that the roles of docs/iam.md have; with
      COMPLIANCE with no rights at all.

How long: one period for all, extended while an object is still there, instead of
the whole life of a retention class at once. A monthly point needs blocks of packs
of any age, so what it stands on has to be extended anyway; a class that is locked
for years can't be shortened when the rules are; and a thief who may create objects
can't make anybody pay for them for longer than one period (docs/security.md, "Locks").
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol, runtime_checkable


class LockMode(StrEnum):
    """Who can end a lock early."""

    COMPLIANCE = "compliance"
    """Nobody, the account's owner included."""
    GOVERNANCE = "governance"
    """Who has the right s3:BypassGovernanceRetention; no role of drsync's has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockPolicy:
    """How new objects are locked."""

    mode: LockMode
    period: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """The lock of one object."""

    mode: LockMode
    until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class LockSupport:
    """What a bucket offers."""

    enabled: bool
    """Whether objects in it can be locked."""
    versioned: bool
    default: str = ""
    """What it locks by itself, in words; empty: nothing."""


@runtime_checkable
class ObjectLocks(Protocol):
    """A store that can lock objects. Safe to call from several threads."""

    @property
    def url(self) -> str:
        """How messages name this store."""
        ...

    def lock_support(self) -> LockSupport:
        """What the bucket offers.

        Raises:
            StoreDenied: these credentials may not ask.
        """
        ...

    def lock_of(self, key: str) -> Lock | None:
        """The lock of an object; None if it has none, or its store can't lock.

        Raises:
            ObjectMissing: no such key.
            StoreDenied: these credentials may not ask.
        """
        ...

    def extend_lock(self, key: str, lock: Lock) -> None:
        """Lock an object until then, unless it is locked for longer already; asking again is safe.

        Raises:
            ObjectMissing: no such key.
            LocksMissing: the store can't lock.
            StoreDenied: these credentials may not, or it would weaken a lock.
        """
        ...
