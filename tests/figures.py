"""What the tests have counted: the figures that a run ends with.

    count("crashes")                   from wherever a test makes one

They say how much was tried, not that all is well: a figure of 0 in a run of everything
is a part of the suite that did not do its work (tests/conftest.py prints them).
"""

import threading
from collections import Counter
from typing import Final

TITLES: Final = (
    "faults injected and survived",
    "crashes",
    "points compared",
    "bytes compared",
    "bad inputs refused",
)
_lock = threading.Lock()
_counted: Counter[str] = Counter()


def count(title: str, number: int = 1) -> None:
    """Add to a figure."""
    if title not in TITLES:
        raise ValueError(title)
    with _lock:
        _counted[title] += number


def compared(size_bytes: int) -> None:
    """A point was compared with what its disks held, byte by byte."""
    count("points compared")
    count("bytes compared", size_bytes)


def counted() -> dict[str, int]:
    """The figures so far, in the order in which they are printed."""
    with _lock:
        return {title: _counted[title] for title in TITLES}
