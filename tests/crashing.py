"""A process that dies before or after any step: doubles that stand before a cycle's collaborators.

    bomb = Bomb(7, "after")
    with suppress(Crash):
        run_cycle(..., cast(VmSpool, Mined(spool, bomb)), lambda: cast(Source, Mined(source, bomb)), ...)
    assert bomb.fired_at

A dead process does nothing more: from the crash on, no call reaches anything,
so what `except` and `finally` would tidy up stays as it is.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal

from figures import count

When = Literal["before", "after"]
WHENS: Final[tuple[When, ...]] = ("before", "after")
READS_ONLY: Final = frozenset({"layer_path", "used_bytes", "state", "held", "is_running"})
"""Steps that leave nothing behind: a crash at them is one at their neighbours."""


class Crash(BaseException):
    """The process dies here."""


class Bomb:
    """Ends the process before or after its `step`-th call of anything."""

    def __init__(self, step: int, when: When) -> None:
        self._step = step
        self._when = when
        self._lock = threading.Lock()
        self._calls = 0
        self.fired_at = ""

    def around(self, name: str, call: Callable[[], Any]) -> Any:
        with self._lock:
            self._calls += 1
            due = self._calls == self._step
            if due and self._when == "before":
                self._fire(name)
            if self.fired_at:
                raise Crash(name)
        try:
            return call()
        finally:
            if due:  # also if it raises, as a read of what is not there does
                self._fire(name)
                raise Crash(name)

    def _fire(self, name: str) -> None:
        self.fired_at = name
        count("crashes")


class Mined:
    """Stands before a collaborator; each call of a method is a step at which the bomb may go off."""

    def __init__(self, inner: Any, bomb: Bomb) -> None:
        self._inner = inner
        self._bomb = bomb

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found) or name in READS_ONLY:
            return found

        def step(*args: object, **options: object) -> object:
            def call() -> object:
                result = found(*args, **options)
                return iter(list(result)) if isinstance(result, Iterator) else result

            result = self._bomb.around(f"{type(self._inner).__name__}.{name}", call)
            return Mined(result, self._bomb) if name == "open_live" else result

        return step

    def __enter__(self) -> "Mined":
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.close()  # the kernel closes a dead process's sockets
