"""Which of QEMU's block nodes are a VM's disks, how they are named, and how much a full of them copies."""

from typing import Any

import msgspec
import pytest

from drsync.model import is_name
from drsync.source.nodes import BlockGraph, Device, Export, Node, choose_disks

MIB = 1024 * 1024


def node(name: str, driver: str = "qcow2", *, ro: bool = False, compat: str = "1.1", **image: Any) -> Node:
    """A node as QEMU describes it; `image` overrides members of its image, with _ for their hyphens."""
    described = {"filename": f"/{name}", "format": driver, "virtual-size": 4 * MIB, "actual-size": MIB}
    described |= {key.replace("_", "-"): value for key, value in image.items()}
    if driver == "qcow2":
        described["format-specific"] = {"type": "qcow2", "data": {"compat": compat}}
    return msgspec.convert({"node-name": name, "drv": driver, "ro": ro, "image": described}, Node)


def device(label: str, qdev: str, inserted: Node | None) -> Device:
    return Device(device=label, qdev=qdev, inserted=inserted)


def graph(nodes: list[Node], devices: list[Device] | None = None, exports: list[str] | None = None) -> BlockGraph:
    listed = [Export(id=f"e{number}", node_name=name) for number, name in enumerate(exports or [])]
    return BlockGraph(nodes=nodes, devices=devices or [], exports=listed)


def chosen(block_graph: BlockGraph, wanted: dict[str, str] | None = None) -> dict[str, str | None]:
    return {
        name: None if found is None else found.node_name for name, found in choose_disks(block_graph, wanted).items()
    }


@pytest.mark.parametrize(
    ("label", "qdev", "node_name", "name"),
    [
        ("drive0", "/machine/peripheral/disk1/virtio-backend", "d0", "disk1"),
        ("", "/machine/peripheral/Data_1", "d0", "data_1"),
        ("virtio0", "/machine/peripheral-anon/device[0]/virtio-backend", "#block195", "virtio0"),
        ("", "/machine/peripheral-anon/device[1]/virtio-backend", "d0", "d0"),
        ("", "/machine/peripheral-anon/device[1]/virtio-backend", "#block195", "device-1"),
        ("pflash1", "/machine/system.flash1", "#block1", "pflash1"),
        ("", "/machine/peripheral/-._ÄÖ/virtio-backend", "d0", "disk"),
        ("", f"/machine/peripheral/{'x' * 100}", "d0", "x" * 63),
    ],
)
def test_a_disk_is_named_after_its_device(label: str, qdev: str, node_name: str, name: str) -> None:
    disk = node(node_name)
    assert is_name(name)
    assert chosen(graph([disk], [device(label, qdev, disk)])) == {name: node_name}


def test_only_writable_media_of_devices_are_disks() -> None:
    disk, cdrom, spare, empty = node("d0"), node("cd", ro=True), node("spare"), node("e", virtual_size=0)
    devices = [
        device("", "/machine/peripheral/root", disk),
        device("ide1-cd0", "/machine/unattached/device[23]", cdrom),
        device("floppy0", "/machine/unattached/device[16]", None),
        device("unplugged", "", spare),
        device("", "/machine/peripheral/zero", empty),
    ]
    assert chosen(graph([disk, cdrom, spare, empty], devices)) == {"root": "d0"}


def test_names_that_become_the_same_are_numbered_in_a_stable_order() -> None:
    nodes = [node(name) for name in ("n1", "n2", "n3")]
    labels = ["Disk A", "disk-a", "disk a"]
    devices = [device(label, "/machine/unattached/x", disk) for label, disk in zip(labels, nodes, strict=True)]
    assert chosen(graph(nodes, devices)) == {"disk-a": "n1", "disk-a-2": "n3", "disk-a-3": "n2"}
    assert chosen(graph(nodes[::-1], devices[::-1])) == chosen(graph(nodes, devices))


def test_a_node_with_two_devices_is_one_disk() -> None:
    disk = node("d0")
    devices = [device("", "/machine/peripheral/a", disk), device("", "/machine/peripheral/b", disk)]
    assert chosen(graph([disk], devices)) == {"a": "d0"}


def test_a_filter_on_top_is_looked_through() -> None:
    disk, other = node("d0"), node("d1")
    file = '"file": {"driver": "qcow2", "file": {"driver": "file", "filename": "/d0"}}'
    top = node("limit", "throttle", filename=f'json:{{"driver": "throttle", "throttle-group": "g", {file}}}')
    assert chosen(graph([disk, other, top], [device("", "/machine/peripheral/root", top)])) == {"root": "d0"}
    assert chosen(graph([disk, top], exports=["limit"])) == {"d0": "d0"}


@pytest.mark.parametrize("filename", ["json:{", "json:[]", 'json:{"file": 1}', "json:null", "/nowhere"])
def test_a_filter_over_something_unknown_is_the_disk_itself(filename: str) -> None:
    top = node("limit", "throttle", filename=filename)
    assert chosen(graph([node("d0"), top], [device("", "/machine/peripheral/root", top)])) == {"root": "limit"}


def test_a_process_without_devices_has_the_disks_that_it_exports() -> None:
    nodes = [node("d0"), node("d0f", "file"), node("d1", "raw"), node("read-only", ro=True), node("Upper")]
    assert chosen(graph(nodes, exports=["d1", "read-only", "Upper", "Upper"])) == {"d1": "d1", "upper": "Upper"}


def test_a_process_that_exports_nothing_has_its_images_as_disks() -> None:
    nodes = [node("d0"), node("d0f", "file"), node("d1", "raw"), node("base", ro=True)]
    assert chosen(graph(nodes)) == {"d0": "d0", "d1": "d1"}


def test_configured_nodes_are_taken_and_those_that_can_not_be_are_told() -> None:
    nodes = [node("d0"), node("d1", ro=True)]
    wanted = {"root": "d0", "gone": "nowhere", "fixed": "d1"}
    assert chosen(graph(nodes), wanted) == {"fixed": None, "gone": None, "root": "d0"}
    assert list(choose_disks(graph(nodes), wanted)) == ["fixed", "gone", "root"]


def test_only_qcow2_of_version_3_keeps_bitmaps() -> None:
    assert node("d0").keeps_bitmaps
    assert not node("d0", compat="0.10").keeps_bitmaps
    assert not node("d0", "raw").keeps_bitmaps


def file_of(name: str) -> Node:
    return node(f"{name}-file", "file", filename=f"/{name}")


def test_a_full_copies_at_most_what_the_images_of_the_chain_take_on_disk() -> None:
    backing = {"filename": "/base", "format": "qcow2", "virtual-size": 4 * MIB, "actual-size": 2 * MIB}
    disk = node("d0", backing_image=backing)
    assert not disk.knows_unwritten
    assert graph([disk, file_of("d0"), file_of("base")]).allocated_bytes(disk) == 3 * MIB + 65536
    assert node("d1").knows_unwritten


def test_a_full_never_copies_more_than_the_disk() -> None:
    disk = node("d0", actual_size=9 * MIB)
    assert graph([disk, file_of("d0")]).allocated_bytes(disk) == 4 * MIB


def test_a_full_of_a_raw_disk_needs_a_table_for_every_512_mib_of_zeros() -> None:
    disk = node("d0", "raw", virtual_size=1025 * MIB, actual_size=0)
    assert graph([disk, file_of("d0")]).allocated_bytes(disk) == 3 * 65536


def test_a_full_of_what_is_not_a_plain_file_may_copy_the_whole_disk() -> None:
    disk = node("d0", "raw", actual_size=0)
    assert graph([disk, node("dev", "host_device", filename="/d0")]).allocated_bytes(disk) == 4 * MIB + 65536
    nameless = msgspec.structs.replace(disk, image=msgspec.structs.replace(disk.image, actual_size=None))
    assert graph([nameless, file_of("d0")]).allocated_bytes(nameless) == 4 * MIB + 65536
