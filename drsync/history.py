"""How the cycles of a VM have ended: what the daemon's log says of it, and when it is to be tried again."""

import logging
from enum import Enum
from typing import Final

from drsync.capture import Outcome, Result
from drsync.catalog import Point, point_of
from drsync.config import VmSettings
from drsync.errors import DrsyncError, Fenced
from drsync.model import Clock, Consistency
from drsync.units import format_duration, format_size

_LOGGER = logging.getLogger(__name__)

_REPEAT_S: Final = 3600.0
"""A failure that goes on is logged once in this time; each attempt would bury what is new."""


class Verdict(Enum):
    """When a VM is to be captured again."""

    NEXT = "in the next slot"
    SOON = "after a back-off"
    NEVER = "when the configuration is read again"


class History:
    """How the cycles of one VM have ended; says so in the log."""

    def __init__(self, vm: VmSettings, clock: Clock) -> None:
        self._vm = vm
        self._clock = clock
        self.failures = 0
        """In a row."""
        self.verdict = Verdict.NEXT
        self._failing_since_s = 0.0
        self._said: type[Exception] | None = None
        self._said_at_s = 0.0

    def note(self, result: Outcome | Exception, took_s: float) -> Verdict:
        """Take in how a cycle ended."""
        name = self._vm.name
        if isinstance(result, Fenced):
            self.verdict = Verdict.NEVER
            _LOGGER.error("vm=%s fenced: %s, until drsync is reloaded; remedy: %s", name, result, result.remedy)
        elif isinstance(result, Exception):
            retry = not isinstance(result, DrsyncError) or result.retryable
            self.verdict = Verdict.SOON if retry else Verdict.NEXT
            self._failed(result)
        else:
            self.verdict = Verdict.NEXT
            self._succeeded(result, took_s)
        return self.verdict

    def _succeeded(self, outcome: Outcome, took_s: float) -> None:
        if self.failures:
            failing = format_duration(self._clock.monotonic_s() - self._failing_since_s)
            _LOGGER.info("vm=%s works again after %d failures in %s", self._vm.name, self.failures, failing)
        self.failures, self._said = 0, None
        level = logging.DEBUG if outcome.result is Result.UNCHANGED else logging.INFO
        _LOGGER.log(level, "%s", outcome_line(outcome, took_s))

    def _failed(self, err: Exception) -> None:
        now_s = self._clock.monotonic_s()
        self.failures += 1
        if self.failures == 1:
            self._failing_since_s = now_s
        if self._said is not type(err) or now_s - self._said_at_s >= _REPEAT_S:
            self._said, self._said_at_s = type(err), now_s
            again = "with back-off" if self.verdict is Verdict.SOON else f"every {format_duration(self._vm.rpo_s)}"
            self._say(err, again)

    def _say(self, err: Exception, when: str) -> None:
        vm, count = self._vm.name, self.failures
        if isinstance(err, DrsyncError):
            message = "vm=%s failed code=%d times=%d, tried again %s: %s; remedy: %s"
            _LOGGER.error(message, vm, err.code, count, when, err, err.remedy)
        else:
            _LOGGER.error("vm=%s failed times=%d, tried again %s: a bug in drsync", vm, count, when, exc_info=err)


def outcome_line(outcome: Outcome, took_s: float) -> str:
    """What the log says of a cycle that went well."""
    took = f"took={took_s:.2f}s"
    if outcome.result is Result.SEEDING:
        return f"vm={outcome.vm} seed stopped, to be gone on with {took}"
    if outcome.result is Result.SEED_DUE:
        return f"vm={outcome.vm} has to be seeded: its disks are read live"
    point = point_of(outcome.segment, None) if outcome.segment is not None else None
    if point is None or outcome.result is Result.UNCHANGED:
        return f"vm={outcome.vm} unchanged point={point.number if point else '-'} {took}"
    sizes = f"changed={_size(point.changed_bytes)} stored={_size(point.stored_bytes)}"
    reason = f' reason="{point.reason}"' if point.reason else ""
    return f"vm={outcome.vm} point={point.number} kind={point.kind} {sizes} {took}{reason}{_quiesced(point)}"


def _quiesced(point: Point) -> str:
    """What was reached of what was asked for beyond a crash-consistent point."""
    told = point.quiesce
    if told is None:
        return ""
    words = [f"consistency={point.consistency}"] if told.asked is Consistency.FILESYSTEM else []
    words += [f'not-frozen="{told.reason}"'] if told.reason else []
    if told.group is not None:
        words.append(f"group={told.group.name} skew={told.group.skew_ms:.1f}ms")
        words += [] if told.group.consistent else [f'not-together="{told.group.reason}"']
    return "".join(f" {word}" for word in words)


def _size(size_bytes: int) -> str:
    return format_size(size_bytes).replace(" ", "")
