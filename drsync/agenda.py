"""What the maintenance does in a repository: the chores of a session."""

import logging
from collections.abc import Sequence
from typing import Final

from drsync.locks import LockPass
from drsync.maintenance import Chore
from drsync.model import NoProgress
from drsync.prune.report import VmPruned
from drsync.session import Session
from drsync.units import format_size

_LOGGER = logging.getLogger(__name__)
_LOCKS_EVERY: Final = 16
"""A pass over the locks begins so often in their period: it extends what ends within half of that."""
_LEAST_LOCKS_S: Final = 3600.0


def chores_of(session: Session) -> Sequence[Chore]:
    """The chores that this configuration asks for."""
    prune = Chore("prune", session.config.prune.every_s, lambda _budget_s: _prune(session))
    lock = session.config.repository.lock
    if lock is None:
        return [prune]
    locks = _Locks(session)
    every_s = max(_LEAST_LOCKS_S, lock.period.total_seconds() / _LOCKS_EVERY)
    return [Chore("locks", every_s, locks.run, locks.is_ended), prune]


def _prune(session: Session) -> str:
    done = session.prune(None, lambda _: NoProgress())
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


class _Locks:
    """Passes over the locks of all objects, in slices."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pass: LockPass | None = None

    def run(self, budget_s: float) -> str:
        self._pass = self._session.extend_locks(budget_s=budget_s, resume=self._pass)
        if self._pass.problem is not None:
            _LOGGER.error("locks: %s; remedy: %s", self._pass.problem, self._pass.problem.remedy)
        seen = "ended" if self._pass.done else f"goes on behind {self._pass.after}"
        return f"seen={self._pass.seen} extended={self._pass.extended} failed={self._pass.failed}: {seen}"

    def is_ended(self) -> bool:
        return self._pass is None or self._pass.done
