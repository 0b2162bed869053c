"""What runs beside what: the order of the tests, and which of them run alone."""

import sys
from pathlib import Path
from subprocess import PIPE, run

import pytest

TREE = {
    "tests/unit/test_short.py": "def test_a(): pass\n\n@pytest.mark.alone\ndef test_timed(): pass\n",
    "tests/libvirt/test_long.py": "def test_b(): pass\n\ndef test_c(): pass\n",
    "tests/cli/test_middling.py": "def test_d(): figures.count('crashes', 2)\n\ndef test_e(seed): assert seed == 7\n",
    "tests/libvirt/test_other.py": "def test_f(): figures.count('crashes', 3)\n\ndef test_g(seed): assert seed == 7\n",
}
CONFTEST = """
import figures, lanes, pytest

def pytest_addoption(parser):
    parser.addoption("--lanes", default="")

def pytest_configure(config):
    config.addinivalue_line("markers", "alone: x")
    config.seed = getattr(config, "workerinput", {}).get("seed", 7)
    config.pluginmanager.register(lanes.Lanes({"seed": config.seed}))

def pytest_collection_modifyitems(config, items):
    items[:] = lanes.in_order(lanes.of_lanes(items, config.getoption("--lanes")))

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"crashes: {figures.counted()['crashes']}")

@pytest.fixture
def seed(request):
    return request.config.seed
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A few tests by themselves, with what the real ones use of lanes."""
    for name, text in TREE.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"import figures\nimport pytest\n\n{text}")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\n")
    return tmp_path


def told_by(tree: Path, *arguments: str) -> str:
    """What pytest prints of these tests; all pass."""
    environ = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    ran = run([sys.executable, "-m", "pytest", *arguments], cwd=tree, env=environ, stdout=PIPE, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def names(told: str) -> list[str]:
    return [line.rpartition("::")[2] for line in told.splitlines() if "::" in line]


def test_long_files_come_first_and_stay_whole(tree: Path) -> None:
    told = told_by(tree, "--collect-only", "-q")
    assert names(told) == ["test_b", "test_c", "test_f", "test_g", "test_d", "test_e", "test_a", "test_timed"]


def test_what_measures_time_runs_apart(tree: Path) -> None:
    assert names(told_by(tree, "--collect-only", "-q", "--lanes", "alone")) == ["test_timed"]
    assert "test_timed" not in told_by(tree, "--collect-only", "-q", "--lanes", "together")


def test_lanes_share_a_seed_and_add_up_their_figures(tree: Path) -> None:
    told = told_by(tree, "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
    assert "8 passed" in told
    assert "crashes: 5" in told
