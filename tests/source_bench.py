"""Sources to test, each on something that a test can write to, restart and break.

    MemoryBench   drsync's own reference disk
    DaemonBench   QMP on a qemu-storage-daemon, with qcow2 or with raw disks

and `Replica`, the oracle: what layers say, put together by other means than drsync's own.
"""

import json
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from qmp_socket import QmpRefused
from storage_daemon import DaemonDisk, StorageDaemon

from drsync.errors import CaptureFailed
from drsync.model import CaptureId, Kind
from drsync.source import DiskSurvey, Source
from drsync.source.bitmap import Owner
from drsync.source.memory import MemoryBitmap, MemoryDisk, MemorySource, MemoryVm
from drsync.source.qmp import QmpOptions, QmpSource

KIB = 1024
MIB = 1024 * KIB
TAG = "00c0ffee"
OTHER_TAG = "0badcafe"
SIZES = {"root": 4 * MIB, "data": 2 * MIB + 4 * KIB}
"""Two disks, one of which does not end with a whole block."""


class SourceBench(ABC):
    """A VM named `web` with the disks `root` and `data`, and whatever a test does to it."""

    keeps_bitmaps: bool
    """Whether bitmaps survive a clean restart."""
    runs_guest = False
    """Whether there is a guest that can be paused."""
    missing: str = "bitmap is missing"
    """Why a disk is a full whose bitmap is not there."""
    inconsistent: str = "bitmap is inconsistent, QEMU did not end cleanly"
    """Why a disk is a full whose bitmap was not saved."""

    def bitmap(self, disk: str, capture: CaptureId, *, tag: str = TAG, vm: str = "web") -> str:
        """What drsync calls the bitmap of a capture on a disk."""
        return Owner(repository=tag, vm=vm).bitmap(capture, disk)

    @abstractmethod
    def open(self, *, tag: str = TAG, disks: Mapping[str, str] | None = None) -> Source:
        """A session; `disks` maps disk names to the names of this bench's disks."""

    @abstractmethod
    def write(self, disk: str, offset: int, length: int, pattern: int) -> None:
        """The guest writes the byte `pattern`."""

    @abstractmethod
    def zero(self, disk: str, offset: int, length: int) -> None:
        """The guest writes zeros, as a command without data."""

    @abstractmethod
    def discard(self, disk: str, offset: int, length: int) -> None:
        """The guest discards: these disks read as zeros then."""

    @abstractmethod
    def content(self, disk: str) -> bytes:
        """The disk's bytes now."""

    @abstractmethod
    def resize(self, disk: str, size_bytes: int) -> None:
        """Give the disk another size."""

    @abstractmethod
    def restart(self) -> None:
        """End QEMU in good order and start it again."""

    @abstractmethod
    def crash(self) -> None:
        """End QEMU as a power cut would; `start` starts it again."""

    @abstractmethod
    def start(self) -> None:
        """Start QEMU after a crash."""

    @abstractmethod
    def add_bitmap(self, disk: str, name: str) -> None:
        """A bitmap that drsync's session did not make."""

    @abstractmethod
    def remove_bitmap(self, disk: str, name: str) -> None:
        """Take a bitmap away behind drsync's back."""

    @abstractmethod
    def things(self) -> set[str]:
        """All bitmaps, jobs and named block nodes that there are, as "bitmap root/name", "job x", "node x"."""

    @abstractmethod
    def add_foreign_things(self) -> None:
        """A job and nodes of somebody else's, where there are such things."""

    @abstractmethod
    def add_dead_capture(self, capture: CaptureId, layer: Path) -> None:
        """What a drsync that was killed while it copied leaves behind."""

    @abstractmethod
    @contextmanager
    def while_copying(self, action: Callable[[], None]) -> Iterator[None]:
        """Run `action` once during the capture inside: when it has begun, and before it is done."""

    @abstractmethod
    @contextmanager
    def read_errors(self) -> Iterator[None]:
        """Captures of `root` that copy all of it fail inside."""

    @abstractmethod
    @contextmanager
    def slowness(self) -> Iterator[None]:
        """A capture of a MiB or more of `root` takes longer than 0.2 s inside."""

    @abstractmethod
    def close(self) -> None:
        """End everything."""

    def bitmaps(self) -> set[str]:
        """The bitmaps of all disks, as "disk/name"."""
        return {thing.removeprefix("bitmap ") for thing in self.things() if thing.startswith("bitmap ")}

    def contents(self) -> dict[str, bytes]:
        """All disks' bytes now."""
        return {disk: self.content(disk) for disk in SIZES}


class MemoryBench(SourceBench):
    """The in-memory VM."""

    keeps_bitmaps = True
    runs_guest = True

    def __init__(self) -> None:
        disks = {name: MemoryDisk(size, persistent=True) for name, size in SIZES.items()}
        self.vm = MemoryVm("web", disks)

    def open(self, *, tag: str = TAG, disks: Mapping[str, str] | None = None) -> Source:
        return MemorySource(self.vm, tag, disks=disks)

    def write(self, disk: str, offset: int, length: int, pattern: int) -> None:
        self.vm.disks[disk].write(offset, bytes([pattern]) * length)

    def zero(self, disk: str, offset: int, length: int) -> None:
        self.vm.disks[disk].zero(offset, length)

    def discard(self, disk: str, offset: int, length: int) -> None:
        self.vm.disks[disk].zero(offset, length)

    def content(self, disk: str) -> bytes:
        return bytes(self.vm.disks[disk].content)

    def resize(self, disk: str, size_bytes: int) -> None:
        self.vm.disks[disk].resize(size_bytes)

    def restart(self) -> None:
        self.vm.restart()

    def crash(self) -> None:
        self.vm.crash()

    def start(self) -> None:
        pass

    def add_bitmap(self, disk: str, name: str) -> None:
        self.vm.disks[disk].bitmaps[name] = MemoryBitmap(persistent=True)

    def remove_bitmap(self, disk: str, name: str) -> None:
        del self.vm.disks[disk].bitmaps[name]

    def things(self) -> set[str]:
        return {f"bitmap {disk}/{name}" for disk, has in self.vm.disks.items() for name in has.bitmaps}

    def add_foreign_things(self) -> None:
        pass

    def add_dead_capture(self, capture: CaptureId, layer: Path) -> None:
        for disk in SIZES:
            self.add_bitmap(disk, Owner(repository=TAG, vm="web").bitmap(capture, disk))

    @contextmanager
    def while_copying(self, action: Callable[[], None]) -> Iterator[None]:
        ran = []

        def hook() -> None:
            ran.append(True)
            action()

        self.vm.during_capture = hook
        try:
            yield
        finally:
            self.vm.during_capture = lambda: None
        assert ran, "no capture began"

    @contextmanager
    def read_errors(self) -> Iterator[None]:
        def fail() -> None:
            raise CaptureFailed(vm="web", operation="copying", problem="Input/output error")

        with self.while_copying(fail):
            yield

    @contextmanager
    def slowness(self) -> Iterator[None]:
        def fail() -> None:
            raise TimeoutError

        with self.while_copying(fail):
            yield

    def close(self) -> None:
        pass


class RootOnDaemon(SourceBench):
    """A bench whose disk `root` has a storage daemon's node below it, which can be slow or broken."""

    daemon: StorageDaemon
    root_format: str
    """Format of the daemon's node."""

    @contextmanager
    def read_errors(self) -> Iterator[None]:
        errors = [{"event": "none", "iotype": "read", "errno": 5, "once": False, "sector": 2 * MIB // 512}]
        with self._below_root({"driver": "blkdebug", "image": "f-root", "inject-error": errors}):
            yield

    @contextmanager
    def slowness(self) -> Iterator[None]:
        self._execute("object-add", **{"qom-type": "throttle-group"}, id="slow", limits={"bps-total": 2 * MIB})
        try:
            with self._below_root({"driver": "throttle", "throttle-group": "slow", "file": "f-root"}):
                yield
        finally:
            if self.daemon.running:
                self._execute("object-del", id="slow")

    @contextmanager
    def _below_root(self, options: Mapping[str, object]) -> Iterator[None]:
        """A node between the image of `root` and its file, for as long as the daemon runs."""
        self._add(**options, **{"node-name": "between"})
        self._reopen_root("between")
        try:
            yield
        finally:
            if self.daemon.running:
                self._reopen_root("f-root")
                self._execute("blockdev-del", **{"node-name": "between"})

    def _reopen_root(self, file: str) -> None:
        options = {"driver": self.root_format, "node-name": "d-root", "file": file, "discard": "unmap"}
        self._execute("blockdev-reopen", options=[options])

    def _add(self, **options: object) -> None:
        self._execute("blockdev-add", **options)

    def _execute(self, command: str, **arguments: object) -> Any:
        try:
            return self.daemon.execute(command, **arguments)
        except QmpRefused as err:
            raise AssertionError(f"the bench does not work: {command}: {err}") from err


class DaemonBench(RootOnDaemon):
    """QMP, on a real qemu-storage-daemon."""

    def __init__(self, directory: Path, image_format: Literal["qcow2", "raw"], *, free_nbd: bool = False) -> None:
        """`free_nbd`: disks can be read live."""
        directory.mkdir(exist_ok=True)
        self.keeps_bitmaps = image_format == "qcow2"
        disks = [DaemonDisk(name=name, size_bytes=size, format=image_format) for name, size in SIZES.items()]
        self.daemon = StorageDaemon(directory, disks, free_nbd=free_nbd)
        self.root_format = image_format
        self.daemon.start()

    def open(self, *, tag: str = TAG, disks: Mapping[str, str] | None = None) -> Source:
        names = disks if disks is not None else {name: name for name in SIZES}
        nodes = {name: f"d-{disk}" for name, disk in names.items()}
        return QmpSource(
            QmpOptions(
                vm="web",
                socket=self.daemon.qmp_socket,
                repository_tag=tag,
                disks=nodes,
                live_directory=self.daemon.directory / ".live",
            )
        )

    def write(self, disk: str, offset: int, length: int, pattern: int) -> None:
        self.daemon.io(disk, f"write -P {pattern} {offset} {length}")

    def zero(self, disk: str, offset: int, length: int) -> None:
        self.daemon.io(disk, f"write -z {offset} {length}")

    def discard(self, disk: str, offset: int, length: int) -> None:
        self.daemon.io(disk, f"discard {offset} {length}")

    def content(self, disk: str) -> bytes:
        return self.daemon.read(disk)

    def resize(self, disk: str, size_bytes: int) -> None:
        self.daemon.resize(disk, size_bytes)

    def restart(self) -> None:
        self.daemon.stop()
        self.daemon.start()

    def crash(self) -> None:
        self.daemon.kill()

    def start(self) -> None:
        self.daemon.start()

    def add_bitmap(self, disk: str, name: str) -> None:
        self.daemon.execute("block-dirty-bitmap-add", node=f"d-{disk}", name=name, granularity=64 * KIB)

    def remove_bitmap(self, disk: str, name: str) -> None:
        self.daemon.execute("block-dirty-bitmap-remove", node=f"d-{disk}", name=name)

    def things(self) -> set[str]:
        nodes = self.daemon.execute("query-named-block-nodes", flat=True)
        found = {f"node {node['node-name']}" for node in nodes if not node["node-name"].startswith("#")}
        found |= {f"job {job['id']}" for job in self.daemon.execute("query-jobs")}
        for node in nodes:
            disk = node["node-name"].removeprefix("d-")
            found |= {f"bitmap {disk}/{bitmap['name']}" for bitmap in node.get("dirty-bitmaps", []) if "name" in bitmap}
        return found

    def add_foreign_things(self) -> None:
        for node in ("foreign", f"drsync-{OTHER_TAG}-00000000-0", f"drsync-{TAG}-00000000-0", "drsync-mine"):
            self._add(driver="null-co", **{"node-name": node}, size=MIB, **{"read-zeroes": True})
        target = f"drsync-{OTHER_TAG}-00000000-0"
        for job, disk in ((f"drsync-{OTHER_TAG}-0000000000000000-0-web", "foreign"), ("x", f"drsync-{TAG}-00000000-0")):
            self._execute("blockdev-backup", **{"job-id": job}, device=disk, target=target, sync="none")
            target = "drsync-mine"

    def add_dead_capture(self, capture: CaptureId, layer: Path) -> None:
        owner = Owner(repository=TAG, vm="web")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(layer), str(SIZES["root"])], check=True)
        self._add(driver="qcow2", **{"node-name": owner.layer_node(0)}, file={"driver": "file", "filename": str(layer)})
        for disk in SIZES:
            self.add_bitmap(disk, owner.bitmap(capture, disk))
        job = {"job-id": owner.job(capture, 0), "auto-dismiss": False}
        self._execute("blockdev-backup", **job, device="d-root", target=owner.layer_node(0), sync="none")

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

    def _wait_for_copying(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if any(job["status"] == "running" for job in self.daemon.execute("query-jobs")):
                return
            time.sleep(0.002)
        raise TimeoutError("no capture began")

    def close(self) -> None:
        self.daemon.close()


class Replica:
    """Disks as their layers say, read with qemu-img: an oracle that shares no code with drsync."""

    def __init__(self) -> None:
        self.disks: dict[str, bytearray] = {}

    def apply(self, surveys: Sequence[DiskSurvey], layers: Mapping[str, Path]) -> None:
        """Bring the replica to the state that one capture shows."""
        for survey in surveys:
            before = self.disks.get(survey.name) if survey.kind is Kind.INCREMENTAL else None
            content = bytearray(survey.size_bytes) if before is None else before
            assert len(content) == survey.size_bytes
            data = layers[survey.name].read_bytes()
            for extent in layer_map(layers[survey.name]):
                if extent["present"]:
                    start, length, offset = extent["start"], extent["length"], extent.get("offset", 0)
                    new = bytes(length) if extent["zero"] else data[offset : offset + length]
                    content[start : start + length] = new
            self.disks[survey.name] = content

    def contents(self) -> dict[str, bytes]:
        return {name: bytes(content) for name, content in self.disks.items()}


def layer_map(layer: Path) -> list[dict[str, Any]]:
    """What `qemu-img map` says of a layer; also that qemu-img finds nothing wrong with it."""
    checked = subprocess.run(["qemu-img", "check", "-q", str(layer)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    command = ["qemu-img", "map", "--output=json", str(layer)]
    mapped: list[dict[str, Any]] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return mapped


def present_blocks(layer: Path) -> set[int]:
    """The numbers of the blocks that a layer holds."""
    blocks: set[int] = set()
    for extent in layer_map(layer):
        if extent["present"]:
            end = extent["start"] + extent["length"]
            blocks.update(range(extent["start"] // (64 * KIB), -(-end // (64 * KIB))))
    return blocks
