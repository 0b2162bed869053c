"""`drsync daemon --role maintenance`: prunes the repository and keeps its locks, and captures nothing."""

import logging
import os
import queue
import signal
import sys
from types import FrameType

from drsync.agenda import chores_of
from drsync.cli.app import App
from drsync.config import Config
from drsync.daemon import POLL_S, Request
from drsync.errors import DrsyncError
from drsync.keyfile import read_key_file
from drsync.maintenance import Maintenance
from drsync.session import Session
from drsync.systemd import Notifier
from drsync.units import format_duration

_LOGGER = logging.getLogger(__name__)

_REQUESTS = {signal.SIGTERM: Request.STOP, signal.SIGINT: Request.STOP, signal.SIGHUP: Request.RELOAD}


def run_maintenance_role(app: App, config: Config) -> None:
    """Work until told to stop."""
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()

    def ask(number: int, _frame: FrameType | None) -> None:
        requests.put(_REQUESTS[signal.Signals(number)])

    for number in _REQUESTS:
        signal.signal(number, ask)
    notifier = Notifier.from_environment()
    maintenance = _begin(app, config)
    notifier.ready(_summary(config))
    _LOGGER.info("started: %s", _summary(config))
    poll_s = min(POLL_S, notifier.watchdog_s / 3) if notifier.watchdog_s else POLL_S
    while (request := _next(requests, poll_s)) is not Request.STOP:
        if request is Request.RELOAD:
            config, maintenance = _reloaded(app, config, maintenance, notifier)
        maintenance.check_alive()
        notifier.watchdog()
    notifier.stopping()
    if not maintenance.stop(config.daemon.stop_timeout_s):
        _LOGGER.warning("stopped in the middle of a chore, which goes on at the next start")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)  # its thread waits for the store; being cut off is safe at any step
    _LOGGER.info("stopped")


def _begin(app: App, config: Config) -> Maintenance:
    read_key_file(config.repository.key_file)
    maintenance = Maintenance(chores_of(Session(config, app.clock)), app.clock)
    maintenance.start()
    return maintenance


def _next(requests: "queue.SimpleQueue[Request]", timeout_s: float) -> Request | None:
    try:
        return requests.get(timeout=timeout_s)
    except queue.Empty:
        return None


def _reloaded(app: App, config: Config, maintenance: Maintenance, notifier: Notifier) -> tuple[Config, Maintenance]:
    """The configuration as it is now, at work; or the old one if it can't be used, or a chore is still at it."""
    notifier.reloading()
    try:
        following = app.config()
        read_key_file(following.repository.key_file)
        if not maintenance.stop(POLL_S):
            _LOGGER.info("a chore goes on as it was configured when it began")
        config, maintenance = following, _begin(app, following)
        _LOGGER.info("reloaded: %s", _summary(config))
    except DrsyncError as err:
        _LOGGER.error("kept the old configuration: %s; remedy: %s", err, err.remedy)
    notifier.ready(_summary(config))
    return config, maintenance


def _summary(config: Config) -> str:
    return f"maintenance of {config.repository.url}, prunes every {format_duration(config.prune.every_s)}"
