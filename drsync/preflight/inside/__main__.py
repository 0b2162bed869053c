"""The process inside the fence: `python -m drsync.preflight.inside`, with the pipes as stdin and stdout.

It gives up what it does not need before it reads the first byte of a disk: memory and processor time beyond the task's,
writing files, and root's rights if it has them.
"""

import importlib
import os
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from drsync.preflight.facts import MAX_FACTS_BYTES, Facts
from drsync.preflight.inside import dissect_files, guestfs_files, wire
from drsync.preflight.inside.files import FileSystem
from drsync.preflight.inside.source import PIECE_BYTES, Source
from drsync.preflight.inside.survey import Opener, survey

_CACHED_PIECES: Final = 256
"""16 MiB: what is asked for twice need not go through the pipe twice."""
_NOBODY: Final = 65534
_MAX_TASK: Final = 1024 * 1024


class Refused(OSError):
    """The outside does not give these bytes: the store failed, or enough was read."""


class _Outside:
    """The pipes, and the disks behind them."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO) -> None:
        self._requests = requests
        self._answers = answers
        self._lock = threading.Lock()

    def task(self) -> wire.Task:
        (length,) = wire.LENGTH.unpack(wire.exactly(self._answers, wire.LENGTH.size))
        if length > _MAX_TASK:
            raise wire.Broken("the task is too long")
        return msgspec.json.decode(wire.exactly(self._answers, length), type=wire.Task)

    def range(self, disk: int, offset: int, length: int) -> bytes:
        with self._lock:  # libguestfs' disks are read by threads of their own
            return self._range(disk, offset, length)

    def _range(self, disk: int, offset: int, length: int) -> bytes:
        self._requests.write(wire.READ + wire.RANGE.pack(disk, offset, length))
        self._requests.flush()
        refused, size = wire.ANSWER.unpack(wire.exactly(self._answers, wire.ANSWER.size))
        data = wire.exactly(self._answers, size)
        if refused:
            raise Refused(data.decode("utf-8", "replace"))
        return data

    def tell(self, facts: Facts) -> None:
        document = msgspec.json.encode(facts)
        if len(document) > MAX_FACTS_BYTES:  # every list is bounded, yet all of them together may be too much
            document = msgspec.json.encode(
                Facts(reader=facts.reader, disks=facts.disks, problems=("too much was found",))
            )
        kind = wire.END if facts.complete else wire.FACTS
        with self._lock:
            self._requests.write(kind + wire.LENGTH.pack(len(document)) + document)
            self._requests.flush()


class _Disk:
    """A disk, read through the pipe (see source.Source)."""

    def __init__(self, outside: _Outside, number: int, size_bytes: int) -> None:
        self._outside = outside
        self._number = number
        self.size_bytes = size_bytes
        self._lock = threading.Lock()
        self._pieces: OrderedDict[int, bytes] = OrderedDict()

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size_bytes)
        if offset < 0 or end <= offset:
            return b""
        first, last = offset // PIECE_BYTES, (end - 1) // PIECE_BYTES
        with self._lock:
            data = b"".join(self._piece(number, last) for number in range(first, last + 1))
        return data[offset - first * PIECE_BYTES :][: end - offset]

    def _piece(self, number: int, last: int) -> bytes:
        """A piece; those up to `last` are wanted next, and come by the same request."""
        if number in self._pieces:
            self._pieces.move_to_end(number)
            return self._pieces[number]
        count = min(last - number + 1, wire.MAX_READ // PIECE_BYTES)
        data = self._outside.range(self._number, number * PIECE_BYTES, count * PIECE_BYTES)
        for place in range(count):
            self._pieces[number + place] = data[place * PIECE_BYTES : (place + 1) * PIECE_BYTES]
        found = self._pieces[number]
        while len(self._pieces) > _CACHED_PIECES:
            self._pieces.popitem(last=False)
        return found


class _Dissect:
    """dissect's libraries as an Opener."""

    name = "dissect"
    readable = dissect_files.READABLE

    def open_files(self, kind: str, source: Source, _name: str) -> FileSystem:
        return dissect_files.open_files(kind, source)

    def logical_volumes(self, members: Sequence[Source]) -> Sequence[tuple[str, Source | None, str]]:
        return dissect_files.logical_volumes(members)


def _load_the_rest() -> None:
    """Load what is otherwise loaded when it is first used: another user may not be able to read this Python."""
    for name in ("lz4.block", "yaml", "encodings.cp437", "encodings.utf_16_le", "encodings.ascii", "encodings.idna"):
        with suppress(ImportError):
            importlib.import_module(name)


def _give_up_rights(task: wire.Task) -> None:
    """Nothing is written, no process started, no other user's file read from here on."""
    for kind, most in (
        (resource.RLIMIT_AS, task.memory_bytes),
        (resource.RLIMIT_CPU, task.cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))


def main() -> None:
    """Do the task that comes through the pipe."""
    requests = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is no message
    outside = _Outside(requests, sys.stdin.buffer)
    task = outside.task()
    disks = {disk.name: _Disk(outside, number, disk.size_bytes) for number, disk in enumerate(task.disks)}
    survey(disks, _prepare(task, disks), outside.tell)


def _prepare(task: wire.Task, disks: Mapping[str, Source]) -> Opener | None:
    """What reads file systems; and the rights that it does not need are gone.

    libguestfs starts a VM, which is a fence of its own, and needs the rights to do that.
    """
    opener: Opener | None = None
    if task.reader == "dissect" and dissect_files.load():
        opener = _Dissect()
    elif task.reader == "libguestfs" and guestfs_files.is_installed():
        return guestfs_files.GuestfsOpener(disks, Path(task.directory))
    _load_the_rest()
    _give_up_rights(task)
    return opener


if __name__ == "__main__":
    main()
