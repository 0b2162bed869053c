"""Audits of a session's logs: what is found is recorded in the repository and kept for `status`."""

import logging
from collections.abc import Callable

from drsync.damage import beside_damaged, record
from drsync.errors import SpoolError, StoreError
from drsync.finding import Finding
from drsync.hurt import TOLD_NAME, DamageTold, standing_of, told_of
from drsync.log import Log
from drsync.model import Progress
from drsync.repair import RepairReport, repair
from drsync.scrub import STATE_NAME, ScrubState, Slice, read_slice
from drsync.session import Session
from drsync.verify import VmReport, verify

_LOGGER = logging.getLogger(__name__)


class Auditing:
    """Verifies logs, as a whole or in slices, and repairs them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._finding = Finding(session)

    def verify(self, vm: str, progress: Progress, *, read_data: bool = False) -> VmReport:
        """Audit a VM's log, also against what the heartbeats and this spool know to have been committed.

        What is damaged is recorded in the repository, for the host that can heal it, and kept for `status`.
        """
        log = self._session.log(vm)
        report = verify(log, committed_seq=self._finding.committed(vm), read_data=read_data, progress=progress)
        self._record(log, report)
        return report

    def _record(self, log: Log, report: VmReport) -> None:
        """Tell of what an audit found. The user is told anyway: a repository that can't be written is no error."""
        try:
            record(log, report.damaged, self._session.clock.now())
            if report.damaged or self._session.spool.vm(log.vm).noted(TOLD_NAME, DamageTold) is not None:
                self._note_damage(log.vm, told_of(standing_of(log), report.hurt, self._session.clock.now()))
        except StoreError as err:
            _LOGGER.warning("vm=%s the damage is not recorded: %s", log.vm, err)

    def _note_damage(self, vm: str, told: DamageTold) -> None:
        try:
            self._session.spool.vm(vm).note(TOLD_NAME, told)
        except SpoolError as err:  # a machine that only recovers need not have a spool
            _LOGGER.warning("vm=%s what is damaged is not kept: %s", vm, err)

    def scrub(self, vm: str, *, stop: Callable[[], bool] = lambda: False) -> Slice | None:
        """Read what is due of a VM's objects (scrub.read_slice); None if that is switched off.

        Raises:
            StoreError, SpoolError: the next slice goes on.
        """
        within_s = self._session.config.verify.within_s
        if within_s is None:
            return None
        spool = self._session.spool.vm(vm)
        found = read_slice(
            self._session.log(vm),
            spool.noted(STATE_NAME, ScrubState),
            within_s=within_s,
            clock=self._session.clock,
            save=lambda state: spool.note(STATE_NAME, state),
            stop=stop,
        )
        if found.assessed is not None:
            self._note_damage(vm, found.assessed)
        return found

    def repair(self, vm: str, progress: Progress, *, dry_run: bool, read_data: bool = False) -> RepairReport:
        """Make a VM's block maps anew where they are no good, and say what its points have lost.

        `read_data`: by reading all objects, not just by what is known.

        Raises:
            StoreError: the repository can't be read.
        """
        log = self._session.log(vm)
        audit = verify(log, committed_seq=self._finding.committed(vm), read_data=read_data, progress=progress)
        if not dry_run:
            self._record(log, audit)
        report = repair(beside_damaged(log), self._session.clock.now(), dry_run=dry_run, found=audit.damaged)
        if not dry_run and (report.hurt or self._session.spool.vm(vm).noted(TOLD_NAME, DamageTold) is not None):
            self._note_damage(vm, told_of(standing_of(log), report.hurt, self._session.clock.now()))
        return report
