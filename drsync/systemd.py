"""Tells systemd how the daemon is: the sd_notify protocol, one datagram a message.

Without NOTIFY_SOCKET in the environment (no systemd, or not Type=notify) every
message is dropped, so the daemon need not know who started it.
"""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress


class Notifier:
    """Where the daemon's state goes. Never raises: systemd being away must not stop a capture."""

    def __init__(self, address: str, watchdog_s: float | None = None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = watchdog_s
        """How often at least systemd wants to hear `watchdog`; None if it doesn't."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Notifier":
        """The notifier that systemd's variables describe; watches only the process they are meant for."""
        watchdog_us = environ.get("WATCHDOG_USEC", "")
        watched = watchdog_us.isdecimal() and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        return cls(environ.get("NOTIFY_SOCKET", ""), int(watchdog_us) / 1e6 if watched else None)

    def ready(self, status: str) -> None:
        """The daemon works; `status` is what `systemctl status` shows."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """The configuration is being read again; `ready` follows."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The daemon lets running captures finish, then ends."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """The daemon lives."""
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
            sender.sendto(message.encode(), self._address)
