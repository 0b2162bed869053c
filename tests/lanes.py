"""The tests laid over lanes: processes of pytest-xdist that run side by side (tests/run.sh).

    ┌ lane 0 ── file ── file ─────── file ─┐
    ├ lane 1 ─────── file ── file ── file ─┤──▶ alone: what measures time or room, when nothing else runs
    └ lane 2 ── file ─────── file ── file ─┘

Most of what is slow waits: for a guest that boots, for a daemon's clock, for a server that was made slow on purpose. A
file stays in one lane, as what its tests share (a libvirt host, a guest) is made once for all of them.
"""

from collections.abc import Mapping
from typing import Any, Final

import figures
import pytest

_SLOW_FIRST: Final = ("tests/libvirt", "tests/contract", "tests/localstack", "tests/qemu", "tests/fault", "tests/cli")
"""Long files first: what comes last decides how long one lane runs while the others have nothing left."""


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests, those that take long in front; those of a file stay together."""

    def rank(item: pytest.Item) -> int:
        return next((at for at, folder in enumerate(_SLOW_FIRST) if item.nodeid.startswith(folder)), len(_SLOW_FIRST))

    return sorted(items, key=rank)


def of_lanes(items: list[pytest.Item], which: str) -> list[pytest.Item]:
    """The tests that may run beside others (`which` is "together"), or those that may not ("alone"); "" is all."""
    if not which:
        return items
    return [item for item in items if (item.get_closest_marker("alone") is not None) == (which == "alone")]


class Lanes:
    """Carries what all lanes share to them, and what each has counted back; a plug-in of pytest."""

    def __init__(self, shared: Mapping[str, Any]) -> None:
        """`shared` are values that can be sent: numbers and strings."""
        self._shared = shared

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """A lane begins: it's given what is shared."""
        node.workerinput.update(self._shared)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A lane has ended: what it has counted is added up."""
        for title, number in getattr(node, "workeroutput", {}).get("figures", {}).items():
            figures.count(title, number)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """In a lane: hand over what was counted."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["figures"] = figures.counted()
