"""drsync, capturing disks that qemu-storage-daemons serve."""

import subprocess
import sys
from collections.abc import Sequence

from bench.disk_data import DISK_BYTES, Piece, to_qcow2
from bench.measuring import GIB, Usage, measure
from bench.tools import Place
from storage_daemon import DaemonDisk, StorageDaemon

DRSYNC = [sys.executable, "-m", "drsync"]
SPARSE_BYTES = 2048 * GIB


class DrsyncTool:
    """Captures the VM "files", which has the data, and the VM "sparse", whose disk of 2 TiB has nearly nothing."""

    name = "drsync"
    restored_format = "qcow2"

    def __init__(self, place: Place) -> None:
        self._place = place
        self._config = place.directory / "drsync.toml"
        self.stored = place.directory / "repository"
        self.restored = place.directory / "restored" / "d.qcow2"
        self._files = StorageDaemon(place.directory / "files", [DaemonDisk(name="d", size_bytes=DISK_BYTES)])
        self._sparse = StorageDaemon(place.directory / "sparse", [DaemonDisk(name="d", size_bytes=SPARSE_BYTES)])
        self.reads = self._files.path("d")

    def prepare(self) -> None:
        for daemon in (self._files, self._sparse):
            daemon.directory.mkdir()
        to_qcow2(self._place.raw, self._files.path("d"))
        for daemon in (self._files, self._sparse):
            daemon.start()
        self.stored.mkdir()
        self._configure()

    def _configure(self) -> None:
        directory = self._place.directory
        text = f'[repository]\nurl = "file://{self.stored}"\nkey_file = "{directory}/key"\n'
        text += f'[spool]\npath = "{directory}/spool"\nreserve = "1MiB"\nstream_above = "1TiB"\n'
        for name, daemon in (("files", self._files), ("sparse", self._sparse)):
            text += f'[[vm]]\nname = "{name}"\nsocket = "{daemon.qmp_socket}"\ndisks = {{ d = "d-d" }}\n'
        self._config.write_text(text)
        subprocess.run(self._command("init"), check=True, stdout=subprocess.DEVNULL)

    def full(self) -> Usage:
        return self.capture("files")

    def change(self, pieces: Sequence[Piece]) -> None:
        self._files.io("d", *(piece.command for piece in pieces))

    def increment(self) -> Usage:
        return self.capture("files")

    def restore(self) -> Usage:
        output = str(self.restored.parent)
        return measure(self._command("restore", "files", "--to", "image", "--output", output), self._place.log)

    def capture(self, vm: str) -> Usage:
        return measure(self._command("capture", vm), self._place.log)

    def write_sparse(self, offset: str) -> None:
        """Write 1 MiB to the sparse disk."""
        self._sparse.io("d", f"write -P 1 {offset} 1M")

    def close(self) -> None:
        self._files.close()
        self._sparse.close()

    def _command(self, *arguments: str) -> list[str]:
        return [*DRSYNC, "--config", str(self._config), *arguments]
