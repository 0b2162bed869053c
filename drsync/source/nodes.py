"""QEMU's block nodes as QMP reports them, and which of them are a VM's disks. No I/O.

    guest device ──▶ root node "d0" (qcow2) ──▶ protocol node (file)
                          │  the dirty bitmaps hang here
                          └─▶ backing chain, read-only

A VM's disks are, unless the configuration names nodes:

1. in a running VM, the writable root nodes of its devices (query-block);
2. in a qemu-storage-daemon, which has no devices, the writable nodes that it
   exports (query-block-exports);
3. and if it exports nothing either, the writable nodes of an image format.

A filter on top (throttle, copy-on-read, another program's job) is looked through,
since only a format node can keep a bitmap in its image. Nothing below that is
taken: all writes pass the format node, so its bitmap sees them all.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from drsync.model import BLOCK_SIZE, block_count, is_name
from drsync.source.bitmap import DirtyBitmap

_FORMATS: Final = frozenset({"qcow2", "raw", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc", "luks", "parallels"})
_ANONYMOUS_NODE: Final = "#block"
"""QEMU names a node so if nobody named it; it is another one after every start."""
_GUEST_ID: Final = re.compile(r"/machine/peripheral/([^/]+)")
_NAME_LENGTH: Final = 63


class FormatSpecific(msgspec.Struct, frozen=True, kw_only=True):
    """What only images of one format have."""

    type: str
    data: dict[str, object] = {}


class Image(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """An image file and, recursively, its backing chain (ImageInfo)."""

    filename: str
    format: str
    virtual_size: int
    actual_size: int | None = None
    format_specific: FormatSpecific | None = None
    backing_image: "Image | None" = None


class Node(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A block node (BlockDeviceInfo)."""

    node_name: str
    drv: str
    ro: bool
    image: Image
    dirty_bitmaps: list[DirtyBitmap] = []

    @property
    def keeps_bitmaps(self) -> bool:
        """Whether a persistent bitmap can be stored in the image: qcow2 from version 3 on."""
        specific = self.image.format_specific
        return self.drv == "qcow2" and specific is not None and specific.data.get("compat") == "1.1"

    @property
    def knows_unwritten(self) -> bool:
        """Whether QEMU can tell which blocks were never written, and those read as zeros: qcow2 with nothing below."""
        return self.drv == "qcow2" and self.image.backing_image is None


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's block device (BlockInfo); `inserted` is None when it holds no medium."""

    device: str
    qdev: str = ""
    inserted: Node | None = None


class Export(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """What the process exports over NBD, vhost-user or FUSE (BlockExportInfo)."""

    id: str
    node_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockGraph:
    """What QEMU tells of its block layer at one moment."""

    nodes: Sequence[Node]
    devices: Sequence[Device]
    exports: Sequence[Export]

    def node(self, name: str) -> Node | None:
        """The node of that name."""
        return next((node for node in self.nodes if node.node_name == name), None)

    def writable(self) -> Sequence[str]:
        """The names of all nodes that can be written, for people."""
        return sorted(node.node_name for node in self.nodes if not node.ro)

    def allocated_bytes(self, node: Node) -> int:
        """Upper bound of the bytes that a full of `node` copies.

        The size on disk of every image of the chain, where the host's file system
        tells it; the disk's size where it does not (block devices, network). The
        content of a *compressed* image can be larger than this says.
        """
        files = {known.image.filename for known in self.nodes if known.drv == "file"}
        total = 0
        image: Image | None = node.image
        while image is not None:
            if image.actual_size is None or image.filename not in files:
                return node.image.virtual_size + _tables_bytes(node)
            total += image.actual_size
            image = image.backing_image
        return min(total, node.image.virtual_size) + _tables_bytes(node)


def _tables_bytes(node: Node) -> int:
    """What a layer needs to say of the whole disk that it is zeros: an L2 table for every 8192 blocks."""
    return 0 if node.knows_unwritten else -(-block_count(node.image.virtual_size) // 8192) * BLOCK_SIZE


def choose_disks(graph: BlockGraph, wanted: Mapping[str, str] | None) -> dict[str, Node | None]:
    """The VM's disks by name, sorted; None where the node that `wanted` names is missing or read-only."""
    if wanted is None:
        found: Mapping[str, Node | None] = _discovered(graph)
    else:
        found = {name: _writable(graph.node(node)) for name, node in wanted.items()}
    return dict(sorted(found.items()))


def _discovered(graph: BlockGraph) -> dict[str, Node]:
    """All writable disks, named after their device, or after their node where there is no device."""
    roots: dict[str, str] = {}  # node → the name that a person knows it by; a node can have several devices
    for device in graph.devices:
        if device.inserted is not None and device.qdev and _is_disk(device.inserted):
            root = _below_filters(graph, device.inserted)
            roots.setdefault(root.node_name, _device_label(device, root))
    if not graph.devices:
        roots = {node.node_name: node.node_name for node in _daemon_roots(graph) if _is_disk(node)}
    names = _unique_names(sorted((label, node) for node, label in roots.items()))
    return {names[node.node_name]: node for node in graph.nodes if node.node_name in names}


def _daemon_roots(graph: BlockGraph) -> Sequence[Node]:
    """The disks of a process without devices: what it exports, or else every image."""
    if not graph.exports:
        return [node for node in graph.nodes if node.drv in _FORMATS]
    exported = [graph.node(export.node_name) for export in graph.exports]
    return [_below_filters(graph, node) for node in exported if node is not None]


def _below_filters(graph: BlockGraph, node: Node) -> Node:
    """The image that a filter passes everything to: the only writable one of the same file and size."""
    if node.drv in _FORMATS:
        return node
    filename = _innermost_filename(node.image.filename)
    same = [
        known
        for known in graph.nodes
        if known.drv in _FORMATS
        and not known.ro
        and known.image.filename == filename
        and known.image.virtual_size == node.image.virtual_size
    ]
    return same[0] if len(same) == 1 else node


def _innermost_filename(filename: str) -> str:
    """The file below a stack of nodes, which QEMU describes as "json:{"driver": …, "file": {…}}"."""
    if not filename.startswith("json:"):
        return filename
    try:
        level = msgspec.json.decode(filename.removeprefix("json:"))
    except msgspec.DecodeError:
        return filename
    while isinstance(level, dict) and isinstance(level.get("file"), dict):
        level = level["file"]
    return str(level.get("filename", filename)) if isinstance(level, dict) else filename


def _is_disk(node: Node) -> bool:
    return not node.ro and node.image.virtual_size > 0


def _writable(node: Node | None) -> Node | None:
    return None if node is None or node.ro else node


def _device_label(device: Device, node: Node) -> str:
    """What a person calls the device: its id, its drive's name, its node's, or its place in the machine."""
    by_id = _GUEST_ID.match(device.qdev)
    if by_id:
        return by_id[1]
    if device.device:
        return device.device
    if not node.node_name.startswith(_ANONYMOUS_NODE):
        return node.node_name
    return device.qdev.removesuffix("/virtio-backend").rpartition("/")[2]


def _unique_names(labels: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A valid name for every node; labels that become the same name are numbered in their order."""
    names: dict[str, str] = {}
    for label, node in labels:
        name, number = _as_name(label), 1
        while name in names.values():
            number += 1
            name = f"{_as_name(label)[: _NAME_LENGTH - 4]}-{number}"
        names[node] = name
    return names


def _as_name(label: str) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", label.lower()).strip("._-")[:_NAME_LENGTH]
    return name if is_name(name) else "disk"
