"""A seed's journal: what was read and sent of a VM so far, on the disk before anybody relies on it.

    <spool>/<vm>/seed.journal       one line an entry: checksum, space, JSON
        begin     which point it goes on from
        round     bitmaps that began to record, and how each disk is read
        stretch   blocks that were read, and the pack that holds what was to be sent of them
        drop      what was sent of a disk is of no use any more

Lines are only ever appended, each with one fsync, so the hundred-thousandth costs
what the first did. A line that is not whole counts as not written, and so does all
behind it: what it told of is read again. (docs/decisions/0004-seed.md)
"""

import errno
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from drsync.durable import sync_directory
from drsync.model import CaptureId, block_count
from drsync.spool import translated

_MAX_BYTES: Final = 1024 * 1024 * 1024
"""Of a journal: 3 million packs, 100 TiB."""
_CHECK_DIGITS: Final = 16


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag="begin"):
    """A seed begins."""

    over: CaptureId | None
    """The newest point's capture, which the seed goes on from; None if there is no point."""
    send_all: bool
    """Everything is sent, whatever the point before has."""
    time: str


class RoundDisk(msgspec.Struct, frozen=True, kw_only=True):
    """How a disk is read in a round."""

    name: str
    size_bytes: int
    whole: bool
    """Read as a whole, or just what the round's base holds."""
    reason: str
    """Why it is read as a whole."""
    copy_bytes: int
    """What there was to read, at most."""
    persistent_bitmap: bool


class Round(msgspec.Struct, frozen=True, kw_only=True, tag="round"):
    """A round begins: its bitmaps record."""

    capture: CaptureId
    """Whose bitmaps record what is written from now on."""
    base: CaptureId | None
    """Whose bitmaps tell what a disk has to read that is not read as a whole."""
    incarnation: str
    """Of the process that ran the VM then."""
    time: str
    disks: list[RoundDisk]
    definition: dict[str, object] = {}
    """What the source told of the VM when the bitmaps began: by this it knows the disks again."""


class PackRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A pack in the store, of blocks of one disk."""

    object_id: str
    length: int
    index_sha256: str


class Stretch(msgspec.Struct, frozen=True, kw_only=True, tag="stretch"):
    """Blocks `first` to `end - 1` of a disk were read in the present round."""

    disk: str
    first: int
    end: int
    read_bytes: int
    changed_bytes: int
    pack: PackRecord | None
    """What was to be sent of them; None if nothing was."""


class Drop(msgspec.Struct, frozen=True, kw_only=True, tag="drop"):
    """What was sent of a disk so far is not part of the seed any more."""

    disk: str


Entry = Begin | Round | Stretch | Drop


@dataclass(slots=True)
class RoundState:
    """A round, and what was done in it."""

    begun: Round
    stretches: dict[str, list[Stretch]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    """Disks of which nothing counts any more that was read before, here or in earlier rounds."""

    def disk(self, name: str) -> RoundDisk | None:
        return next((d for d in self.begun.disks if d.name == name), None)

    def missing(self, disk: RoundDisk) -> list[tuple[int, int]]:
        """The ranges of blocks (first, end) that no stretch covers."""
        found: list[tuple[int, int]] = []
        at, blocks = 0, block_count(disk.size_bytes)
        for stretch in sorted(self.stretches.get(disk.name, []), key=lambda s: s.first):
            if stretch.first > at:
                found.append((at, stretch.first))
            at = max(at, stretch.end)
        return [*found, *([(at, blocks)] if at < blocks else [])]

    @property
    def is_done(self) -> bool:
        return not any(self.missing(disk) for disk in self.begun.disks)

    @property
    def total_bytes(self) -> int:
        """What there was to read, at most."""
        return sum(disk.copy_bytes for disk in self.begun.disks)

    @property
    def read_bytes(self) -> int:
        return sum(s.read_bytes for stretches in self.stretches.values() for s in stretches)


class Journal:
    """The journal of one VM's seed. `append` may be called from several threads."""

    def __init__(self, path: Path, begin: Begin) -> None:
        self.path = path
        self.begin = begin
        self.rounds: list[RoundState] = []
        self._lock = threading.Lock()

    @classmethod
    def create(cls, path: Path, begin: Begin) -> "Journal":
        """Begin a journal; one that is there is gone.

        Raises:
            SpoolUnusable: it can't be written.
        """
        with translated(path):
            path.unlink(missing_ok=True)
            _append(path, _line(begin))
            sync_directory(path.parent)
        return cls(path, begin)

    @classmethod
    def load(cls, path: Path, *, repair: bool = False) -> "Journal | None":
        """The journal at `path`; None if there is none, or its first line is not whole.

        `repair`: cut off what is behind the last whole line, as must be done before anything is appended.

        Raises:
            SpoolUnusable: it can't be read.
        """
        with translated(path):
            try:
                with path.open("rb") as file:
                    data = file.read(_MAX_BYTES)
            except FileNotFoundError:
                return None
            entries, whole_bytes = _parsed(data)
            if repair and whole_bytes < len(data):
                os.truncate(path, whole_bytes)
        if not entries or not isinstance(entries[0], Begin):
            return None
        journal = cls(path, entries[0])
        for entry in entries[1:]:
            journal._apply(entry)
        return journal

    def append(self, entry: Round | Stretch | Drop) -> None:
        """Note an entry; when this returns it survives a crash of the machine.

        Raises:
            SpoolUnusable: it can't be written.
        """
        with self._lock, translated(self.path):
            _append(self.path, _line(entry))
            self._apply(entry)

    def pass_over(self, disk: str, first: int, end: int) -> None:
        """Count blocks `first` to `end - 1` of the present round as read, without a note in the file."""
        self._apply(Stretch(disk=disk, first=first, end=end, read_bytes=0, changed_bytes=0, pack=None))

    def _apply(self, entry: Entry) -> None:
        if isinstance(entry, Round):
            self.rounds.append(RoundState(entry))
        elif isinstance(entry, Stretch) and self.rounds:
            self.rounds[-1].stretches.setdefault(entry.disk, []).append(entry)
        elif isinstance(entry, Drop):
            for done in self.rounds:
                done.stretches.pop(entry.disk, None)
                done.dropped.add(entry.disk)

    @property
    def present(self) -> RoundState | None:
        """The newest round; None before the first."""
        return self.rounds[-1] if self.rounds else None

    def packs(self, disk: str) -> list[Stretch]:
        """The stretches of a disk, of all rounds, that have packs."""
        return [s for done in self.rounds for s in done.stretches.get(disk, []) if s.pack is not None]

    def size_bytes(self, disk: str) -> int | None:
        """The size that a disk had in the newest round that read of it; None if none did."""
        sizes = [d.size_bytes for r in self.rounds if r.stretches.get(disk) and (d := r.disk(disk)) is not None]
        return sizes[-1] if sizes else None

    def whole_reason(self, disk: str) -> str | None:
        """Why a disk was last read as a whole; None if it never was."""
        found = [d.reason for r in self.rounds if (d := r.disk(disk)) is not None and d.whole]
        return found[-1] if found else None


def _parsed(data: bytes) -> tuple[list[Entry], int]:
    """The entries up to the first line that is not whole, and how many bytes they take."""
    entries: list[Entry] = []
    at = 0
    while (end := data.find(b"\n", at)) >= 0:
        entry = _entry(data[at:end])
        if entry is None:
            break
        entries.append(entry)
        at = end + 1
    return entries, at


def _entry(line: bytes) -> Entry | None:
    check, _, body = line.partition(b" ")
    if check != _check(body):
        return None
    with suppress(msgspec.MsgspecError):
        return msgspec.json.decode(body, type=Entry)  # type: ignore[no-any-return]
    return None


def _line(entry: Entry) -> bytes:
    body = msgspec.json.encode(entry)
    return _check(body) + b" " + body + b"\n"


def _check(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECK_DIGITS // 2).hexdigest().encode()


def _append(path: Path, line: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        before = os.fstat(fd).st_size
        if os.write(fd, line) != len(line):
            os.ftruncate(fd, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedProgress:
    """How far a VM's seed is."""

    begun_at: str
    round_number: int
    read_bytes: int
    """Of the present round."""
    total_bytes: int
    """What the present round has to read, at most."""
    stored_bytes: int
    """Of all rounds."""


def seed_progress(journal: Journal) -> SeedProgress:
    """How far a seed is."""
    present = journal.present
    stretches: Sequence[Stretch] = [s for r in journal.rounds for found in r.stretches.values() for s in found]
    return SeedProgress(
        begun_at=journal.begin.time,
        round_number=len(journal.rounds),
        read_bytes=present.read_bytes if present else 0,
        total_bytes=present.total_bytes if present else 0,
        stored_bytes=sum(s.pack.length for s in stretches if s.pack is not None),
    )


def changed_bytes(journal: Journal) -> Mapping[str, int]:
    """What a seed has brought of each disk, zeros included."""
    changed: dict[str, int] = {}
    for done in journal.rounds:
        for name, stretches in done.stretches.items():
            changed[name] = changed.get(name, 0) + sum(s.changed_bytes for s in stretches)
    return changed
