"""Runs the part that reads hostile bytes as a process of its own, and serves it the disks.

    this process                                             drsync.preflight.inside
    repository, key, credentials     ◀── "vda, 64 KiB at …"  no environment, no key, no rights of root's,
    serves at most READ_LIMIT_BYTES  ──▶ the bytes           bounded memory and processor time
                                     ◀── facts (JSON)

It is killed when its time is over. What it found until then is kept.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import msgspec

from drsync.errors import DrsyncError
from drsync.preflight.facts import MAX_FACTS_BYTES, Facts, decode_facts, plain
from drsync.preflight.inside import wire
from drsync.preflight.inside.nbd_export import NbdExport, socket_name

READ_LIMIT_BYTES: Final = 1024 * 1024 * 1024
"""What is served in all: two initramfs and the metadata of some file systems have 200 MiB."""
MEMORY_BYTES: Final = 1536 * 1024 * 1024
CPU_S: Final = 240
TIME_LIMIT_S: Final = 600.0
_MAX_COMPLAINT: Final = 4096
_KEPT: Final = frozenset({"PYTHONPATH", "PATH", "COVERAGE_PROCESS_START"})


class Readable(Protocol):
    """A disk that can be served (disk.PointDisk)."""

    name: str
    size_bytes: int

    def read(self, offset: int, length: int) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the process may take."""

    memory_bytes: int = MEMORY_BYTES
    cpu_s: int = CPU_S
    time_s: float = TIME_LIMIT_S
    read_bytes: int = READ_LIMIT_BYTES


_LIMITS: Final = Limits()


def look_inside(disks: Sequence[Readable], *, reader: str = "", limits: Limits = _LIMITS) -> Facts:
    """What is on the disks. How a search ended that did not come to its end is one of `problems`.

    Raises:
        DrsyncError: the repository does not give the disks' blocks.
    """
    command = [sys.executable, "-m", "drsync.preflight.inside"]
    shared = [_Shared(disk) for disk in disks]
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="drsync-pf-", ignore_cleanup_errors=True))
        chosen = reader or _installed_reader()
        for place, disk in enumerate(shared) if chosen == "libguestfs" else ():
            stack.callback(NbdExport(disk, Path(directory, socket_name(place))).close)
        facts = _look_inside(command, directory, shared, chosen, limits)
    for disk in shared:
        if disk.failure is not None:
            raise disk.failure
    return facts


def _installed_reader() -> str:
    """The first of the implementations that is installed. They are looked for, not loaded: that happens inside."""
    known = (("dissect", "dissect.extfs"), ("libguestfs", "guestfs"))
    return next((name for name, module in known if _is_there(module)), "none")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


class _Shared:
    """A disk that is read by the pipe and by NBD, in turns; it remembers what went wrong, for NBD can't say it."""

    def __init__(self, disk: Readable) -> None:
        self.name = disk.name
        self.size_bytes = disk.size_bytes
        self.failure: DrsyncError | None = None
        self._disk = disk
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        with self._lock:
            try:
                return self._disk.read(offset, length)
            except DrsyncError as err:
                self.failure = err
                raise OSError("the repository does not give it") from err


def _environment(directory: str) -> dict[str, str]:
    """Where Python and libguestfs find what is theirs; nothing else, so no credentials."""
    kept = {n: v for n, v in os.environ.items() if n in _KEPT or n.startswith(("LIBGUESTFS_", "SUPERMIN_"))}
    return {**kept, "TMPDIR": directory}


def _look_inside(
    command: Sequence[str], directory: str, disks: Sequence[Readable], reader: str, limits: Limits
) -> Facts:
    kept = _environment(directory)
    with subprocess.Popen(  # noqa: S603 - this Python, on a module of ours
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=kept, cwd="/"
    ) as process:
        served = _Served(process, disks, limits)
        killer = threading.Timer(limits.time_s, process.kill)
        killer.daemon = True
        killer.start()
        try:
            served.run(reader, directory)
        finally:
            timed_out = not killer.is_alive()
            killer.cancel()
            process.kill()  # it has nothing more to do
            complaint = served.complaint()
            process.wait()
    return served.told(timed_out=timed_out, complaint=complaint)


class _Served:
    """One run of the process."""

    def __init__(self, process: "subprocess.Popen[bytes]", disks: Sequence[Readable], limits: Limits) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise ValueError("the process has no pipes")
        self._to: BinaryIO = process.stdin  # type: ignore[assignment]  # IO[bytes] that Popen opened
        self._from: BinaryIO = process.stdout  # type: ignore[assignment]  # as above
        self._errors: BinaryIO = process.stderr  # type: ignore[assignment]  # as above
        self._disks = disks
        self._limits = limits
        self._facts = Facts()
        self._served_bytes = 0
        self._ended = False
        self._problem = ""
        self._complaint: list[bytes] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """Take what the process says on stderr, so that it never waits for that; its beginning is kept."""
        for piece in iter(lambda: self._errors.read1(4096), b""):  # type: ignore[attr-defined]  # a BufferedReader
            if sum(map(len, self._complaint)) < _MAX_COMPLAINT:
                self._complaint.append(piece)

    def run(self, reader: str, directory: str) -> None:
        task = wire.Task(
            disks=[wire.TaskDisk(name=d.name, size_bytes=d.size_bytes) for d in self._disks],
            memory_bytes=self._limits.memory_bytes,
            cpu_s=self._limits.cpu_s,
            reader=reader,
            directory=directory,
        )
        document = msgspec.json.encode(task)
        try:
            self._send(wire.LENGTH.pack(len(document)) + document)
            while not self._ended:
                self._answer()
        except (wire.Broken, BrokenPipeError):
            pass  # it has ended, which `told` explains
        except ValueError as err:
            self._problem = f"it broke the rules: {err}"

    def _send(self, data: bytes) -> None:
        self._to.write(data)
        self._to.flush()

    def _answer(self) -> None:
        kind = wire.exactly(self._from, 1)
        if kind == wire.READ:
            self._serve(*wire.RANGE.unpack(wire.exactly(self._from, wire.RANGE.size)))
        elif kind in {wire.FACTS, wire.END}:
            (length,) = wire.LENGTH.unpack(wire.exactly(self._from, wire.LENGTH.size))
            if length > MAX_FACTS_BYTES:
                raise ValueError(f"{length} bytes of facts")
            self._facts = decode_facts(wire.exactly(self._from, length))
            self._ended = kind == wire.END
        else:
            raise ValueError("an unknown message")

    def _serve(self, disk: int, offset: int, length: int) -> None:
        if disk >= len(self._disks) or length > wire.MAX_READ:
            raise ValueError("a range that no disk has")
        self._served_bytes += length
        if self._served_bytes > self._limits.read_bytes:
            self._problem = self._problem or f"more than {self._limits.read_bytes} bytes were asked for"
            refusal = b"enough was read"
            self._send(wire.ANSWER.pack(1, len(refusal)) + refusal)
            return
        try:
            data = self._disks[disk].read(offset, length)
        except OSError as err:  # the run is over: it is raised when the process is gone
            raise wire.Broken("the disk can't be read") from err
        self._send(wire.ANSWER.pack(0, len(data)) + data)

    def complaint(self) -> str:
        """The last line that the ended process left on stderr."""
        self._listener.join()
        lines = b"".join(self._complaint).decode("utf-8", "replace").strip().splitlines()
        return plain(lines[-1], 200) if lines else ""

    def told(self, *, timed_out: bool, complaint: str) -> Facts:
        problem = self._problem
        if not self._ended and not problem:
            problem = (
                f"it took longer than {self._limits.time_s:.0f} s" if timed_out else f"it ended early: {complaint}"
            )
        if not problem:
            return self._facts
        problems = (*self._facts.problems[:500], plain(f"the search of the disks is not complete: {problem}"))
        return msgspec.structs.replace(self._facts, problems=problems, complete=False)
