"""Opens a VM's disks for live reading: read-only NBD exports of QEMU itself, at a socket in drsync's spool.

    block-dirty-bitmap-add (disabled) + merge   what changed since the base, held still: only such a one can be exported
    nbd-server-start   unix socket in a directory of QEMU's user
    block-export-add   one a disk, read-only
    ...                drsync reads, with a connection a thread
    block-export-del, nbd-server-stop, block-dirty-bitmap-remove

A QEMU process has one NBD server. One that is there belongs to somebody else: it
is left alone, and the disks can't be read live then. One that listens at our
socket is ours, even if the drsync that started it is dead; but if others export
through it too, it stays for them.

Before 9.0, QEMU's NBD server works in the iothread of the disk, and asserts, when a
client leaves, that it is in the main thread: the VM is gone (seen with 7.2.22;
"nbd/server: only traverse NBDExport->clients from main loop thread" is the fix). A
client leaves by dying, too, so nothing that drsync could do makes that safe.
"""

import logging
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from drsync.errors import DrsyncError, LiveUnavailable, SourceLost
from drsync.model import BLOCK_SIZE, CaptureId, Clock, Kind, Pace, new_capture_id
from drsync.source import Base, DiskSurvey
from drsync.source.backup import identity
from drsync.source.bitmap import Owner
from drsync.source.monitor import CommandRefused, Monitor
from drsync.source.nbd import NbdReader, load
from drsync.source.nodes import Node

log = logging.getLogger(__name__)

MAX_SOCKET_PATH_BYTES: Final = 107
"""Linux' sun_path is 108 bytes with its closing zero."""
SAFE_VERSION: Final = 9
"""From this QEMU on, an NBD client may leave a disk that an iothread serves."""
_SOCKET: Final = "nbd"
_END_TIMEOUT_S: Final = 60.0
_PEER_CREDENTIALS: Final = struct.Struct("3i")


class _Export(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A block export (BlockExportInfo)."""

    id: str
    type: str


class _Property(msgspec.Struct, frozen=True, kw_only=True):
    """What lies in a place of QEMU's object tree (ObjectPropertyInfo)."""

    name: str
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _LiveDisk:
    """A disk in a view."""

    survey: DiskSurvey
    node: Node
    export: str
    base_bitmap: str
    copy_bitmap: str
    """The still copy of `base_bitmap`; empty: all of the disk is read."""


class Exports:
    """What live reading puts into one QEMU, and takes away again. Not thread-safe, as its monitor is not."""

    def __init__(self, monitor: Monitor, owner: Owner, directory: Path | None, clock: Clock) -> None:
        """`directory`: where the socket goes; None: there is no place for one."""
        self._monitor = monitor
        self._owner = owner
        self._directory = directory
        self._clock = clock

    @property
    def vm(self) -> str:
        return self._owner.vm

    @property
    def socket(self) -> Path | None:
        return self._directory / _SOCKET if self._directory is not None else None

    def open(self, base: Base | None, disks: Sequence[DiskSurvey], nodes: Mapping[str, Node], pace: Pace) -> "NbdView":
        """Start the server and export `disks`.

        Raises:
            LibraryMissing, LiveUnavailable: it can't be; nothing is left in QEMU.
            CommandRefused, SourceLost: as Monitor.execute; what is left, `clear` and a survey take away.
        """
        load(self._owner.vm)
        self._refuse_iothreads()
        runs = self._is_our_server()  # left for others who export through it, too
        path = self.socket if runs and self.socket is not None else self._make_place()
        still = new_capture_id()
        live = [self._disk(n, disk, nodes[disk.name], base, still) for n, disk in enumerate(disks)]
        if not runs:
            self._start_server(path)
        try:
            self._copy_bitmaps(live)
            for disk in live:
                self._monitor.execute("block-export-add", _export(disk))
        except CommandRefused:
            self.clear()
            self._remove_copies(live)
            raise
        return NbdView(self, live, path, pace)

    def _refuse_iothreads(self) -> None:
        """See that no NBD client can bring this QEMU down (see the module)."""
        version = self._monitor.qemu_version()
        try:
            objects = self._monitor.query("qom-list", list[_Property], {"path": "/objects"})
        except CommandRefused:  # there is no object at all
            return
        if version[0] < SAFE_VERSION and any(found.type == "child<iothread>" for found in objects):
            said = ".".join(str(number) for number in version)
            raise self._unavailable(
                f"it has iothreads, and QEMU {said} would end when an NBD client leaves (9.0 does not)"
            )

    def _disk(self, number: int, disk: DiskSurvey, node: Node, base: Base | None, still: CaptureId) -> _LiveDisk:
        dirty = disk.kind is Kind.INCREMENTAL and base is not None
        return _LiveDisk(
            survey=disk,
            node=node,
            export=self._owner.export(number),
            base_bitmap=self._owner.bitmap(base.capture, disk.name) if dirty and base is not None else "",
            copy_bitmap=self._owner.bitmap(still, disk.name) if dirty else "",
        )

    def _make_place(self) -> Path:
        """The directory of the socket, which QEMU's user can write and nobody else."""
        if self._directory is None or self.socket is None:
            raise self._unavailable("no directory for a socket was given")
        if len(bytes(self.socket)) > MAX_SOCKET_PATH_BYTES:
            raise self._unavailable(f"{self.socket} is longer than a socket's path can be")
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            if os.geteuid() == 0:
                uid, gid = identity(self._monitor.peer)
                os.chown(self._directory, uid, gid, follow_symlinks=False)
            self.socket.unlink(missing_ok=True)
        except OSError as err:
            raise self._unavailable(f"{err.filename or self._directory}: {err.strerror}") from err
        return self.socket

    def _start_server(self, path: Path) -> None:
        address = {"type": "unix", "data": {"path": str(path)}}
        try:
            self._monitor.execute("nbd-server-start", {"addr": address})
        except CommandRefused as err:
            raise self._unavailable(err.text) from err

    def _copy_bitmaps(self, live: Sequence[_LiveDisk]) -> None:
        actions: list[dict[str, object]] = []
        for disk in live:
            if disk.copy_bitmap:
                where = {"node": disk.node.node_name}
                new = {"name": disk.copy_bitmap, "granularity": BLOCK_SIZE, "persistent": False, "disabled": True}
                merge = {"target": disk.copy_bitmap, "bitmaps": [disk.base_bitmap]}
                actions += [
                    {"type": "block-dirty-bitmap-add", "data": where | new},
                    {"type": "block-dirty-bitmap-merge", "data": where | merge},
                ]
        if actions:
            self._monitor.execute("transaction", {"actions": actions})

    def close(self, live: Sequence[_LiveDisk]) -> None:
        """Take a view away, as far as QEMU still answers: what is left, the next survey takes away."""
        try:
            self.clear()
            self._remove_copies(live)
        except (SourceLost, CommandRefused, TimeoutError) as err:
            log.warning("vm=%s live reading is not cleared away yet: %s", self._owner.vm, err)

    def _remove_copies(self, live: Sequence[_LiveDisk]) -> None:
        for disk in live:
            if disk.copy_bitmap:
                with suppress(CommandRefused):  # it was not made, or is still busy: the next survey removes it
                    where = {"node": disk.node.node_name, "name": disk.copy_bitmap}
                    self._monitor.execute("block-dirty-bitmap-remove", where)

    def clear(self) -> None:
        """End our exports, then our server, whoever made them.

        Raises:
            SourceLost, CommandRefused: as Monitor.execute.
            TimeoutError: an export does not end.
        """
        deadline_s = self._clock.monotonic_s() + _END_TIMEOUT_S
        asked: set[str] = set()
        while mine := [e.id for e in self._exports() if self._owner.owns_export(e.id)]:
            for export in mine:
                if export not in asked:
                    with suppress(CommandRefused):  # it is shutting down already
                        self._monitor.execute("block-export-del", {"id": export, "mode": "hard"})
                    asked.add(export)
            if self._clock.monotonic_s() > deadline_s:
                raise TimeoutError
            self._monitor.pause(0.02)
        if self._is_our_server():
            if any(e.type == "nbd" for e in self._exports()):
                log.warning("vm=%s leaves its NBD server running: others export through it", self._owner.vm)
                return
            with suppress(CommandRefused):  # it ended in between
                self._monitor.execute("nbd-server-stop")
        if self._directory is not None and self._directory.exists():
            with suppress(OSError):  # an empty directory of ours harms nobody
                (self._directory / _SOCKET).unlink(missing_ok=True)
                self._directory.rmdir()

    def _exports(self) -> list[_Export]:
        return self._monitor.query("query-block-exports", list[_Export])

    def _is_our_server(self) -> bool:
        """Whether this very QEMU listens at our socket."""
        if self.socket is None or not self.socket.exists():
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            try:
                connection.settimeout(5.0)
                connection.connect(str(self.socket))
                raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
            except OSError:
                return False
        pid: int = _PEER_CREDENTIALS.unpack(raw)[0]
        return pid == self._monitor.peer.pid

    def _unavailable(self, problem: str) -> DrsyncError:
        return LiveUnavailable(vm=self._owner.vm, problem=problem)


def _export(disk: _LiveDisk) -> dict[str, object]:
    """Arguments of block-export-add."""
    return {
        "type": "nbd",
        "id": disk.export,
        "node-name": disk.node.node_name,
        "name": disk.export,
        "writable": False,
        "bitmaps": [disk.copy_bitmap] if disk.copy_bitmap else [],
    }


class NbdView:
    """A LiveView over the exports of one QEMU."""

    def __init__(self, exports: Exports, disks: Sequence[_LiveDisk], path: Path, pace: Pace) -> None:
        self._exports = exports
        self._live = disks
        self._disks = {disk.survey.name: disk for disk in disks}
        self._path = path
        self._pace = pace
        self._closed = False

    def reader(self, disk: str) -> NbdReader:
        live = self._disks[disk]
        return NbdReader(
            self._exports.vm,
            self._path,
            live.export,
            size_bytes=live.survey.size_bytes,
            bitmap=live.copy_bitmap,
            pace=self._pace,
        )

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._exports.close(self._live)
