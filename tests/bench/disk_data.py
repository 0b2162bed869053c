"""The data: a disk with a file system of real files, and the 256 MiB that change on it."""

import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.measuring import GIB, MIB

DISK_BYTES = 16 * GIB
CHANGED_BYTES = 256 * MIB
_SEED = 1
_HALF_PAGE = 2048


def real_files(work: Path, size_gib: int) -> Path:
    """A raw disk with an ext4 file system of this machine's files; made once."""
    disk = work / f"files-{size_gib}.raw"
    if disk.exists():
        return disk
    tree = work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    _copy_files(tree, int(size_gib * GIB * 0.95))
    partial = disk.with_suffix(".partial")
    with partial.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-d", str(tree), str(partial)], check=True)
    shutil.rmtree(tree)
    return partial.rename(disk)


def _copy_files(tree: Path, limit_bytes: int) -> None:
    copied = 0
    for source in (Path("/usr/lib"), Path("/usr/share"), Path("/usr/bin")):
        for path in sorted(source.rglob("*")):
            if path.is_file() and not path.is_symlink() and copied < limit_bytes:
                target = tree / path.relative_to("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                copied += path.stat().st_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """1 MiB that is written to the disk."""

    path: Path
    offset: int

    @property
    def command(self) -> str:
        """The qemu-io command that writes it."""
        return f"write -q -s {self.path} {self.offset} {MIB}"


def make_changes(directory: Path) -> list[Piece]:
    """The 256 pieces of a change, their bytes in files: the same places and the same bytes every time.

    Every page is half random, half code: about half of it compresses away, and
    nothing of it repeats, so no tool gains by finding a piece again.
    """
    directory.mkdir()
    generator = random.Random(_SEED)
    code = Path(sys.executable).read_bytes()
    places = generator.sample(range(DISK_BYTES // MIB), CHANGED_BYTES // MIB)
    pieces = [Piece(path=directory / f"{n:03}", offset=place * MIB) for n, place in enumerate(places)]
    for piece in pieces:
        starts = (generator.randrange(len(code) - _HALF_PAGE) for _ in range(MIB // _HALF_PAGE // 2))
        content = b"".join(generator.randbytes(_HALF_PAGE) + code[start : start + _HALF_PAGE] for start in starts)
        piece.path.write_bytes(content)
    return pieces


def copy_raw(source: Path, target: Path) -> None:
    """A copy of a raw disk, as sparse as the source."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", str(source), str(target)], check=True)


def write_raw(raw: Path, pieces: list[Piece]) -> None:
    """Write the changes to a raw disk."""
    with raw.open("r+b") as disk:
        for piece in pieces:
            disk.seek(piece.offset)
            disk.write(piece.path.read_bytes())


def to_qcow2(raw: Path, target: Path) -> None:
    """A qcow2 image of a raw disk."""
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(target)], check=True)


def holds(image: Path, image_format: str, disk: Path, disk_format: str = "raw") -> bool:
    """Whether an image holds what the disk does."""
    command = ["qemu-img", "compare", "-q", "-f", disk_format, "-F", image_format, str(disk), str(image)]
    return subprocess.run(command, check=False).returncode == 0
