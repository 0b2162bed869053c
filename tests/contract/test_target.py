"""One suite for every target: the rules T1 to T4 of drsync/target/__init__.py.

A disk that came back is read by QEMU, never by drsync. The target in memory has
no place where something can exist already, and nothing of it survives: T1 and T4
are asked of files only.
"""

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final, Protocol

import numpy as np
import pytest
import qemu_img
from hypothesis import given
from hypothesis import strategies as st
from protected_vm import MemoryTarget
from shipped_vm import Blocks, OracleDisk, content, write_raw

from drsync.errors import TargetExists, TargetFull, TargetUnusable
from drsync.model import BLOCK_SIZE, block_count, block_length
from drsync.qcow2 import TABLE_BLOCKS
from drsync.target import DiskWriter, Positions
from drsync.target.block_device import BlockDevice
from drsync.target.image import ImageDisk, ImageFormat, write_text_file
from drsync.target.upload import UploadDisk

SECTOR: Final = 512
SIZE: Final = 5 * BLOCK_SIZE - SECTOR
PRECIOUS: Final = b"precious"
WINDOW_BYTES: Final = TABLE_BLOCKS * BLOCK_SIZE
EDGES: Final = (0, TABLE_BLOCKS - 1, TABLE_BLOCKS, 2 * TABLE_BLOCKS - 1, 2 * TABLE_BLOCKS)


class Place(Protocol):
    """Where one disk comes back."""

    def writer(self, size_bytes: int) -> DiskWriter: ...

    def check(self, expected: OracleDisk | None) -> None:
        """Fail unless the final place has this disk; None: nothing at all."""
        ...


class MemoryPlace:
    """The target of tests that look at other things than files."""

    def __init__(self, directory: Path) -> None:
        self._target = MemoryTarget(0)
        self._directory = directory

    def writer(self, size_bytes: int) -> DiskWriter:
        self._target = MemoryTarget(size_bytes)
        return self._target

    def check(self, expected: OracleDisk | None) -> None:
        if expected is None:
            with pytest.raises(AssertionError):
                self._target.content  # noqa: B018 - it refuses to be read
        else:
            assert self._target.content == write_raw(expected, self._directory / "expected").read_bytes()


class FilePlace:
    """A file of one format, `path`, alone in its folder."""

    def __init__(self, directory: Path, image_format: ImageFormat) -> None:
        self.path = directory / "restored" / f"root.{image_format}"
        self.format = image_format
        self._expected = directory / "expected"

    def writer(self, size_bytes: int, *, overwrite: bool = False) -> DiskWriter:
        return ImageDisk(self.path, size_bytes, self.format, vm="web", overwrite=overwrite)

    def check(self, expected: OracleDisk | None) -> None:
        if expected is None:
            assert not os.path.lexists(self.path)
            return
        if self.format is ImageFormat.QCOW2:
            qemu_img.check(self.path)
        assert self._size_bytes() == expected.size_bytes
        qemu_img.assert_same(write_raw(expected, self._expected), self.path, self.format)
        self._expected.unlink()

    def _size_bytes(self) -> int:
        if self.format is ImageFormat.RAW:
            return self.path.stat().st_size
        return int(qemu_img.info(self.path)["virtual-size"])

    def existing(self) -> None:
        """Let something be there already."""
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_bytes(PRECIOUS)

    def names(self) -> list[str]:
        """All that is in the folder."""
        return sorted(path.name for path in self.path.parent.iterdir())


class FileStream:
    """A ByteStream into a file, as libvirt writes what is uploaded: never truncated first, a hole is a seek."""

    def __init__(self, path: Path, offset: int) -> None:
        self._file = path.open("r+b")
        self._file.seek(offset)

    def send(self, data: bytes) -> None:
        self._file.write(data)

    def skip(self, length: int) -> None:
        self._file.truncate(self._file.seek(length, os.SEEK_CUR))

    def finish(self) -> None:
        self._file.close()

    abort = finish


class UploadPlace(FilePlace):
    """A volume in which a disk is uploaded; it has its name from the beginning, but is no image until the end."""

    def writer(self, size_bytes: int, *, overwrite: bool = False) -> DiskWriter:
        assert not overwrite
        self.path.parent.mkdir(exist_ok=True)
        self.path.touch()
        if self.format is ImageFormat.RAW:
            os.truncate(self.path, size_bytes)
        return UploadDisk(
            lambda offset: FileStream(self.path, offset),
            size_bytes,
            self.format,
            scratch=self.path.parent,
            remove=self.path.unlink,
        )

    def check(self, expected: OracleDisk | None) -> None:
        if expected is not None:
            super().check(expected)
        elif self.path.exists():
            assert self.path.read_bytes()[:4] != b"QFI\xfb"


class DevicePlace(FilePlace):
    """A device that holds other bytes; a file stands for it, which has no quick way to zeros."""

    def writer(self, size_bytes: int, *, overwrite: bool = False) -> DiskWriter:
        assert not overwrite
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_bytes(b"\xaa" * size_bytes)
        return BlockDevice(self.path, size_bytes, remove=self.path.unlink)


def _upload(directory: Path) -> FilePlace:
    return UploadPlace(directory, ImageFormat.QCOW2)


def _raw_upload(directory: Path) -> FilePlace:
    return UploadPlace(directory, ImageFormat.RAW)


def _device(directory: Path) -> FilePlace:
    return DevicePlace(directory, ImageFormat.RAW)


def _qcow2(directory: Path) -> FilePlace:
    return FilePlace(directory, ImageFormat.QCOW2)


def _raw(directory: Path) -> FilePlace:
    return FilePlace(directory, ImageFormat.RAW)


FILES: Final = [
    pytest.param(_qcow2, id="qcow2", marks=pytest.mark.qemu),
    pytest.param(_raw, id="raw", marks=pytest.mark.qemu),
]
TARGETS: Final = [
    pytest.param(MemoryPlace, id="memory"),
    *FILES,
    pytest.param(_upload, id="upload", marks=pytest.mark.qemu),
]
IN_PLACE: Final = [
    pytest.param(_raw_upload, id="raw-upload", marks=pytest.mark.qemu),
    pytest.param(_device, id="device", marks=pytest.mark.qemu),
]
"""Targets that are written where they stay: T2 can't hold, and T3 is harder."""


@pytest.fixture(params=TARGETS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    make: Callable[[Path], Place] = request.param
    return make(tmp_path)


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> FilePlace:
    make: Callable[[Path], FilePlace] = request.param
    return make(tmp_path)


def written(size_bytes: int, *numbers: int) -> Blocks:
    """What is written into blocks `numbers` of a disk: no two are the same."""
    return {number: content(2 * number + 2, block_length(number, size_bytes)) for number in numbers}


def oracle(size_bytes: int, blocks: Blocks) -> OracleDisk:
    """What a disk holds into which `blocks` were written."""
    disk = OracleDisk(size_bytes)
    for number, data in blocks.items():
        disk.put(number, data)
    return disk


def pieces(positions: Positions, dice: random.Random) -> Iterator[tuple[int, int]]:
    """Any split of the blocks at `positions` into pieces of neighbours: first and behind the last."""
    first = 0
    for end in range(1, len(positions) + 1):
        apart = end == len(positions) or positions[end] != positions[end - 1] + BLOCK_SIZE
        if apart or dice.random() < 0.3:
            yield first, end
            first = end


def write(writer: DiskWriter, size_bytes: int, blocks: Blocks, dice: random.Random | None = None) -> None:
    """Write `blocks` as a restore does, in several threads; with `dice` in any order and any pieces."""
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(3) as workers:
        for window in range(-(-block_count(size_bytes) // TABLE_BLOCKS)):
            numbers = [n for n in sorted(blocks) if n // TABLE_BLOCKS == window]
            positions = writer.place(window, np.array(numbers, np.int64))
            split = list(pieces(positions, dice or random.Random(1)))
            if dice is not None:
                dice.shuffle(split)
            for first, end in split:
                buffers = [blocks[number] for number in numbers[first:end]]
                pending.append(workers.submit(writer.write, int(positions[first]), buffers))
        for future in pending:
            future.result()


def restore(writer: DiskWriter, size_bytes: int, blocks: Blocks, dice: random.Random | None = None) -> OracleDisk:
    """Write `blocks` and finish; what the disk must hold."""
    write(writer, size_bytes, blocks, dice)
    writer.finish()
    return oracle(size_bytes, blocks)


def test_t1_an_existing_file_is_refused_at_once_and_not_touched(file: FilePlace) -> None:
    file.existing()
    with pytest.raises(TargetExists):
        file.writer(SIZE)
    assert file.path.read_bytes() == PRECIOUS
    assert file.names() == [file.path.name]


def test_t1_a_link_that_leads_nowhere_exists_too(file: FilePlace, tmp_path: Path) -> None:
    file.path.parent.mkdir()
    file.path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetExists):
        file.writer(SIZE)
    assert file.path.readlink() == tmp_path / "nowhere"
    assert not (tmp_path / "nowhere").exists()


def test_t1_a_file_that_came_into_being_meanwhile_is_refused_and_not_touched(file: FilePlace) -> None:
    writer = file.writer(SIZE)
    write(writer, SIZE, written(SIZE, 1, 4))
    file.existing()
    with pytest.raises(TargetExists):
        writer.finish()
    writer.abandon()
    assert file.path.read_bytes() == PRECIOUS
    assert file.names() == [file.path.name]


def test_t1_a_file_that_may_be_overwritten_stays_until_finish(file: FilePlace) -> None:
    file.existing()
    writer = file.writer(SIZE, overwrite=True)
    write(writer, SIZE, written(SIZE, 1, 4))
    assert file.path.read_bytes() == PRECIOUS
    writer.finish()
    file.check(oracle(SIZE, written(SIZE, 1, 4)))
    assert file.names() == [file.path.name]


def test_t1_a_file_that_may_be_overwritten_stays_after_abandon(file: FilePlace) -> None:
    file.existing()
    writer = file.writer(SIZE, overwrite=True)
    write(writer, SIZE, written(SIZE, 1, 4))
    writer.abandon()
    assert file.path.read_bytes() == PRECIOUS
    assert file.names() == [file.path.name]


def test_t1_overwriting_a_link_leaves_what_it_leads_to(file: FilePlace, tmp_path: Path) -> None:
    (tmp_path / "linked").write_bytes(PRECIOUS)
    file.path.parent.mkdir()
    file.path.symlink_to(tmp_path / "linked")
    file.check(restore(file.writer(SIZE, overwrite=True), SIZE, written(SIZE, 0)))
    assert not file.path.is_symlink()
    assert (tmp_path / "linked").read_bytes() == PRECIOUS


def test_t1_a_link_under_the_partial_name_is_not_followed(file: FilePlace, tmp_path: Path) -> None:
    (tmp_path / "linked").write_bytes(PRECIOUS)
    file.path.parent.mkdir()
    file.path.with_name(file.path.name + ".partial").symlink_to(tmp_path / "linked")
    with pytest.raises(TargetUnusable):
        file.writer(SIZE)
    assert (tmp_path / "linked").read_bytes() == PRECIOUS


@pytest.mark.parametrize("overwrite", [False, True])
def test_t1_a_second_restore_to_the_same_place_is_refused_and_the_first_is_whole(
    file: FilePlace, *, overwrite: bool
) -> None:
    first = file.writer(SIZE)
    write(first, SIZE, written(SIZE, 0, 1, 4))
    with pytest.raises(TargetUnusable, match="another restore is writing it"):
        file.writer(2 * SIZE, overwrite=overwrite)
    first.finish()
    file.check(oracle(SIZE, written(SIZE, 0, 1, 4)))


def test_t1_a_partial_name_of_a_complete_file_does_not_let_the_next_restore_into_it(file: FilePlace) -> None:
    complete = file.path.with_name("complete")
    complete.parent.mkdir()
    complete.write_bytes(PRECIOUS)
    file.path.with_name(file.path.name + ".partial").hardlink_to(complete)  # a kill between link and unlink
    file.check(restore(file.writer(SIZE), SIZE, written(SIZE, 0, 2)))
    assert complete.read_bytes() == PRECIOUS


def test_t1_the_definition_beside_the_disks_keeps_the_rules_too(tmp_path: Path) -> None:
    path = tmp_path / "web.json"
    (tmp_path / "precious").write_bytes(PRECIOUS)
    path.with_name("web.json.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(TargetUnusable):
        write_text_file(path, "new", vm="web", overwrite=False)
    assert (tmp_path / "precious").read_bytes() == PRECIOUS
    path.with_name("web.json.partial").unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetExists):
        write_text_file(path, "new", vm="web", overwrite=False)
    syncs = syncs_of(lambda: write_text_file(path, "new", vm="web", overwrite=True), path)
    assert path.read_text() == "new"
    assert [s.finished for s in syncs] == [False, True]


def test_t2_a_writer_that_can_not_be_made_leaves_no_file_and_no_lock(tmp_path: Path) -> None:
    place = FilePlace(tmp_path, ImageFormat.RAW)
    for _ in range(2):
        with pytest.raises(TargetUnusable, match="File too large"):
            place.writer(2**47)
        assert place.names() == []


def test_t2_nothing_is_at_the_final_place_before_finish(place: Place) -> None:
    writer = place.writer(SIZE)
    place.check(None)
    write(writer, SIZE, written(SIZE, 0, 2, 4))
    place.check(None)
    writer.finish()
    place.check(oracle(SIZE, written(SIZE, 0, 2, 4)))


@pytest.mark.parametrize("numbers", [(), (0, 2, 4)], ids=["nothing-written", "all-written"])
def test_t2_nothing_is_at_the_final_place_after_abandon_also_twice(place: Place, numbers: tuple[int, ...]) -> None:
    writer = place.writer(SIZE)
    write(writer, SIZE, written(SIZE, *numbers))
    writer.abandon()
    place.check(None)
    writer.abandon()
    place.check(None)


def test_t2_abandon_leaves_no_file_at_all(file: FilePlace) -> None:
    writer = file.writer(SIZE)
    write(writer, SIZE, written(SIZE, 0, 2, 4))
    writer.abandon()
    assert file.names() == []


def test_t2_abandon_of_one_restore_leaves_the_file_of_the_next(file: FilePlace) -> None:
    first = file.writer(SIZE)
    first.abandon()
    second = file.writer(SIZE)
    write(second, SIZE, written(SIZE, 3))
    first.abandon()
    second.finish()
    file.check(oracle(SIZE, written(SIZE, 3)))


def test_t2_abandon_after_finish_leaves_the_finished_file(file: FilePlace) -> None:
    writer = file.writer(SIZE)
    disk = restore(writer, SIZE, written(SIZE, 3))
    writer.abandon()
    file.check(disk)


@pytest.mark.parametrize("size_bytes", [SECTOR, BLOCK_SIZE, SIZE])
def test_t3_a_disk_of_which_nothing_was_written_reads_as_zeros(place: Place, size_bytes: int) -> None:
    place.check(restore(place.writer(size_bytes), size_bytes, {}))


@pytest.mark.parametrize("numbers", [(0,), (4,), (1, 3), (0, 1, 2, 3)], ids=str)
def test_t3_blocks_that_were_not_written_read_as_zeros(place: Place, numbers: tuple[int, ...]) -> None:
    place.check(restore(place.writer(SIZE), SIZE, written(SIZE, *numbers)))


def test_t3_bytes_of_the_overwritten_file_do_not_come_back(file: FilePlace) -> None:
    restore(file.writer(2 * SIZE), 2 * SIZE, written(2 * SIZE, *range(9)))
    file.check(restore(file.writer(SIZE, overwrite=True), SIZE, written(SIZE, 2)))


@st.composite
def disks(draw: st.DrawFn, *, most_blocks: int, edges: tuple[int, ...] = (0,)) -> tuple[int, Blocks]:
    """The size of a disk, often not a multiple of a block, and what is written into any of its blocks."""
    size_bytes = draw(st.integers(1, most_blocks)) * BLOCK_SIZE - draw(st.integers(0, 127)) * SECTOR
    last = block_count(size_bytes) - 1
    likely = st.sampled_from([number for number in (*edges, last) if number <= last])
    numbers = draw(st.sets(likely | st.integers(0, last), max_size=20))
    kinds = {number: draw(st.sampled_from([0, 2 * number + 1, 2 * number + 2])) for number in numbers}
    return size_bytes, {number: content(kind, block_length(number, size_bytes)) for number, kind in kinds.items()}


@contextmanager
def made(make: Callable[[Path], Place]) -> Iterator[Place]:
    """A place for one example."""
    with tempfile.TemporaryDirectory() as directory:
        yield make(Path(directory))


@pytest.mark.parametrize("make", [*TARGETS, *IN_PLACE])
@given(disk=disks(most_blocks=20), dice=st.randoms(use_true_random=False))
def test_t3_any_blocks_written_in_any_order_and_pieces_by_several_threads_read_back(
    make: Callable[[Path], Place], disk: tuple[int, Blocks], dice: random.Random
) -> None:
    with made(make) as place:
        place.check(restore(place.writer(disk[0]), *disk, dice))


@pytest.mark.parametrize("make", [*FILES, TARGETS[-1], IN_PLACE[0]])
@given(disk=disks(most_blocks=2 * TABLE_BLOCKS + 9, edges=EDGES), dice=st.randoms(use_true_random=False))
def test_t3_blocks_at_the_edges_of_windows_read_back_too(
    make: Callable[[Path], Place], disk: tuple[int, Blocks], dice: random.Random
) -> None:
    with made(make) as place:
        place.check(restore(place.writer(disk[0]), *disk, dice))


class BrokenStream(FileStream):
    """A line that breaks after some bytes."""

    def __init__(self, path: Path, offset: int) -> None:
        super().__init__(path, offset)
        self.left = 2 * BLOCK_SIZE

    def send(self, data: bytes) -> None:
        self.left -= len(data)
        if self.left < 0:
            raise TargetUnusable(path="volume", problem="the line broke")
        super().send(data)


@pytest.mark.parametrize("windows", [1, 6])
def test_t2_an_upload_whose_line_breaks_ends_and_leaves_nothing(tmp_path: Path, windows: int) -> None:
    path = tmp_path / "volume"
    path.touch()
    size_bytes = windows * WINDOW_BYTES
    writer = UploadDisk(
        lambda offset: BrokenStream(path, offset), size_bytes, ImageFormat.RAW, scratch=tmp_path, remove=path.unlink
    )
    blocks = written(size_bytes, *(n + k for n in range(0, block_count(size_bytes), TABLE_BLOCKS) for k in range(3)))
    with pytest.raises(TargetUnusable, match="the line broke"):
        restore(writer, size_bytes, blocks)
    writer.abandon()
    assert not path.exists()


def test_a_device_that_is_too_small_is_refused_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(bytes(BLOCK_SIZE))
    with pytest.raises(TargetFull):
        BlockDevice(path, SIZE, remove=path.unlink)
    assert not path.exists()


@pytest.mark.parametrize("count", [63, 64, 65, 130])
def test_t3_one_write_takes_any_number_of_neighbouring_blocks(place: Place, count: int) -> None:
    size_bytes = count * BLOCK_SIZE - 3 * SECTOR
    blocks = written(size_bytes, *range(count))
    writer = place.writer(size_bytes)
    positions = writer.place(0, np.arange(count, dtype=np.int64))
    writer.write(int(positions[0]), list(blocks.values()))
    writer.finish()
    place.check(oracle(size_bytes, blocks))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """A moment at which the kernel is asked to put something on the disk."""

    finished: bool
    """The file has its final name by now."""
    open_paths: frozenset[Path]


def open_paths() -> frozenset[Path]:
    """What this process has open."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, not paths
        with suppress(FileNotFoundError):  # the descriptor by which the folder itself was read
            found.add(Path(f"/proc/self/fd/{fd}").readlink())
    return frozenset(found)


def syncs_of(call: Callable[[], None], path: Path) -> list[Sync]:
    """The fsyncs that `call` makes in this thread, as the interpreter tells them to a profiler.

    A profiler is not told which descriptor it was: so all that are open are noted.
    """
    seen: list[Sync] = []

    def watch(_frame: FrameType, event: str, called: object) -> None:
        if event == "c_call" and called in {os.fsync, os.fdatasync}:
            seen.append(Sync(finished=path.exists(), open_paths=open_paths()))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return seen


def test_t4_finish_syncs_the_file_before_it_has_its_name_and_the_folder_after(file: FilePlace) -> None:
    writer = file.writer(SIZE)
    write(writer, SIZE, written(SIZE, 1, 4))
    syncs = syncs_of(writer.finish, file.path)
    partial = file.path.with_name(file.path.name + ".partial")
    assert [s for s in syncs if not s.finished and partial in s.open_paths]
    assert [s for s in syncs if s.finished and file.path.parent in s.open_paths]


def test_t4_the_folders_that_are_made_have_their_names_synced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "root.raw"
    made: list[ImageDisk] = []
    syncs = syncs_of(lambda: made.append(ImageDisk(path, SIZE, ImageFormat.RAW, vm="web", overwrite=False)), path)
    made[0].abandon()
    assert [s for s in syncs if tmp_path in s.open_paths]
    assert [s for s in syncs if tmp_path / "a" in s.open_paths]


WRITER: Final = """
import sys
from pathlib import Path
import numpy as np
from drsync.target.image import ImageDisk, ImageFormat

path, image_format, last_step = sys.argv[1:]
disk = ImageDisk(Path(path), 5 * 65536 - 512, ImageFormat(image_format), vm="web", overwrite=False)
for at, byte, length in zip(disk.place(0, np.array([1, 2, 4])), (b"1", b"2", b"4"), (65536, 65536, 65024)):
    disk.write(int(at), [byte * length])
if last_step == "finish":
    disk.finish()
print("done", flush=True)
sys.stdin.read()
"""


def kill_writer(file: FilePlace, last_step: str) -> OracleDisk:
    """Kill a process with SIGKILL right after its last step; what it wrote."""
    command = [sys.executable, "-c", WRITER, str(file.path), file.format, last_step]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        process.kill()
    return oracle(SIZE, {1: b"1" * BLOCK_SIZE, 2: b"2" * BLOCK_SIZE, 4: b"4" * (BLOCK_SIZE - SECTOR)})


def test_t4_a_process_killed_right_after_finish_leaves_the_whole_disk(file: FilePlace) -> None:
    file.check(kill_writer(file, "finish"))
    assert file.names() == [file.path.name]


def test_t2_a_killed_restore_leaves_nothing_at_the_final_place_and_t3_nothing_in_the_next_one(file: FilePlace) -> None:
    kill_writer(file, "write")
    file.check(None)
    assert file.names() == [f"{file.path.name}.partial"], "the writer was not killed in the middle: this proves nothing"
    file.check(restore(file.writer(SIZE), SIZE, written(SIZE, 3)))
    assert file.names() == [file.path.name]
