"""Every rule has its tests, and docs/reliability.md says so."""

import re
from pathlib import Path

import pytest
from rules import PAGE, ROOT, RULES, Rule, functions_of, table


def test_there_are_36_rules_and_each_has_its_tests() -> None:
    assert [rule.number for rule in RULES] == list(range(1, 37))
    assert all(rule.ids for rule in RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.number))
def test_the_tests_of_a_rule_exist(rule: Rule) -> None:
    for file, names in rule.tests.items():
        assert set(names) <= functions_of(ROOT / "tests" / file), file


def test_the_page_shows_the_rules_as_they_are() -> None:
    assert table() in PAGE.read_text(), "run python tests/rules.py"


def test_the_page_names_no_test_that_does_not_exist() -> None:
    known = {name for file in (ROOT / "tests").rglob("test_*.py") for name in functions_of(Path(file))}
    assert set(re.findall(r"\btest_\w+\b(?!\.py)", PAGE.read_text())) <= known
