"""`init` and `key recover`: the repository's key comes into being once, and comes back from paper."""

import os
import pty
import re
import select
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import Cli

from drsync.cli.unlocking import NOTHING_GIVEN

KEY = r"(?:[A-Z2-7]{4}-){13}[A-Z2-7]{4}"


def files_below(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_init_makes_repository_and_key_and_prints_the_recovery_key_once(cli: Cli) -> None:
    done = cli.ok("init")
    (recovery,) = re.findall(KEY, done.stdout)
    assert done.stderr == ""
    assert stat.S_IMODE(cli.key_file.stat().st_mode) == 0o600
    assert (cli.repository / "repo.json").exists()
    assert all(recovery.encode() not in content for content in files_below(cli.place).values())
    cli.ok("status")


def test_init_as_json_has_the_recovery_key_in_its_document(cli: Cli) -> None:
    document = cli.ok("init", "--json").json
    assert set(document) == {"repository", "repository_id", "key_file", "recovery_key"}
    assert document["repository"] == f"file://{cli.repository}"
    assert document["key_file"] == str(cli.key_file)
    assert re.fullmatch(KEY, document["recovery_key"])


def test_init_refuses_a_repository_that_exists_and_changes_nothing(cli: Cli) -> None:
    cli.ok("init")
    before = files_below(cli.place)
    error, remedy = cli.refused(21, "init")
    assert error == f"a repository exists at file://{cli.repository} already"
    assert remedy.startswith("drsync key recover")
    cli.key_file.rename(cli.place / "key.old")
    cli.refused(21, "init")
    (cli.place / "key.old").rename(cli.key_file)
    assert files_below(cli.place) == before


def test_init_refuses_a_key_file_that_exists_and_makes_no_repository(cli: Cli) -> None:
    cli.key_file.write_text("precious")
    error, _ = cli.refused(25, "init")
    assert error == f"a key file exists at {cli.key_file} already"
    assert cli.key_file.read_text() == "precious"
    assert not (cli.repository / "repo.json").exists()


def test_a_key_that_others_can_read_is_refused(cli: Cli) -> None:
    cli.ok("init")
    cli.key_file.chmod(0o640)
    error, remedy = cli.refused(26, "status")
    assert "others can read it" in error
    assert remedy == f"chmod 600 {cli.key_file}"


def test_a_key_of_another_repository_is_refused(cli: Cli, tmp_path: Path) -> None:
    cli.ok("init")
    (tmp_path / "other").mkdir()
    other = Cli(tmp_path / "other")
    other.ok("init")
    other.key_file.replace(cli.key_file)
    error, _ = cli.refused(23, "status")
    assert error == f"the key in {cli.key_file} does not open the repository at file://{cli.repository}"


def recovery_key_of(cli: Cli) -> str:
    return str(cli.ok("init", "--json").json["recovery_key"])


@pytest.mark.parametrize("typed", ["{}", "{}\n", " {} \n"], ids=repr)
def test_the_recovery_key_from_stdin_writes_the_same_key_file_again(typed: str, cli: Cli) -> None:
    recovery = recovery_key_of(cli)
    before = cli.key_file.read_bytes()
    cli.key_file.unlink()
    cli.refused(24, "status")
    cli.ok("key", "recover", stdin=typed.format(recovery))
    assert cli.key_file.read_bytes() == before
    assert stat.S_IMODE(cli.key_file.stat().st_mode) == 0o600
    cli.ok("status")


def test_case_and_dashes_do_not_matter(cli: Cli) -> None:
    recovery = recovery_key_of(cli)
    cli.key_file.unlink()
    document = cli.ok("key", "recover", "--json", stdin=recovery.lower().replace("-", " ")).json
    assert document == {"repository": f"file://{cli.repository}", "key_file": str(cli.key_file), "generation": 1}


def test_a_typing_error_is_told_from_a_wrong_key_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    recovery = recovery_key_of(cli)
    cli.key_file.unlink()
    (tmp_path / "other").mkdir()
    foreign = recovery_key_of(Cli(tmp_path / "other"))
    swapped = recovery[:10] + ("A" if recovery[10] != "A" else "B") + recovery[11:]
    for typed, problem in [
        (swapped, "its check digits do not match: there is a typing error"),
        (recovery[:-5], "can be used, a recovery key has 56"),
        ("", NOTHING_GIVEN),
        ("\n", NOTHING_GIVEN),
        (foreign, "it is another repository's"),
    ]:
        error, _ = cli.refused(27, "key", "recover", stdin=typed)
        assert error.endswith(problem)
        assert not typed.strip() or typed not in error
    assert not cli.key_file.exists()


def test_a_key_file_that_exists_is_never_replaced(cli: Cli) -> None:
    recovery = recovery_key_of(cli)
    before = cli.key_file.read_bytes()
    _, remedy = cli.refused(25, "key", "recover", stdin=recovery)
    assert remedy.startswith(f"mv {cli.key_file} {cli.key_file}.old")
    assert cli.key_file.read_bytes() == before


def test_the_recovery_key_cannot_be_an_argument(cli: Cli) -> None:
    recovery = recovery_key_of(cli)
    cli.key_file.unlink()
    cli.refused(2, "key", "recover", recovery)


@contextmanager
def at_a_terminal(cli: Cli, *words: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """A command whose controlling terminal is ours: the process, and our end of the terminal."""
    ours, its = pty.openpty()
    command = ["setsid", "--ctty", sys.executable, "-m", "drsync", "--config", str(cli.config), *words]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        try:
            yield process, ours
        finally:
            if process.poll() is None:
                process.kill()
            os.close(ours)


def read_until(terminal: int, wanted: bytes) -> bytes:
    """What the terminal shows, until `wanted` or its end."""
    shown = b""
    while wanted not in shown and select.select([terminal], [], [], 30)[0]:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
    return shown


def test_at_a_terminal_the_recovery_key_is_asked_for_and_not_shown(cli: Cli) -> None:
    recovery = recovery_key_of(cli)
    cli.key_file.unlink()
    with at_a_terminal(cli, "key", "recover") as (process, terminal):
        assert b"Recovery key: " in read_until(terminal, b"Recovery key: ")
        os.write(terminal, recovery.encode() + b"\n")
        shown = read_until(terminal, b"for its owner only")
        assert process.wait(30) == 0
    assert b"wrote the key" in shown
    assert recovery.encode() not in shown
    cli.ok("status")


def test_ctrl_c_ends_quietly_with_130(cli: Cli) -> None:
    recovery_key_of(cli)
    cli.key_file.unlink()
    with at_a_terminal(cli, "key", "recover") as (process, terminal):
        read_until(terminal, b"Recovery key: ")
        os.write(terminal, b"\x03")
        shown = read_until(terminal, b"a text that never comes")
        assert process.wait(30) == 130
    assert shown.strip() == b""
