"""What a test can switch on: what AWS does to its callers, and a double would not do by itself.

Set over HTTP (`PUT /_drsync/faults`, control.py) or, for a LocalStack that is about to start, as JSON in the variable
DRSYNC_LOCALSTACK_FAULTS. A field that is not named goes back to its default: `{}` switches all off.

    {
      "visibility_delay_s": 2,       a snapshot "does not exist" for so long after StartSnapshot
                                     (seen on AWS for up to 2 min: awslabs/coldsnap#43, #56)
      "completion_delay_s": 1,       a snapshot is `pending` for so long after CompleteSnapshot or CreateSnapshots
      "import_step_s": 0.5,          each step of an import task takes so long
      "pending_limit": 100,          snapshots that may be pending (known: a fixed quota)
      "corrupt_reads": 3,            the next GetSnapshotBlock answers have a wrong byte behind a right checksum
      "empty_pages": true,           each listing's first page is empty, with a NextToken (known: API reference)
      "rates": {"PutSnapshotBlock": 1000},      requests a second, more are throttled (known: quotas, 1000/s)
      "rules": [                     the next `times` calls of an operation are hit
        {"operation": "PutSnapshotBlock", "times": 3, "error": "throttle"},
        {"operation": "StartSnapshot", "times": 1, "error": {"code": "InternalServerException", "status": 500}},
        {"operation": "CompleteSnapshot", "times": 1, "after": true, "error": {"code": "…", "status": 500}},
        {"operation": "PutSnapshotBlock", "times": 1, "delay_s": 30}],   (stalls: awslabs/coldsnap#437)
      "import_failures": ["ClientError: Unsupported kernel version 5.9"]   the next import tasks fail with these
    }

With `"after": true` the operation takes place and its answer is lost, as when a connection breaks.
The answer to GET says how often each has hit (`fired`), so that a test can check that its fault took place.

Known are the error codes: EBS direct's RequestThrottledException is a 400 (botocore), EC2's RequestLimitExceeded a 503.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from drsync_localstack.refusal import Refused

T = TypeVar("T")

EBS_OPERATIONS = frozenset(
    {
        "StartSnapshot",
        "PutSnapshotBlock",
        "CompleteSnapshot",
        "GetSnapshotBlock",
        "ListSnapshotBlocks",
        "ListChangedBlocks",
    }
)


@dataclass(slots=True, kw_only=True)
class Rule:
    """The next `times` calls of `operation` are hit."""

    operation: str
    times: int
    error: Refused | None = None
    delay_s: float = 0.0
    after: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The faults that are on; by default none."""

    visibility_delay_s: float = 0.0
    completion_delay_s: float = 0.0
    import_step_s: float = 0.0
    pending_limit: int = 100
    corrupt_reads: int = 0
    empty_pages: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    import_failures: tuple[str, ...] = ()


class Faults:
    """The settings, and what has fired since they were set."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.settings = Settings()
        self._now = now
        self._lock = threading.Lock()
        self._fired: Counter[str] = Counter()
        self._import_failures: list[str] = []
        self._corrupt_reads = 0
        self._buckets: dict[str, tuple[float, float]] = {}

    def set(self, document: object) -> None:
        """Replace all settings.

        Raises:
            ValueError: something in the document is no setting.
        """
        settings = parse_settings(document)
        with self._lock:
            self.settings = settings
            self._fired.clear()
            self._buckets.clear()
            self._import_failures = list(settings.import_failures)
            self._corrupt_reads = settings.corrupt_reads

    def fired(self) -> dict[str, int]:
        """How often each fault has hit since `set`: by operation, or by the setting's name."""
        with self._lock:
            return dict(self._fired)

    def note(self, name: str) -> None:
        """A fault that its place applies itself has hit."""
        with self._lock:
            self._fired[name] += 1

    def hit(self, operation: str, *, after: bool = False) -> None:
        """Apply what is due to one call of an operation; called before it, and again after it.

        Raises:
            Refused: the call is to fail.
        """
        rule = self._due(operation, after=after)
        if rule is not None and rule.delay_s:
            time.sleep(rule.delay_s)
        if rule is not None and rule.error is not None:
            raise rule.error
        if not after and self._exceeds_rate(operation):
            self.note(operation)
            raise throttled(operation)

    def as_read(self, data: bytes) -> bytes:
        """A block as it arrives: as it is, unless it is to arrive with a wrong byte."""
        with self._lock:
            if not self._corrupt_reads:
                return data
            self._corrupt_reads -= 1
            self._fired["corrupt_reads"] += 1
        return bytes([data[0] ^ 1]) + data[1:]

    def next_import_failure(self) -> str | None:
        """The message that the next import task is to fail with."""
        with self._lock:
            if not self._import_failures:
                return None
            self._fired["import_failures"] += 1
            return self._import_failures.pop(0)

    def _due(self, operation: str, *, after: bool) -> Rule | None:
        with self._lock:
            for rule in self.settings.rules:
                if rule.operation == operation and rule.after == after and rule.times > 0:
                    rule.times -= 1
                    self._fired[operation] += 1
                    return rule
        return None

    def _exceeds_rate(self, operation: str) -> bool:
        """A token bucket that holds one second's requests."""
        rate = self.settings.rates.get(operation, math.inf)
        if rate == math.inf:
            return False
        with self._lock:
            tokens, then = self._buckets.get(operation, (rate, self._now()))
            now = self._now()
            tokens = min(rate, tokens + (now - then) * rate)
            self._buckets[operation] = (max(tokens - 1, 0.0) if tokens >= 1 else tokens, now)
        return tokens < 1


def throttled(operation: str) -> Refused:
    """What AWS answers to too many requests."""
    if operation in EBS_OPERATIONS:
        return Refused("RequestThrottledException", "Rate exceeded", reason="ACCOUNT_THROTTLED")
    return Refused("RequestLimitExceeded", "Request limit exceeded.", status=503)


def parse_settings(document: object) -> Settings:
    """The settings that a JSON document names.

    Raises:
        ValueError: something in it is no setting.
    """
    try:
        fields = dict(_given(document, dict))
        fields["rules"] = tuple(_parse_rule(rule) for rule in _given(fields.get("rules", []), list))
        fields["import_failures"] = tuple(_given(one, str) for one in _given(fields.get("import_failures", []), list))
        settings = Settings(**fields)
        for number in (settings.visibility_delay_s, settings.completion_delay_s, settings.import_step_s):
            _number(number)
        for rate in _given(settings.rates, dict).values():
            _number(rate)
        _given(settings.pending_limit, int)
        _given(settings.corrupt_reads, int)
        _given(settings.empty_pages, bool)
    except (TypeError, KeyError, ValueError) as err:
        raise ValueError(f"not a setting of faults: {err}") from err
    return settings


def _parse_rule(rule: object) -> Rule:
    fields = dict(_given(rule, dict))
    error = fields.pop("error", None)
    _given(fields["operation"], str)
    _given(fields["times"], int)
    _number(fields.get("delay_s", 0.0))
    if error == "throttle":
        fields["error"] = throttled(fields["operation"])
    elif error is not None:
        _given(error, dict)
        fields["error"] = Refused(
            error["code"],
            error.get("message", "switched on by a test"),
            status=error.get("status", 400),
            reason=error.get("reason", ""),
        )
    return Rule(**fields)


def _given(value: Any, kind: type[T]) -> T:
    """A value that is of the kind it has to be; a number is no truth value."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _number(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise TypeError(f"{value!r} is no number from 0 on")
