"""examples/recover.py brings back what `drsync restore` does, by the rules of docs/format.md alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Cli
from storage_daemon import StorageDaemon

pytestmark = pytest.mark.qemu

SCRIPT = Path(__file__).parents[2] / "examples" / "recover.py"


def recover(cli: Cli, disk: str, output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    where = ["--key", str(cli.key_file), *words, str(cli.repository), "web", disk, str(output)]
    return subprocess.run([sys.executable, str(SCRIPT), *where], capture_output=True, text=True, check=False)


def test_every_point_is_the_same(cli: Cli, vm: StorageDaemon, tmp_path: Path) -> None:
    expected = []
    for step, words in enumerate(
        [["write -P 1 0 1M"], ["write -P 2 64k 64k", "write -z 0 64k"], ["discard 128k 256k"]]
    ):
        vm.io("root", *words)
        vm.io("data", f"write -P {step + 7} 512k 64k")
        expected.append({name: vm.read(name) for name in ("root", "data")})
        cli.ok("capture", "web")
    for number, contents in enumerate(expected, 1):
        for name, content in contents.items():
            output = tmp_path / f"{number}-{name}"
            done = recover(cli, f"d-{name}", output, "--point", str(number))
            assert done.returncode == 0, done.stderr
            assert output.read_bytes() == content


def test_damage_is_refused_and_leaves_no_file(cli: Cli, vm: StorageDaemon, tmp_path: Path) -> None:
    vm.io("root", "write -P 1 0 1M")
    cli.ok("capture", "web")
    (segment,) = (cli.repository / "vm" / "web" / "log").iterdir()
    content = bytearray(segment.read_bytes())
    content[len(content) // 4] ^= 1
    segment.write_bytes(content)
    output = tmp_path / "disk"
    done = recover(cli, "d-root", output)
    assert done.returncode != 0
    assert re.search(r"vm/web/log/0+1", done.stderr)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("disk")]
