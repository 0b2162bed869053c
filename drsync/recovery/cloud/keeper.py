"""Keeps the pilot lights of a configuration burning: each VM's newest point, on the interval of its [[cloud]].

A thread of the daemon on the host, or all that `drsync daemon --role cloud` does beside the bucket. A failure that
may pass is tried again after a pause that doubles up to RETRY_S[1]; any other one at the VM's next turn. No failure
of one VM holds up another for longer than its own requests take.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drsync.config import CloudSettings, Config
from drsync.errors import DrsyncError
from drsync.model import Clock
from drsync.pace import TokenBucket
from drsync.session import Session
from drsync.units import format_duration, format_size

if TYPE_CHECKING:
    from drsync.recovery.cloud.pilot import PilotLight, SyncOutcome
    from drsync.target.ec2.aws import Aws

log = logging.getLogger(__name__)

LOOK_S: Final = 30.0
"""How often a VM that is due is looked after at most: until there is a new point, that is a listing of its log."""
RETRY_S: Final = (30.0, 900.0)


class Stopped(BaseException):
    """The daemon ends; what is written so far is found again."""


@dataclass(slots=True)
class _Turn:
    """When a VM is looked after again, on the monotonic clock."""

    at_s: float = 0.0
    failures: int = 0


class CloudKeeper:
    """Brings points to AWS until it is told to stop."""

    def __init__(
        self,
        config: Callable[[], Config],
        clock: Clock,
        *,
        look_s: float = LOOK_S,
        retry_s: tuple[float, float] = RETRY_S,
    ) -> None:
        """`config` gives the configuration of now: one that was read again counts from the next turn on."""
        self._config = config
        self._clock = clock
        self._look_s = look_s
        self._retry_s = retry_s
        self._stopped = threading.Event()
        self._turns: dict[tuple[str, str], _Turn] = {}
        self._regions: dict[str | None, Aws] = {}
        self._session: Session | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Work in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="cloud", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Begin nothing more, and end what runs behind the block that is on its way."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def run(self) -> None:
        """Work until `stop`."""
        try:
            while not self._stopped.is_set():
                self.round()
                self._stopped.wait(min(self._look_s, 5.0))
        except Stopped:
            log.info("stopped; what was on its way to AWS goes on with the next start")

    def round(self) -> None:
        """Look after every VM whose turn it is.

        Raises:
            Stopped: it was told to stop meanwhile.
        """
        config = self._config()
        if self._session is None or self._session.config is not config:
            self._session = Session(config, self._clock)
        for cloud in config.clouds:
            turn = self._turns.setdefault((cloud.name, ""), _Turn())
            if self._clock.monotonic_s() < turn.at_s:
                continue
            try:
                self._look_after(self._session, cloud, self._aws_of(cloud))
            except DrsyncError as err:  # no VM can be looked after: the repository, or the region, can't be asked
                turn.at_s = self._clock.monotonic_s() + self._pause_s(turn, cloud, err)
                log.error("cloud=%s failed code=%d: %s; remedy: %s", cloud.name, err.code, err, err.remedy)
            else:
                turn.failures = 0

    def _aws_of(self, cloud: CloudSettings) -> "Aws":
        """The connections to a region; kept, since making them costs more than using them."""
        from drsync.target.ec2.aws import Aws, CloudOptions  # noqa: PLC0415 - most hosts have no [[cloud]]

        return self._regions.setdefault(cloud.region, Aws(CloudOptions(region=cloud.region)))

    def _look_after(self, session: Session, cloud: CloudSettings, aws: "Aws") -> None:
        from drsync.recovery.cloud.pilot import PilotLight  # noqa: PLC0415 - as in `_aws_of`
        from drsync.target.ec2.snapshot import Snapshots  # noqa: PLC0415 - as in `_aws_of`

        pace = TokenBucket(session.config.limits.cloud, self._clock)
        light = PilotLight(session, aws, Snapshots(aws, self._clock, pace=pace, sleep=self._sleep), keep=cloud.keep)
        for vm in cloud.vms or session.known_vms():
            turn = self._turns.setdefault((cloud.name, vm), _Turn())
            if self._clock.monotonic_s() >= turn.at_s:
                self._one(light, cloud, vm, turn)

    def _pause_s(self, turn: _Turn, cloud: CloudSettings, err: DrsyncError) -> float:
        """How long to wait after a failure: longer from one to the next, and longest if a retry hardly helps."""
        turn.failures += 1
        wait_s = min(self._retry_s[0] * 2.0 ** min(turn.failures - 1, 16), self._retry_s[1])
        return wait_s if err.retryable else max(wait_s, min(cloud.interval_s, self._retry_s[1]))

    def _one(self, light: "PilotLight", cloud: CloudSettings, vm: str, turn: _Turn) -> None:
        try:
            if light.is_due(vm, cloud.interval_s):
                _tell(cloud, light.sync(vm, _Watched(self._stopped)))
        except DrsyncError as err:
            wait_s = self._pause_s(turn, cloud, err)
            turn.at_s = self._clock.monotonic_s() + wait_s
            again = format_duration(wait_s)
            log.error(
                "cloud=%s vm=%s failed code=%d: %s; remedy: %s; again in %s",
                cloud.name,
                vm,
                err.code,
                err,
                err.remedy,
                again,
            )
        except Exception as err:
            turn.at_s = self._clock.monotonic_s() + self._retry_s[1]
            log.exception("cloud=%s vm=%s failed: a bug in drsync", cloud.name, vm, exc_info=err)
        else:
            if turn.failures:
                log.info("cloud=%s vm=%s works again after %d failures", cloud.name, vm, turn.failures)
            turn.failures = 0
            turn.at_s = self._clock.monotonic_s() + self._look_s

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Stopped


class _Watched:
    """A Progress that nobody sees, and that ends the work when the daemon does."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped

    def start(self, step: str, total_bytes: int) -> None:
        del step, total_bytes
        self.advance(0)

    def advance(self, done_bytes: int) -> None:
        del done_bytes
        if self._stopped.is_set():
            raise Stopped


def _tell(cloud: CloudSettings, outcome: "SyncOutcome") -> None:
    level = logging.DEBUG if outcome.was_there and not outcome.removed else logging.INFO
    log.log(
        level,
        "cloud=%s vm=%s point=%d sent=%s removed=%d took=%.1fs",
        cloud.name,
        outcome.vm,
        outcome.point,
        format_size(outcome.sent_bytes),
        len(outcome.removed),
        outcome.took_s,
    )
