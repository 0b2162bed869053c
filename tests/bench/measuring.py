"""What commands take, from the operating system's own accounting: wall and CPU seconds, peak memory, bytes stored.

CPU and memory are those of the command and of the children that it waited for.
QEMU, which serves the disk, works for every tool and is counted for none.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1024**2
GIB = 1024**3
_NO_ENV: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one command took."""

    wall_s: float
    cpu_s: float
    peak_mib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What one step of one tool took in one run."""

    tool: str
    step: str
    run: int
    wall_s: float
    cpu_s: float
    peak_mib: float
    stored_bytes: int | None = None
    """What the repository grew by."""
    raw_bytes: int | None = None
    """Bytes of the disk that were handled, where their rate is the figure."""

    def __str__(self) -> str:
        text = f"{self.tool + ' ' + self.step:44} {self.wall_s:8.2f} s wall {self.cpu_s:8.2f} s cpu"
        text += f" {self.peak_mib:7.0f} MiB"
        if self.stored_bytes is not None:
            text += f" {self.stored_bytes / MIB:9.1f} MiB stored"
        if self.raw_bytes is not None:
            text += f" {self.raw_bytes / 1e6 / self.wall_s:9.1f} MB/s"
        return text


@dataclass(slots=True)
class Journal:
    """All figures, in the order in which they were measured."""

    figures: list[Figure] = field(default_factory=list)

    def note(self, figure: Figure) -> None:
        """Keep a figure and print it."""
        self.figures.append(figure)
        print(figure, flush=True)

    def of(self, tool: str, step: str | None = None) -> list[Figure]:
        """The figures of a tool, or of one of its steps."""
        return [f for f in self.figures if f.tool == tool and step in {None, f.step}]

    def median(self, tool: str, step: str) -> Figure | None:
        """The step's medians over all runs, and its highest peak; None if it was not measured."""
        found = self.of(tool, step)
        if not found:
            return None
        return Figure(
            tool=tool,
            step=step,
            run=0,
            wall_s=statistics.median(f.wall_s for f in found),
            cpu_s=statistics.median(f.cpu_s for f in found),
            peak_mib=max(f.peak_mib for f in found),
            stored_bytes=_median_bytes([f.stored_bytes for f in found if f.stored_bytes is not None]),
            raw_bytes=_median_bytes([f.raw_bytes for f in found if f.raw_bytes is not None]),
        )

    def medians(self) -> list[Figure]:
        """The medians of every step, in the order in which they were first measured."""
        steps = dict.fromkeys((f.tool, f.step) for f in self.figures)
        return [figure for tool, step in steps if (figure := self.median(tool, step)) is not None]


def _median_bytes(values: Sequence[int]) -> int | None:
    return round(statistics.median(values)) if values else None


def measure(
    command: Sequence[str | Path], log: Path, env: Mapping[str, str] = _NO_ENV, cwd: Path | None = None
) -> Usage:
    """Run a command to its end; what it and its children took. What it says goes to `log`.

    Raises:
        SystemExit: it failed; a run without it would compare nothing.
    """
    result = log.with_suffix(".took")
    timed = [sys.executable, "-I", "-S", str(Path(__file__).with_name("timed.py")), str(result)]
    status = _run([*timed, *map(str, command)], log, {**os.environ, **env}, cwd)
    if status:
        said = log.read_text(errors="replace")[-4000:]
        raise SystemExit(f"{' '.join(map(str, command))} failed with {status}:\n{said}")
    return Usage(**json.loads(result.read_text()))


def _run(command: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path | None) -> int:
    """Run a command to its end, in a session of its own; if we are ended meanwhile, it and its children are, too."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=cwd, start_new_session=True
        )
        try:
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def used_bytes(directory: Path) -> int:
    """Bytes of all files below a directory, which may not exist yet."""
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def settle(*read_next: Path) -> None:
    """Make the start the same for every command: nothing waits to be written, what it reads is in the page cache."""
    os.sync()
    for path in read_next:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                _read_data(file)


def _read_data(path: Path) -> None:
    """Read a file, but for its holes."""
    buffer = memoryview(bytearray(4 * MIB))
    with path.open("rb", buffering=0) as file:
        size, end = path.stat().st_size, 0
        while end < size:
            try:
                at = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # there is only a hole left
                return
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            file.seek(at)
            while at < end:
                at += file.readinto(buffer[: end - at]) or end
