"""The agenda of `drsync daemon --role maintenance`: chores of the whole repository, one after the other.

    agenda ─▶ prune        every 6 h
              locks        extended in slices, where [repository] has a lock
              verify       a slice of each VM a minute, so that all is read within [verify] within
              …            each gets a budget of time, and says in a line what it did

One chore runs at a time, in one thread: none of them is urgent, and each may be cut off at any moment by
the end of the process (they are made so that a crash at any step is harmless). A chore that fails is
logged, and comes again when it is due.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from drsync.errors import DrsyncError
from drsync.model import Clock

_LOGGER = logging.getLogger(__name__)
BUDGET_S: Final = 600.0
"""How long a chore that works in slices may take before the next one has its turn."""
RETRY_S: Final = 300.0
"""A chore whose failure may pass comes again so soon."""


@dataclass(frozen=True, slots=True)
class Chore:
    """Something that is done to the repository now and then."""

    name: str
    every_s: float
    run: Callable[[float], str]
    """Do it within about so many seconds, and say in a line what was done; empty: nothing that is worth a line."""
    is_ended: Callable[[], bool] = lambda: True
    """Whether the last run came to its end; if not, it goes on as soon as the others had their turn."""


class Maintenance:
    """Runs chores in a thread of its own until it is stopped."""

    def __init__(self, chores: Sequence[Chore], clock: Clock, *, budget_s: float = BUDGET_S) -> None:
        self._chores = chores
        self._clock = clock
        self._budget_s = budget_s
        self._stopped = threading.Event()
        self._due_s = {chore.name: clock.monotonic_s() for chore in chores}
        self._thread = threading.Thread(target=self._run, name="maintenance", daemon=True)

    def start(self) -> None:
        """Begin; every chore is due at once."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Begin nothing more, and give what runs its time; whether it came to its end."""
        self._stopped.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def check_alive(self) -> None:
        """Check that the thread works.

        Raises:
            RuntimeError: it has ended; a new process has to be started.
        """
        if not self._thread.is_alive() and not self._stopped.is_set():
            raise RuntimeError("the thread of the maintenance has ended")

    def run_due(self) -> float:
        """Do what is due; how many seconds there are until the next chore is."""
        for chore in self._chores:
            if self._stopped.is_set():
                break
            if self._due_s[chore.name] <= self._clock.monotonic_s():
                self._due_s[chore.name] = self._clock.monotonic_s() + self._do(chore)
        return max(0.0, min(self._due_s.values(), default=RETRY_S) - self._clock.monotonic_s())

    def _do(self, chore: Chore) -> float:
        """Do a chore; in how many seconds it is due again."""
        try:
            said = chore.run(self._budget_s)
        except DrsyncError as err:
            _LOGGER.error("chore=%s failed code=%d: %s; remedy: %s", chore.name, err.code, err, err.remedy)
            return min(RETRY_S, chore.every_s) if err.retryable else chore.every_s
        except Exception:
            _LOGGER.exception("chore=%s failed: a bug in drsync", chore.name)
            return chore.every_s
        if said:
            _LOGGER.info("chore=%s %s", chore.name, said)
        return chore.every_s if chore.is_ended() else 0.0

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._stopped.wait(self.run_due())
