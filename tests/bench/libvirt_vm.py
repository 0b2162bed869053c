"""The VM that the tools back up while it works: a real guest that libvirt runs, 5 GiB of files on its second disk.

It writes 4 KiB at a time, past its own cache, to the last 64 MiB of that disk: that is whose latency is measured.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Final

from bench.disk_data import CHANGED_BYTES, DISK_BYTES
from bench.guest_latency import Latency, WriteLatency
from bench.measuring import MIB
from libvirt_guest import LibvirtGuest, Machine, SiteDisk
from libvirt_site import LibvirtSite

DATA: Final = "vdb"
_WRITER: Final = (
    "(n=0; while [ ! -e /tmp/stop ]; do n=$(((n * 5 + 1) % 16384)); "
    "dd if=/tmp/page of=/dev/{disk} bs=4k seek=$(({first} + n)) count=1 oflag=direct conv=notrunc; done; "
    "echo > /tmp/stopped) 2>/dev/null &"
)


class LibvirtVm:
    """One VM for one tool. It stands still (suspended) while another tool's is measured."""

    def __init__(self, site: LibvirtSite, name: str, system: Path, data: Path) -> None:
        """Start it. `system` is the guest's image, `data` a raw disk; both are copied."""
        self.name = name
        self.data = site.images / f"{name}-data.qcow2"
        boot = site.images / f"{name}.qcow2"
        shutil.copyfile(system, boot)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(data), str(self.data)], check=True)
        self._site = site
        disks = [SiteDisk(target="vda", path=boot), SiteDisk(target=DATA, path=self.data)]
        self._guest = LibvirtGuest(site, name, disks, Machine())
        self._guest.define()
        self._guest.start()

    def stand_still(self) -> None:
        """Stop its processors until `go_on`."""
        self._site.virsh("suspend", self.name)

    def go_on(self) -> None:
        """Let its processors run."""
        self._site.virsh("resume", self.name)

    def begin_writing(self) -> None:
        """Write small pieces until `stop_writing`, one after the other."""
        first = DISK_BYTES // 4096 - 16384
        self._guest.check("rm -f /tmp/stop /tmp/stopped; dd if=/dev/urandom of=/tmp/page bs=4k count=1 2>/dev/null")
        self._guest.check(_WRITER.format(disk=DATA, first=first))

    def stop_writing(self) -> None:
        """Let the last piece be written."""
        self._guest.check("touch /tmp/stop; while [ ! -e /tmp/stopped ]; do sleep 0.1; done; sync", timeout_s=120)

    def change(self, seed: int) -> None:
        """Write 256 MiB in pieces of 1 MiB at random places of the first 15 GiB."""
        pieces = CHANGED_BYTES // MIB
        places = f"awk 'BEGIN {{ srand({seed}); for (n = 0; n < {pieces}; n++) print int(rand() * 15000) }}'"
        write = f"dd if=/dev/urandom of=/dev/{DATA} bs=1M seek=$place count=1 conv=notrunc 2>/dev/null"
        self._guest.check(f"for place in $({places}); do {write}; done; sync", timeout_s=600)

    def write_at(self, mib_per_s: int) -> None:
        """Keep writing at a rate: new random bytes, now here, now there."""
        write = f"dd if=/dev/urandom of=/dev/{DATA} bs=1M seek=$((n % 1000 * 15)) count={mib_per_s} conv=notrunc"
        self._guest.check("rm -f /tmp/stop /tmp/stopped")
        self._guest.check(
            f"(n=0; while [ ! -e /tmp/stop ]; do {write}; sync; n=$((n + 1)); sleep 1; done; "
            "echo > /tmp/stopped) 2>/dev/null &"
        )

    def latency(self) -> WriteLatency:
        """A new count of the data disk's writes."""
        return WriteLatency(self._site, self.name, "virtio-disk1")

    def idle_latency(self, seconds: float) -> Latency:
        """The writes of a time in which nobody captures."""
        count = self.latency()
        self._guest.check(f"sleep {seconds:g}", timeout_s=seconds * 10 + 60)
        return count.read()

    def power_off(self) -> None:
        """End it; its disks stay."""
        self._guest.destroy()

    def close(self) -> None:
        """Hang up its console; the domain is the site's."""
        self._guest.disconnect()
