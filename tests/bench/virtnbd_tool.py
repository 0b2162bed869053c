"""virtnbdbackup: backs up a libvirt domain that has the data on its disk. The domain's CPUs never start.

Its disk is changed through QEMU's monitor, as a guest would, so that libvirt's bitmaps see it.
"""

import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bench.disk_data import Piece, to_qcow2
from bench.measuring import Usage, measure
from bench.tools import NotMeasured, Place, need
from libvirt_site import LibvirtSite, LibvirtSiteFailed

_PROGRAMS = ("virtnbdbackup", "virtnbdrestore", "libvirtd", "virsh", "qemu-system-x86_64", "qemu-nbd", "unshare")
_DEVICE = "/machine/peripheral/virtio-disk0/virtio-backend"
_DOMAIN = """
<domain type='qemu'><name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os>
<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>
<source file='{disk}'/><target dev='vda' bus='virtio'/></disk></devices></domain>
"""


class VirtnbdTool:
    """virtnbdbackup and virtnbdrestore, with lz4."""

    name = "virtnbdbackup"
    restored_format = "qcow2"

    def __init__(self, place: Place) -> None:
        self._place = place
        self._domain = f"drsync-bench-{secrets.token_hex(4)}"
        self._libvirt: LibvirtSite | None = None
        self.reads = place.directory / "disk.qcow2"
        self.stored = place.directory / "backup"
        self.restored = place.directory / "restored" / "disk.qcow2"

    def prepare(self) -> None:
        need(_PROGRAMS, root=True)
        to_qcow2(self._place.raw, self.reads)
        (self._place.directory / "scratch").mkdir()
        xml = self._place.directory / "domain.xml"
        xml.write_text(_DOMAIN.format(name=self._domain, disk=self.reads))
        try:
            self._libvirt = LibvirtSite()
        except LibvirtSiteFailed as err:
            raise NotMeasured(str(err)) from err
        self._libvirt.virsh("define", xml)
        self._libvirt.virsh("start", "--paused", self._domain)

    def full(self) -> Usage:
        return self._backup("full")

    def change(self, pieces: Sequence[Piece]) -> None:
        lines = (
            f"qemu-monitor-command {self._domain} --hmp 'qemu-io -d {_DEVICE} \"{piece.command}\"'" for piece in pieces
        )
        self._running().virsh(script="\n".join(lines))

    def increment(self) -> Usage:
        return self._backup("inc")

    def restore(self) -> Usage:
        directory = self._place.directory
        options: list[str | Path] = [
            "-i",
            self.stored,
            "-o",
            self.restored.parent,
            "-n",
            "-L",
            directory / "restore.log",
        ]
        return measure(["virtnbdrestore", "-U", self._running().uri, *options, *self._socket()], self._place.log)

    def close(self) -> None:
        if self._libvirt is None:
            return
        for command in (("destroy", self._domain), ("undefine", "--checkpoints-metadata", self._domain)):
            with suppress(LibvirtSiteFailed):  # it may not have come so far
                self._libvirt.virsh(*command)
        self._libvirt.destroy()
        self._libvirt = None

    def _backup(self, level: str) -> Usage:
        options: list[str | Path] = ["-d", self._domain, "-l", level, "-z", "-n", "-o", self.stored]
        options += ["-S", self._place.directory / "scratch"]
        return measure(["virtnbdbackup", "-U", self._running().uri, *options, *self._socket()], self._place.log)

    def _socket(self) -> list[str]:
        return ["-f", f"{self._running().path}/nbd"]

    def _running(self) -> LibvirtSite:
        if self._libvirt is None:
            raise RuntimeError("prepare first")
        return self._libvirt
