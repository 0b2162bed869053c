"""Connections to libvirt, and what its errors mean.

libvirt has one event loop a process. It is started with the first connection
and runs in a thread of its own: without it no event comes, and a daemon that
hangs is never noticed.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Final, TypeVar

import libvirt

from drsync.errors import DomainMissing, DrsyncError, LibvirtUnreachable, SourceLost

T = TypeVar("T")
log = logging.getLogger(__name__)

_KEEPALIVE_S: Final = 5
_KEEPALIVE_TRIES: Final = 6
"""A libvirtd that answers nothing for half a minute is gone: the connection breaks instead of waiting for ever."""


_END_LOOKS: Final = 10
_END_PAUSE_S: Final = 0.05


class LibvirtRefused(Exception):
    """libvirt understood what was asked and said no. Translated by who knows what was meant."""

    def __init__(self, operation: str, code: int, text: str) -> None:
        super().__init__(f"{operation}: {text}")
        self.operation = operation
        self.code = code
        self.text = text


def connect(vm: str, uri: str) -> Any:
    """A connection (libvirt.virConnect) for the sake of `vm`.

    Raises:
        LibvirtUnreachable: nobody answers there, or access is refused.
    """
    _prepare_library()
    try:
        connection = libvirt.open(uri)
        with suppress(libvirt.libvirtError):  # an old daemon can't; then a hang is noticed by time limits only
            connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_TRIES)
    except libvirt.libvirtError as err:
        raise LibvirtUnreachable(vm=vm, uri=uri, problem=_text(err)) from err
    return connection


@contextmanager
def connected(uri: str) -> Iterator[Any]:
    """A connection that is closed again; for looking around at the host.

    Raises:
        LibvirtUnreachable: as `connect`, also when a request in the block fails.
    """
    connection = connect("*", uri)
    try:
        yield connection
    except libvirt.libvirtError as err:
        raise LibvirtUnreachable(vm="*", uri=uri, problem=_text(err)) from err
    finally:
        _close(connection)


class LibvirtDomain:
    """One domain over a connection of its own; every call through it has its errors translated.

    It is bound to the run that it was opened in: when the domain is started,
    stopped or gone meanwhile, everything raises SourceLost.
    """

    def __init__(self, vm: str, uri: str, name: str) -> None:
        """Find the domain by its name or UUID.

        Raises:
            LibvirtUnreachable: as `connect`.
            DomainMissing: there is none; the message has those that there are.
        """
        self.vm = vm
        self.uri = uri
        self.connection = connect(vm, uri)
        self._closed = False
        try:
            self.handle = self._find(name)
            self.run_id: int = self.handle.ID()
            self.uuid: str = self.handle.UUIDString()
            self.name: str = self.handle.name()
        except libvirt.libvirtError as err:
            self.close()
            raise LibvirtUnreachable(vm=vm, uri=uri, problem=_text(err)) from err
        except BaseException:
            self.close()
            raise

    @property
    def active(self) -> bool:
        """Whether it ran when it was opened."""
        return self.run_id >= 0

    def call(self, operation: str, function: Callable[[], T]) -> T:
        """What `function` gives.

        Raises:
            LibvirtRefused: libvirt said no, and the domain is as before.
            SourceLost: the connection broke, or the domain's run has ended.
        """
        if self._closed:
            raise self.lost(operation, "the session was closed")
        try:
            return function()
        except libvirt.libvirtError as err:
            problem = self._end_after(err.get_error_code())
            if problem:
                raise self.lost(operation, problem) from err
            raise LibvirtRefused(operation, err.get_error_code(), _text(err)) from err

    def check_run(self, operation: str) -> None:
        """Check that the domain is still in the run that it was opened in.

        Raises:
            SourceLost: it is not.
        """
        if self._closed:
            raise self.lost(operation, "the session was closed")
        problem = self._end()
        if problem:
            raise self.lost(operation, problem)

    def lost(self, operation: str, problem: str) -> SourceLost:
        return SourceLost(vm=self.vm, operation=operation, problem=problem)

    def missing(self, problem: str) -> DomainMissing:
        return DomainMissing(vm=self.vm, uri=self.uri, domain=self.name, problem=problem)

    def close(self) -> None:
        """End the connection; the domain runs on. Safe to call twice."""
        if not self._closed:
            self._closed = True
            _close(self.connection)

    def _find(self, name: str) -> Any:
        for look in (self.connection.lookupByName, self.connection.lookupByUUIDString):
            with suppress(libvirt.libvirtError):
                return look(name)
        names = sorted(domain.name() for domain in self.connection.listAllDomains())
        known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        problem = f"there are: {known or 'none'}"
        raise DomainMissing(vm=self.vm, uri=self.uri, domain=name, problem=problem)

    def _end_after(self, code: int) -> str:
        """What ended the session, after an error: libvirt notices a QEMU's end a moment after its monitor broke."""
        vague = {libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_OPERATION_FAILED}
        for _ in range(_END_LOOKS if code in vague else 1):
            problem = self._end()
            if problem:
                return problem
            time.sleep(_END_PAUSE_S if code in vague else 0)
        return ""

    def _end(self) -> str:
        """What ended the session, if something did: asked of libvirt anew, as its error codes don't tell it."""
        try:
            if not self.connection.isAlive():
                return "the connection to libvirt broke"
            # By its UUID and anew: a handle keeps the id that it was made with.
            run_id = self.connection.lookupByUUIDString(self.uuid).ID()
        except libvirt.libvirtError as err:
            return _text(err)
        if run_id == self.run_id:
            return ""
        return "the domain was shut off" if run_id < 0 else "the domain was started again"


def is_error(err: LibvirtRefused, *names: str) -> bool:
    """Whether a refusal is one of libvirt's errors by these names (VIR_ERR_...)."""
    return err.code in {getattr(libvirt, name) for name in names}


@cache  # once a process, as libvirt's event loop and error handler are
def _prepare_library() -> None:
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it would print what is raised as well
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_run_events, name="libvirt-events", daemon=True).start()


def _run_events() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as err:
            log.debug("libvirt's event loop: %s", err)


def _text(err: Any) -> str:
    return str(err.get_error_message() or err)


def _close(connection: Any) -> None:
    with suppress(libvirt.libvirtError, DrsyncError):
        connection.close()
