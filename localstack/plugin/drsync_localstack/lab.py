"""What the services of one LocalStack share."""

import functools
import json
import os
import time
from pathlib import Path

from drsync_localstack.blocks import BlockStore
from drsync_localstack.catalog import Catalog
from drsync_localstack.faults import Faults
from drsync_localstack.tokens import Tokens

FAULTS_VARIABLE = "DRSYNC_LOCALSTACK_FAULTS"


class Clock:
    """The time of the snapshots, tokens and tasks: a test can move it on instead of waiting for days."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time() + self.ahead_s


class Lab:
    """The parts that have a state, over a directory for the blocks."""

    def __init__(self, directory: Path) -> None:
        self.clock = Clock()
        self.faults = Faults(self.clock.now)
        self.tokens = Tokens(self.clock.now)
        self.catalog = Catalog(BlockStore(directory), self.faults, self.clock.now)
        if given := os.environ.get(FAULTS_VARIABLE):
            self.faults.set(json.loads(given))


@functools.cache
def the_lab() -> Lab:
    """That of this process: LocalStack makes its providers itself, and passes nothing in."""
    from localstack.config import dirs  # noqa: PLC0415 - only inside LocalStack

    return Lab(Path(dirs.tmp) / "drsync-ebs")
