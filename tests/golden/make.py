"""Makes a golden repository: what a released format looks like, and what each of its points must restore to.

Run once, by hand, when a format is released; never to make a failing test pass.
What it made is never changed or made again: a release that can't restore it is wrong.

    PYTHONPATH=tests .venv/bin/python tests/golden/make.py tests/golden/format-2
    PYTHONPATH=tests .venv/bin/python tests/golden/make.py tests/golden/format-2-seeded
    PYTHONPATH=tests .venv/bin/python tests/golden/make.py tests/golden/format-2-keys
    PYTHONPATH=tests .venv/bin/python tests/golden/make.py tests/golden/format-2-pruned
"""

import hashlib
import json
import secrets
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from fake_clock import FakeClock
from shipped_vm import WRITTEN_ZEROS, ZEROED, DiskStep, OracleDisk, ShippedVm, Step

from drsync.format.ring import ScryptCost
from drsync.heartbeat import Seen, write_heartbeat
from drsync.hostkeys import HostKeyFile
from drsync.keyfile import read_key_file, write_key_file
from drsync.keyring import Keyring, KeyService
from drsync.log import Log
from drsync.model import BLOCK_SIZE
from drsync.prune.run import PruneOptions, prune_vm
from drsync.repository import open_repository, read_record
from drsync.retention import Pin, Rules
from drsync.store.directory import DirectoryStore

ODD: Final = 11 * BLOCK_SIZE + 1536
"""Bytes of the disk `root`: its last block is short."""
SMALL: Final = 5 * BLOCK_SIZE
GROWN: Final = 8 * BLOCK_SIZE - 512
SHRUNK: Final = 4 * BLOCK_SIZE + 512
INCOMPRESSIBLE: Final = 2
"""A content whose frame is larger than the block. Odd contents take a few bytes."""


def root(writes: dict[int, int], size_bytes: int = ODD, *, whole: bool = False) -> DiskStep:
    return DiskStep(size_bytes=size_bytes, writes=writes, whole=whole)


def data(writes: dict[int, int], size_bytes: int = SMALL, *, whole: bool = False) -> DiskStep:
    return DiskStep(size_bytes=size_bytes, writes=writes, whole=whole)


HISTORY: Final = [
    # 1: a full of several packs; a block that does not compress, and a short one that does not
    Step(
        disks={
            "root": root({0: 1, 1: 3, 2: INCOMPRESSIBLE, 3: 5, 4: 7, 5: 9, 6: 11, 7: 13, 11: 4}),
            "data": data({0: 15, 1: 17, 2: 19, 4: 21}),
        }
    ),
    # 2: an increment of rows and zero runs, in the middle of old rows and where nothing was
    Step(disks={"root": root({1: ZEROED, 3: 23, 4: ZEROED, 5: ZEROED, 8: 25, 9: ZEROED}), "data": data({1: 27})}),
    # 3: an increment of so many that they take packs; zeros that the guest wrote as bytes
    Step(
        disks={
            "root": root({0: 29, 4: 31, 5: 33, 6: WRITTEN_ZEROS, 7: 35, 11: 37}),
            "data": data({0: 39, 2: ZEROED, 3: 41, 4: ZEROED}),
        }
    ),
    # 4: a resync of a disk whose bitmap was lost, beside an increment
    Step(disks={"root": root({2: 43, 8: ZEROED, 10: 45}, whole=True), "data": data({1: ZEROED})}),
    # 5: an increment in which nothing of one disk changed
    Step(disks={"root": root({}), "data": data({2: 47})}),
    # 6 is the fence of the host that takes over, 7 its first point
    Step(disks={"root": root({1: 49}), "data": data({0: 51})}, taken_over=True),
    # 8: a disk grew to an odd size, and the new part is written to
    Step(disks={"root": root({5: 53}), "data": data({6: 55, 7: 77}, GROWN)}),
    # 9: the other one shrank, into the middle of a block
    Step(disks={"root": root({0: 57}, SHRUNK), "data": data({7: 59}, GROWN)}),
    # 10: it grew again; what was cut off reads as zeros
    Step(disks={"root": root({10: 61}, ODD), "data": data({}, GROWN)}),
    # 11: a disk is gone
    Step(disks={"root": root({3: 63})}),
    # 12: it is there again, with less in it
    Step(disks={"root": root({4: 65}), "data": data({3: 67}, GROWN)}),
    # 13: all is sent again
    Step(
        disks={"root": root({6: 69}, whole=True), "data": data({0: 71, 5: 73}, GROWN, whole=True)},
        compare=False,
    ),
    # 14: an increment on it
    Step(disks={"root": root({11: 8}), "data": data({0: ZEROED, 7: 75}, GROWN)}),
]


SEEDED_HISTORY: Final = [
    # 1: a first full that was read live in three rounds, a later one over an earlier one, and the capture over all
    Step(
        disks={"root": root({0: 1, 4: ZEROED, 5: 3}, whole=True), "data": data({1: 17}, whole=True)},
        rounds=[
            {"root": {0: 5, 1: 7, 2: INCOMPRESSIBLE, 3: 9, 4: 11, 11: 6}, "data": {0: 15, 1: 13}},
            {"root": {1: 19, 3: ZEROED, 5: 21}},
            {"root": {3: 23}, "data": {0: ZEROED, 4: 25}},
        ],
    ),
    # 2: an ordinary increment on it
    Step(disks={"root": root({5: 27, 8: 29}), "data": data({0: 31})}),
    # 3: a resync that was read live, beside an increment that was
    Step(
        disks={"root": root({1: 33, 6: ZEROED}, whole=True), "data": data({2: 35})},
        rounds=[{"root": {0: ZEROED, 6: 37, 9: 39}, "data": {3: 41}}, {"root": {9: 43, 10: 45}, "data": {3: ZEROED}}],
    ),
    # 4 is the fence of the host that takes over, 5 its first point: an increment of so many that they take packs
    Step(disks={"root": root({n: 47 + 2 * n for n in range(8)}), "data": data({0: ZEROED})}, taken_over=True),
]


ROTATED_HISTORY: Final = [
    # 1: under the first root key
    Step(disks={"root": root({0: 1, 2: INCOMPRESSIBLE, 4: 3, 11: 4}), "data": data({0: 5, 2: 7, 3: 9, 4: 11})}),
    # 2: under the second one, on it
    Step(disks={"root": root({1: 13, 2: ZEROED, 3: 15}), "data": data({1: 17})}),
    # 3: a resync that compares with what lies under the first
    Step(disks={"root": root({5: 19, 11: 21}, whole=True), "data": data({2: ZEROED})}),
    # 4 is the fence of the host that takes over, 5 its first point; both under the third
    Step(disks={"root": root({n: 23 + 2 * n for n in range(8)}), "data": data({0: ZEROED})}, taken_over=True),
]
PASSPHRASE: Final = "Schlüssel unter der Fußmatte"  # noqa: S105  of a repository in git, for all to read


def make_rotated(folder: Path, layers: Path) -> ShippedVm:
    """The history of a repository whose root key was rotated twice, with a passphrase as a slot."""
    vm = ShippedVm(layers, store=DirectoryStore((folder / "repository").absolute()))
    recovery = vm.recovery
    if recovery is None:
        raise ValueError(vm)
    record = read_record(vm.store)

    def no_kms() -> KeyService:
        raise ValueError(record)

    def cheap() -> ScryptCost:
        return ScryptCost(salt=secrets.token_hex(16), log2_n=12)

    ring = Keyring(vm.store, record, FakeClock(), no_kms, new_cost=cheap)
    host = HostKeyFile(folder / "key", vm.store, FakeClock(), no_kms)
    write_key_file(folder / "key", vm.root)
    ring.add_passphrase(lambda: ring.open_with_recovery(recovery), "ops", PASSPHRASE)
    for number, step in enumerate(ROTATED_HISTORY):
        vm.run([step])
        if number in {0, 2}:
            host.rotate(lambda: ring.open_with_passphrase(PASSPHRASE))
            vm.repository = open_repository(vm.store, read_key_file(folder / "key"), "key")
            vm.log = Log(vm.repository.vm(vm.vm))
    (folder / "passphrase").write_text(PASSPHRASE + "\n")
    return vm


def pruned(vm: ShippedVm) -> ShippedVm:
    """A log with holes: points come, some are dropped, more come, more are dropped, and some come after that."""
    vm.run([*HISTORY[:3], *OVERWRITING]).run(HISTORY[3:5])
    prune(vm, keep={1, 4, 7}, copy_below=0.5)
    vm.run(HISTORY[5:11]).run(OVERWRITING).run(PARTLY_OVERWRITTEN)
    prune(vm, keep={1, 4, 11, 14}, copy_below=0.5)
    return vm.run([*HISTORY[11:], *OVERWRITING[:1]])


OVERWRITING: Final = [
    Step(disks={"root": root({n: 101 + 2 * k + 20 * n for n in range(7)}), "data": data({0: 81 + 2 * k, k: ZEROED})})
    for k in range(4)
]

PARTLY_OVERWRITTEN: Final = [
    Step(disks={"root": root({n: 301 + 2 * n for n in range(7)}), "data": data({})}),
    Step(disks={"root": root({2: 321, 6: 323}), "data": data({})}),
    Step(disks={"root": root({6: 325}), "data": data({1: 327})}),
]
"""What is left of the first two: a pack two thirds of which are alive, and a copied block that lies over it."""


def prune(vm: ShippedVm, *, keep: set[int], copy_below: float) -> None:
    """Drop all points but these and the newest, and delete what nothing needs any more."""
    options = PruneOptions(grace=timedelta(0), orphan_grace=timedelta(days=14), copy_below=copy_below)
    pins = [Pin(point, None) for point in keep]
    done = prune_vm(vm.log, Rules(last=1), pins, committed=0, now=vm.store.now(), options=options)
    for verdict in done.dropped:
        del vm.points[verdict.point]


def make(folder: Path) -> None:
    """Make the folder with the repository, its two keys, and what each point must restore to.

    Raises:
        FileExistsError: it is there already, and stays as it is.
    """
    folder.mkdir()
    store = DirectoryStore((folder / "repository").absolute())
    with tempfile.TemporaryDirectory() as layers:
        if folder.name.endswith("-keys"):
            vm = make_rotated(folder, Path(layers))
        else:
            vm = ShippedVm(Path(layers), store=store)
            write_key_file(folder / "key", vm.root)
            if folder.name.endswith("-pruned"):
                pruned(vm)
            else:
                vm.run(SEEDED_HISTORY if folder.name.endswith("-seeded") else HISTORY)
    assert vm.recovery is not None
    newest = max(vm.points)
    write_heartbeat(
        vm.repository, "alpha", {vm.vm: Seen(seq=newest, checked_at=datetime(2026, 1, 2, 3, 5, tzinfo=UTC))}
    )
    (folder / "recovery-key").write_text(vm.recovery.to_text() + "\n")
    (folder / "expected.json").write_text(json.dumps(_expected(vm), indent=1) + "\n")


def _expected(vm: ShippedVm) -> dict[str, Any]:
    points = {
        str(point): {name: _content(disk) for name, disk in sorted(disks.items())} for point, disks in vm.points.items()
    }
    return {"vm": vm.vm, "points": points}


def _content(disk: OracleDisk) -> dict[str, Any]:
    raw = bytearray(disk.size_bytes)
    for number, block in disk.blocks.items():
        raw[number * BLOCK_SIZE : number * BLOCK_SIZE + len(block)] = block
    return {"size_bytes": disk.size_bytes, "sha256": hashlib.sha256(raw).hexdigest()}


if __name__ == "__main__":
    make(Path(sys.argv[1]))
