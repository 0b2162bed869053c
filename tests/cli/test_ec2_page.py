"""docs/ec2.md: each command on it is one that drsync has, and the TOML on it is read."""

import re
from pathlib import Path

import click
import pytest

from drsync.cli import main
from drsync.config import parse_config

PAGE = (Path(__file__).parents[2] / "docs/ec2.md").read_text()
COMMANDS = sorted(set(re.findall(r"^ {4,}drsync ([^#\n]+)", PAGE, re.MULTILINE)))


def accept(command: click.Command, words: list[str]) -> None:
    """Follow the words down to a command, and let it parse the rest without running it."""
    while isinstance(command, click.Group):
        child = command.get_command(click.Context(command), words.pop(0))
        assert child is not None
        command = child
    assert command.make_context(command.name or "", words).params


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_is_one(line: str) -> None:
    accept(main, line.split())


def test_the_page_has_its_commands_and_its_table_is_read(tmp_path: Path) -> None:
    assert len(COMMANDS) >= 9
    table = re.search(r"( {4}\[\[cloud\]\]\n(?: {4}\w.*\n)+)", PAGE)
    assert table is not None
    text = '[repository]\nurl = "s3://bucket/dr"\nkey_file = "key"\n[spool]\npath = "spool"\n'
    text += re.sub(r"^ {4}", "", table[1], flags=re.MULTILINE)
    (cloud,) = parse_config(text.encode(), tmp_path / "drsync.toml").clouds
    assert (cloud.name, cloud.region, cloud.interval_s, cloud.keep) == ("ireland", "eu-west-1", 3600, 2)
