"""What the maintenance does in a repository: the chores of a session."""

import logging
from collections.abc import Sequence
from typing import Final

from drsync.auditing import Auditing
from drsync.errors import DrsyncError
from drsync.locks import LockKeeper
from drsync.maintenance import Chore
from drsync.model import NoProgress
from drsync.prune.report import VmPruned
from drsync.pruning import Pruning
from drsync.session import Session
from drsync.units import format_size
from drsync.upkeep import Upkeep
from drsync.verifier import SLICE_S

_LOGGER = logging.getLogger(__name__)
LOCKS_EVERY_S: Final = 3600.0
"""So often the maintenance asks whether a pass over the locks is due (locks.LockKeeper)."""


def chores_of(session: Session) -> Sequence[Chore]:
    """The chores that this configuration asks for."""
    chores = [Chore("prune", session.config.prune.every_s, lambda _budget_s: _prune(session))]
    if session.config.verify.within_s is not None:
        chores.append(Chore("verify", SLICE_S, lambda budget_s: _verify(session, budget_s)))
    keeper = Upkeep(session).lock_keeper()
    if keeper is None:
        return chores
    locks = Chore("locks", LOCKS_EVERY_S, lambda budget_s: _extend(keeper, budget_s), keeper.is_between_passes)
    return [locks, *chores]


def _verify(session: Session, budget_s: float) -> str:
    """A slice of every VM in the repository; what is not reached in this turn has its own in the next one."""
    ends_s = session.clock.monotonic_s() + budget_s
    for vm in session.repository.vm_names():
        try:
            Auditing(session).scrub(vm, stop=lambda: session.clock.monotonic_s() > ends_s)
        except DrsyncError as err:
            _LOGGER.error("vm=%s is not verified code=%d: %s; remedy: %s", vm, err.code, err, err.remedy)
    return ""  # damage, and the end of a pass, have lines of their own


def _extend(keeper: LockKeeper, budget_s: float) -> str:
    """A slice of a pass over the locks, if one is due: that is asked each time, and rarely so."""
    done = keeper.work(budget_s)
    if done is None:
        return ""
    seen = "ended" if done.done else f"goes on behind {done.after}"
    return f"seen={done.seen} extended={done.extended} failed={done.failed}: {seen}"


def _prune(session: Session) -> str:
    done = Pruning(session).prune(None, lambda _: NoProgress())
    for one in done.vms:
        if one.error is not None:
            _LOGGER.error(
                "vm=%s not pruned code=%d: %s; remedy: %s", one.vm, one.error.code, one.error, one.error.remedy
            )
        elif one.dropped or one.deleted_objects or one.orphans:
            _LOGGER.info("vm=%s %s", one.vm, pruned_line(one))
    freed = sum(one.deleted_bytes for one in done.vms)
    denied = sum(one.denied_objects for one in done.vms)
    held = f" denied={denied}" if denied else ""
    return f"vms={len(done.vms)} deleted={format_size(freed).replace(' ', '')}{held} uploads={done.abandoned_uploads}"


def pruned_line(one: VmPruned) -> str:
    """What the log says of a VM that was pruned."""
    sizes = {"deleted": one.deleted_bytes, "copied": one.copied_bytes, "will-free": max(0, one.freed_bytes)}
    words = [f"{name}={format_size(size).replace(' ', '')}" for name, size in sizes.items()]
    return f"pruned kept={one.kept} dropped={len(one.dropped)} {' '.join(words)} horizon={one.horizon}"
