"""libvirt's storage pools as places for disks.

dir, fs, netfs     directories: written here as files if they are this machine's, else uploaded
logical, disk, zfs volumes that are devices: created by libvirt, written here through their path
others             no volume can be made in them, or none that can be written (rbd, iscsi, scsi, mpath, gluster)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

from drsync.errors import PoolUnusable, VolumeExists
from drsync.target import DiskWriter
from drsync.target.block_device import BlockDevice
from drsync.target.domain import tree
from drsync.target.image import ImageFormat
from drsync.target.libvirt_host import LibvirtHost
from drsync.target.partial import translated
from drsync.target.place import Directory, Place, Room
from drsync.target.upload import UploadDisk
from drsync.units import format_size

DIRECTORY_KINDS: Final = frozenset({"dir", "fs", "netfs"})
BLOCK_KINDS: Final = frozenset({"logical", "disk", "zfs"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A storage pool of the host."""

    name: str
    kind: str
    active: bool
    path: str
    free_bytes: int

    @property
    def usable(self) -> bool:
        """Whether disks can be restored into it."""
        return self.active and self.kind in DIRECTORY_KINDS | BLOCK_KINDS


def pools(host: LibvirtHost) -> Sequence[Pool]:
    """All storage pools."""
    with host.asked("listing storage pools"):
        return [_describe(pool) for pool in host.connection.listAllStoragePools(0)]


def _describe(pool: Any) -> Pool:
    described = tree.parse(pool.XMLDesc(0), "pool")
    return Pool(
        name=pool.name(),
        kind=described.get("type", ""),
        active=bool(pool.isActive()),
        path=tree.value(described, "target/path"),
        free_bytes=int(pool.info()[3]),
    )


def choose_pool(known: Sequence[Pool], wanted: str | None, hints: Sequence[str], uri: str) -> Pool:
    """The pool that is named; else the one in which the VM was; else the one named "default".

    Raises:
        PoolUnusable: there is no such pool, it is not active, or of a kind that can't take disks.
    """
    by_name = {pool.name: pool for pool in known}
    candidates = [wanted] if wanted else [*hints, "default"]
    pool = next((by_name[name] for name in candidates if name in by_name and (wanted or by_name[name].usable)), None)
    listed = ", ".join(_listed(pool) for pool in known) or "none"
    if pool is None:
        problem = f"there is no pool {wanted}" if wanted else "choose a pool for the disks with --pool"
        raise PoolUnusable(uri=uri, problem=problem, known=listed)
    if not pool.active:
        raise PoolUnusable(uri=uri, problem=f"pool {pool.name} is not active", known=listed)
    if not pool.usable:
        raise PoolUnusable(
            uri=uri, problem=f"pool {pool.name} is of kind {pool.kind}: no disk can be made there", known=listed
        )
    return pool


def _listed(pool: Pool) -> str:
    state = f"{format_size(pool.free_bytes)} free" if pool.active else "not active"
    return f"{pool.name} ({pool.kind}, {state})"


def open_place(host: LibvirtHost, pool: Pool, *, vm: str, scratch: Path) -> Place:
    """The pool as a place for disks; `scratch` is a directory of this machine for what waits for a slow line."""
    handle = _handle(host, pool)
    if pool.kind in BLOCK_KINDS:
        return BlockPool(host, pool, handle, vm=vm)
    if host.is_local and Path(pool.path).is_dir():

        def refresh() -> None:
            with host.asked(f"refreshing pool {pool.name}"):
                handle.refresh(0)

        return Directory(Path(pool.path), vm=vm, description=f"pool {pool.name} ({pool.path})", refresh=refresh)
    return UploadPool(host, pool, handle, vm=vm, scratch=scratch)


def _handle(host: LibvirtHost, pool: Pool) -> Any:
    with host.asked(f"opening pool {pool.name}"):
        handle = host.connection.storagePoolLookupByName(pool.name)
        handle.refresh(0)  # who wrote files there without libvirt is seen, too
        return handle


class _Volumes:
    """What both kinds of pools do through libvirt."""

    def __init__(self, host: LibvirtHost, pool: Pool, handle: Any, *, vm: str) -> None:
        self._host = host
        self._pool = pool
        self._handle = handle
        self._vm = vm
        self.description = f"pool {pool.name} ({pool.kind}, at {host.uri})"

    def path_of(self, name: str) -> str:
        return f"{self._pool.path.rstrip('/')}/{name}"

    def is_taken(self, name: str) -> bool:
        return self._find(name) is not None

    def remove(self, name: str) -> None:
        volume = self._find(name)
        if volume is not None:
            with self._host.asked(f"removing volume {name}"):
                volume.delete(0)

    def finish(self) -> None:
        with self._host.asked(f"refreshing pool {self._pool.name}"):
            self._handle.refresh(0)

    def _find(self, name: str) -> Any:
        with self._host.asked(f"listing the volumes of pool {self._pool.name}"):
            return next((v for v in self._handle.listAllVolumes(0) if v.name() == name), None)

    def _create(self, name: str, capacity_bytes: int, *, sparse: bool) -> Any:
        if self.is_taken(name):
            raise VolumeExists(path=self.path_of(name), vm=self._vm)
        allocation = "<allocation>0</allocation>" if sparse else ""
        raw = "<target><format type='raw'/></target>" if sparse else ""
        capacity = f"<capacity unit='bytes'>{capacity_bytes}</capacity>"
        xml = f"<volume><name>{escape(name)}</name>{capacity}{allocation}{raw}</volume>"
        with self._host.asked(f"creating volume {name}"):
            return self._handle.createXML(xml, 0)

    def _check_free(self, needed: int) -> None:
        if self._pool.free_bytes < needed:
            has, wants = format_size(self._pool.free_bytes), format_size(needed)
            problem = f"pool {self._pool.name} needs {wants}, but only {has} are free"
            raise PoolUnusable(uri=self._host.uri, problem=problem, known=_listed(self._pool))


class BlockPool(_Volumes):
    """A pool whose volumes are devices of this machine."""

    block_devices = True

    def check_room(self, disks: Iterable[Room]) -> None:
        if not self._host.is_local:
            problem = f"volumes of pool {self._pool.name} are devices of another machine: run drsync there"
            raise PoolUnusable(uri=self._host.uri, problem=problem, known=_listed(self._pool))
        self._check_free(sum(disk.size_bytes for disk in disks))

    def writer(self, name: str, size_bytes: int, image_format: ImageFormat) -> DiskWriter:
        if image_format is not ImageFormat.RAW:
            raise ValueError("a device holds a raw disk")
        volume = self._create(name, size_bytes, sparse=False)
        try:
            return BlockDevice(Path(volume.path()), size_bytes, remove=lambda: self.remove(name))
        except BaseException:
            self.remove(name)
            raise

    def put_file(self, name: str, content: bytes) -> None:
        problem = f"pool {self._pool.name} has no place for the file {name}; give --disk-dir for it"
        raise PoolUnusable(uri=self._host.uri, problem=problem, known=f"{len(content)} bytes")


class UploadPool(_Volumes):
    """A pool of files that only libvirt can reach: on another machine, or in another mount namespace."""

    block_devices = False

    def __init__(self, host: LibvirtHost, pool: Pool, handle: Any, *, vm: str, scratch: Path) -> None:
        super().__init__(host, pool, handle, vm=vm)
        self._scratch = scratch

    def check_room(self, disks: Iterable[Room]) -> None:
        self._check_free(sum(disk.live_bytes for disk in disks))

    def writer(self, name: str, size_bytes: int, image_format: ImageFormat) -> DiskWriter:
        # As libvirt makes it, the file of a qcow2 has tables already, which a hole would not overwrite.
        volume = self._create(name, size_bytes if image_format is ImageFormat.RAW else 0, sparse=True)
        try:
            return UploadDisk(
                lambda offset: VolumeStream(self._host, volume, offset),
                size_bytes,
                image_format,
                scratch=self._scratch,
                remove=lambda: self.remove(name),
            )
        except BaseException:
            self.remove(name)
            raise

    def put_file(self, name: str, content: bytes) -> None:
        volume = self._create(name, len(content), sparse=True)
        try:
            stream = VolumeStream(self._host, volume, 0)
            try:
                stream.send(content)
                stream.finish()
            except BaseException:
                stream.abort()
                raise
        except BaseException:
            self.remove(name)
            raise


class VolumeStream:
    """A ByteStream into a volume (virStorageVolUpload), sparse."""

    def __init__(self, host: LibvirtHost, volume: Any, offset: int) -> None:
        self._host = host
        with host.asked("uploading"):
            self._stream = host.connection.newStream(0)
            volume.upload(self._stream, offset, 0, host.libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM)
        self._is_open = True

    def send(self, data: bytes) -> None:
        with self._host.asked("uploading"):
            while data:
                data = data[self._stream.send(data) :]

    def skip(self, length: int) -> None:
        with self._host.asked("uploading"):
            self._stream.sendHole(length, 0)

    def finish(self) -> None:
        with self._host.asked("uploading"):
            self._stream.finish()
        self._is_open = False

    def abort(self) -> None:
        if self._is_open:
            self._is_open = False
            try:
                self._stream.abort()
            except self._host.libvirt.libvirtError:  # it is broken already, which is what was wanted
                return


def remove_disk(host: LibvirtHost, path: str) -> None:
    """Remove a disk or file that no domain needs: through its pool, else as a file of this machine.

    Raises:
        HostRefused, TargetUnusable: it can't be removed.
    """
    try:
        volume = host.connection.storageVolLookupByPath(path)
    except host.libvirt.libvirtError:
        volume = None
    if volume is not None:
        with host.asked(f"removing {path}"):
            volume.delete(0)
    elif host.is_local and Path(path).is_file():
        with translated(Path(path)):
            Path(path).unlink()
