"""Ships one layer into a new repository and prints what that took, as JSON. A process of its own, so memory is its own.

python tests/bench/ship_alone.py LAYER REPOSITORY

Only `drsync.ship.ship` is timed: read, zero test, compress, encrypt, write, fsync.
"""

import json
import resource
import secrets
import sys
import time
from pathlib import Path

import numpy as np

from drsync.format.keys import RootKey
from drsync.log import Log
from drsync.model import BLOCK_SIZE, Consistency, NoProgress, SystemClock, new_capture_id
from drsync.qcow2 import ImageReader
from drsync.repository import create_repository, open_repository
from drsync.ship import ship
from drsync.source.layer import Layer
from drsync.spool import boot_id
from drsync.spooled import SpooledCapture, SpooledDisk
from drsync.store.open import open_store
from drsync.store.retry import RetryingStore
from drsync.writer import LogWriter, open_writer


def new_log(repository: Path) -> LogWriter:
    """The log of a VM in a new repository."""
    repository.mkdir()
    clock = SystemClock()
    store = RetryingStore(open_store(f"file://{repository}", endpoint_url=None, region=None), clock=clock)
    root = RootKey.generate()
    create_repository(store, root, clock)
    return open_writer(Log(open_repository(store, root, "key").vm("files")), secrets.token_hex(8))


def full_of(size_bytes: int) -> SpooledCapture:
    """The first capture of a VM with one disk."""
    disk = SpooledDisk(name="d", size_bytes=size_bytes, full=True, reason="first point", persistent_bitmap=True)
    return SpooledCapture(
        capture=new_capture_id(),
        base=None,
        boot_id=boot_id(),
        time=SystemClock().now().isoformat(),
        consistency=Consistency.CRASH,
        send_all=True,
        disks=[disk],
        definition={},
    )


def main() -> None:
    """Ship and print."""
    path, writer = Path(sys.argv[1]), new_log(Path(sys.argv[2]))
    with path.open("rb") as file:
        size_bytes = ImageReader(file.fileno()).size_bytes
    with Layer(path, size_bytes) as layer:
        raw_bytes = sum(int(np.count_nonzero(table.offsets)) for table in layer.tables()) * BLOCK_SIZE
        wall, cpu = time.monotonic(), time.process_time()
        ship(full_of(size_bytes), {"d": layer}, writer, None, NoProgress())
        took = {"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu}
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**took, "peak_mib": peak_mib, "raw_bytes": raw_bytes}))


if __name__ == "__main__":
    main()
