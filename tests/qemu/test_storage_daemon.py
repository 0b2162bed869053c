"""The test bench itself: a qemu-storage-daemon must behave as the source's tests take for granted."""

from pathlib import Path

import pytest
from qmp_socket import QmpSocket
from storage_daemon import DaemonDisk, StorageDaemon, StorageDaemonFailed

pytestmark = pytest.mark.qemu

MIB = 1024 * 1024


def bitmap_flags(daemon: StorageDaemon, name: str) -> list[tuple[str, int, bool]]:
    """Name, dirty bytes and inconsistency of each bitmap of a disk."""
    nodes = daemon.execute("query-named-block-nodes")
    (node,) = (node for node in nodes if node["node-name"] == daemon.node(name))
    bitmaps = node.get("dirty-bitmaps", [])
    return [(bitmap["name"], bitmap["count"], bitmap.get("inconsistent", False)) for bitmap in bitmaps]


def add_bitmap(daemon: StorageDaemon, name: str, *, persistent: bool) -> None:
    daemon.execute("block-dirty-bitmap-add", node=daemon.node(name), name="test", persistent=persistent)


def test_writes_zeros_and_discards_are_read_back(storage_daemon: StorageDaemon) -> None:
    storage_daemon.io("root", "write -P 1 0 8M", "write -z 2M 1M", "discard 4M 1M", "write -P 9 64k 512")
    content = bytearray(b"\1" * (8 * MIB))
    content[2 * MIB : 3 * MIB] = bytes(MIB)
    content[4 * MIB : 5 * MIB] = bytes(MIB)
    content[65536 : 65536 + 512] = b"\x09" * 512
    assert storage_daemon.read("root") == bytes(content)
    assert storage_daemon.read("data") == bytes(4 * MIB)


def test_a_discard_marks_blocks_dirty(storage_daemon: StorageDaemon) -> None:
    for name in ("root", "data"):
        storage_daemon.io(name, "write -P 1 0 4M")
        add_bitmap(storage_daemon, name, persistent=False)
        storage_daemon.io(name, "discard 1M 1M", "write -z 3M 64k")
        assert bitmap_flags(storage_daemon, name) == [("test", MIB + 65536, False)]


def test_a_failed_io_command_raises(storage_daemon: StorageDaemon) -> None:
    with pytest.raises(StorageDaemonFailed):
        storage_daemon.io("root", "write -P 1 8M 64k")


def test_drsync_and_the_test_each_have_a_monitor(storage_daemon: StorageDaemon) -> None:
    with QmpSocket(storage_daemon.qmp_socket) as other:
        assert other.execute("query-named-block-nodes") == storage_daemon.execute("query-named-block-nodes")


def test_a_clean_stop_saves_persistent_bitmaps(storage_daemon: StorageDaemon) -> None:
    add_bitmap(storage_daemon, "root", persistent=True)
    storage_daemon.io("root", "write -P 1 0 64k")
    storage_daemon.stop()
    assert not storage_daemon.running
    assert storage_daemon.read("root")[:65536] == b"\1" * 65536
    storage_daemon.start()
    assert bitmap_flags(storage_daemon, "root") == [("test", 65536, False)]


def test_a_kill_leaves_saved_bitmaps_inconsistent(storage_daemon: StorageDaemon) -> None:
    add_bitmap(storage_daemon, "root", persistent=True)
    storage_daemon.stop()
    storage_daemon.start()
    storage_daemon.io("root", "write -P 1 0 64k")
    storage_daemon.kill()
    storage_daemon.start()
    assert [(name, bad) for name, _, bad in bitmap_flags(storage_daemon, "root")] == [("test", True)]


def test_a_resize_is_seen_by_the_next_reader(storage_daemon: StorageDaemon) -> None:
    for name in ("root", "data"):
        storage_daemon.io(name, "write -P 1 0 64k")
        storage_daemon.resize(name, 16 * MIB)
        storage_daemon.io(name, "write -P 2 15M 1M")
        content = storage_daemon.read(name)
        assert len(content) == 16 * MIB
        assert content[:65536] == b"\1" * 65536
        assert content[15 * MIB :] == b"\2" * MIB


def test_a_daemon_that_cannot_start_says_what_qemu_said(tmp_path: Path) -> None:
    (tmp_path / "root.qcow2").write_bytes(b"this is no qcow2 image")
    daemon = StorageDaemon(tmp_path, [DaemonDisk(name="root", size_bytes=MIB)])
    try:
        with pytest.raises(StorageDaemonFailed, match="not in qcow2 format"):
            daemon.start()
    finally:
        daemon.close()
