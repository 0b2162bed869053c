"""Holds a guest still, and lets it go again whatever happens.

    reach ─▶ begin ─▶ freeze ─▶ pause ─▶ (the instant) ─▶ let_go: resume, thaw
               │ note in the spool,                            │ note removed
               │ on the disk                                   ▼
               └ watchdog thread: thaws after `limit_s`, wherever the others are

A guest that stays frozen is worse than a point that is missing. So it is let go
by whoever comes first: the cycle itself, on every way out; the watchdog, when the
cycle hangs; and, when the process was killed, the next one on this host that finds the
note (`let_go_of_the_dead`), before it does anything else. A pause has no watchdog, as QEMU
serves one client a socket: all that is waited for during one is bounded instead.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from drsync.errors import CaptureFailed, DomainMissing, SourceError, SourceLost, SourceUnreachable
from drsync.model import Clock
from drsync.source import INSTANT_TIMEOUT_S, Source
from drsync.source.agent import ANSWER_S, AgentAbsent, AgentFailed, AgentRefused, GuestAgent
from drsync.spool import VmSpool, boot_id
from drsync.spooled import HeldGuest

_LOGGER = logging.getLogger(__name__)

LET_GO_S: Final = 30.0
"""How long letting go is tried; then the note stays, and the next cycle of this VM tries again."""
_AGAIN_S: Final = 0.5

OpenAgent = Callable[[], GuestAgent]
OpenSource = Callable[[], Source]


class Hold:
    """One guest, held still once around one instant."""

    def __init__(
        self,
        spool: VmSpool,
        open_agent: OpenAgent | None,
        open_source: OpenSource,
        clock: Clock,
        *,
        limit_s: float,
        let_go_s: float = LET_GO_S,
    ) -> None:
        """`limit_s` is the longest that the guest may be held; `let_go_s` how long letting it go is tried."""
        self._spool = spool
        self._open_agent = open_agent
        self._open_source = open_source
        self._clock = clock
        self._limit_s = limit_s
        self._let_go_s = let_go_s
        self._lock = threading.RLock()  # the cycle and the watchdog both use the agent
        self._agent: GuestAgent | None = None
        self._watchdog: threading.Timer | None = None
        self._began_s = 0.0
        self._may_be_frozen = False
        self._may_be_paused = False
        self.file_systems = 0
        """How many were frozen."""
        self.frozen_ms: float | None = None
        """From the request to freeze to the agent's word that all is thawed; None: nothing was frozen."""
        self.paused_ms: float | None = None
        """As long as the guest's processors stood still for this; None: they did not."""
        self.problem = ""
        """Why the guest's file systems were not held frozen over the whole instant; empty if they were."""

    @property
    def vm(self) -> str:
        return self._spool.vm

    def reach(self, source: Source) -> None:
        """Get the agent ready; what is wrong with it becomes the `problem`, and nothing is frozen."""
        if self._open_agent is None:
            self._note_problem("no guest agent is configured")
        elif not source.is_running():
            self._note_problem("the guest does not run")
        else:
            try:
                self._agent = self._open_agent()
            except AgentFailed as err:
                self._note_problem(f"no answer from the guest agent: {err}")

    def begin(self, *, pauses: bool) -> None:
        """Note that the guest is about to be frozen (if its agent was reached) and paused, and start the watchdog.

        Raises:
            SpoolUnusable: it can't be noted, and so it must not be done.
        """
        self._began_s = self._clock.monotonic_s()
        if self._agent is None and not pauses:
            return
        held = HeldGuest(
            boot_id=boot_id(),
            pid=os.getpid(),
            vm_run=self._agent.vm_run if self._agent else "",
            paused=pauses,
            since=self._clock.now().isoformat(),
        )
        self._spool.hold(held)
        self._began_s = self._clock.monotonic_s()  # the disk may have been slow to take the note
        if self._agent is not None:
            self._watchdog = threading.Timer(self._limit_s, self._expire)
            self._watchdog.daemon = True
            self._watchdog.start()

    def freeze(self) -> None:
        """Freeze the guest's file systems; if that does not work, they are thawed, and `problem` says why."""
        with self._lock:
            if self._agent is None:
                return
            self._may_be_frozen = True
            self._frozen_s = self._clock.monotonic_s()
            try:
                self.file_systems = self._agent.freeze(timeout_s=self.left_s())
            except AgentRefused as err:
                self._may_be_frozen = False
                self._note_problem(str(err))
            except AgentFailed as err:
                self._note_problem(f"the guest did not freeze: {err}")
                self._thaw()
            else:
                if self.file_systems == 0:
                    self._note_problem("the guest agent found no file system to freeze")

    def pause(self, source: Source) -> bool:
        """Stop the guest's processors; whether they stand still now.

        Raises:
            SourceLost: QEMU does not answer; `let_go` tries in a new session.
        """
        self._may_be_paused = True
        self._paused_s = self._clock.monotonic_s()
        try:
            self._may_be_paused = source.pause(timeout_s=self.left_s())
        except CaptureFailed as err:
            self._may_be_paused = False
            _LOGGER.warning("vm=%s was not paused: %s", self.vm, err)
            return False
        return True  # also a guest that did not run stands still

    @property
    def is_frozen(self) -> bool:
        """Whether, as far as is known, all file systems are frozen now."""
        return self._may_be_frozen and not self.problem

    def left_s(self) -> float:
        """How much longer the guest may be held."""
        return max(0.0, self._limit_s - (self._clock.monotonic_s() - self._began_s))

    def patience_s(self) -> float:
        """How long may be waited for others, so that there is time left for the instant itself."""
        return max(0.0, self.left_s() - self._limit_s / 4)

    def call_limit_s(self) -> float:
        """How long the call that fixes the instant may take: a paused guest has no watchdog that would let it go."""
        return self.left_s() if self._may_be_paused else INSTANT_TIMEOUT_S

    def let_go(self, source: Source) -> None:
        """Resume and thaw, whatever was done; if it can't be done now, the note stays."""
        try:
            self._resume(source)
        finally:
            with self._lock:
                if self._watchdog is not None:
                    self._watchdog.cancel()
                if self._may_be_frozen:
                    self._thaw()
                self._close_agent()
                if not self._may_be_frozen and not self._may_be_paused:
                    self._spool.let_go()

    def _expire(self) -> None:
        """The watchdog's part: the guest was held too long."""
        with self._lock:
            if self._may_be_frozen:
                self._note_problem(f"the instant was not over in {self._limit_s:g} s")
                _LOGGER.warning("vm=%s is thawed by the watchdog: %s", self.vm, self.problem)
                self._thaw()

    def _thaw(self) -> None:
        """Thaw, again and again until it is known to be done or `let_go_s` are over."""
        deadline_s = time.monotonic() + self._let_go_s
        while self._may_be_frozen:
            try:
                if self._agent is None and self._open_agent is not None:
                    self._agent = self._open_agent()
                if self._agent is not None:
                    self._thawed(self._agent.thaw(timeout_s=ANSWER_S))
            except AgentAbsent:
                self._may_be_frozen = False
                self._note_problem("the VM ended")
            except AgentFailed as err:
                self._close_agent()
                self._note_problem(f"the guest did not thaw at once: {err}")
                if time.monotonic() >= deadline_s:
                    _LOGGER.error("vm=%s may still be frozen: %s", self.vm, err)
                    return
                time.sleep(_AGAIN_S)

    def _thawed(self, count: int) -> None:
        self._may_be_frozen = False
        self.frozen_ms = (self._clock.monotonic_s() - self._frozen_s) * 1000
        if count != self.file_systems:
            self._note_problem(f"{self.file_systems} file systems were frozen, but {count} were still so at the end")

    def _resume(self, source: Source) -> None:
        deadline_s = time.monotonic() + self._let_go_s
        while self._may_be_paused:
            try:
                _resume(source, self._open_source)
                self._may_be_paused = False
                self.paused_ms = (self._clock.monotonic_s() - self._paused_s) * 1000
            except (SourceUnreachable, DomainMissing):
                self._may_be_paused = False  # it ended
            except SourceError as err:
                if time.monotonic() >= deadline_s:
                    _LOGGER.error("vm=%s may still be paused: %s", self.vm, err)
                    return
                time.sleep(_AGAIN_S)

    def _close_agent(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def _note_problem(self, problem: str) -> None:
        self.problem = self.problem or problem


def let_go_of_the_dead(spool: VmSpool, open_agent: OpenAgent | None, open_source: OpenSource) -> str:
    """Let a guest go that a process held which has ended; call it under the VM's lock.

    Returns why that did not work; empty if no guest is held any more.
    """
    held = spool.held()
    if held is None:
        return ""
    problem = (_resume_of_the_dead(open_source) if held.paused else "") or (
        _thaw_of_the_dead(held.vm_run, open_agent) if held.vm_run else ""
    )
    if problem:
        _LOGGER.warning("vm=%s may be %s since %s: %s", spool.vm, held.what, held.since, problem)
    else:
        spool.let_go()
        _LOGGER.warning("vm=%s was let go: a process held it %s since %s and ended", spool.vm, held.what, held.since)
    return problem


def _resume_of_the_dead(open_source: OpenSource) -> str:
    try:
        with open_source() as source:
            source.resume(timeout_s=ANSWER_S)
    except (SourceUnreachable, DomainMissing):
        return ""  # the VM is off, and when it starts it is not paused
    except SourceError as err:
        return str(err)
    return ""


def _thaw_of_the_dead(vm_run: str, open_agent: OpenAgent | None) -> str:
    if open_agent is None:
        return "no guest agent is configured any more"
    try:
        agent = open_agent()
    except AgentAbsent:
        return ""  # the VM is off
    except AgentFailed as err:
        return str(err)
    try:
        if agent.vm_run == vm_run and agent.is_frozen(timeout_s=ANSWER_S):
            agent.thaw(timeout_s=ANSWER_S)
    except AgentFailed as err:
        return str(err)
    finally:
        agent.close()
    return ""


def _resume(source: Source, open_source: OpenSource) -> None:
    """Resume; in a new session if this one has broken, as it does when QEMU does not answer in time."""
    try:
        source.resume(timeout_s=ANSWER_S)
    except SourceLost:
        with open_source() as fresh:
            fresh.resume(timeout_s=ANSWER_S)
