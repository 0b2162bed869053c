"""Prune, of the VMs of a repository: apart from upkeep.py, since what only looks need not load how it is done."""

from collections.abc import Callable
from datetime import datetime, timedelta

from drsync.errors import DrsyncError
from drsync.heartbeat import Seen, read_heartbeats
from drsync.log import beside
from drsync.model import Progress
from drsync.pins import read_pins
from drsync.prune.planning import FREE, Prices
from drsync.prune.report import Pruned, VmPruned
from drsync.prune.run import PruneOptions, prune_vm
from drsync.session import Session


class Pruning:
    """Takes what retention drops out of a session's repository."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def prune(self, vm: str | None, progress_of: Callable[[str], Progress], *, dry_run: bool = False) -> Pruned:
        """Drop what retention drops, and delete what was taken out of use before; of one VM, or of all there are.

        A VM that can't be pruned keeps no other from it: its error is told with it.

        Raises:
            UnknownVm: there is no such VM.
            StoreError: the store does not tell the time, or what it has.
        """
        repository = self._session.repository
        names = [n for n in self._session.known_vms(vm) if vm is not None or n in set(repository.vm_names())]
        now, beats = self._session.store.now(), read_heartbeats(repository)
        settings = self._session.config.prune
        options = PruneOptions(
            grace=timedelta(seconds=settings.grace_s),
            orphan_grace=timedelta(seconds=settings.orphan_grace_s),
            prices=Prices(transfer_gib=settings.read_price) if self._session.store.url.startswith("s3:") else FREE,
            dry_run=dry_run,
        )
        vms = [self._prune(name, beats.of(name), now, options, progress_of(name)) for name in names]
        uploads = 0 if vm is not None else self._abandon_uploads(now - options.orphan_grace, dry_run=dry_run)
        return Pruned(vms=vms, abandoned_uploads=uploads, dry_run=dry_run)

    def _prune(self, vm: str, seen: Seen | None, now: datetime, options: PruneOptions, progress: Progress) -> VmPruned:
        try:
            log = self._session.log(vm)
            return prune_vm(
                beside(log),
                self._session.config.retention.of(vm),
                read_pins(log.objects).for_rules(),
                committed=seen.seq if seen else 0,
                now=now,
                options=options,
                progress=progress,
            )
        except DrsyncError as err:
            return VmPruned(vm=vm, kept=0, dropped=[], horizon=0, error=err)

    def _abandon_uploads(self, before: datetime, *, dry_run: bool) -> int:
        """Free what uploads take that were begun before then and never ended; how many there were."""
        found = [upload for upload in self._session.store.unfinished() if upload.began < before]
        for upload in found if not dry_run else ():
            self._session.store.abandon(upload)
        return len(found)
