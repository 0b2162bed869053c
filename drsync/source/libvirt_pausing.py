"""Holds a domain still for the instant of a capture, and lets it go on whatever happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import libvirt

from drsync.source.libvirt_connection import LibvirtDomain

_PAUSED_BY_US: Final = "paused-by-drsync"
"""A file beside the layers while the guest is paused: whoever finds it after a crash lets the guest go on."""


class Pausing:
    """Pauses a domain. What libvirt refuses is raised as LibvirtRefused."""

    def __init__(self, domain: LibvirtDomain, directory: Path) -> None:
        """`directory` is the VM's own, and outlives this process: in it is noted that the domain is paused."""
        self._domain = domain
        self._mark = directory / _PAUSED_BY_US

    def state(self) -> tuple[int, int]:
        """The domain's state and its reason (virDomainState)."""
        state, reason = self._domain.call("virDomainGetState", self._domain.handle.state)
        return state, reason

    def resume(self) -> None:
        """Let it go on, unless it is not paused, or not by a request."""
        if self.state() == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER):
            self._domain.call("virDomainResume", self._domain.handle.resume)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The guest stands still inside, if it was running. After a crash in between, the next survey lets it go on."""
        if self.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
            yield
            return
        self._mark.write_text(f"{self._domain.uuid} {self._domain.run_id}")
        try:
            self._domain.call("virDomainSuspend", self._domain.handle.suspend)
            yield
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Let a guest go on that this or an earlier drsync has paused."""
        try:
            paused = self._mark.read_text()
        except FileNotFoundError:
            return
        if paused == f"{self._domain.uuid} {self._domain.run_id}":
            self.resume()
        self._mark.unlink(missing_ok=True)
