"""The contract of a site: where the VMs of a plan come back, whatever kind it is.

PlanRun (waves.py) ──▶ check(task), bring_up(task) ──▶ libvirt host (libvirt_site.py) | EC2 (cloud/site.py)
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from drsync.catalog import Point
from drsync.config.plan import VmOverride
from drsync.config.plan_values import Wait
from drsync.errors import DrsyncError
from drsync.model import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One VM of the plan."""

    vm: str
    wave: int
    wait: Wait
    timeout_s: float
    own: VmOverride | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A VM that is up, or would come up."""

    name: str
    """The domain, or the instance's id; in a check of EC2, its name."""
    point: Point | None = None
    """None: an earlier run brought it back."""
    number: int | None = None
    """Of the point, if it is known."""
    was_there: bool = False
    live_bytes: int = 0
    notes: Sequence[str] = ()
    errors: Sequence[DrsyncError] = ()
    """What would refuse it; of a check only."""


class Site(Protocol):
    """Where VMs come back; called from several threads."""

    @property
    def address(self) -> str:
        """What the report calls it: a URI, or a region."""
        ...

    def opened(self) -> AbstractContextManager[object]:
        """Connected while it is entered.

        Raises:
            HostUnreachable, BindingMissing, CloudError: it can't be reached.
        """
        ...

    def check(self, task: Task) -> Arrival:
        """What `bring_up` would do; nothing is written.

        Raises:
            DrsyncError: it can't even be planned.
        """
        ...

    def bring_up(self, task: Task, progress: Progress, say: Callable[[str], None]) -> Arrival:
        """Bring the VM back unless an earlier run has, start it, and return when it is up.

        Raises:
            DrsyncError: it is not up; what was made before it was started is removed.
        """
        ...
