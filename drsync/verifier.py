"""Reads slices of VMs' objects all the time, in a thread of its own: for the daemon, in whatever role.

every minute: each VM, one after the other ─▶ scrub: what is due of it, mostly nothing
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from drsync.errors import DrsyncError

_LOGGER = logging.getLogger(__name__)

SLICE_S: Final = 60.0
"""How often it is looked what is due; an object is read as a whole, so more often would not be more even."""


class Scrub(Protocol):
    """Reads what is due of one VM (Auditing.scrub)."""

    def __call__(self, vm: str, /, *, stop: Callable[[], bool]) -> object: ...


class Verifier:
    """Reads slices until it is stopped. What fails is logged, and tried again a minute later."""

    def __init__(
        self, vms: Callable[[], Sequence[str]], scrub: Scrub, stopped: threading.Event, *, every_s: float = SLICE_S
    ) -> None:
        """`vms` names the VMs to read; `stopped` ends it, behind the object that it is at."""
        self._vms = vms
        self._scrub = scrub
        self._stopped = stopped
        self._every_s = every_s
        self._trouble: dict[str, str] = {}

    def start(self) -> None:
        """Begin, in a thread that does not keep the process alive: what it is at is read again."""
        threading.Thread(target=self._keep_reading, name="verify", daemon=True).start()

    def _keep_reading(self) -> None:
        while not self._stopped.wait(self._every_s):
            for vm in self._vms():
                if self._stopped.is_set():
                    return
                self.read(vm)

    def read(self, vm: str) -> None:
        """One slice of one VM; whatever goes wrong in it stays in it, and is logged once until it works again."""
        try:
            self._scrub(vm, stop=self._stopped.is_set)
        except DrsyncError as err:
            if self._trouble.get(vm) != str(err):
                _LOGGER.warning("vm=%s is not verified now: %s; remedy: %s", vm, err, err.remedy)
            self._trouble[vm] = str(err)
        except Exception as err:  # a bug in here must not end the daemon
            if self._trouble.get(vm) != repr(err):
                _LOGGER.exception("vm=%s is not verified: a bug in drsync", vm, exc_info=err)
            self._trouble[vm] = repr(err)
        else:
            self._trouble.pop(vm, None)
