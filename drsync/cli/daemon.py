"""`drsync daemon`: the scheduler, in the foreground."""

import logging
import os
import signal
import sys
import time
from types import FrameType

import click

from drsync.cli.app import App, pass_app
from drsync.config import Config
from drsync.daemon import Daemon, Request
from drsync.duties import Duties
from drsync.errors import DrsyncError
from drsync.keyfile import read_key_file
from drsync.limits import Limits, described
from drsync.recovery.cloud.keeper import CloudKeeper
from drsync.repository import open_repository
from drsync.session import Session
from drsync.systemd import Notifier

_LOGGER = logging.getLogger(__name__)

LETTING_GO_S = 15.0
"""As long as the default limit of a frozen guest, and a bit; less than what systemd waits beyond `stop_timeout`."""
STOP_CLOUD_S = 5.0
"""As long as a block takes that is on its way to AWS; what comes after goes on with the next start."""
REQUESTS = {signal.SIGTERM: Request.STOP, signal.SIGINT: Request.STOP, signal.SIGHUP: Request.RELOAD}


@click.command("daemon")
@click.option(
    "--role",
    type=click.Choice(["host", "cloud", "maintenance"]),
    default="host",
    show_default=True,
    help="host = capture VMs; cloud = only bring points to AWS, beside the bucket; maintenance = prune.",
)
@pass_app
def command(app: App, role: str) -> None:
    """Capture every VM on its RPO until told to stop.

    Stays in the foreground and logs one line an outcome to stderr. SIGTERM lets
    running captures finish, SIGHUP reads the configuration again
    (examples/drsync.service). With [[cloud]], the newest points are also kept in AWS.
    """
    app.set_up_logging(least=1)
    config = app.config()
    if role == "cloud":
        from drsync.cli.daemon_cloud import run_cloud_role  # noqa: PLC0415 - hosts need not have it

        _reach(config, app)
        run_cloud_role(app, config)
        return
    if role == "maintenance":
        from drsync.cli.daemon_maintenance import run_maintenance_role  # noqa: PLC0415 - as above

        _reach(config, app)
        run_maintenance_role(app, config)
        return
    session = Session(config, app.clock)
    session.guests.let_go()
    session.reach.end_dead_reading()
    _reach(config, app)
    limits = Limits(config.limits, app.clock)
    daemon = Daemon(
        config,
        load=app.config,
        open_captures=lambda config: Duties(_open(config, app, limits)),
        clock=app.clock,
        notifier=Notifier.from_environment(),
    )
    for number, request in REQUESTS.items():
        signal.signal(number, _asking(daemon, request))
    keeper = CloudKeeper(lambda: daemon.config, app.clock)
    keeper.start()
    finished = daemon.run()
    keeper.stop(STOP_CLOUD_S)
    if not finished:
        wait_for_guests(daemon.config, app)
        # Its threads wait for QEMU or the store; joining them, as the interpreter would, could take for ever.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def _asking(daemon: Daemon, request: Request) -> "signal._HANDLER":
    def handle(_number: int, _frame: FrameType | None) -> None:
        daemon.ask(request)

    return handle


def wait_for_guests(config: Config, app: App) -> None:
    """Let the threads that are left behind let their guests go; if they don't, the next start does."""
    guests = Session(config, app.clock).guests
    deadline_s = app.clock.monotonic_s() + LETTING_GO_S
    while guests.any_held() and app.clock.monotonic_s() < deadline_s:
        time.sleep(0.05)


def _reach(config: Config, app: App) -> None:
    """End the start if the key is wrong; a store that is away now may come back, and is no reason to.

    One attempt without retries: systemd waits for READY. A reload does without
    it, since the watchdog wouldn't wait for a store that hangs.
    """
    settings = config.repository
    try:
        open_repository(Session(config, app.clock).raw_store, read_key_file(settings.key_file), settings.key_file)
    except DrsyncError as err:
        if not err.retryable:
            raise
        _LOGGER.warning("%s; goes on and tries again", err)


def _open(config: Config, app: App, limits: Limits) -> Session:
    """A session, if what is on this host can be used; it shares the limits with those before it."""
    read_key_file(config.repository.key_file)
    session = Session(config, app.clock, limits=limits)
    session.spool.writer_id()
    limits.set(config.limits)
    for line in described(config.limits, app.clock.now()):
        _LOGGER.info("limits: %s", line)
    return session
