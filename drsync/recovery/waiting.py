"""Waits until a guest is up: its agent answers, or a port of its is open."""

import socket
from collections.abc import Callable, Sequence
from typing import Final

from drsync.config.plan_values import Wait, WaitFor
from drsync.errors import NotUp
from drsync.model import Clock
from drsync.target.libvirt_host import LibvirtHost

_EVERY_S: Final = 0.5
_CONNECT_TIMEOUT_S: Final = 2.0


def wait_until_up(
    host: LibvirtHost,
    uuid: str,
    domain: str,
    wait: Wait,
    *,
    timeout_s: float,
    clock: Clock,
    sleep: Callable[[float], None],
) -> None:
    """Return when the guest is up.

    Raises:
        NotUp: it was not in time, or its domain stopped.
    """
    deadline_s = clock.monotonic_s() + timeout_s
    while True:
        if not host.is_active(uuid):
            raise NotUp(domain=domain, uri=host.uri, timeout_s=timeout_s, problem="it has stopped")
        problem = _not_yet(host, uuid, wait)
        if not problem:
            return
        if clock.monotonic_s() >= deadline_s:
            raise NotUp(domain=domain, uri=host.uri, timeout_s=timeout_s, problem=problem)
        sleep(_EVERY_S)


def _not_yet(host: LibvirtHost, uuid: str, wait: Wait) -> str:
    """Why the guest is not up; empty if it is."""
    match wait.what:
        case WaitFor.RUNNING:
            return ""
        case WaitFor.AGENT:
            return "" if host.agent_answers(uuid) else "its guest agent does not answer"
        case WaitFor.TCP:
            return _port_is_closed(host, uuid, wait)


def _port_is_closed(host: LibvirtHost, uuid: str, wait: Wait) -> str:
    addresses = [wait.host] if wait.host else host.addresses(uuid)
    if not addresses:
        return "its address is not known (write it in the plan: tcp:HOST:PORT)"
    return closed(addresses, wait.port)


def closed(addresses: Sequence[str], port: int) -> str:
    """Why nobody can be reached at a port of any of these addresses; empty if somebody can."""
    for address in addresses:
        try:
            socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT_S).close()
        except OSError:
            continue
        return ""
    return f"nobody listens at port {port} of {', '.join(addresses)}"
