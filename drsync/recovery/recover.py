"""Brings one point back as a domain, or leaves nothing behind.

Until the domain is defined, whatever fails removes all that was made. With `replace` the
old disks are never touched: the new ones have other names, and defining the domain anew is the
switch. When the new one runs, the old disks go; when it does not start, the old definition comes back.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import ParamSpec

from drsync.errors import CantComeUp, DrsyncError, HostRefused, NotStarted, ReplaceUndone
from drsync.model import Progress
from drsync.recovery.planning import Planning
from drsync.recovery.request import RecoveryPlan, RecoveryRequest
from drsync.restore import restore_disk
from drsync.session import Session
from drsync.target.libvirt_host import Domain, LibvirtHost
from drsync.target.libvirt_storage import remove_disk
from drsync.target.place import Place
from drsync.target.tpm import STATE_ROOT, TpmState

log = logging.getLogger(__name__)

P = ParamSpec("P")


class Recovery:
    """Brings points back on one host."""

    def __init__(self, session: Session, host: LibvirtHost, *, tpm_root: Path = STATE_ROOT) -> None:
        self._session = session
        self._host = host
        self._tpm_root = tpm_root

    def plan(self, request: RecoveryRequest) -> RecoveryPlan:
        """What `run` would do; nothing is written. What would refuse it is in the plan's errors.

        Raises:
            UnknownVm, UnknownPoint, PointLost, IntegrityError, StoreError: there is no such point.
            HostUnreachable: the host does not answer.
        """
        return Planning(self._session, self._host, request).plan()

    def run(self, plan: RecoveryPlan, progress: Progress) -> None:
        """Bring the domain back.

        Raises:
            DrsyncError: the first of the plan's errors; nothing was written.
            ObjectMissing, ObjectDamaged, StoreError, TargetError: it failed on the way; all was removed again.
            NotStarted: it is defined, but does not start.
            ReplaceUndone: it does not start, and the one that it replaced is back.
        """
        if plan.errors:
            raise plan.errors[0]
        if plan.place is None:  # which is one of the errors
            raise CantComeUp(vm=plan.request.vm, uri=self._host.uri, problem="there is nothing to define")
        with ExitStack() as undo:
            self._write(plan, plan.place, undo, progress)
            self._host.define(plan.rewritten.xml, autostart=plan.autostart)
            undo.callback(_quietly, self._undefine, plan)
            if plan.request.start:
                self._start(plan, undo)
            else:
                undo.pop_all()
        if plan.request.start and plan.replaced is not None:
            self._forget_replaced(plan, plan.replaced)

    def _write(self, plan: RecoveryPlan, place: Place, undo: ExitStack, progress: Progress) -> None:
        objects = self._session.log(plan.request.vm).objects
        progress.start(f"restore {plan.request.vm}", sum(disk.size_bytes for disk in plan.disks))
        for disk in plan.disks:
            writer = place.writer(disk.file, disk.size_bytes, disk.image_format)
            restore_disk(objects, plan.image, disk.name, writer, progress)
            undo.callback(_quietly, place.remove, disk.file)
        if plan.nvram is not None:
            plan.nvram.place.put_file(plan.nvram.name, plan.nvram.content)
            undo.callback(_quietly, plan.nvram.place.remove, plan.nvram.name)
        if plan.tpm is not None:
            state = self._tpm(plan)
            undo.callback(_quietly, state.put_back)
            state.put(plan.tpm, version=plan.tpm_version, replace=plan.replaced is not None)
        place.finish()

    def _tpm(self, plan: RecoveryPlan) -> TpmState:
        return TpmState(plan.uuid, vm=plan.request.vm, root=self._tpm_root)

    def _undefine(self, plan: RecoveryPlan) -> None:
        if plan.replaced is not None:
            self._host.define(plan.replaced.xml, autostart=plan.replaced.autostart)
        else:
            self._host.undefine(plan.uuid)

    def _start(self, plan: RecoveryPlan, undo: ExitStack) -> None:
        try:
            self._host.start(plan.uuid)
        except HostRefused as err:
            fields = {"domain": plan.domain, "uri": self._host.uri, "problem": err.fields["problem"]}
            if plan.replaced is not None:
                raise ReplaceUndone(**fields, vm=plan.request.vm) from err
            undo.pop_all()  # whoever can mend what it lacks needs no second restore
            raise NotStarted(**fields) from err
        undo.pop_all()

    def _forget_replaced(self, plan: RecoveryPlan, old: Domain) -> None:
        """Remove the disks that were replaced, unless somebody else uses them."""
        others = {path for d in self._host.domains() if d.uuid != old.uuid for path in d.disks.values()}
        kept = others | {disk.path for disk in plan.disks}
        targets = {disk.target for disk in plan.disks}
        for path in [path for target, path in old.disks.items() if target in targets and path not in kept]:
            _quietly(remove_disk, self._host, path)
        if plan.nvram is not None and old.nvram and old.nvram != plan.nvram.path:
            _quietly(remove_disk, self._host, old.nvram)
        if plan.tpm is not None:
            _quietly(self._tpm(plan).forget_old)


def _quietly(function: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> None:
    """Clean up as far as it goes: what is said is why it had to be done."""
    try:
        function(*arguments, **named)
    except DrsyncError as err:
        log.warning("cleaning up: %s; remedy: %s", err, err.remedy)
