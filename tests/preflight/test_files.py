"""The contract of a guest's file system, kept by every implementation, and the tree over several of them."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from guest_disks import (
    DebianGuest,
    Files,
    FileSource,
    initramfs,
    lvm_physical_volume,
    make_btrfs,
    make_disk,
    make_ext4,
    make_fat,
    make_ntfs,
    make_xfs,
    pe,
    run,
)
from memory_files import MemoryFiles

from drsync.preflight.fence import Limits, look_inside
from drsync.preflight.inside import dissect_files
from drsync.preflight.inside.files import FileSystem, Kind, Tree, Unreadable
from drsync.preflight.inside.nbd_export import NbdExport
from drsync.preflight.inside.signatures import identify
from drsync.units import MiB

FILES: Files = {
    "/etc/fstab": "UUID=1 / ext4 defaults 0 1\n",
    "/etc/os-release": "-> ../usr/lib/os-release",
    "/usr/lib/os-release": "ID=debian\n",
    "/bin": "-> usr/bin",
    "/usr/bin/sh": "-> /usr/bin/dash",
    "/usr/bin/dash": b"\x7fELF" + bytes(range(256)) * 1024,
    "/loop": "-> loop",
    "/a": "-> b/x",
    "/b": "-> a/y",
    "/out": "-> ../../../../etc/fstab",
    "/long": "-> " + "/" * 50 + "usr/lib/os-release" + "/" * 30,
    **{f"/many/file{n:04d}": "x" for n in range(700)},
}
PLAIN: Files = {name: c for name, c in FILES.items() if not (isinstance(c, str) and c.startswith("-> "))}


def opened(path: Path) -> FileSystem:
    source = FileSource(path)
    return dissect_files.open_files(identify(source).kind, source)


MAKERS: dict[str, Callable[[Path], FileSystem]] = {
    "memory": lambda _: MemoryFiles(FILES),
    "ext4": lambda place: opened(make_ext4(place / "x.img", 32 * MiB, FILES)),
    "xfs": lambda place: opened(make_xfs(place / "x.img", 320 * MiB, FILES)),
    "btrfs": lambda place: opened(make_btrfs(place / "x.img", 128 * MiB, FILES)),
    "vfat": lambda place: opened(make_fat(place / "x.img", 34 * MiB, PLAIN)),
    "ntfs": lambda place: opened(make_ntfs(place / "x.img", 32 * MiB, PLAIN)),
}
WITHOUT_LINKS = ("vfat", "ntfs")


@pytest.fixture(scope="module", params=MAKERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


CAN_MOUNT = os.geteuid() == 0 and Path("/dev/fuse").exists()


@pytest.fixture(scope="module")
def files(kind: str, tmp_path_factory: pytest.TempPathFactory) -> FileSystem:
    if kind == "ntfs" and not CAN_MOUNT:
        pytest.skip("NTFS is filled through FUSE, which needs root")
    return MAKERS[kind](tmp_path_factory.mktemp(kind))


def test_it_tells_what_is_at_a_path(files: FileSystem, kind: str) -> None:
    dash = files.look(("usr", "bin", "dash"))
    assert dash is not None
    assert (dash.kind, dash.size_bytes) == (Kind.FILE, 4 + 256 * 1024)
    etc = files.look(("etc",))
    assert etc is not None
    assert etc.kind is Kind.DIRECTORY
    assert files.look(("etc", "nothing")) is None
    assert files.look(("etc", "fstab", "below")) is None
    if kind not in WITHOUT_LINKS:
        link = files.look(("bin",))
        assert link is not None
        assert link.kind is Kind.LINK
        assert files.look(("bin", "dash")) is None, "links are not followed"


def test_it_lists_directories(files: FileSystem) -> None:
    assert sorted(files.names(("many",))) == [f"file{n:04d}" for n in range(700)]
    assert not files.names(("nothing",))
    assert not files.names(("etc", "fstab"))


def test_it_reads_files_at_any_place(files: FileSystem) -> None:
    file = files.open(("usr", "bin", "dash"))
    assert file.read(4) == b"\x7fELF"
    file.seek(4 + 256 * 1000)
    assert file.read() == bytes(range(256)) * 24
    with pytest.raises(Unreadable):
        files.open(("nothing",))


def test_a_tree_follows_links_and_stays_inside(files: FileSystem, kind: str) -> None:
    tree = Tree(files)
    assert tree.text("/etc/fstab") == FILES["/etc/fstab"]
    assert tree.text("/../../etc/./fstab") == FILES["/etc/fstab"]
    if kind in WITHOUT_LINKS:
        assert tree.is_file("/ETC/FSTAB"), "FAT and NTFS ignore case"
        return
    assert tree.text("/etc/os-release") == "ID=debian\n"
    assert tree.text("/long") == "ID=debian\n"
    assert tree.read("/bin/sh", 4) == b"\x7fELF"
    assert tree.text("/out") == FILES["/etc/fstab"], "above the root is the root"
    assert (tree.link("/bin"), tree.link("/etc/fstab")) == ("usr/bin", None)
    for path in ("/loop", "/a", "/b/z"):
        assert not tree.exists(path)


def test_what_is_mounted_hides_what_is_below() -> None:
    tree = Tree(MemoryFiles({"/boot/old": "x", "/etc/x": "-> /boot/grub/grub.cfg"}))
    tree.mount("/boot", MemoryFiles({"/grub/grub.cfg": "new", "/up": "-> ../etc/x"}))
    tree.mount("/boot/efi", MemoryFiles({"/EFI/x": "y"}))
    assert not tree.exists("/boot/old")
    assert tree.text("/etc/x") == tree.text("/boot/up") == "new"
    assert tree.text("/boot/efi/EFI/x") == "y"
    assert tree.walk("/boot", "x", depth=4, limit=10) == []
    assert tree.walk("/boot/efi", "x", depth=4, limit=10) == ["/boot/efi/EFI/x"]


def test_a_file_that_breaks_while_it_is_read_is_unreadable() -> None:
    class Broken(MemoryFiles):
        def open(self, path: tuple[str, ...]):  # type: ignore[no-untyped-def]
            file = super().open(path)
            file.close()
            return file

    with pytest.raises(Unreadable, match="/x"):
        Tree(Broken({"/x": "y"})).read("/x")


def test_a_source_is_offered_over_nbd_as_it_is(tmp_path: Path) -> None:
    content = b"".join(n.to_bytes(4, "big") for n in range(MiB)) + bytes(3 * MiB) + b"end" + bytes(509)
    path = tmp_path / "disk.raw"
    path.write_bytes(content)
    export = NbdExport(FileSource(path), tmp_path / "s")
    try:
        uri = f"nbd+unix:///?socket={tmp_path / 's'}"
        assert f'"virtual-size": {len(content)}' in run("qemu-img", "info", "--output=json", uri)
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == content
        refused = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 512", uri], capture_output=True, check=False)
        assert refused.returncode != 0, "it is read only"
    finally:
        export.close()
    assert path.read_bytes() == content


@pytest.mark.skipif("DRSYNC_TEST_GUESTFS" not in os.environ, reason="libguestfs takes minutes without KVM")
@pytest.mark.timeout(1200)
def test_libguestfs_tells_what_dissect_tells(tmp_path: Path) -> None:
    guest = DebianGuest(initramfs=initramfs(tmp_path / "initramfs", ["nvme/host/nvme"]))
    root = make_ext4(tmp_path / "root.img", 24 * MiB, guest.files())
    volume = lvm_physical_volume(tmp_path / "pv.img", 40 * MiB, "my-vg", {"root": root})
    esp = make_fat(tmp_path / "esp.img", 34 * MiB, {"/EFI/BOOT/BOOTX64.EFI": pe()})
    table = "label: gpt\nstart=2048, size=34MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\nsize=50MiB\n"
    disk = make_disk(tmp_path / "disk.raw", 96 * MiB, table, {MiB: esp, 35 * MiB: volume})
    by_dissect = look_inside([FileSource(disk)], reader="dissect")
    by_libguestfs = look_inside([FileSource(disk)], reader="libguestfs", limits=Limits(time_s=1000))
    assert by_dissect.linux[0].root == "my-vg/root"
    assert msgspec.structs.replace(by_libguestfs, reader="dissect") == by_dissect
