"""Initramfs archives, made by the real cpio and packers."""

import io
import shutil
from pathlib import Path

import pytest
from guest_disks import initramfs
from hypothesis import given
from hypothesis import strategies as st

from drsync.preflight.inside import initramfs as module
from drsync.preflight.inside.initramfs import module_name, read_initramfs


@pytest.mark.parametrize("packed", ["gzip", "xz", "zstd", "bzip2", "lz4", "plain"])
@pytest.mark.parametrize("early", [True, False])
def test_the_modules_are_found_however_it_is_packed(packed: str, early: bool, tmp_path: Path) -> None:
    if packed == "lz4" and shutil.which("lz4") is None:
        pytest.skip("no lz4 here")
    data = initramfs(tmp_path, ["nvme/host/nvme-core", "nvme/host/nvme", "virtio_blk"], packed=packed, early=early)
    found = read_initramfs(io.BytesIO(data))
    assert found.modules == {"nvme_core", "nvme", "virtio_blk"}
    assert not found.problem


def test_modules_may_be_packed_themselves() -> None:
    assert module_name("usr/lib/modules/6.1/kernel/drivers/nvme/host/nvme.ko.xz") == "nvme"
    assert module_name("kernel/drivers/md/dm-mod.ko.zst") == "dm_mod"
    assert module_name("etc/modules") == module_name("x.kon") == ""


def test_a_cut_archive_tells_what_it_had(tmp_path: Path) -> None:
    data = initramfs(tmp_path, ["a" * 200, "nvme"], packed="plain", early=False)
    found = read_initramfs(io.BytesIO(data[: len(data) // 2]))
    assert "can't be unpacked" in found.problem


@pytest.mark.parametrize("data", [b"\x89LZO" + bytes(100), b"x" * 1000, b"\x1f\x8b" + bytes(50), b"\xfd7zXZ\0junk"])
def test_what_is_not_known_is_told(data: bytes) -> None:
    found = read_initramfs(io.BytesIO(data))
    assert found.problem
    assert not found.modules


def test_a_bomb_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PLAIN_BYTES", 4 * 1024 * 1024)
    import gzip

    found = read_initramfs(io.BytesIO(gzip.compress(bytes(64 * 1024 * 1024))))
    assert "more than 4194304 bytes" in found.problem


def test_a_squashfs_hides_modules(tmp_path: Path) -> None:
    from guest_disks import _archive, lay_out

    data = _archive(lay_out(tmp_path / "x", {"squashfs-root.img": "hsqs", "init": "x"}))
    assert "squashfs" in read_initramfs(io.BytesIO(data)).problem


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    place = tmp_path_factory.mktemp("archives")
    kinds = ["gzip", "xz", "zstd", "plain"]
    return {packed: initramfs(place / packed, ["nvme/host/nvme", "ext4"], packed=packed) for packed in kinds}


@given(
    packed=st.sampled_from(["gzip", "xz", "zstd", "plain"]),
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=8),
)
def test_flipped_bytes_break_nothing(archives: dict[str, bytes], packed: str, flips: list[tuple[int, int]]) -> None:
    whole = bytearray(archives[packed])
    for at, change in flips:
        whole[at % len(whole)] ^= change
    found = read_initramfs(io.BytesIO(bytes(whole)))
    assert len(found.modules) < 10
