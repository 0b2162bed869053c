"""The list of mutants fits the code, and the recorded run killed all of them (tests/mutants.sh runs them)."""

import pytest
from mutants import MUTANTS, Mutant, recorded, rows_of
from rules import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_one_line_of_the_code_as_it_is(mutant: Mutant) -> None:
    text = (ROOT / mutant.path).read_text()
    compile(mutant.apply(text), mutant.path, "exec")
    assert mutant.old != mutant.new
    assert all((ROOT / "tests" / test.partition("::")[0]).exists() for test in mutant.tests)


def test_every_mutant_was_killed() -> None:
    assert set(rows_of()) == {m.name for m in MUTANTS}, "run bash tests/mutants.sh again"
    killed, made = recorded()
    assert killed == made >= 40
