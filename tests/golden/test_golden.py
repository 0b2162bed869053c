"""Repositories that released formats left behind: every point restores, today and in every later release.

Each folder `format-N` was made once by make.py. A test that fails here has found that
users' repositories can't be read any more: the folder is right, drsync is wrong.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from command_line import Cli, Done
from figures import compared, count

FOLDERS: Final = sorted(Path(__file__).parent.glob("format-*"))
RECOVER: Final = Path(__file__).parents[2] / "examples" / "recover.py"

Content = Mapping[str, Any]
"""Size and SHA-256 of what a disk holds."""


@dataclass(frozen=True, slots=True)
class Golden:
    """One released repository, as it is in git."""

    folder: Path

    @property
    def expected(self) -> dict[int, dict[str, Content]]:
        """What each disk of each point holds."""
        found = json.loads((self.folder / "expected.json").read_text())
        return {int(point): disks for point, disks in found["points"].items()}

    @property
    def vm(self) -> str:
        return str(json.loads((self.folder / "expected.json").read_text())["vm"])

    @property
    def recovery_key(self) -> str:
        return (self.folder / "recovery-key").read_text()

    def objects(self) -> list[str]:
        repository = self.folder / "repository"
        return sorted(str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file())

    @property
    def is_pruned(self) -> bool:
        return self.folder.name.endswith("-pruned")

    def sealed_objects(self) -> list[str]:
        """Segments, merged ones too, packs, and the horizon in force; older ones are just there."""
        horizons = [name for name in self.objects() if "/horizon/" in name]
        return [name for name in self.objects() if name.startswith("vm/") and name not in horizons[:-1]]


GOLDEN: Final = [Golden(folder) for folder in FOLDERS]
EVERY: Final = pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.folder.name)
FIRST: Final = pytest.mark.parametrize("golden", GOLDEN[:1], ids=lambda golden: golden.folder.name)
"""For what is the same in all of them."""


def each(names: str) -> pytest.MarkDecorator:
    """For each object of each repository; `names` is the method that lists them."""
    found = [
        pytest.param(golden, name, id=f"{golden.folder.name}-{name}")
        for golden in GOLDEN
        for name in getattr(golden, names)()
    ]
    return pytest.mark.parametrize(("golden", "name"), found)


def host_of(golden: Golden, place: Path) -> Cli:
    """A new host that has a copy of the repository, but no key yet."""
    place.mkdir()
    cli = Cli(place)
    shutil.copytree(golden.folder / "repository", cli.repository)
    return cli


def use_key_file(cli: Cli, golden: Golden) -> None:
    shutil.copyfile(golden.folder / "key", cli.key_file)
    cli.key_file.chmod(0o600)  # git keeps no such modes


def use_recovery_key(cli: Cli, golden: Golden) -> None:
    cli.ok("key", "recover", stdin=golden.recovery_key)
    assert cli.key_file.read_bytes() == (golden.folder / "key").read_bytes()


@pytest.fixture
def cli(golden: Golden, tmp_path: Path) -> Cli:
    """A new host that has a copy of the repository and its key file."""
    cli = host_of(golden, tmp_path / "host")
    use_key_file(cli, golden)
    return cli


def content_of(path: Path) -> Content:
    return {"size_bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def disks_in(output: Path) -> dict[str, Content]:
    """What a restore left that looks finished."""
    return {path.stem: content_of(path) for path in sorted(output.glob("*.raw"))}


def size_of(disks: Mapping[str, Content]) -> int:
    return sum(disk["size_bytes"] for disk in disks.values())


def restore(cli: Cli, golden: Golden, output: Path, *words: str) -> Done:
    where = ["--to", "image", "--output", str(output), "--format", "raw"]
    return cli.run("restore", golden.vm, *where, *words)


def recover(cli: Cli, golden: Golden, key: Path, disk: str, output: Path, *words: str) -> "subprocess.Popen[str]":
    """Start recover.py."""
    where = ["--key", str(key), *words, str(cli.repository), golden.vm, disk, str(output)]
    return subprocess.Popen([sys.executable, str(RECOVER), *where], stderr=subprocess.PIPE, text=True)


def test_there_is_a_repository_of_every_released_format() -> None:
    from drsync.format import FORMAT_VERSION

    released = [f"format-{n}" for n in range(1, FORMAT_VERSION + 1)]
    folders = [*released, "format-1-keys", "format-1-pruned", "format-1-seeded"]
    assert [folder.name for folder in FOLDERS] == sorted(folders)


def test_the_seeded_one_has_packs_of_several_rounds() -> None:
    from drsync.keyfile import read_key_file
    from drsync.log import Log
    from drsync.repository import open_repository
    from drsync.store.directory import DirectoryStore

    folder = Path(__file__).parent / "format-1-seeded"
    store = DirectoryStore((folder / "repository").absolute())
    (Path(folder) / "key").chmod(0o600)
    repository = open_repository(store, read_key_file(folder / "key"), folder / "key")
    log = Log(repository.vm("web"))
    assert [len(log.read(seq).meta.rounds) for seq in (1, 2, 3)] == [3, 0, 2]


def test_the_pruned_one_has_holes_of_every_kind() -> None:
    from drsync.keyfile import read_key_file
    from drsync.log import Log
    from drsync.repository import open_repository
    from drsync.store.directory import DirectoryStore

    folder = Path(__file__).parent / "format-1-pruned"
    (folder / "key").chmod(0o600)
    store = DirectoryStore((folder / "repository").absolute())
    log = Log(open_repository(store, read_key_file(folder / "key"), folder / "key").vm("web"))
    horizon = log.horizon()
    merged = [log.read_merged(hole) for hole in horizon.merged()]
    assert horizon.number == 2
    assert any(segment.first < segment.seq for segment in merged)
    assert any(len(segment.meta.rounds) > 1 for segment in merged)
    assert any(segment.rows for segment in merged), "zeros that were told"
    kept = [seq for seq, _ in log.listed() if horizon.is_dropped(seq)]
    assert any(log.read(seq).meta.point is not None for seq in kept), "a dropped point's segment that is mostly alive"


def test_the_rotated_one_has_objects_under_several_keys() -> None:
    from drsync.keyfile import read_key_file
    from drsync.log import Log
    from drsync.repository import open_repository
    from drsync.store.directory import DirectoryStore

    folder = Path(__file__).parent / "format-1-keys"
    store = DirectoryStore((folder / "repository").absolute())
    (folder / "key").chmod(0o600)
    repository = open_repository(store, read_key_file(folder / "key"), folder / "key")
    log = Log(repository.vm("web"))
    assert [log.read(seq).generation for seq in (1, 2, 3, 4, 5)] == [1, 2, 2, 3, 3]


def test_a_host_with_the_keys_of_one_vm_restores_the_rotated_one(tmp_path: Path) -> None:
    golden = next(one for one in GOLDEN if one.folder.name == "format-1-keys")
    cli = host_of(golden, tmp_path / "host")
    use_key_file(cli, golden)
    cli.ok("key", "export", "web", "--output", str(tmp_path / "web.key"))
    (tmp_path / "web.key").replace(cli.key_file)
    newest = max(golden.expected)
    assert restore(cli, golden, tmp_path / "out").code == 0
    assert disks_in(tmp_path / "out") == golden.expected[newest]
    process = recover(cli, golden, cli.key_file, "root", tmp_path / "root")
    assert process.communicate(timeout=60)[1] == ""
    assert content_of(tmp_path / "root") == golden.expected[newest]["root"]
    process = recover(cli, golden, golden.folder / "recovery-key", "root", tmp_path / "first", "--point", "1")
    assert process.communicate(timeout=60)[1] == ""


def test_recover_py_refuses_what_opens_nothing(tmp_path: Path) -> None:
    golden = next(one for one in GOLDEN if one.folder.name == "format-1-keys")
    cli = host_of(golden, tmp_path / "host")
    key = tmp_path / "given"
    right = (golden.folder / "passphrase").read_text()
    recovery = golden.recovery_key.strip()
    roots = (golden.folder / "key").read_text().splitlines(keepends=True)
    for given, problem in [
        (right.upper(), "none of its slots takes this key or passphrase"),
        (recovery[:-1] + ("A" if recovery[-1] != "A" else "B"), "typing error"),
        (roots[0], "it is under the key of generation 3; what was given has 1"),
        (f"drsync-host-key:{'0' * 32}\n", "it is not this repository's"),
        ("drsync-root-key:" + "0" * 64, "it is not this repository's"),
    ]:
        key.write_text(given)
        process = recover(cli, golden, key, "root", tmp_path / "out")
        complaint = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert problem in complaint
        assert not (tmp_path / "out").exists()


@EVERY
def test_it_has_all_that_the_format_has(golden: Golden, cli: Cli) -> None:
    points = cli.ok("points", golden.vm, "--json").json
    disks = [disk for point in points for disk in point["disks"]]
    assert {disk["kind"] for disk in disks} == {"full", "incremental", "resync"}
    assert len({disk["name"] for disk in disks}) == 2
    assert any(disk["size_bytes"] % 65536 for disk in disks)
    numbers = [point["point"] for point in points]
    assert numbers == sorted(golden.expected)
    segments = len(list((cli.repository / "vm" / golden.vm / "log").iterdir()))
    assert golden.is_pruned or segments == len(numbers) + 1, "a fence is in between"
    assert {point["epoch"] for point in points} == {1, 2}
    assert list((cli.repository / "host").iterdir())
    assert len(list((cli.repository / "vm" / golden.vm / "pack").iterdir())) > 1


@EVERY
@pytest.mark.parametrize("use_key", [use_key_file, use_recovery_key])
def test_restore_brings_every_point_back(golden: Golden, use_key: Any, tmp_path: Path) -> None:
    cli = host_of(golden, tmp_path / "host")
    use_key(cli, golden)
    for point, expected in golden.expected.items():
        output = tmp_path / str(point)
        done = restore(cli, golden, output, "--point", str(point))
        assert done.code == 0, done
        assert disks_in(output) == expected, f"point {point}"
        compared(size_of(expected))
    assert restore(cli, golden, tmp_path / "newest").code == 0
    assert disks_in(tmp_path / "newest") == golden.expected[max(golden.expected)]


@EVERY
@pytest.mark.parametrize("key", ["key", "recovery-key", "passphrase"])
def test_recover_py_brings_every_point_back(golden: Golden, key: str, cli: Cli, tmp_path: Path) -> None:
    if key == "passphrase" and not (golden.folder / key).exists():
        return  # it has no slot for one
    points = sorted(golden.expected)[-1 if key == "passphrase" else 0 :]
    for point in points:
        expected = golden.expected[point]
        outputs = {disk: tmp_path / f"{point}-{disk}" for disk in expected}
        running = [
            recover(cli, golden, golden.folder / key, disk, output, "--point", str(point))
            for disk, output in outputs.items()
        ]
        for process in running:
            _, complaint = process.communicate(timeout=60)
            assert process.returncode == 0, complaint
        assert {disk: content_of(output) for disk, output in outputs.items()} == expected, f"point {point}"
        compared(size_of(expected))


@EVERY
def test_verify_finds_nothing_wrong(golden: Golden, cli: Cli) -> None:
    (report,) = cli.ok("verify", "--read-data", "--json").json
    assert (report["vm"], report["points"], report["problems"]) == (golden.vm, len(golden.expected), [])
    assert report["objects"] == len(golden.sealed_objects())


def damage(path: Path, at: int) -> None:
    """Change one bit."""
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def places(path: Path) -> list[int]:
    """Bytes of a segment or pack in its magic, frames, header and index, and footer."""
    size = path.stat().st_size
    return [0, 8, size // 4, size // 2, size - 70, size - 30, size - 1]


@each("sealed_objects")
def test_verify_notices_a_changed_byte_anywhere_in_a_segment_or_pack(golden: Golden, name: str, cli: Cli) -> None:
    path = cli.repository / name
    for at in places(path):
        damage(path, at)
        done = cli.run("verify", "--read-data", "--json")
        damage(path, at)
        assert done.code in {40, 41}, f"byte {at} of {name}: {done}"
        count("bad inputs refused")
        assert any(name in problem["message"] for problem in done.json[0]["problems"]), f"byte {at}: {done}"
    cli.ok("verify", "--read-data")


def hurt_from(cli: Cli) -> int:
    """The first point that is hurt, as verify says."""
    return int(min(problem["point"] for problem in cli.run("verify", "--read-data", "--json").json[0]["problems"]))


def check_unharmed_or_refused(done: Done, output: Path, expected: Mapping[str, Content]) -> None:
    """Fail if anything that looks finished is not what it should be, or is missing without a word."""
    found = disks_in(output)
    assert found.items() <= expected.items()
    assert done.code or found == expected


@each("sealed_objects")
def test_a_changed_segment_or_pack_is_refused_where_it_is_needed_and_never_restores_wrong(
    golden: Golden, name: str, cli: Cli, tmp_path: Path
) -> None:
    path = cli.repository / name
    damage(path, path.stat().st_size // 2)
    (report,) = cli.run("verify", "--read-data", "--json").json
    assert report["problems"]
    codes = {}
    for point, expected in golden.expected.items():
        done = restore(cli, golden, tmp_path / str(point), "--point", str(point))
        check_unharmed_or_refused(done, tmp_path / str(point), expected)
        codes[point] = done.code
    hurt = {point["point"] for point in report["hurt"]}
    assert {point for point, code in codes.items() if code} == hurt & codes.keys(), "verify says exactly which"
    assert {code for code in codes.values() if code} <= {40, 41, 94}


@each("sealed_objects")
def test_recover_py_refuses_a_changed_segment_or_pack_at_the_point_that_it_hurts(
    golden: Golden, name: str, cli: Cli, tmp_path: Path
) -> None:
    path = cli.repository / name
    damage(path, path.stat().st_size // 2)
    first = hurt_from(cli)
    point = min(point for point in golden.expected if point >= first)
    outputs = {disk: tmp_path / f"{disk}.raw" for disk in golden.expected[point]}
    running = [
        recover(cli, golden, cli.key_file, disk, output, "--point", str(point)) for disk, output in outputs.items()
    ]
    complaints = [process.communicate(timeout=60)[1] for process in running]
    refused = any(name in complaint for complaint in complaints)
    assert refused or disks_in(tmp_path) == golden.expected[point], complaints  # F52: it may not be needed
    assert disks_in(tmp_path).items() <= golden.expected[point].items()
    assert not list(tmp_path.glob("*.partial"))


@FIRST
def test_a_changed_byte_of_repo_json_never_restores_wrong(golden: Golden, cli: Cli, tmp_path: Path) -> None:
    path = cli.repository / "repo.json"
    newest = golden.expected[max(golden.expected)]
    refused = 0
    for at in range(path.stat().st_size):
        damage(path, at)
        output = tmp_path / str(at)
        done = restore(cli, golden, output)
        damage(path, at)
        check_unharmed_or_refused(done, output, newest)
        refused += done.code != 0
    assert refused > 64, "64 digits are of the id and the key's check"


@EVERY
def test_a_changed_byte_of_the_recovery_slot_never_gives_another_key(golden: Golden, tmp_path: Path) -> None:
    cli = host_of(golden, tmp_path / "host")
    path = sorted((cli.repository / "keys").iterdir())[-1]  # the slot of old, or the newest key ring
    right = (golden.folder / "key").read_bytes()
    refused = 0
    for at in range(0, size := path.stat().st_size, 1 + size // 200):
        damage(path, at)
        done = cli.run("key", "recover", stdin=golden.recovery_key)
        damage(path, at)
        assert cli.key_file.exists() == (done.code == 0)
        if cli.key_file.exists():
            assert cli.key_file.read_bytes() == right
            cli.key_file.unlink()
        refused += done.code != 0
    assert refused > 64


@FIRST
def test_f21_a_changed_byte_of_the_heartbeat_never_restores_wrong(golden: Golden, cli: Cli, tmp_path: Path) -> None:
    (path,) = (cli.repository / "host").iterdir()
    newest = golden.expected[max(golden.expected)]
    for at in range(0, path.stat().st_size, 3):
        damage(path, at)
        output = tmp_path / str(at)
        check_unharmed_or_refused(restore(cli, golden, output), output, newest)
        damage(path, at)


@EVERY
def test_f16_without_its_newest_point_it_is_refused(golden: Golden, cli: Cli, tmp_path: Path) -> None:
    newest = max(golden.expected)
    (cli.repository / f"vm/{golden.vm}/log/{newest:016x}").unlink()
    assert restore(cli, golden, tmp_path / "out").code == 42
    assert not (tmp_path / "out").exists()
