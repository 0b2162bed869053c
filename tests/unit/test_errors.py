"""The error tree: every class is complete, and every remedy is something that can be run."""

import re
from collections.abc import Iterator
from string import Formatter

import click
import pytest

import drsync.errors
from drsync.cli import main
from drsync.errors import DrsyncError

RANGES = {
    "ConfigError": range(10, 20),
    "RepositoryError": range(20, 30),
    "StoreError": range(30, 40),
    "IntegrityError": range(40, 45),
    "LogError": range(45, 50),
    "SourceError": range(50, 60),
    "SpoolError": range(60, 70),
    "TargetError": range(70, 80),
    "RecoveryError": range(80, 84),
    "PruneError": range(84, 88),
    "GuestError": range(90, 100),
    "DamageError": range(94, 98),
    "RetentionError": range(84, 100),
    "CloudError": range(100, 126),
}


def subclasses(kind: type[DrsyncError]) -> Iterator[type[DrsyncError]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


BRANCHES = [kind for kind in subclasses(DrsyncError) if kind.__name__ in RANGES]
LEAVES = [kind for kind in subclasses(DrsyncError) if kind.__name__ not in RANGES]


def example_of(kind: type[DrsyncError]) -> DrsyncError:
    names = [name for _, name, _, _ in Formatter().parse(kind.template + kind.remedy_template) if name]
    return kind(**{name: 1.5 if name.endswith("_s") else name for name in names})


def test_the_whole_tree_is_in_one_package() -> None:
    assert {kind.__module__.rpartition(".")[0] for kind in LEAVES} == {drsync.errors.__name__}
    assert {kind.__name__ for kind in BRANCHES + LEAVES} < set(drsync.errors.__all__)


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in LEAVES]
    assert sorted(codes) == sorted(set(codes))


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_a_code_lies_in_the_range_of_its_branch(kind: type[DrsyncError]) -> None:
    (branch,) = [branch for branch in BRANCHES if issubclass(kind, branch)]
    assert kind.code in RANGES[branch.__name__]


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_a_message_is_one_line_lower_case_and_without_full_stop(kind: type[DrsyncError]) -> None:
    message = str(example_of(kind))
    assert message
    assert "\n" not in message
    assert not message.endswith(".")
    first = message.split(maxsplit=1)[0]
    assert first[:1].islower() or first in ("VM", "{path}:")


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_an_error_without_its_fields_cannot_be_made(kind: type[DrsyncError]) -> None:
    with pytest.raises(TypeError, match="lacks"):
        kind()


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_an_error_says_what_it_means(kind: type[DrsyncError]) -> None:
    assert kind.__doc__


def commands_in(remedy: str) -> list[str]:
    """The `drsync ...` command lines of a remedy; explanations in brackets are left out."""
    plain = re.sub(r"\(.*?\)\)?", "", remedy)
    return [found.strip() for found in re.findall(r"\bdrsync (?=[-a-z])([^;`]*)", plain)]


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_a_remedy_names_only_commands_and_options_that_exist(kind: type[DrsyncError]) -> None:
    error = example_of(kind)
    assert error.remedy
    for line in commands_in(error.remedy):
        accept(main, line.split())


def accept(command: click.Command, words: list[str]) -> None:
    """Follow the words down the command tree; fail on a word or option that it does not know."""
    options = {name: parameter for parameter in command.params for name in parameter.opts if name.startswith("-")}
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            assert word in options, f"{command.name} has no option {word}"
            option = options[word]
            if isinstance(option, click.Option) and not option.is_flag:
                words.pop(0)
        elif isinstance(command, click.Group):
            child = command.get_command(click.Context(command), word)
            assert child is not None, f"{command.name} has no command {word}"
            return accept(child, words)
    assert not isinstance(command, click.Group) or not words
    return None
