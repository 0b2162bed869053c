"""Live reading over NBD from a real QEMU: what is read, what is left behind, and who else uses the NBD server."""

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from live_content import content_of
from storage_daemon import DaemonDisk, StorageDaemon

from drsync.errors import CaptureFailed, LibraryMissing, LiveUnavailable, SourceLost
from drsync.model import BLOCK_SIZE, Kind, NoPace, new_capture_id
from drsync.source import Base, BaseDisk, DiskSurvey, Source
from drsync.source.bitmap import Owner
from drsync.source.qmp import QmpOptions, QmpSource

MIB = 1024 * 1024
SIZES = {"root": 20 * MIB + 1536, "data": 4 * MIB}
TAG = "00c0ffee"
pytestmark = pytest.mark.qemu


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StorageDaemon]:
    disks = [
        DaemonDisk(name="root", size_bytes=SIZES["root"]),
        DaemonDisk(name="data", size_bytes=SIZES["data"], format="raw"),
    ]
    with StorageDaemon(tmp_path, disks, free_nbd=True) as daemon:
        yield daemon


def opened(daemon: StorageDaemon) -> QmpSource:
    options = QmpOptions(
        vm="web",
        socket=daemon.qmp_socket,
        repository_tag=TAG,
        disks={name: daemon.node(name) for name in SIZES},
        live_directory=daemon.directory / ".live",
    )
    return QmpSource(options)


def base_of(surveys: list[DiskSurvey], capture: str) -> Base:
    disks = [BaseDisk(name=d.name, size_bytes=d.size_bytes) for d in surveys]
    return Base(capture=capture, disks=disks)  # type: ignore[arg-type]


def things(daemon: StorageDaemon) -> tuple[list[str], set[str]]:
    """Exports, and bitmaps."""
    nodes = daemon.execute("query-named-block-nodes", flat=True)
    bitmaps = {bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", [])}
    return [export["id"] for export in daemon.execute("query-block-exports")], bitmaps


def nbd_is_free(daemon: StorageDaemon) -> bool:
    """Whether an NBD server can be started, which then is."""
    with suppress(Exception):
        path = str(daemon.directory / "probe")
        daemon.execute("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
        daemon.execute("nbd-server-stop")
        return True
    return False


def record(source: Source, base: Base | None = None) -> tuple[list[DiskSurvey], Base]:
    surveys = list(source.survey(base))
    capture = new_capture_id()
    source.begin_recording(capture, surveys)
    return surveys, base_of(surveys, capture)


def test_c7_all_of_a_disk_is_read_and_what_reads_as_zeros_is_not(daemon: StorageDaemon) -> None:
    daemon.io("root", "write -P 5 0 3M", "write -P 6 10M 1000", f"write -P 9 {20 * MIB} 1536", "write -z 1M 1M")
    daemon.io("data", "write -P 7 100k 1M")
    with opened(daemon) as source:
        surveys, _ = record(source)
        view = source.open_live(None, surveys, pace=NoPace())
        for disk, size_bytes in SIZES.items():
            content, held, zeros = content_of(view, disk, size_bytes)
            assert content == daemon.read(disk)
            assert held | zeros == set(range(-(-size_bytes // BLOCK_SIZE)))
            assert not held & zeros
        assert set(range(16, 32)) <= content_of(view, "root", SIZES["root"])[2]
        view.close()
    assert things(daemon)[0] == []
    assert nbd_is_free(daemon)
    assert not (daemon.directory / ".live").exists()


def test_c8_a_view_of_an_increment_tells_of_what_was_written_and_zeroed_since(daemon: StorageDaemon) -> None:
    daemon.io("root", "write -P 5 0 3M")
    with opened(daemon) as source:
        _, base = record(source)
        daemon.io("root", "write -P 8 64k 64k", "write -z 1M 64k", "discard 2M 64k", f"write -P 9 {20 * MIB} 1536")
        surveys, _ = record(source, base)
        assert {d.kind for d in surveys} == {Kind.INCREMENTAL}
        daemon.io("root", "write -P 4 512k 64k")  # is in the bitmaps that record now, not in the view
        view = source.open_live(base, surveys, pace=NoPace())
        content, held, zeros = content_of(view, "root", SIZES["root"])
        assert held | zeros >= {1, 16, 32, 320}
        assert {16, 32} <= zeros
        assert content[BLOCK_SIZE : 2 * BLOCK_SIZE] == b"\x08" * BLOCK_SIZE
        assert content_of(view, "data", SIZES["data"])[1:] == (set(), set())
        view.close()


def test_c5_what_a_dead_drsync_left_is_taken_away_by_the_next_survey(daemon: StorageDaemon) -> None:
    with opened(daemon) as source:
        _, base = record(source)
        daemon.io("root", "write -P 8 64k 64k")
        surveys, second = record(source, base)
        source.open_live(base, surveys, pace=NoPace())  # and is never closed
    exports, bitmaps = things(daemon)
    assert len(exports) == 2
    with opened(daemon) as source:
        source.survey(second, keep=[base.capture])
    exports, bitmaps = things(daemon)
    owner = Owner(repository=TAG, vm="web")
    assert exports == []
    assert bitmaps == {owner.bitmap(c, d) for c in (base.capture, second.capture) for d in SIZES}
    assert nbd_is_free(daemon)


def test_a_server_that_was_started_and_no_more_is_known_by_its_socket(daemon: StorageDaemon) -> None:
    place = daemon.directory / ".live"
    place.mkdir()
    daemon.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(place / "nbd")}})
    with opened(daemon) as source:
        source.survey(None)
    assert nbd_is_free(daemon)


def test_c6_somebody_elses_nbd_server_is_never_touched(daemon: StorageDaemon) -> None:
    path = str(daemon.directory / "theirs")
    daemon.execute("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
    export = {"type": "nbd", "id": "theirs", "node-name": "d-root", "name": "theirs"}
    daemon.execute("block-export-add", **export)
    with opened(daemon) as source:
        surveys = source.survey(None)
        with pytest.raises(LiveUnavailable, match="already running"):
            source.open_live(None, surveys, pace=NoPace())
        source.survey(None)
    assert things(daemon) == (["theirs"], set())
    assert not nbd_is_free(daemon)


def test_c6_others_who_export_through_our_server_keep_it(daemon: StorageDaemon) -> None:
    with opened(daemon) as source:
        view = source.open_live(None, source.survey(None), pace=NoPace())
        daemon.execute("block-export-add", **{"type": "nbd", "id": "theirs", "node-name": "d-root", "name": "theirs"})
        view.close()
        assert things(daemon)[0] == ["theirs"]
        assert not nbd_is_free(daemon)
        view = source.open_live(None, source.survey(None), pace=NoPace())  # ours still, so it is used again
        content_of(view, "root", SIZES["root"])
        view.close()
        assert things(daemon)[0] == ["theirs"]
        daemon.execute("block-export-del", id="theirs")
        source.survey(None)
    assert nbd_is_free(daemon)


def test_a_qemu_that_ends_while_it_is_read_is_lost(daemon: StorageDaemon) -> None:
    daemon.io("root", "write -P 5 0 20M")
    with opened(daemon) as source:
        view = source.open_live(None, source.survey(None), pace=NoPace())
        reader = view.reader("root")
        pieces = reader.read(np.arange(300))
        next(pieces)
        daemon.kill()
        with pytest.raises(SourceLost):
            for _ in pieces:
                pass
        with pytest.raises(SourceLost):
            view.reader("root")
        reader.close()
        view.close()


def test_a_disk_that_cannot_be_read_fails_the_reading(daemon: StorageDaemon) -> None:
    daemon.io("root", "write -P 5 0 20M")
    errors = [{"event": "none", "iotype": "read", "errno": 5, "once": False}]
    daemon.execute(
        "blockdev-add", **{"driver": "blkdebug", "node-name": "bad", "image": "f-root", "inject-error": errors}
    )
    with opened(daemon) as source:
        view = source.open_live(None, source.survey(None), pace=NoPace())
        reader = view.reader("root")
        options = {"driver": "qcow2", "node-name": "d-root", "file": "bad", "discard": "unmap"}
        daemon.execute("blockdev-reopen", options=[options])
        with pytest.raises(CaptureFailed, match="rror"):
            for _ in reader.read(np.arange(100)):
                pass
        reader.close()
        view.close()
        daemon.execute("blockdev-reopen", options=[options | {"file": "f-root"}])


def test_several_readers_read_at_once(daemon: StorageDaemon) -> None:
    daemon.io("root", "write -P 5 0 20M")
    wanted = daemon.read("root")
    with opened(daemon) as source:
        view = source.open_live(None, source.survey(None), pace=NoPace())
        found: list[bytes] = []
        threads = [
            threading.Thread(target=lambda: found.append(content_of(view, "root", SIZES["root"])[0])) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        view.close()
    assert found == [wanted] * 4


def test_without_a_place_for_its_socket_nothing_is_started(daemon: StorageDaemon) -> None:
    options = QmpOptions(vm="web", socket=daemon.qmp_socket, repository_tag=TAG)
    for place, problem in ((None, "no directory"), (daemon.directory / ("x" * 100), "longer than a socket's path")):
        from dataclasses import replace

        with QmpSource(replace(options, live_directory=place)) as source:
            with pytest.raises(LiveUnavailable, match=problem):
                source.open_live(None, source.survey(None), pace=NoPace())
    assert nbd_is_free(daemon)


def test_without_libnbd_the_remedy_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from drsync.source.nbd import load

    monkeypatch.setitem(sys.modules, "nbd", None)
    with pytest.raises(LibraryMissing, match="reading disks live needs libnbd") as caught:
        load("web")
    assert caught.value.remedy.startswith("apt install python3-libnbd")


def test_while_drsync_waits_for_its_pace_qemu_can_drain_its_disks(daemon: StorageDaemon) -> None:
    """A snapshot or a job drains; until NBD clients have taken their replies, all of QEMU stands still."""
    daemon.io("root", "write -P 5 0 20M")

    class Slow:
        def take_now(self, _size_bytes: int) -> bool:
            self.asked += 1
            return self.asked <= 3

        def limit_bytes_per_s(self) -> float | None:
            return None

        def take(self, _size_bytes: int) -> None:
            daemon.execute("block_resize", **{"node-name": "d-data", "size": SIZES["data"]})
            daemon.io("root", "write -P 6 0 64k")
            daemon.execute(
                "transaction",
                actions=[{"type": "block-dirty-bitmap-add", "data": {"node": "d-root", "name": f"x{self.asked}"}}],
            )

        asked = 0

    with opened(daemon) as source:
        view = source.open_live(None, source.survey(None)[1:], pace=Slow())
        reader = view.reader("root")
        for _ in reader.read(np.arange(96)):
            pass
        reader.close()
        view.close()
