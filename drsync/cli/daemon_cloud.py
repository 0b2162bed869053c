"""`drsync daemon --role cloud`: brings points from the bucket to AWS, and captures nothing."""

import logging
import queue
import signal
from types import FrameType

from drsync.cli.app import App
from drsync.config import Config
from drsync.daemon import POLL_S, Request
from drsync.errors import ConfigInvalid, DrsyncError
from drsync.recovery.cloud.keeper import CloudKeeper
from drsync.systemd import Notifier

_LOGGER = logging.getLogger(__name__)

STOP_S = 15.0
"""As long as a block takes that is on its way to AWS."""
_REQUESTS = {signal.SIGTERM: Request.STOP, signal.SIGINT: Request.STOP, signal.SIGHUP: Request.RELOAD}


def run_cloud_role(app: App, config: Config) -> None:
    """Work until told to stop.

    Raises:
        ConfigInvalid: there is no [[cloud]].
    """
    if not config.clouds:
        problem = "--role cloud needs a [[cloud]]"
        raise ConfigInvalid(path=config.path, problem=problem, problems=(problem,))
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()

    def ask(number: int, _frame: FrameType | None) -> None:
        requests.put(_REQUESTS[signal.Signals(number)])

    for number in _REQUESTS:
        signal.signal(number, ask)
    current = [config]
    keeper = CloudKeeper(lambda: current[0], app.clock)
    notifier = Notifier.from_environment()
    keeper.start()
    notifier.ready(_summary(config))
    _LOGGER.info("started: %s", _summary(config))
    poll_s = min(POLL_S, notifier.watchdog_s / 3) if notifier.watchdog_s else POLL_S
    while (request := _next(requests, poll_s)) is not Request.STOP:
        if request is Request.RELOAD:
            current[0] = _reloaded(app, current[0], notifier)
        notifier.watchdog()
    notifier.stopping()
    keeper.stop(STOP_S)
    _LOGGER.info("stopped")


def _next(requests: "queue.SimpleQueue[Request]", timeout_s: float) -> Request | None:
    try:
        return requests.get(timeout=timeout_s)
    except queue.Empty:
        return None


def _reloaded(app: App, config: Config, notifier: Notifier) -> Config:
    """The configuration as it is now, or the old one if it can't be used."""
    notifier.reloading()
    try:
        config = app.config()
        _LOGGER.info("reloaded: %s", _summary(config))
    except DrsyncError as err:
        _LOGGER.error("kept the old configuration: %s; remedy: %s", err, err.remedy)
    notifier.ready(_summary(config))
    return config


def _summary(config: Config) -> str:
    names = ", ".join(f"{cloud.name} ({cloud.region or 'region of the environment'})" for cloud in config.clouds)
    return f"points of {config.repository.url} to {names}"
