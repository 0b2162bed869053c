"""The guest agent of a domain, by way of libvirt, which owns its channel.

libvirt's calls to an agent wait for ever unless told otherwise, so every call here
sets a limit first. libvirt itself gets in step with the agent before each command
(guest-sync, qemuAgentGuestSync): one that hangs is not asked to freeze.
"""

from collections.abc import Callable
from math import ceil
from typing import Final, TypeVar

import libvirt

from drsync.errors import DomainMissing, LibvirtUnreachable, SourceLost
from drsync.source.agent import ANSWER_S, AgentAbsent, AgentInfo, AgentRefused, AgentSilent
from drsync.source.libvirt_connection import LibvirtDomain, LibvirtRefused, is_error

T = TypeVar("T")

_SILENT: Final = ("VIR_ERR_AGENT_UNRESPONSIVE", "VIR_ERR_AGENT_UNSYNCED", "VIR_ERR_OPERATION_TIMEOUT")
"""Errors after which it is not known whether the agent does, or will do, what it was asked for."""


class LibvirtAgent:
    """A GuestAgent over a connection of its own, so that another thread can let the guest go."""

    def __init__(self, vm: str, uri: str, domain: str, *, timeout_s: float = ANSWER_S) -> None:
        """Find the domain, and see that its agent answers.

        Raises:
            AgentAbsent: there is no such domain, or it is off.
            AgentSilent: libvirt or the agent does not answer.
        """
        try:
            self._domain = LibvirtDomain(vm, uri, domain)
        except DomainMissing as err:
            raise AgentAbsent(str(err)) from err
        except LibvirtUnreachable as err:
            raise AgentSilent(str(err)) from err
        try:
            if not self._domain.active:
                raise AgentAbsent("the domain is off")
            self._call("virDomainGetTime", self._domain.handle.getTime, timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def vm_run(self) -> str:
        return f"{self._domain.uuid}-{self._domain.run_id}"

    def about(self, *, timeout_s: float) -> AgentInfo:
        """libvirt passes on neither the agent's version nor what it may do."""
        return AgentInfo(version="", can_freeze=True)

    def is_frozen(self, *, timeout_s: float) -> bool:
        """libvirt has no call that tells; thawing what is not frozen does no harm."""
        return True

    def freeze(self, *, timeout_s: float) -> int:
        return self._call("virDomainFSFreeze", lambda: int(self._domain.handle.fsFreeze(None, 0)), timeout_s)

    def thaw(self, *, timeout_s: float) -> int:
        return self._call("virDomainFSThaw", lambda: int(self._domain.handle.fsThaw(None, 0)), timeout_s)

    def close(self) -> None:
        self._domain.close()

    def _call(self, operation: str, function: Callable[[], T], timeout_s: float) -> T:
        """Ask the agent, within whole seconds."""
        handle = self._domain.handle
        seconds = max(1, ceil(timeout_s))
        try:
            self._domain.call("virDomainAgentSetResponseTimeout", lambda: handle.agentSetResponseTimeout(seconds, 0))
            return self._domain.call(operation, function)
        except SourceLost as err:
            raise self._ended(err) from err
        except LibvirtRefused as err:
            if is_error(err, *_SILENT):
                raise AgentSilent(f"it gave no answer in time: {err.text}") from err
            raise AgentRefused(err.text) from err

    def _ended(self, err: SourceLost) -> AgentAbsent | AgentSilent:
        """A domain whose run has ended holds nothing frozen; a connection that broke tells nothing of it."""
        with_connection = True
        try:
            with_connection = bool(self._domain.connection.isAlive())
        except libvirt.libvirtError:
            with_connection = False
        problem = str(err.fields["problem"])
        return AgentAbsent(problem) if with_connection else AgentSilent(problem)
