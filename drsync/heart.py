"""When the daemon's heartbeats go out: soon after there is news, and not too often, however many VMs there are.

    a VM was looked at ─▶ tell ─┐
    another one        ─▶ tell ─┴▶ one heartbeat of all ── every_s ──▶ the next one, if there is news

A heartbeat is a request that costs, and it tells of all VMs of the host. So what the
repository knows of an idle VM is `every_s` old at most, beside what its RPO allows.
"""

import logging
import threading
from collections.abc import Callable

_LOGGER = logging.getLogger(__name__)


class Heart:
    """Beats when there is news, in a thread of its own: a store that hangs holds up no capture."""

    def __init__(self, beat: Callable[[], None], every_s: float) -> None:
        """`beat` writes a heartbeat."""
        self._beat = beat
        self._every_s = every_s
        self._news = threading.Event()
        self._stopped = threading.Event()
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to beat."""
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def tell(self) -> None:
        """There is news. Once it was stopped, it is told at once, in the caller's thread."""
        if self._stopped.is_set():
            self._try()
        self._news.set()

    def stop(self) -> None:
        """Beat no more, but for what there is to tell still."""
        self._stopped.set()
        self._news.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until what there was to tell when it was stopped is told; whether it is."""
        return self._ended.wait(timeout_s)

    def _run(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            self._try()
            if self._stopped.is_set() or self._stopped.wait(self._every_s):
                break
        if self._news.is_set():
            self._try()
        self._ended.set()

    def _try(self) -> None:
        try:
            self._beat()
        except Exception as err:  # noqa: BLE001  the heartbeat is news, not data: the next one tells as much
            _LOGGER.debug("no heartbeat: %s", err)
