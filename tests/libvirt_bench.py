"""The contract's bench for libvirt: a domain with a real guest that writes when it is told to.

    LibvirtGround   a site and a guest that was booted once; its memory is saved, so that a test has it in a moment
    LibvirtBench    the domain `web` with the disks root (vda) and data (vdb):
        root   qcow2 on an NBD server, which a test can make slow or broken (a storage daemon)
        data   qcow2 in a file

The guest has nothing mounted and writes past its page cache, so its saved memory goes with any content of the disks.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from xml.sax.saxutils import quoteattr

import pytest
from forwarding_source import ForwardingSource
from libvirt_guest import LibvirtGuest, Machine, SiteDisk
from libvirt_site import LibvirtSite
from source_bench import MIB, SIZES, TAG, RootOnDaemon
from storage_daemon import DaemonDisk, StorageDaemon

from drsync.model import CaptureId, Pace, Progress
from drsync.source import (
    NO_PACE,
    Base,
    BaseDisk,
    CaptureResult,
    DiskSurvey,
    Instant,
    LiveReader,
    LiveView,
    Source,
    at_once,
)
from drsync.source.bitmap import Owner
from drsync.source.libvirt_pull import PullOptions
from drsync.source.libvirt_scratch import ScratchLimits
from drsync.source.libvirt_source import open_source
from drsync.source.libvirt_survey import BROKEN_REASON, LibvirtOptions
from drsync.source.libvirt_xml import checkpoint_xml

ROOT: Final = Path(__file__).parents[1]
TARGETS: Final = {"root": "vda", "data": "vdb"}
NAMES: Final = {target: name for name, target in TARGETS.items()}
_ROOM_BYTES: Final = 64 * MIB
"""Of the NBD export below `root`: qcow2 grows in it as on a block device."""
_INIT: Final = """#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc /sys /tmp /sbin /usr/bin /usr/sbin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
dmesg -n 1
while read -r module; do insmod "/lib/modules/$module"; done </lib/modules/order
while [ ! -b /dev/vda ]; do sleep 0.05; done
echo "GUEST-UP boots=1 writer"
while :; do setsid sh -c 'exec sh -i </dev/ttyS0 >/dev/ttyS0 2>&1'; done
"""


class LibvirtGround:
    """A site, and a guest ready to be continued. A context manager."""

    def __init__(self, guest_image: Path) -> None:
        self.site = LibvirtSite()
        try:
            self._prepare(guest_image)
        except BaseException:
            self.site.destroy()
            raise

    def _prepare(self, guest_image: Path) -> None:
        kernel, initrd = make_writer(guest_image, self.site.path / "writer")
        self.machine = Machine(
            os=f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd>"
            "<cmdline>console=ttyS0,115200 quiet panic=-1</cmdline>"
        )
        self.memory = self.site.path / "writer" / "memory"
        disks = []
        for name, target in TARGETS.items():
            path = self.site.images / f"{name}.qcow2"
            create(path, SIZES[name])
            disks.append(SiteDisk(target=target, path=path))
        with LibvirtGuest(self.site, "web", disks, self.machine) as guest:
            guest.define()
            guest.start()
            guest.check("true")
            guest.disconnect()
            self.site.virsh("save", "web", self.memory)
            self.site.virsh("undefine", "web")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.site.destroy()


def make_writer(guest_image: Path, directory: Path) -> tuple[Path, Path]:
    """A kernel and an initramfs of the examples' guest, with blkdiscard in it and nothing mounted."""
    directory.mkdir()
    raw, kernel, initrd = directory / "guest.raw", directory / "vmlinuz", directory / "initrd"
    subprocess.run(["qemu-img", "convert", "-O", "raw", guest_image, raw], check=True)
    for name, path in (("vmlinuz", kernel), ("initrd.gz", initrd)):
        subprocess.run(["mcopy", "-n", "-i", f"{raw}@@1M", f"::/{name}", path], check=True)
    raw.unlink()
    tree = directory / "tree"
    program = shutil.which("blkdiscard", path="/usr/sbin:/sbin:/usr/bin")
    assert program is not None
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for file in [program, *(word for word in listed.split() if word.startswith("/"))]:
        target = tree / file.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (tree / "init").write_text(_INIT)
    (tree / "init").chmod(0o755)
    pack = ["sh", "-c", "find . | cpio --quiet -o -H newc -R 0:0 | gzip -1"]
    archive = subprocess.run(pack, cwd=tree, capture_output=True, check=True)
    with initrd.open("ab") as end:  # the kernel unpacks one archive after the other; the later file wins
        end.write(archive.stdout)
    return kernel, initrd


def create(path: Path, size_bytes: int) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size_bytes)], check=True)


class LibvirtBench(RootOnDaemon):
    """The domain `web`; off until its source is opened or it is started."""

    keeps_bitmaps = True
    runs_guest = True
    root_format = "raw"
    missing = BROKEN_REASON
    inconsistent = BROKEN_REASON

    def __init__(self, ground: LibvirtGround, directory: Path, layers: Path, *, pulls: bool) -> None:
        """`pulls`: drsync copies by itself, else QEMU does it."""
        directory.mkdir()
        self.site = ground.site
        self.ground = ground
        self.layers = layers
        scratch = ScratchLimits(keep_free_bytes=0)
        self._pull = PullOptions(directory=layers / ".live", scratch=scratch) if pulls else None
        self.daemon = StorageDaemon(directory, [DaemonDisk(name="root", size_bytes=_ROOM_BYTES, format="raw")])
        self.files = {"root": self.daemon.path("root"), "data": directory / "data.qcow2"}
        for name, path in self.files.items():
            create(path, SIZES[name])
        os.truncate(self.files["root"], _ROOM_BYTES)
        disks: list[SiteDisk] = [
            NbdDisk(target="vda", path=self.files["root"], socket=self.daemon.nbd_uri("root").partition("socket=")[2]),
            SiteDisk(target="vdb", path=self.files["data"]),
        ]
        self.guest = LibvirtGuest(self.site, "web", disks, ground.machine)
        self.guest.define()
        self._started = False
        self.stays_off = False
        """Whether `open` leaves a domain off that is off."""

    def limit_scratch(self, copy_scratch_bytes: int) -> None:
        """Let the guest overwrite no more than so much while drsync copies."""
        self._pull = None if self._pull is None else replace(self._pull, copy_scratch_bytes=copy_scratch_bytes)

    def open(self, *, tag: str = TAG, disks: Mapping[str, str] | None = None) -> Source:
        if not self._started and not self.stays_off:
            self.start()
        exclude: list[str] = []
        if disks is not None:
            if any(name != disk for name, disk in disks.items()):
                pytest.skip("a domain's disks are not named by the configuration")
            exclude = [target for name, target in TARGETS.items() if name not in disks]
        options = LibvirtOptions(
            vm="web",
            domain="web",
            uri=self.site.uri,
            repository_tag=tag,
            layers=self.layers,
            exclude=exclude,
            pull=self._pull,
        )
        return NamedSource(open_source(options))

    def bitmap(self, disk: str, capture: CaptureId, *, tag: str = TAG, vm: str = "web") -> str:
        return Owner(repository=tag, vm=vm).checkpoint(capture)

    # The guest's work

    def write(self, disk: str, offset: int, length: int, pattern: int) -> None:
        if not self._started:
            self._while_off(disk, f"write -P {pattern} {offset} {length}")
            return
        device, step = f"/dev/{TARGETS[disk]}", 512
        while length % (step * 2) == 0 and offset % (step * 2) == 0 and step < MIB:
            step *= 2
        fill = f"tr '\\000' '\\{pattern:03o}' </dev/zero | " if pattern else "cat /dev/zero | "
        self.guest.check(
            f"{fill}dd of={device} bs={step} seek={offset // step} count={length // step} iflag=fullblock "
            "oflag=direct conv=fsync,notrunc"
        )

    def zero(self, disk: str, offset: int, length: int) -> None:
        self._discard(disk, "-z", offset, length)

    def discard(self, disk: str, offset: int, length: int) -> None:
        self._discard(disk, "", offset, length)

    def content(self, disk: str) -> bytes:
        copy = self.files[disk].with_suffix(".content")
        subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", self.files[disk], copy], check=True)
        try:
            return copy.read_bytes()
        finally:
            copy.unlink()

    def resize(self, disk: str, size_bytes: int) -> None:
        self.site.virsh("blockresize", "web", TARGETS[disk], f"{size_bytes}B")

    # Its life

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        """End QEMU in good order."""
        self.guest.disconnect()
        if self._started:
            self.site.power_off("web", "--graceful")
            self._started = False

    def crash(self) -> None:
        self.guest.disconnect()
        pid = int((self.site.path / "run" / "libvirt" / "qemu" / "web.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        self.guest.wait_for_state("shut off")
        self._started = False

    def start(self) -> None:
        if not self.daemon.running:
            self.daemon.start()
        xml = self.site.path / "restore.xml"
        xml.write_text(self.guest.xml())
        self.site.virsh("restore", self.ground.memory, "--xml", xml, "--running")
        self.guest.connect()
        self._started = True

    # Behind drsync's back, but through libvirt

    def add_bitmap(self, disk: str, name: str) -> None:
        if not self._started:
            self.start()
        self._checkpoint(name, [disk], "")

    def remove_bitmap(self, disk: str, name: str) -> None:
        others = [other for other in TARGETS if other != disk and f"{other}/{name}" in self.bitmaps()]
        self.site.virsh("checkpoint-delete", "web", name, "--metadata")
        self._checkpoint(name, [disk], "--redefine")
        self.site.virsh("checkpoint-delete", "web", name)
        if others:
            self._checkpoint(name, others, "--redefine")

    def things(self) -> set[str]:
        nodes = self._query("query-named-block-nodes")
        found = {f"node {node['node-name']}" for node in nodes if not node["node-name"].startswith("#")}
        found |= {f"job {job['id']}" for job in self._query("query-jobs")}
        for node in nodes:
            disk = next((name for name, end in (("root", "nbd"), ("data", "data.qcow2")) if is_of(node, end)), "")
            if disk:
                found |= {
                    f"bitmap {disk}/{bitmap['name']}" for bitmap in node.get("dirty-bitmaps", []) if "name" in bitmap
                }
        return found

    def add_foreign_things(self) -> None:
        pass  # one backup a domain: somebody else's keeps drsync's from running at all (test_trouble.py)

    def add_dead_capture(self, capture: CaptureId, layer: Path) -> None:
        backup, checkpoint = self.site.path / "backup.xml", self.site.path / "checkpoint.xml"
        backup.write_text(
            f"<domainbackup mode='pull'><server transport='unix' socket='{self.site.path}/nbd'/><disks>"
            f"<disk name='vda' backup='yes' type='file'><scratch file={quoteattr(str(layer))}/></disk>"
            "<disk name='vdb' backup='no'/></disks></domainbackup>"
        )
        checkpoint.write_text(checkpoint_xml(self.bitmap("root", capture), list(NAMES), []))
        self.site.virsh("backup-begin", "web", backup, checkpoint)

    @contextmanager
    def read_errors(self) -> Iterator[None]:
        with super().read_errors():
            yield
        # The NBD server hung up with the error: QEMU connects again with the next request, whose first try fails.
        self.guest.check("until dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct; do sleep 0.1; done")

    @contextmanager
    def while_copying(self, action: Callable[[], None]) -> Iterator[None]:
        trouble: list[BaseException] = []

        def watch() -> None:
            try:
                self._wait_for_copying()
                action()
            except BaseException as err:  # noqa: BLE001 - raised again where the test sees it
                trouble.append(err)

        with self.slowness():
            thread = threading.Thread(target=watch)
            thread.start()
            try:
                yield
            finally:
                thread.join()
        if trouble:
            raise trouble[0]

    def close(self) -> None:
        self.guest.disconnect()
        self.site.power_off("web")
        self.site.virsh("undefine", "web", "--checkpoints-metadata")
        self.daemon.close()

    def _discard(self, disk: str, option: str, offset: int, length: int) -> None:
        if not self._started:
            self.start()
        device = f"/dev/{TARGETS[disk]}"
        flush = f"dd if=/dev/null of={device} conv=fsync,notrunc 2>/dev/null"
        self.guest.check(f"LD_LIBRARY_PATH=/lib {_blkdiscard()} {option} -o {offset} -l {length} {device} && {flush}")

    def _while_off(self, disk: str, command: str) -> None:
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, self.files[disk]], check=True, capture_output=True)

    def _wait_for_copying(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if "Backup" in self.site.virsh("domjobinfo", "web"):
                return
            time.sleep(0.01)
        raise TimeoutError("no capture began")

    def _query(self, command: str) -> Any:
        """QEMU's own answer: what there really is, beside what libvirt knows."""
        return self.execute(command)

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command of QEMU's own, behind libvirt's back."""
        request = json.dumps({"execute": command, "arguments": arguments})
        said = self.site.virsh("qemu-monitor-command", "web", request)
        return json.loads(said)["return"]

    def _checkpoint(self, name: str, disks: Sequence[str], option: str) -> None:
        targets = [TARGETS[disk] for disk in disks]
        others = [target for target in NAMES if target not in targets]
        domain = self.site.virsh("dumpxml", "web") if option else ""
        file = self.site.path / "checkpoint.xml"
        file.write_text(checkpoint_xml(name, targets, others, domain=domain))
        self.site.virsh("checkpoint-create", "web", file, *([option] if option else []))


class NbdDisk(SiteDisk):
    """A qcow2 disk on an NBD server."""

    def __init__(self, *, target: str, path: Path, socket: str) -> None:
        super().__init__(target=target, path=path)
        object.__setattr__(self, "_socket", socket)

    def xml(self) -> str:
        return (
            "<disk type='network' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>"
            "<source protocol='nbd' name='root'>"
            f"<host transport='unix' socket={quoteattr(self._socket)}/></source>"  # type: ignore[attr-defined]
            f"<target dev='{self.target}' bus='virtio'/></disk>"
        )


class NamedSource(ForwardingSource):
    """A source of a domain, with the bench's names of its disks."""

    def survey(
        self, base: Base | None, *, full: bool = False, tidy: bool = True, keep: Collection[CaptureId] = ()
    ) -> Sequence[DiskSurvey]:
        found = super().survey(_base(base), full=full, tidy=tidy, keep=keep)
        return sorted((_renamed(disk, NAMES) for disk in found), key=lambda disk: disk.name)

    def check_live(self, disks: Sequence[DiskSurvey]) -> None:
        super().check_live([_renamed(disk, TARGETS) for disk in disks])

    def begin_recording(self, capture: CaptureId, disks: Sequence[DiskSurvey]) -> Mapping[str, object]:
        return super().begin_recording(capture, [_renamed(disk, TARGETS) for disk in disks])

    def open_live(self, base: Base | None, disks: Sequence[DiskSurvey], *, pace: Pace) -> LiveView:
        return NamedView(super().open_live(_base(base), [_renamed(disk, TARGETS) for disk in disks], pace=pace))

    def capture(
        self,
        capture: CaptureId,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        layers: Mapping[str, Path],
        *,
        timeout_s: float,
        keep_free_bytes: int = 0,
        progress: Progress | None = None,
        instant: Instant = at_once,
        pace: Pace = NO_PACE,
    ) -> CaptureResult:
        return super().capture(
            capture,
            _base(base),
            [_renamed(disk, TARGETS) for disk in disks],
            {TARGETS[name]: path for name, path in layers.items()},
            timeout_s=timeout_s,
            keep_free_bytes=keep_free_bytes,
            progress=progress,
            instant=instant,
            pace=pace,
        )


class NamedView:
    """A view of a domain, likewise."""

    def __init__(self, inner: LiveView) -> None:
        self._inner = inner

    def reader(self, disk: str) -> LiveReader:
        return self._inner.reader(TARGETS[disk])

    def close(self) -> None:
        self._inner.close()


def _renamed(disk: DiskSurvey, names: Mapping[str, str]) -> DiskSurvey:
    return DiskSurvey(
        name=names[disk.name],
        size_bytes=disk.size_bytes,
        kind=disk.kind,
        reason=disk.reason,
        copy_bytes=disk.copy_bytes,
        persistent=disk.persistent,
    )


def _base(base: Base | None) -> Base | None:
    if base is None:
        return None
    disks = [BaseDisk(name=TARGETS[disk.name], size_bytes=disk.size_bytes) for disk in base.disks]
    return Base(capture=base.capture, disks=disks, definition=base.definition)


def is_of(node: Mapping[str, Any], end: str) -> bool:
    """Whether a node is the image whose file's name ends so, or contains that of the NBD server's socket."""
    filename = node["image"]["filename"]
    return node["drv"] == "qcow2" and (filename.endswith(end) or (end == "nbd" and "nbd" in filename))


def _blkdiscard() -> str:
    return shutil.which("blkdiscard", path="/usr/sbin:/sbin:/usr/bin") or "blkdiscard"
