"""Every source keeps C11 of drsync/source/__init__.py: how fast a capture reads the disks."""

import logging
import threading
import time
from pathlib import Path

import pytest
from source_bench import MIB, SIZES, Replica, SourceBench

from drsync.model import Pace, SystemClock, new_capture_id
from drsync.pace import UNLIMITED, Rate, TokenBucket

pytestmark = pytest.mark.qemu

ALL_BYTES = sum(SIZES.values())
paced = pytest.mark.parametrize("bench", ["memory", "qcow2", "raw", "libvirt-pull", "libvirt-off"], indirect=True)
"""libvirt in push mode lets QEMU begin without a limit: these disks are copied before it can be told one."""


def full_took_s(bench: SourceBench, spool: Path, pace: Pace, *, meanwhile: threading.Thread | None = None) -> float:
    """Capture all of the disks, and see that the layers hold them; `meanwhile` begins with the capture."""
    with bench.open() as source:
        surveys = source.survey(None)
        layers = {survey.name: spool / f"{survey.name}.qcow2" for survey in surveys}
        began_s = time.monotonic()
        if meanwhile is not None:
            meanwhile.start()
        source.capture(new_capture_id(), None, surveys, layers, timeout_s=60, pace=pace)
        took_s = time.monotonic() - began_s
    replica = Replica()
    replica.apply(surveys, layers)
    assert {name: bytes(disk) for name, disk in replica.disks.items()} == bench.contents()
    return took_s


def spool_of(bench: SourceBench, tmp_path: Path) -> Path:
    spool = getattr(bench, "spool", tmp_path / "layers")
    spool.mkdir(exist_ok=True)
    return spool


@paced
def test_c11_a_capture_reads_no_faster_than_its_pace(bench: SourceBench, tmp_path: Path) -> None:
    pace = TokenBucket(Rate(bytes_per_s=5 * MIB), SystemClock())
    took_s = full_took_s(bench, spool_of(bench, tmp_path), pace)
    assert took_s >= 0.8 * ALL_BYTES / (5 * MIB)


@paced
def test_c11_a_limit_that_is_lifted_is_lifted_for_a_capture_that_runs(bench: SourceBench, tmp_path: Path) -> None:
    """At the first rate it would take a minute."""
    pace = TokenBucket(Rate(bytes_per_s=ALL_BYTES / 60), SystemClock())
    lifted = threading.Timer(0.5, pace.set_rate, [UNLIMITED])
    assert 0.4 <= full_took_s(bench, spool_of(bench, tmp_path), pace, meanwhile=lifted) <= 15


@paced
def test_c11_a_limit_that_comes_holds_for_a_capture_that_runs(bench: SourceBench, tmp_path: Path) -> None:
    pace = TokenBucket(Rate(bytes_per_s=ALL_BYTES / 10), SystemClock())
    comes = threading.Timer(0.5, pace.set_rate, [Rate(bytes_per_s=ALL_BYTES / 2)])
    took_s = full_took_s(bench, spool_of(bench, tmp_path), pace, meanwhile=comes)
    comes.join()
    assert 1.5 <= took_s <= 8


@pytest.mark.parametrize("bench", ["libvirt"], indirect=True)
def test_libvirt_passes_the_limit_on_to_its_own_copy(
    bench: SourceBench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pace = TokenBucket(Rate(bytes_per_s=MIB), SystemClock())
    spool = spool_of(bench, tmp_path)
    root_only = {"root": "root"}  # it alone is slow: QEMU has copied `data` before it can be told, and refuses then
    with caplog.at_level(logging.DEBUG, "drsync"), bench.open(disks=root_only) as source:
        surveys = source.survey(None)
        layers = {survey.name: spool / f"{survey.name}.qcow2" for survey in surveys}
        with bench.slowness():
            source.capture(new_capture_id(), None, surveys, layers, timeout_s=60, pace=pace)
    assert "virDomainBlockJobSetSpeed" in caplog.text
    assert "takes no limit" not in caplog.text
