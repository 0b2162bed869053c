"""Where a VM comes back: the contract that every target of restored disks keeps.

Rules, checked for every target by tests/contract/test_target.py:

- T1  what exists already is not touched unless the user said so.
- T2  before `finish` returns there is nothing at the final place; after `abandon` there never will be.
- T3  blocks that were not written read as zeros.
- T4  when `finish` returns, the bytes survive a crash of the machine.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


class DiskWriter(Protocol):
    """Takes the blocks of one restored disk. `write` may be called from several threads."""

    def place(self, window: int, blocks: npt.NDArray[np.int64]) -> Positions:
        """Where each of `blocks` (ascending, all of one window of 8192 blocks) is to be written.

        Called once a window, in the order of the disk, from one thread.
        """
        ...

    def write(self, at: int, buffers: Sequence[bytes]) -> None:
        """Write `buffers` one after the other from a position that `place` gave on.

        Raises:
            TargetFull: no room is left.
            TargetUnusable: it can't be written.
        """
        ...

    def finish(self) -> None:
        """All blocks are written: put the disk at its final place."""
        ...

    def abandon(self) -> None:
        """Remove what was written, unless it is finished; safe to call at any time, also twice."""
        ...
