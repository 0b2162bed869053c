"""The guests of a configuration's VMs: their agents, how they are quiesced, and that none stays held still."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Final

from drsync.config import LibvirtSource, VmSettings
from drsync.errors import CaptureRunning, DrsyncError
from drsync.model import Clock
from drsync.protection import Protection, libvirt_needed
from drsync.quiesce import Company, Quiesce, QuiescePolicy
from drsync.source import Source
from drsync.source.agent import ANSWER_S, AgentInfo, AgentSocket, GuestAgent
from drsync.spool import Spool

_LOGGER = logging.getLogger(__name__)

_AT_A_TIME: Final = 8
"""How many guests are let go at a time."""


class Guests:
    """Thread-safe, for different VMs at a time."""

    def __init__(
        self, spool: Spool, protection: Protection, open_source: Callable[[VmSettings], Source], clock: Clock
    ) -> None:
        """`open_source` opens sessions that need no repository: they only resume."""
        self._spool = spool
        self._protection = protection
        self._open_source = open_source
        self._clock = clock

    def quiesce(self, vm: VmSettings, company: Company | None = None) -> Quiesce:
        """What is done around one capture of a VM."""
        return Quiesce(
            QuiescePolicy(consistency=vm.consistency, limit_s=vm.freeze_timeout_s, on_failure=vm.on_freeze_failure),
            self._spool.vm(vm.name),
            (lambda: self._open_agent(vm)) if _has_agent(vm) else None,
            lambda: self._open_source(vm),
            self._clock,
            company,
        )

    def about_agent(self, vm: VmSettings) -> AgentInfo:
        """What the agent in the VM's guest says of itself. Nothing is frozen.

        Raises:
            AgentFailed: it does not answer.
            CaptureRunning: a capture uses it now.
        """
        with self._spool.vm(vm.name).locked(), closing(self._open_agent(vm)) as agent:
            return agent.about(timeout_s=ANSWER_S)

    def let_go(self) -> None:
        """Thaw and resume every guest that a process held which has ended; what does not work now is logged."""
        names = self._spool.held_vms()
        if not set(names) <= {vm.name for vm in self._protection.vms}:
            self._look()
        held = [vm for vm in self._protection.vms if vm.name in names]
        if held:
            with ThreadPoolExecutor(_AT_A_TIME) as pool:
                list(pool.map(self.let_go_of, held))

    def let_go_of(self, vm: VmSettings) -> None:
        """Thaw and resume the guest of one VM, as `let_go`."""
        spool = self._spool.vm(vm.name)
        if spool.held() is None:
            return
        try:
            with spool.locked():
                self.quiesce(vm).recover()
        except CaptureRunning:
            pass  # a live process looks after its own
        except DrsyncError as err:
            _LOGGER.warning("vm=%s may still be held: %s", vm.name, err)

    def are_held(self, vm_name: str) -> bool:
        """Whether this process holds the VM's guest still now."""
        held = self._spool.vm(vm_name).held()
        return held is not None and held.pid == os.getpid()

    def any_held(self) -> bool:
        """Whether this process holds any guest still now."""
        return any(map(self.are_held, self._spool.held_vms()))

    def _look(self) -> None:
        """Ask for the VMs that patterns find: a note names one that the configuration does not."""
        try:
            self._protection.look()
        except DrsyncError as err:
            _LOGGER.warning("some guests may still be held, and libvirt can't be asked for them: %s", err)

    def _open_agent(self, vm: VmSettings) -> GuestAgent:
        if isinstance(vm.source, LibvirtSource):
            with libvirt_needed(vm.name):
                from drsync.source.libvirt_agent import LibvirtAgent  # noqa: PLC0415 - as libvirt_needed
            return LibvirtAgent(vm.name, vm.source.uri, vm.source.domain or vm.name)
        if vm.source.agent is None:
            raise ValueError(vm.name)
        return AgentSocket(vm.source.agent, clock=self._clock)


def _has_agent(vm: VmSettings) -> bool:
    """Whether there is a way to the guest's agent; for a domain, libvirt knows."""
    return isinstance(vm.source, LibvirtSource) or vm.source.agent is not None
