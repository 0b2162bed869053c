"""A directory store whose writer is killed: what is listed is whole."""

import subprocess
import sys
from pathlib import Path

from figures import count

from drsync.store.directory import DirectoryStore
from drsync.units import MiB

WRITER = """
import sys
from pathlib import Path
from drsync.store.directory import DirectoryStore

store = DirectoryStore(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), 10**6):
    body = number.to_bytes(8, "big") * (2**20 + number)
    store.create(f"vm/web/pack/{number:016x}", body, sha256=bytes(32))  # which it does not look at
    print(number, flush=True)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_until_killed(root: Path, first: int, others: int) -> list[int]:
    """Kill a writer in the middle of an object, after so many others; the numbers that it had acknowledged."""
    command = [sys.executable, "-c", WRITER, str(root), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(others)]
        before = names(root / ".tmp")
        while names(root / ".tmp") <= before:
            pass
        process.kill()
        count("crashes")
        return acknowledged + [int(line) for line in process.stdout if line.endswith("\n")]


def test_s1_s3_after_kill_every_listed_object_is_whole_and_every_acknowledged_one_listed(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    acknowledged: list[int] = []
    for turn in range(12):
        first = max(acknowledged, default=-2) + 2  # the next one may be there though it was not acknowledged
        acknowledged += write_until_killed(root, first, 1 + turn % 3)
    assert names(root / ".tmp"), "no writer was killed in the middle of an object: this proves nothing"
    store = DirectoryStore(root)
    listed = {int(info.key[-16:], 16): info.key for info in store.list("vm/web/pack/")}
    assert set(acknowledged) <= listed.keys()
    for number, key in listed.items():
        assert store.get(key, limit_bytes=9 * MiB) == number.to_bytes(8, "big") * (2**20 + number)
