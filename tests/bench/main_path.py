"""Measures the main path beside its peers: whole commands, same data, same run. Not a test: nothing fails on a figure.

    .venv/bin/python tests/bench/main_path.py [--size-gib 5] [--work DIRECTORY] [--json FILE]

Data: an ext4 file system with real files of this machine (/usr), on a qcow2
disk that a qemu-storage-daemon serves. Peers: `qemu-img convert` (a plain copy)
and restic, if it is installed. Every figure is of a whole process, from the
operating system's own accounting: wall and CPU seconds, peak memory.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples" / "guest")]

from storage_daemon import DaemonDisk, StorageDaemon  # noqa: E402 - found through the path above

MIB = 1024**2
GIB = 1024**3
DRSYNC = [sys.executable, "-m", "drsync"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What one command took."""

    name: str
    wall_s: float
    cpu_s: float
    peak_mib: float
    stored_bytes: int | None = None


def measure(name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> Figure:
    """Run a command to its end; what it and its children took."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **(env or {})})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} failed with {process.returncode}: {' '.join(command)}")
    return Figure(
        name=name,
        wall_s=time.monotonic() - started,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_mib=usage.ru_maxrss / 1024,
    )


def used_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def real_files(work: Path, size_gib: int) -> Path:
    """A raw disk with a file system of real files; made once."""
    disk = work / f"files-{size_gib}.raw"
    if disk.exists():
        return disk
    tree = work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    copied = 0
    for source in (Path("/usr/lib"), Path("/usr/share"), Path("/usr/bin")):
        for path in sorted(source.rglob("*")):
            if path.is_file() and not path.is_symlink() and copied < size_gib * GIB * 0.95:
                target = tree / path.relative_to("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                copied += path.stat().st_size
    partial = disk.with_suffix(".partial")
    with partial.open("wb") as file:
        file.truncate(16 * GIB)
    subprocess.run(["mkfs.ext4", "-q", "-d", str(tree), str(partial)], check=True)
    shutil.rmtree(tree)
    return partial.rename(disk)


class Bench:
    """One run, in a directory of its own."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.run = work / "run"
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir(parents=True)
        self.config = self.run / "drsync.toml"
        self.figures: list[Figure] = []

    def drsync(self, name: str, *arguments: str) -> Figure:
        before = used_bytes(self.run / "repository")
        figure = measure(name, [*DRSYNC, "--config", str(self.config), *arguments])
        stored = used_bytes(self.run / "repository") - before
        return self.note(figure, stored if arguments[0] == "capture" else None)

    def note(self, figure: Figure, stored_bytes: int | None = None) -> Figure:
        noted = Figure(**{**asdict(figure), "stored_bytes": stored_bytes})
        self.figures.append(noted)
        stored = f"{stored_bytes / MIB:9.1f} MiB stored" if stored_bytes is not None else ""
        print(
            f"{noted.name:44} {noted.wall_s:8.2f} s wall {noted.cpu_s:8.2f} s cpu {noted.peak_mib:7.0f} MiB {stored}",
            flush=True,
        )
        return noted

    def configure(self, daemons: Mapping[str, StorageDaemon]) -> None:
        text = f'[repository]\nurl = "file://{self.run}/repository"\nkey_file = "{self.run}/key"\n'
        text += f'[spool]\npath = "{self.run}/spool"\nreserve = "1MiB"\n'
        for name, daemon in daemons.items():
            text += f'[[vm]]\nname = "{name}"\nsocket = "{daemon.qmp_socket}"\ndisks = {{ d = "d-d" }}\n'
        self.config.write_text(text)
        (self.run / "repository").mkdir()
        subprocess.run([*DRSYNC, "--config", str(self.config), "init"], check=True, stdout=subprocess.DEVNULL)


def settle() -> None:
    """Let what earlier commands wrote reach the disk, so that the next one does not pay for it."""
    os.sync()


def write_random(daemon: StorageDaemon, total: int, span: int, pattern_seed: int) -> None:
    """Overwrite `total` bytes in pieces of 1 MiB at random places."""
    places = random.Random(pattern_seed).sample(range(span // MIB), total // MIB)
    daemon.io("d", *(f"write -s {sys.executable} -q {place * MIB} {MIB}" for place in places))


def full_and_restore(bench: Bench, raw: Path) -> None:
    """A full, an increment of 256 MiB and a restore, beside a plain copy and restic."""
    daemon = StorageDaemon(bench.run / "vm", [DaemonDisk(name="d", size_bytes=16 * GIB)])
    daemon.directory.mkdir()
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(daemon.path("d"))], check=True)
    sparse = StorageDaemon(bench.run / "sparse", [DaemonDisk(name="d", size_bytes=2048 * GIB)])
    sparse.directory.mkdir()
    with daemon, sparse:
        bench.configure({"files": daemon, "sparse": sparse})
        settle()
        copy = ["qemu-img", "convert", "-O", "qcow2", str(raw), str(bench.run / "copy.qcow2")]
        plain = bench.note(measure("qemu-img convert", copy))
        (bench.run / "copy.qcow2").unlink()
        settle()
        full = bench.drsync("drsync capture, full", "capture", "files")
        print(f"{'':44} {full.wall_s / plain.wall_s:8.2f} x qemu-img convert")
        write_random(daemon, 256 * MIB, 16 * GIB, 1)
        settle()
        bench.drsync("drsync capture, increment of 256 MiB", "capture", "files")
        bench.drsync("drsync capture, nothing changed", "capture", "files")
        settle()
        output = str(bench.run / "restored")
        mine = bench.drsync("drsync restore to qcow2", "restore", "files", "--to", "image", "--output", output)
        shutil.rmtree(output)
        sparse.io("d", "write -P 1 0 1M")
        bench.drsync("drsync capture, full of a sparse 2 TiB disk", "capture", "sparse")
        sparse.io("d", "write -P 2 1T 1M")
        bench.drsync("drsync capture, 1 MiB on a sparse 2 TiB disk", "capture", "sparse")
    peer(bench, raw, mine)


def peer(bench: Bench, raw: Path, mine: Figure) -> None:
    """restic on the raw disk, the same data."""
    if shutil.which("restic") is None:
        print("restic is not installed: not measured")
        return
    env = {"RESTIC_PASSWORD": "bench", "RESTIC_REPOSITORY": str(bench.run / "restic")}
    env["RESTIC_CACHE_DIR"] = str(bench.run / "restic-cache")
    subprocess.run(["restic", "init", "-q"], check=True, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
    settle()
    figure = measure("restic backup", ["restic", "backup", "-q", str(raw)], env)
    bench.note(figure, used_bytes(bench.run / "restic"))
    settle()
    restore = ["restic", "restore", "-q", "latest", "--target", str(bench.run / "restic-restored")]
    theirs = bench.note(measure("restic restore", restore, env))
    print(f"{'':44} restic / drsync: {theirs.wall_s / mine.wall_s:.2f} x")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gib", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(".lab/bench"))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work)
    try:
        full_and_restore(bench, real_files(work, options.size_gib))
    finally:
        shutil.rmtree(bench.run, ignore_errors=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(f) for f in bench.figures], indent=2))


if __name__ == "__main__":
    main()
