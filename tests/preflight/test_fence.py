"""The fence: what is inside has nothing, and whatever it does ends in time, with what it had found."""

import os
import struct
import time
from pathlib import Path

import pytest
from guest_disks import DebianGuest, FileSource, initramfs, make_disk, make_ext4, make_fat, make_xfs, pe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drsync.errors import ObjectDamaged
from drsync.preflight.facts import Facts
from drsync.preflight.fence import Limits, look_inside
from drsync.preflight.findings import Verdict
from drsync.preflight.machine import Machine
from drsync.preflight.report import judge
from drsync.units import KiB, MiB

SHORT = Limits(time_s=25.0, cpu_s=4, memory_bytes=768 * MiB)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Debian on one partition."""
    place = tmp_path_factory.mktemp("system")
    guest = DebianGuest(initramfs=initramfs(place / "initramfs", ["nvme/host/nvme"]))
    root = make_ext4(place / "root.img", 24 * MiB, guest.files())
    return make_disk(place / "disk.raw", 32 * MiB, "label: dos\nstart=2048, type=83, bootable\n", {MiB: root})


class Watching(FileSource):
    """A disk that looks at who asks for it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seen: dict[str, str] = {}

    def read(self, offset: int, length: int) -> bytes:
        children = Path("/proc/self/task").joinpath(str(os.getpid()), "children").read_text().split()
        (child,) = [c for c in children if "drsync.preflight.inside" in Path("/proc", c, "cmdline").read_text()]
        for name in ("status", "limits", "environ", "cmdline"):
            self.seen[name] = Path("/proc", child, name).read_text()
        self.seen["files"] = "\n".join(str(p.readlink()) for p in Path("/proc", child, "fd").iterdir())
        return super().read(offset, length)


def test_the_process_inside_has_nothing(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very secret")
    disk = Watching(system)
    facts = look_inside([disk])
    assert facts.complete
    assert "secret" not in disk.seen["environ"].lower()
    assert str(system) not in disk.seen["cmdline"] + disk.seen["files"]
    limits = {" ".join(line.split()[:-3]): line.split()[-3] for line in disk.seen["limits"].splitlines()[1:]}
    assert limits["Max file size"] == limits["Max core file size"] == "0"
    assert limits["Max cpu time"] == "240"
    assert "Max address space 1610612736" in " ".join(disk.seen["limits"].split())
    if os.geteuid() == 0:
        assert "Uid:\t65534\t65534\t65534\t65534" in disk.seen["status"]
        assert "Groups:\t \n" in disk.seen["status"]


class Stuck(FileSource):
    """A disk whose later requests are answered when it is too late."""

    def __init__(self, path: Path, until_s: float) -> None:
        super().__init__(path)
        self._until_s = until_s

    def read(self, offset: int, length: int) -> bytes:
        if self.read_bytes > 200 * KiB:
            time.sleep(max(0.0, self._until_s - time.monotonic()))
        return super().read(offset, length)


def test_it_is_killed_when_its_time_is_over_and_what_it_found_counts(system: Path) -> None:
    facts = look_inside([Stuck(system, time.monotonic() + 7)], limits=Limits(time_s=6.0))
    assert not facts.complete
    assert [d.name for d in facts.disks] == ["vda"]
    assert any("longer than 6 s" in p for p in facts.problems)


def test_more_than_the_limit_is_not_served(system: Path) -> None:
    disk = FileSource(system)
    facts = look_inside([disk], limits=Limits(read_bytes=300 * KiB))
    assert disk.read_bytes <= 300 * KiB
    assert not facts.complete
    assert any("more than 307200 bytes" in p for p in facts.problems)
    findings = judge(Machine(disks={"vda": disk.size_bytes}), facts)
    assert any(f.check == "reading" and f.verdict is Verdict.UNKNOWN for f in findings)


def test_a_process_without_memory_is_told(system: Path) -> None:
    facts = look_inside([FileSource(system)], limits=Limits(memory_bytes=MiB))
    assert not facts.complete
    assert facts.problems


class Failing(FileSource):
    def read(self, offset: int, length: int) -> bytes:
        raise ObjectDamaged(key="vm/web/pack/1", problem="it does not authenticate")


def test_what_the_repository_does_not_give_is_raised(system: Path) -> None:
    with pytest.raises(ObjectDamaged, match="vm/web/pack/1"):
        look_inside([Failing(system)])


def test_without_the_libraries_the_rest_is_told(system: Path) -> None:
    facts = look_inside([FileSource(system)], reader="none")
    assert facts.complete
    assert (facts.reader, len(facts.volumes), facts.linux) == ("", 1, ())
    findings = judge(Machine(disks={"vda": 32 * MiB}), facts)
    (reading,) = [f for f in findings if f.check == "reading"]
    assert reading.verdict is Verdict.UNKNOWN
    assert "drsync[preflight]" in reading.action


def test_a_directory_whose_clusters_go_round_in_a_circle_ends(tmp_path: Path) -> None:
    image = make_fat(tmp_path / "esp.img", 34 * MiB, {"/EFI/BOOT/BOOTX64.EFI": pe()})
    with image.open("r+b") as file:
        head = file.read(512)
        reserved, sectors = struct.unpack_from("<H", head, 14)[0], struct.unpack_from("<H", head, 22)[0]
        for table in (reserved, reserved + sectors):
            file.seek(table * 512 + 4)  # cluster 2, FAT16
            file.write(struct.pack("<H", 2))
    started_s = time.monotonic()
    facts = look_inside([FileSource(image)], limits=Limits(cpu_s=3, memory_bytes=512 * MiB, time_s=20))
    assert time.monotonic() - started_s < 20
    assert [v.kind for v in facts.volumes] == ["vfat"], "what was found before is kept"
    assert facts.problems


def test_what_a_guest_writes_can_not_move_a_terminals_cursor(tmp_path: Path) -> None:
    guest = DebianGuest(initramfs=b"")
    guest.fstab = "/dev/vda1\x1b[2J / ext4 defaults\n"
    guest.more["/usr/lib/os-release"] = 'ID=debian\nPRETTY_NAME="\x1b]0;x\x07\u202eevil"\n'
    facts = look_inside([FileSource(make_ext4(tmp_path / "r.img", 24 * MiB, guest.files()))])
    text = str(facts) + str(judge(Machine(disks={"vda": 1}), facts))
    assert text.isprintable()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, system: Path) -> dict[str, bytes]:
    """What bytes are flipped in: the first MiB of each, where metadata is."""
    place = tmp_path_factory.mktemp("images")
    guest = DebianGuest(initramfs=b"x")
    return {
        "ext4": system.read_bytes(),
        "vfat": make_fat(place / "fat.img", 34 * MiB, {"/EFI/BOOT/BOOTX64.EFI": pe()}).read_bytes(),
        "xfs": make_xfs(place / "xfs.img", 300 * MiB, guest.files()).read_bytes()[: 8 * MiB],
    }


class Flipped:
    """An image with some bytes changed."""

    def __init__(self, image: bytes, flips: dict[int, int]) -> None:
        self.name, self.size_bytes = "vda", len(image)
        self._image, self._flips = image, flips

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(self._image[offset : offset + length])
        for at, change in self._flips.items():
            if offset <= at < offset + len(data):
                data[at - offset] ^= change
        return bytes(data)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(["ext4", "vfat", "xfs"]),
    flips=st.dictionaries(st.integers(0, 4 * MiB), st.integers(1, 255), min_size=1, max_size=400),
)
def test_flipped_bytes_break_nothing(images: dict[str, bytes], kind: str, flips: dict[int, int]) -> None:
    started_s = time.monotonic()
    facts = look_inside([Flipped(images[kind], flips)], limits=SHORT)
    assert time.monotonic() - started_s < SHORT.time_s + 5
    assert isinstance(facts, Facts)
    findings = judge(Machine(disks={"vda": len(images[kind])}), facts)
    assert findings
    assert facts.complete or any(f.verdict is Verdict.UNKNOWN for f in findings)
