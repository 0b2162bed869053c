"""One disk's part of a capture: the layer file, and what QEMU is asked to do with it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drsync.errors import SpoolUnusable
from drsync.model import Kind
from drsync.qcow2 import create_image
from drsync.source import DiskSurvey
from drsync.source.bitmap import Action, begin_bitmap
from drsync.source.nodes import Node
from drsync.source.unix_socket import Peer
from drsync.units import KiB

_HAS_PERF: Final = (6, 0, 0)
"""The first QEMU that can be told (BackupPerf in its qapi/block-core.json)."""
_EFFECTIVE: Final = 2
"""Column of the effective id behind "Uid:" and "Gid:" in /proc/<pid>/status (proc(5))."""


def copy_tuning(qemu_version: tuple[int, int, int]) -> Action:
    """Arguments of blockdev-backup: how much it copies at once.

    QEMU copies 64 pieces of 1 MiB side by side, unless it is told otherwise. They fill its 64
    threads, and a guest's write waits behind them all: one in the way of a full of 1 GiB took
    1.8 s (QEMU 7.2, files on one disk). With 4 pieces of 256 KiB it took 9 ms at most, and the
    copy 0.8 s instead of 1.9 s.
    """
    if qemu_version < _HAS_PERF:
        return {}
    return {"x-perf": {"max-workers": 4, "max-chunk": 256 * KiB}}


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCopy:
    """One disk's part of a capture."""

    disk: DiskSurvey
    node: Node
    path: Path
    """The layer file."""
    layer_node: str
    job: str
    bitmap: str
    """The bitmap that begins with this capture."""
    base_bitmap: str
    """The bitmap whose blocks are copied, if it is an increment."""

    def layer(self) -> Action:
        """Arguments of blockdev-add: the layer as a node that QEMU can write.

        A layer of an earlier boot is thrown away, so a flush would only cost. Through the page
        cache it is read from memory, and what is shipped before the kernel writes it, never
        goes to the disk at all (docs/decisions/0002-past-the-page-cache.md).
        """
        cache = {"no-flush": True, "direct": False}
        return {
            "driver": "qcow2",
            "node-name": self.layer_node,
            "file": {"driver": "file", "filename": str(self.path), "cache": cache},
            "cache": cache,
        }

    def begin_bitmap(self) -> Action:
        """Transaction action: the new bitmap records from now on."""
        return begin_bitmap(self.node.node_name, self.bitmap, self.node.keeps_bitmaps)

    def begin_backup(self, tuning: Action, speed: int) -> Action:
        """Transaction action: copy the disk as it is now, by a `copy_tuning`; the job stays until dismissed.

        `speed` is bytes a second, 0 = no limit. It holds for the copying alone: what a guest is about to
        overwrite is copied at once.
        """
        data: Action = {
            "job-id": self.job,
            "device": self.node.node_name,
            "target": self.layer_node,
            "speed": speed,
            "auto-finalize": True,
            "auto-dismiss": False,
            "on-source-error": "report",
            "on-target-error": "report",
        }
        return {"type": "blockdev-backup", "data": data | tuning | self._extent()}

    def _extent(self) -> Action:
        """Which blocks the job copies.

        `never` leaves the bits of the base's bitmap as they are, whatever becomes of
        the job. A full of a qcow2 image without a backing file skips what was never
        written (`top`): QEMU would write an explicit zero for all of it, which for
        2 TiB takes 15 s and 256 MiB instead of 0.3 s and nothing (measured with 7.2).
        Of a raw image QEMU does not know it, and a backing chain has to be flattened.
        """
        if self.disk.kind is Kind.INCREMENTAL:
            return {"sync": "bitmap", "bitmap": self.base_bitmap, "bitmap-mode": "never"}
        return {"sync": "top" if self.node.knows_unwritten else "full"}


def make_layer(path: Path, size_bytes: int, owner: tuple[int, int]) -> None:
    """An empty layer file that only QEMU and root can open; `owner` is QEMU's user and group.

    Raises:
        SpoolUnusable: it can't be made there, or exists; nothing is left.
    """
    try:
        create_image(path, size_bytes)
    except FileExistsError as err:
        raise SpoolUnusable(path=path, problem="the layer exists already") from err
    except OSError as err:
        path.unlink(missing_ok=True)
        raise SpoolUnusable(path=path, problem=err.strerror) from err
    _give_to(path, owner)


def _give_to(path: Path, owner: tuple[int, int]) -> None:
    """Let QEMU's user own the file, if we may and it is another one."""
    if os.geteuid() == 0 and owner[0] != 0:
        os.chown(path, *owner, follow_symlinks=False)


def boot_of_host() -> str:
    """The id of the machine's present boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def incarnation_of(peer: Peer) -> str:
    """Boot, process id and start time of QEMU's process (proc(5), field 22 of stat): no other process has had them."""
    boot = boot_of_host()
    try:
        stat = Path(f"/proc/{peer.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it is in another pid namespace; its id there and the boot must do
        return f"{boot} {peer.pid}"
    return f"{boot} {peer.pid} {stat.rpartition(')')[2].split()[19]}"


def identity(peer: Peer) -> tuple[int, int]:
    """The user and group that QEMU's process has now.

    The socket tells those it had when it began to listen; with `-run-with user=`
    (or `-runas`) it has given them up since.
    """
    try:
        lines = Path(f"/proc/{peer.pid}/status").read_text(encoding="utf-8").splitlines()
        ids = {line.split()[0]: int(line.split()[_EFFECTIVE]) for line in lines if line.startswith(("Uid:", "Gid:"))}
    except OSError:
        return peer.uid, peer.gid
    return ids.get("Uid:", peer.uid), ids.get("Gid:", peer.gid)
