"""Wires a configuration to the parts: what all that the command line and the daemon do stands on.

A session opens what it needs when it needs it, and holds nothing that a
concurrent thread could not use: the daemon runs several VMs in one session.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Final

from drsync.config import Config, VmSettings
from drsync.errors import DrsyncError, LocksMissing, RepositoryExists, UnknownVm
from drsync.format.keys import RecoveryKey, RootKey
from drsync.guests import Guests
from drsync.hostkeys import HostKeyFile
from drsync.keyfile import read_key_file, write_key_file
from drsync.limits import Limits
from drsync.log import Log
from drsync.model import Clock, Pace
from drsync.protection import Protection
from drsync.reach import Reach
from drsync.repository import Repository, create_repository, find_record, open_repository
from drsync.source import Source
from drsync.spool import Spool
from drsync.store import ObjectStore
from drsync.store.lock import ObjectLocks

_LOGGER = logging.getLogger(__name__)
_NO_REPOSITORY: Final = "00000000"
"""The tag of sessions that only resume a guest: it must not stay paused because a store is down."""


class Session:
    """One configuration, open for work."""

    def __init__(self, config: Config, clock: Clock, *, limits: Limits | None = None) -> None:
        """`limits` holds what is moved to `[limits]`; given where several sessions share it."""
        self.config = config
        self.clock = clock
        self.limits = limits or Limits(config.limits, clock)
        self.protection = Protection(config)
        self._told_of_closed = False

    @cached_property
    def raw_store(self) -> ObjectStore:
        """The store without retries: for finding out what it really does."""
        return self._open_store(self.limits.increments)

    @cached_property
    def store(self) -> ObjectStore:
        """The store of the repository; passing failures are tried again."""
        from drsync.store.retry import RetryingStore  # noqa: PLC0415 - as above

        return RetryingStore(self.raw_store, clock=self.clock)

    @cached_property
    def seed_store(self) -> ObjectStore:
        """The same store, with the limits of seeds on what is sent."""
        from drsync.store.retry import RetryingStore  # noqa: PLC0415 - as above

        return RetryingStore(self._open_store(self.limits.seeds), clock=self.clock)

    def _open_store(self, pace: Pace) -> ObjectStore:
        from drsync.store.open import open_store  # noqa: PLC0415 - a store's library is large, and not always needed

        settings = self.config.repository
        return open_store(
            settings.url,
            endpoint_url=settings.endpoint_url,
            region=settings.region,
            pace=pace,
            read_pace=self.limits.restores,
            lock=settings.lock,
        )

    @cached_property
    def repository(self) -> Repository:
        """The repository, its key checked."""
        key_file = self.config.repository.key_file
        return open_repository(self.store, read_key_file(key_file), key_file)

    @cached_property
    def host_keys(self) -> HostKeyFile:
        """This host's key file, and the repository's key ring, which changes with it."""
        return HostKeyFile(self.config.repository.key_file, self.store, self.clock)

    @cached_property
    def spool(self) -> Spool:
        """The spool of this host."""
        return Spool(self.config.spool.path, self.config.spool.reserve_bytes)

    @cached_property
    def reach(self) -> Reach:
        """The way to the QEMUs of the VMs."""
        return Reach(self.spool, self.protection, self.clock)

    @cached_property
    def guests(self) -> Guests:
        """What is done to the guests around a capture, and undone."""
        return Guests(self.spool, self.protection, lambda vm: self.reach.open(vm, _NO_REPOSITORY), self.clock)

    def init(self) -> RecoveryKey:
        """Create repository and key file; the recovery key, which is nowhere else.

        The key file comes first: a crash in between leaves a key without a
        repository, never the other way round.

        Raises:
            RepositoryExists, KeyFileExists: one of them is there already; nothing was changed.
            LocksMissing: objects shall be locked, and can't; nothing was changed.
        """
        if find_record(self.store) is not None:
            raise RepositoryExists(url=self.store.url)
        self._check_locks()
        root = RootKey.generate()
        path = self.config.repository.key_file
        write_key_file(path, root)
        try:
            return create_repository(self.store, root, self.clock, bare_store=self.raw_store)
        except DrsyncError as err:
            if not err.retryable:  # else the repository may be there, and this key the only one that opens it
                path.unlink(missing_ok=True)
            raise

    def _check_locks(self) -> None:
        """Find out, before there is a repository, whether what it is to be locked with is there.

        The first write is no proof: there are stores that take a lock, and set none.

        Raises:
            LocksMissing: it is not.
        """
        policy = self.config.repository.lock
        if policy is not None and not self.locks.lock_support().enabled:
            raise LocksMissing(url=self.store.url, problem="the bucket has no Object Lock")

    def log(self, vm: str) -> Log:
        """The log of a VM; it may be empty."""
        return Log(self.repository.vm(vm))

    def known_vms(self, vm: str | None = None) -> list[str]:
        """The VMs that are configured or in the repository, in order; or just `vm`, if it is one of them.

        VMs that only the repository has, and this host has no key of, are left out; the log names them.

        Raises:
            UnknownVm: `vm` is neither.
        """
        configured = {v.name for v in self.protection.vms}
        known = sorted(configured | set(self.repository.vm_names()))
        if vm is None:
            closed = [name for name in known if name not in configured and not self.repository.holds(name)]
            if closed and not self._told_of_closed:
                self._told_of_closed = True
                _LOGGER.warning("left out, since this host has no key of them: %s", ", ".join(closed))
            return [name for name in known if name not in closed]
        if vm not in known:
            raise UnknownVm(vm=vm, known=", ".join(known) or "none")
        return [vm]

    def open_source(self, vm: VmSettings) -> Source:
        """A session with the VM's QEMU."""
        return self.reach.open(vm, self.repository.tag)

    def vms(self) -> Sequence[VmSettings]:
        """The VMs that this host protects now; libvirt is asked if there are patterns.

        Raises:
            LibvirtMissing, LibvirtUnreachable: it can't be asked.
        """
        return self.protection.look()

    @cached_property
    def locks(self) -> ObjectLocks:
        """The locks of the store; of one that has none, it says so."""
        if not isinstance(self.store, ObjectLocks):
            raise LocksMissing(url=self.store.url, problem="only S3 buckets can")
        return self.store
