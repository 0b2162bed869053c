"""What holds for every command: help, streams, errors, exit codes, JSON, and how soon it is there."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from command_line import Cli

import drsync.errors
from drsync.cli import Commands, main
from drsync.errors import DrsyncError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/cli.md").read_text()


def leaves(
    command: click.Command = main, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that can be run, with the words that call it."""
    if not isinstance(command, click.Group):
        yield words, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        yield from leaves(child, (*words, name))


LEAVES = dict(leaves())


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_has_help_whose_first_line_is_not_cut(words: tuple[str, ...], cli: Cli) -> None:
    done = cli.ok(*words, "--help")
    assert done.stdout.startswith("Usage: drsync ")
    assert not LEAVES[words].get_short_help_str(limit=60).endswith("...")


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_and_option_is_documented(words: tuple[str, ...]) -> None:
    section = re.search(rf"^## drsync {' '.join(words)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None
    for parameter in LEAVES[words].params:
        assert not isinstance(parameter, click.Option) or parameter.help
        for name in parameter.opts:
            if name.startswith("-") and name != "--json":
                assert name in section[1], name


@pytest.mark.parametrize("words", sorted({words[:-1] for words in LEAVES}), ids=" ".join)
def test_a_group_without_a_command_shows_what_there_is(words: tuple[str, ...], cli: Cli) -> None:
    shown = cli.run(*words, config=bool(words))
    assert (shown.code, shown.stdout) == (2, "")
    assert shown.stderr.startswith("Usage: drsync")
    assert "\nCommands:\n" in shown.stderr
    assert "error" not in shown.stderr
    document = cli.run("--json", *words).json
    assert document["error"]["message"] == "missing command"


@pytest.mark.parametrize("name", ["drsync.toml", "my own.toml"])
def test_a_remedy_has_the_configuration_file_that_was_given_and_runs_as_it_stands(cli: Cli, name: str) -> None:
    cli.ok("init")
    path = cli.config.rename(cli.place / name)
    run = CliRunner().invoke
    refused = run(main, ["--config", str(path), "capture", "web"])
    remedy = refused.stderr.splitlines()[-1].removeprefix("remedy: ")
    program, *words = shlex.split(remedy)
    assert (program, words) == ("drsync", ["--config", str(path), "config", "check"])
    assert run(main, words).exit_code == 0
    document = json.loads(run(main, ["--config", str(path), "--json", "capture", "web"]).stdout)
    assert document["error"]["remedy"] == "drsync config check", "a program knows what it has given"
    elsewhere = run(main, ["capture", "web"], env={"DRSYNC_CONFIG": str(path)})
    assert elsewhere.stderr.splitlines()[-1] == "remedy: drsync config check"
    mistyped = run(main, ["--config", str(path), "capture"])
    assert shlex.split(mistyped.stderr.splitlines()[-1])[1:] == ["drsync", "--config", str(path), "capture", "--help"]


def test_every_exit_code_is_documented_with_its_class_and_meaning() -> None:
    for name, kind in vars(drsync.errors).items():
        if isinstance(kind, type) and issubclass(kind, DrsyncError) and kind.template:
            meaning = (kind.__doc__ or "").splitlines()[0].rstrip(".")
            assert f"| {kind.code} | {name}: {meaning} |" in PAGE, name


def test_no_exit_code_is_documented_that_does_not_exist() -> None:
    known = {k.code for k in vars(drsync.errors).values() if isinstance(k, type) and issubclass(k, DrsyncError)}
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert documented - known == {0, 1, 2, 130, 141}


REPORTING = [words for words in LEAVES if words != ("daemon",)]


@pytest.mark.parametrize("words", REPORTING, ids=" ".join)
@pytest.mark.parametrize("first", [True, False])
def test_with_json_an_error_is_the_one_document_on_stdout(words: tuple[str, ...], first: bool, cli: Cli) -> None:
    cli.config.unlink()
    needed = {
        "capture": ["web"],
        "cloud setup": ["--bucket", "images"],
        "failback": ["web", "--from", "ec2"],
        "key add": ["recovery"],
        "key export": ["web", "--output", "out"],
        "key remove": ["recovery"],
        "pin": ["web", "--point", "1"],
        "preflight": ["--to", "ec2"],
        "restore": ["web", "--to", "image", "--output", "out"],
        "unpin": ["web", "--point", "1"],
    }
    arguments = needed.get(" ".join(words), [])
    done = cli.run("--json", *words, *arguments) if first else cli.run(*words, *arguments, "--json")
    assert done.code == 10
    document = done.json
    error = document["checks"][0]["error"] if words == ("config", "check") else document["error"]
    assert set(error) == {"code", "class", "message", "remedy", "retryable"}
    assert (error["code"], error["class"], error["retryable"]) == (10, "ConfigMissing", False)


@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        (["pionts"], "no such command 'pionts'", "drsync --help"),
        (["points", "--all"], "no such option '--all'", "drsync points --help"),
        (["capture"], "missing argument 'VM'", "drsync capture --help"),
        (["restore", "web", "--output", "x"], "missing option '--to'", "drsync restore --help"),
        (
            ["restore", "web", "--to", "image", "--output", "x", "--point", "1", "--at", "2026-11-23T10:00:00Z"],
            "--point and --at both choose the point: give one of them",
            "drsync restore --help",
        ),
        (
            ["restore", "web", "--to", "image", "--output", "x", "--at", "yesterday"],
            "invalid value for '--at': 'yesterday' is not a time; write \"2026-11-23 10:00\"",
            "drsync restore --help",
        ),
        (
            ["restore", "web", "--to", "image", "--output", "x", "--at", "2026-11-23"],
            "invalid value for '--at': '2026-11-23' is not a time",
            "drsync restore --help",
        ),
    ],
)
def test_a_wrong_command_line_is_told_in_two_lines(words: list[str], message: str, remedy: str, cli: Cli) -> None:
    said = cli.refused(2, *words)
    assert said[0].startswith(message)
    assert said[1] == remedy
    error = cli.run(*words, "--json").json["error"]
    assert (error["code"], error["message"], error["remedy"]) == (2, *said)


def test_the_configuration_is_found_by_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRSYNC_CONFIG", str(cli.place / "elsewhere.toml"))
    done = cli.run("status", config=False)
    assert done.code == 10
    assert f"no configuration file at {cli.place}/elsewhere.toml" in done.stderr


def test_a_bug_is_called_one_with_a_trace_and_code_1() -> None:
    class Broken(Commands):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            raise ZeroDivisionError(cmd_name)

    done = CliRunner().invoke(Broken("drsync", callback=main.callback, params=main.params), ["status", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["class"] == "ZeroDivisionError"
    assert "Traceback" in done.stderr


def test_who_closes_the_pipe_is_not_shouted_at() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "drsync", "--help"]
    process = subprocess.Popen(command, text=True, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 141


def test_stdout_holds_nothing_but_the_document_whatever_is_logged(cli: Cli) -> None:
    cli.ok("init")
    command = [sys.executable, "-m", "drsync", "--config", str(cli.config), "-vv", "status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("words", [["points"], ["status"], ["capture", "web"], ["verify"]], ids=" ".join)
def test_a_command_loads_no_library_that_it_does_not_need(words: list[str], cli: Cli) -> None:
    cli.ok("init")
    script = "import sys; from drsync.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)\n"
    command = [sys.executable, "-c", script, "--config", str(cli.config), *words, "--json"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=False).stderr.split()
    assert "drsync.session" in loaded
    assert {"boto3", "botocore", "apscheduler", "rich", "drsync.store.s3"}.isdisjoint(loaded)
