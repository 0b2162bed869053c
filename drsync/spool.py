"""The spool: the local directory where layers wait until the repository has them.

    <spool>/spool.json                      the id of this spool: who writes the logs
    <spool>/.group-<group>.lock             held while a process captures this group
    <spool>/<vm>/lock                       held while a process captures this VM
    <spool>/<vm>/state.json                 what this host knows of the VM's log
    <spool>/<vm>/seed.journal               what was sent of a VM that is being seeded (journal.py)
    <spool>/<vm>/failback.journal           what was sent of an instance that goes home (recovery/failback)
    <spool>/<vm>/.live/                     the socket through which its disks are read meanwhile
    <spool>/<vm>/held.json                  a guest is held still: let it go (hold.py)
    <spool>/<vm>/preflight.json             whether its newest checked point would boot elsewhere (preflight/report.py)
    <spool>/<vm>/<capture id>/capture.json  what the capture is, once it is complete
    <spool>/<vm>/<capture id>/<disk>.qcow2  its layers

A capture goes through these states; its directory shows which one it is in:

    TAKING ──▶ CAPTURED ──▶ COMMITTED        no capture.json: QEMU may be writing
       │           │                         capture.json:    complete, waits to be shipped
       └───────────┴──────▶ DROPPED          no directory:    committed, or dropped

Layers are not fsynced: a crash of the machine ends QEMU too, so its bitmaps are
gone and the next capture reads everything anyway. capture.json therefore names
the boot that it belongs to; a capture of an earlier boot is dropped, never shipped.
"""

import fcntl
import os
import pwd
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from drsync.durable import sync_directory
from drsync.errors import CaptureRunning, LiveUnavailable, NoWayToCopy, SpoolClosed, SpoolFull, SpoolUnusable
from drsync.model import CaptureId, is_name
from drsync.spooled import CaptureState, HeldGuest, SpooledCapture, VmState
from drsync.units import format_size

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_DIRECTORY_MODE: Final = 0o711  # QEMU may run as another user: it must pass, and need not list
_MAX_STATE_BYTES: Final = 64 * 1024 * 1024
_Record = TypeVar("_Record", bound=msgspec.Struct)
_UNREADABLE: Final = (OSError, ValueError, RecursionError, msgspec.MsgspecError)
"""What reading a state file raises that is not there, not JSON, or not the JSON that it should be."""


class _SpoolRecord(msgspec.Struct, frozen=True, kw_only=True):
    writer: str


class Spool:
    """The spool's directory. Several processes may use it; one at a time captures a VM."""

    def __init__(self, path: Path, reserve_bytes: int) -> None:
        self.path = path
        self.reserve_bytes = reserve_bytes

    def writer_id(self) -> str:
        """The id of this spool, made when it is first asked for: 16 hex digits.

        Raises:
            SpoolUnusable: the directory can't be made or written.
        """
        record = self.path / "spool.json"
        with translated(self.path):
            _make_directory(self.path)
            if not record.exists():
                _write_new(record, msgspec.json.encode(_SpoolRecord(writer=secrets.token_hex(8))))
                sync_directory(self.path)
            try:
                return _read(record, _SpoolRecord).writer
            except (ValueError, RecursionError, msgspec.MsgspecError) as err:
                raise SpoolUnusable(path=record, problem="it does not hold the id of a spool") from err

    @contextmanager
    def group_locked(self, group: str) -> Iterator[None]:
        """Hold a group of VMs: no other process on this host captures it as a group meanwhile.

        Without it, two processes would each get some of the members.

        Raises:
            CaptureRunning: another process holds it.
        """
        with _locked(self.path, f".group-{group}.lock", f"of group {group}"):  # no name of a VM begins so
            yield

    def held_vms(self) -> list[str]:
        """The VMs whose guests some process holds still, or held when it ended."""
        with translated(self.path):
            return sorted(note.parent.name for note in self.path.glob("*/held.json") if is_name(note.parent.name))

    def vm(self, name: str) -> "VmSpool":
        """The part of the spool that belongs to the VM `name`."""
        return VmSpool(self, name)

    def free_bytes(self) -> int:
        """Room on the spool's file system beside the reserve; may be negative."""
        with translated(self.path):
            return shutil.disk_usage(self.path).free - self.reserve_bytes


class VmSpool:
    """One VM's directory in the spool."""

    def __init__(self, spool: Spool, vm: str) -> None:
        if not is_name(vm):
            raise ValueError(vm)
        self._spool = spool
        self.vm = vm
        self.path = spool.path / vm

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this VM: no other process on this host captures it meanwhile. A dead process holds nothing.

        Raises:
            CaptureRunning: another process holds it.
        """
        with _locked(self.path, "lock", self.vm):
            yield

    def state(self) -> VmState:
        """What this host remembers of the VM; a new state if nothing, or nothing readable."""
        try:
            return _read(self.path / "state.json", VmState)
        except _UNREADABLE:
            return VmState()

    def remember(self, state: VmState) -> None:
        """Store `state`, whole or not at all; it survives a crash of the machine.

        A host that forgot that it was fenced would take the VM back by itself.
        """
        if state == self.state():
            return
        with translated(self.path):
            _make_directory(self.path)
            _write_over(self.path / "state.json", msgspec.json.encode(state))

    def held(self) -> HeldGuest | None:
        """What a process noted before it held the guest still; None if nobody does, or did before the last boot."""
        try:
            held = _read(self.path / "held.json", HeldGuest)
        except _UNREADABLE:
            return None
        return held if held.boot_id == boot_id() else None

    def hold(self, held: HeldGuest) -> None:
        """Note that the guest is about to be held still; the note is on the disk when this returns.

        Raises:
            SpoolUnusable: it is not: do not hold the guest.
        """
        with translated(self.path):
            _make_directory(self.path)
            _write_over(self.path / "held.json", msgspec.json.encode(held))

    def let_go(self) -> None:
        """Remove the note: the guest is known to run freely."""
        with translated(self.path):
            (self.path / "held.json").unlink(missing_ok=True)

    def note(self, name: str, record: msgspec.Struct) -> None:
        """Store a record under a file name, over the one before: it is for people, and losing it costs nothing."""
        with translated(self.path):
            _make_directory(self.path)
            _write_over(self.path / name, msgspec.json.encode(record))

    def noted(self, name: str, kind: type[_Record]) -> _Record | None:
        """The record under a file name; None if there is none, or none of this kind."""
        try:
            return _read(self.path / name, kind)
        except _UNREADABLE:
            return None

    def check_room(self, copy_bytes: int) -> None:
        """Check that a capture of `copy_bytes` leaves the reserve free.

        A spool that fills up during a capture fails it and, while QEMU copies
        before it writes, makes the guest wait: so QEMU isn't touched without room.

        Raises:
            SpoolFull: there is not enough room.
        """
        needed, free = _needed_bytes(copy_bytes), self._spool.free_bytes()
        if needed > free:
            raise SpoolFull(
                vm=self.vm,
                path=self._spool.path,
                needed=format_size(needed),
                free=format_size(max(0, free)),
                reserve=format_size(self._spool.reserve_bytes),
            )

    def has_room(self, copy_bytes: int) -> bool:
        """Whether `check_room` would find the room."""
        return _needed_bytes(copy_bytes) <= self._spool.free_bytes()

    def no_way(self, copy_bytes: int, cause: LiveUnavailable) -> NoWayToCopy:
        """The error of a capture for which there is no room, and which can't be read live for this `cause`."""
        return NoWayToCopy(
            vm=self.vm,
            path=self._spool.path,
            needed=format_size(_needed_bytes(copy_bytes)),
            free=format_size(max(0, self._spool.free_bytes())),
            problem=cause.fields["problem"],
        )

    @property
    def journal_path(self) -> Path:
        """Where the journal of a seed is."""
        return self.path / "seed.journal"

    @property
    def live_directory(self) -> Path:
        """Where the socket goes through which disks are read live."""
        return self.path / ".live"

    def remove_journal(self) -> None:
        """A seed is done, or given up."""
        with translated(self.path):
            self.journal_path.unlink(missing_ok=True)

    def check_passable(self, uid: int, gid: int) -> None:
        """Check that a user can pass through every directory down to this VM's layers.

        Raises:
            SpoolClosed: one is closed to it; the error names it.
        """
        if uid == 0:
            return
        user, groups = _user(uid, gid)
        for directory in reversed([self.path, *self.path.parents]):
            try:
                status = directory.stat()
            except OSError:
                return  # not made yet: drsync makes what is missing passable
            if not _may_pass(status, uid, groups):
                raise SpoolClosed(vm=self.vm, user=user, directory=directory)

    @property
    def keep_free_bytes(self) -> int:
        """Below this much free space a running capture gives up: half the reserve, as the guest may write meanwhile."""
        return self._spool.reserve_bytes // 2

    def begin(self, capture: CaptureId, disks: list[str]) -> dict[str, Path]:
        """Make the directory of a new capture; the paths where its layers go (TAKING)."""
        with translated(self.path):
            directory = self.path / capture
            directory.mkdir()
            directory.chmod(_DIRECTORY_MODE)
            return {disk: directory / f"{disk}.qcow2" for disk in disks}

    def complete(self, capture: SpooledCapture) -> None:
        """Note that every layer of the capture is whole (CAPTURED)."""
        with translated(self.path):
            _write_new(self.path / capture.capture / "capture.json", msgspec.json.encode(capture))

    def layer_path(self, capture: CaptureId, disk: str) -> Path:
        return self.path / capture / f"{disk}.qcow2"

    def remove(self, capture: CaptureId) -> None:
        """Remove a capture that is committed or shall be dropped; half a removal leaves it TAKING."""
        directory = self.path / capture
        with translated(self.path), suppress(FileNotFoundError):
            (directory / "capture.json").unlink(missing_ok=True)
            shutil.rmtree(directory)

    def state_of(self, capture: CaptureId) -> CaptureState:
        """TAKING or CAPTURED, as the capture's directory shows; DROPPED if there is none."""
        directory = self.path / capture
        if not directory.exists():
            return CaptureState.DROPPED
        return CaptureState.CAPTURED if (directory / "capture.json").exists() else CaptureState.TAKING

    def waiting(self) -> SpooledCapture | None:
        """The complete capture that waits to be shipped, if there is one. Everything else that lies here is dropped."""
        found: SpooledCapture | None = None
        with translated(self.path):
            for directory in sorted(p for p in self.path.glob("*/") if is_name(p.name)):
                spooled = self._read_capture(directory)
                if spooled is None or found is not None:
                    self.remove(CaptureId(directory.name))
                else:
                    found = spooled
        return found

    def _read_capture(self, directory: Path) -> SpooledCapture | None:
        try:
            spooled = _read(directory / "capture.json", SpooledCapture)
        except _UNREADABLE:
            return None
        same = spooled.capture == directory.name and spooled.boot_id == boot_id()
        return spooled if same and all(is_name(d.name) for d in spooled.disks) else None

    def used_bytes(self) -> int:
        """What this VM's layers take on the disk now."""
        used = 0
        for directory, _, files in os.walk(self.path):  # what a running cycle removes meanwhile is passed over
            for name in files if directory != str(self.path) else ():
                with suppress(FileNotFoundError):
                    used += Path(directory, name).lstat().st_blocks * 512
        return used


def _needed_bytes(copy_bytes: int) -> int:
    return copy_bytes + copy_bytes // 1024 + 1024 * 1024  # tables and headers of the layers


def boot_id() -> str:
    """The id of the machine's present boot."""
    return _BOOT_ID.read_text().strip()


def _user(uid: int, gid: int) -> tuple[str, list[int]]:
    """A user's name, and all groups that it is in."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid), [gid]
    return name, os.getgrouplist(name, gid)


def _may_pass(status: os.stat_result, uid: int, groups: Sequence[int]) -> bool:
    """What the kernel decides for a search of a directory (path_resolution(7)), but for ACLs."""
    if status.st_uid == uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid in groups:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


@contextmanager
def _locked(directory: Path, name: str, vm: str) -> Iterator[None]:
    """Hold a file's lock, which the kernel takes back when the process ends."""
    with translated(directory):
        _make_directory(directory)
        fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "?"
            raise CaptureRunning(vm=vm, pid=pid) from err
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """What the file system refuses in the block raises SpoolUnusable."""
    try:
        yield
    except OSError as err:
        raise SpoolUnusable(path=err.filename or path, problem=err.strerror) from err


def _make_directory(path: Path) -> None:
    """Make a directory that QEMU can reach its layers through, whatever the umask; one that exists stays as it is."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return
    path.chmod(_DIRECTORY_MODE)


def _read(path: Path, kind: type[_Record]) -> _Record:
    with path.open("rb") as file:
        return msgspec.json.decode(file.read(_MAX_STATE_BYTES), type=kind)


def _write_new(path: Path, data: bytes) -> None:
    """Write a file that does not exist; whoever sees it sees all of it."""
    temporary = _write_beside(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass  # another process was first: its record stands
    finally:
        temporary.unlink()


def _write_over(path: Path, data: bytes) -> None:
    _write_beside(path, data).replace(path)
    sync_directory(path.parent)


def _write_beside(path: Path, data: bytes) -> Path:
    """Write a file of another name beside `path`, and have its bytes on the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
