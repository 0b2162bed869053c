"""The README's first command does what it promises: the VM comes back from its repository, and its files are whole."""

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.qemu

ROOT = Path(__file__).parents[2]


def quickstart(*arguments: str) -> str:
    """Run the quickstart as a user would, and give back what it printed."""
    command = ["bash", "examples/quickstart.sh", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def check_the_story(output: str) -> None:
    assert output.count("photos.bin: OK") == 2  # at the newest point and at the first
    assert output.count("music.bin: OK") == 1  # only at the newest
    assert "what came after the last point is gone" in output
    assert "RPO reached" in output
    assert "RTO reached" in output


@pytest.mark.timeout(600)
def test_the_quickstart_loses_a_vm_and_brings_it_back() -> None:
    check_the_story(quickstart())


@pytest.mark.localstack
@pytest.mark.timeout(600)
def test_the_quickstart_does_the_same_with_s3(localstack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALSTACK_URL", localstack)
    check_the_story(quickstart("--s3"))


def test_an_unknown_option_is_refused_before_anything_is_done() -> None:
    done = subprocess.run(
        ["bash", "examples/quickstart.sh", "--s4"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "usage:" in done.stderr
