"""qemu-img and qemu-io: what says whether an image is right."""

import json
import subprocess
from pathlib import Path
from typing import Any


def run(*command: str | Path) -> str:
    """Run a program of QEMU's; its output. What it complains of fails the test."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
    return done.stdout


def create(path: Path, size_bytes: int, *options: str) -> Path:
    """A qcow2 image of QEMU's own."""
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        ",".join(("cluster_size=65536", *options)),
        path,
        str(size_bytes),
    )
    return path


def io(path: Path, *commands: str, image_format: str = "qcow2") -> None:
    """Run qemu-io commands on an image."""
    run("qemu-io", "-f", image_format, *(part for command in commands for part in ("-c", command)), path)


def check(path: Path) -> None:
    """Fail if a qcow2 image has an error or a leak."""
    report = json.loads(run("qemu-img", "check", "--output=json", "-f", "qcow2", path))
    assert {key: report.get(key, 0) for key in ("check-errors", "corruptions", "leaks")} == {
        "check-errors": 0,
        "corruptions": 0,
        "leaks": 0,
    }


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", "-f", "qcow2", path))
    return found


def map_of(path: Path) -> list[dict[str, Any]]:
    """What `qemu-img map` tells of an image."""
    found: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", path))
    return found


def assert_same(raw: Path, image: Path, image_format: str) -> None:
    """Fail unless an image holds what the raw file does, and has its size."""
    run("qemu-img", "compare", "-q", "-f", "raw", "-F", image_format, raw, image)
