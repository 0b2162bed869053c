"""What a host owes its VMs: the duties of a session that the daemon calls for, by the clock."""

from collections.abc import Callable, Mapping, Sequence

from drsync.auditing import Auditing
from drsync.beating import Beating
from drsync.capture import Outcome
from drsync.capturing import Capturing
from drsync.config import VmSettings
from drsync.model import Progress
from drsync.session import Session


class Duties:
    """Thread-safe, for different VMs at a time (jobs.Captures); lives as long as its session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._capturing = Capturing(session)
        self._auditing = Auditing(session)
        self._beating = Beating(session)

    def capture(self, vm_name: str, progress: Progress, /, *, may_seed: bool, stop: Callable[[], bool]) -> Outcome:
        """One cycle of one VM (Capturing.capture)."""
        return self._capturing.capture(vm_name, progress, may_seed=may_seed, stop=stop)

    def capture_together(
        self, names: Sequence[str], progress_of: Callable[[str], Progress], /, *, may_seed: bool
    ) -> Mapping[str, Outcome | Exception]:
        """One cycle of each VM of a group (Capturing.capture_together)."""
        return self._capturing.capture_together(names, progress_of, may_seed=may_seed)

    def vms(self) -> Sequence[VmSettings]:
        """The VMs to protect now (Session.vms)."""
        return self._session.vms()

    def scrub(self, vm: str, /, *, stop: Callable[[], bool]) -> object:
        """Read what is due of what is stored of a VM (Auditing.scrub)."""
        return self._auditing.scrub(vm, stop=stop)

    def beat(self) -> None:
        """Write the heartbeat (Beating.beat)."""
        self._beating.beat()
