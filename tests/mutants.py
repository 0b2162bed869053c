"""drsync, broken on purpose: one line each, and the tests that ought to notice.

    bash tests/mutants.sh             every mutant, some seconds each; writes the list in docs/reliability.md
    bash tests/mutants.sh ship: log:  those in whose names (module: meaning) one of these is

A mutant that lives is a hole in the tests, not in drsync. The list is for people to add to: a line that
nobody would miss is not worth one; a line whose loss costs data is.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rules import PAGE, ROOT, between

_COPIED: Final = ("drsync", "tests", "examples", "docs", "localstack/plugin", "pyproject.toml")
_TIMEOUT_S: Final = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A change of one line, which must be noticed by one of these tests."""

    module: str
    """Below drsync/, without its ending."""
    old: str
    new: str
    meaning: str
    tests: Sequence[str]
    """Files below tests/, or one test of a file; the likeliest to notice first."""

    @property
    def name(self) -> str:
        return f"{self.module}: {self.meaning}"

    @property
    def path(self) -> str:
        return f"drsync/{self.module}.py"

    def apply(self, text: str) -> str:
        """The module with the mistake in it.

        Raises:
            ValueError: the line is not there any more, or more than once.
        """
        if text.count(self.old) != 1 or "\n" in self.old:
            raise ValueError(f"{self.path} has {text.count(self.old)} times {self.old!r}")
        return text.replace(self.old, self.new)


def listed(file: Path = ROOT / "tests/mutants.toml") -> list[Mutant]:
    """The mutants in the list."""
    return [
        Mutant(module=module, **{"tests": entry["tests"], **mutant})
        for module, entry in tomllib.loads(file.read_text()).items()
        for mutant in entry["mutants"]
    ]


MUTANTS: Final = listed()


def recorded(page: Path = PAGE) -> tuple[int, int]:
    """How many mutants were killed when they were run last, and how many there were."""
    rows = rows_of(page)
    return sum("alive" not in killer for killer in rows.values()), len(rows)


def rows_of(page: Path = PAGE) -> dict[str, str]:
    """What killed each mutant, by module and meaning, as the page has it."""
    text = page.read_text() if page.exists() else ""
    found = re.findall(r"^\| `([\w/]+)` \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    return {f"{module}: {meaning}": killer for module, meaning, killer in found}


def copied(place: Path) -> Path:
    """A copy of the tree that can be broken."""
    for name in _COPIED:
        source, target = ROOT / name, place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".venv*"))
        else:
            shutil.copy(source, target)
    return place


def killer_of(mutant: Mutant, tree: Path) -> str:
    """The test that noticed the mutant; empty if it lives."""
    module = tree / mutant.path
    whole = module.read_text()
    module.write_text(mutant.apply(whole))
    try:
        return _first_failure(tree, mutant.tests)
    finally:
        module.write_text(whole)


def _first_failure(tree: Path, tests: Sequence[str]) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout=60", "--seed=1"]
    environ = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_PROFILE": "mutants"}
    for name in ("DRSYNC_SOAK", "DRSYNC_SOAK_MINUTES"):
        environ.pop(name, None)
    try:
        run = subprocess.run(
            [*command, *(f"tests/{test}" for test in tests)],
            cwd=tree,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return ""  # a single test has a minute: it was the machine, and says nothing
    if run.returncode == 0:
        return ""
    found = re.findall(r"^(?:FAILED|ERROR) tests/([^\s:]+)(?:::(\w+))?", run.stdout, re.MULTILINE)
    if run.returncode not in (1, 2) or not found:
        raise RuntimeError(f"the tests did not run: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    file, test = found[0]
    return f"{test or 'collection'} ({file})"


def run_all(mutants: Iterable[Mutant]) -> dict[str, str]:
    """Each mutant's killer, told as it is found."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        tree = copied(Path(place))
        for mutant in mutants:
            began_s = time.monotonic()
            killer = killer_of(mutant, tree)
            found[mutant.name] = killer
            told = f"killed by {killer}" if killer else "ALIVE"
            print(f"{time.monotonic() - began_s:6.1f} s  {mutant.name}: {told}", flush=True)  # noqa: T201 - for whoever runs it
    return found


def write_record(found: Mapping[str, str], page: Path = PAGE) -> None:
    """Put the result into the page, between its marks; what was not run now stays as it was."""
    known = {**rows_of(page), **found}
    rows = [f"| `{m.module}` | {m.meaning} | {known.get(m.name) or '**alive**'} |" for m in MUTANTS]
    table = "\n".join(["| module | what is broken | killed by |", "| --- | --- | --- |", *rows])
    page.write_text(between(page.read_text(), "mutants", table))


def main(words: Sequence[str]) -> int:
    """Run the mutants in whose names one of the words is, or all of them."""
    found = run_all(m for m in MUTANTS if not words or any(word in m.name for word in words))
    write_record(found)
    alive = [name for name, killer in found.items() if not killer]
    print(f"{len(found) - len(alive)} of {len(found)} killed", *(f"alive: {name}" for name in alive), sep="\n")  # noqa: T201 - as above
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
