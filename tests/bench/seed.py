"""Measures a seed beside a full through the spool and a plain copy: what each takes, and what the guest's writes wait.

    .venv/bin/python tests/bench/seed.py [--size-gib 5] [--runs 3] [--work DIRECTORY] [--json FILE]

The disk and its data are main_path.py's. QEMU runs without a guest; every 50 ms 4 KiB are
written to a random place that holds data, over NBD (through drsync's own server while it
seeds, as QEMU has one only), and timed.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples" / "guest")]

import nbd  # noqa: E402 - found through the path above
from bench.disk_data import DISK_BYTES, real_files, to_qcow2  # noqa: E402
from bench.measuring import GIB, Figure, Journal, Usage, measure, settle, used_bytes  # noqa: E402
from storage_daemon import DaemonDisk, StorageDaemon  # noqa: E402

DRSYNC = [sys.executable, "-m", "drsync"]
WAYS = {"full through the spool": "1TiB", "seed": "256MiB"}
"""What is measured, and the `stream_above` that makes it so."""
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How long writes of 4 KiB took, in milliseconds."""

    step: str
    writes: int
    median_ms: float
    p99_ms: float
    worst_ms: float

    def __str__(self) -> str:
        figures = f"median {self.median_ms:6.2f} ms   p99 {self.p99_ms:7.2f} ms   worst {self.worst_ms:7.2f} ms"
        return f"writes during {self.step:30} {self.writes:6}   {figures}"


class Writer:
    """Writes to the disk all the time, and notes how long each write took."""

    def __init__(self, daemon: StorageDaemon, live_socket: Path, data_bytes: int = 4 * GIB) -> None:
        """`live_socket`: where drsync's NBD server listens while it seeds; it is written within `data_bytes`."""
        self._data_bytes = data_bytes
        self._daemon = daemon
        self._live_socket = live_socket
        self._random = random.Random(1)
        self._took_s: list[float] = []
        self.seeds = False

    @contextmanager
    def during(self, step: str, found: list[Latency]) -> Iterator[None]:
        """Write inside of the block."""
        self.seeds = step.startswith("seed")
        over = threading.Event()
        thread = threading.Thread(target=self._write, args=[over])
        self._took_s = []
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        took_ms = sorted(1000 * seconds for seconds in self._took_s)
        latency = Latency(
            step=step,
            writes=len(took_ms),
            median_ms=statistics.median(took_ms),
            p99_ms=took_ms[int(len(took_ms) * 0.99)],
            worst_ms=took_ms[-1],
        )
        found.append(latency)
        print(latency, flush=True)

    def _write(self, over: threading.Event) -> None:
        export = {"type": "nbd", "id": "bench", "node-name": "d-d", "name": "bench", "writable": True}
        own = self._daemon.directory / "bench.nbd"
        if self.seeds:
            while not self._live_socket.exists() and not over.wait(_PAUSE_S):
                pass
        else:
            self._daemon.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(own)}})
        self._daemon.execute("block-export-add", **export)
        handle = nbd.NBD()
        handle.set_export_name("bench")
        handle.connect_unix(str(self._live_socket if self.seeds else own))
        while not over.wait(_PAUSE_S):
            offset = self._random.randrange(self._data_bytes // 4096) * 4096
            began_s = time.monotonic()
            handle.pwrite(b"\7" * 4096, offset)
            self._took_s.append(time.monotonic() - began_s)
        handle.shutdown()
        self._daemon.execute("block-export-del", id="bench", mode="hard")
        time.sleep(1)
        self._daemon.execute("nbd-server-stop")


def configure(directory: Path, daemon: StorageDaemon, way: str, stream_above: str) -> list[str]:
    """A new repository and spool; the command."""
    place = directory / way.replace(" ", "-")
    place.mkdir()
    text = f'[repository]\nurl = "file://{place}/repository"\nkey_file = "{place}/key"\n'
    text += f'[spool]\npath = "{directory}/{way[:4]}"\nreserve = "1MiB"\nstream_above = "{stream_above}"\n'
    text += f'[[vm]]\nname = "files"\nsocket = "{daemon.qmp_socket}"\ndisks = {{ d = "d-d" }}\n'
    (place / "drsync.toml").write_text(text)
    (place / "repository").mkdir()
    command = [*DRSYNC, "--config", str(place / "drsync.toml")]
    subprocess.run([*command, "init"], check=True, stdout=subprocess.DEVNULL)
    return command


def run(work: Path, data: Path, number: int, journal: Journal, latencies: list[Latency]) -> None:
    """One run, in a directory that is removed afterwards."""
    directory = work / "seed-run"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        settle(data)
        copy: list[str | Path] = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", data, directory / "copy.qcow2"]
        _note(journal, "qemu-img", "convert", number, measure(copy, directory / "convert.log"))
        (directory / "copy.qcow2").unlink()
        daemon = StorageDaemon(directory, [DaemonDisk(name="d", size_bytes=DISK_BYTES)], free_nbd=True)
        to_qcow2(data, daemon.path("d"))
        with daemon:
            writer = Writer(daemon, directory / "seed" / "files" / ".live" / "nbd")
            with writer.during("nothing", latencies):
                time.sleep(5)
            for way, stream_above in WAYS.items():
                command = configure(directory, daemon, way, stream_above)
                settle(daemon.path("d"))
                with writer.during(way, latencies):
                    usage = measure([*command, "capture", "files"], directory / "capture.log")
                stored = used_bytes(directory / way.replace(" ", "-") / "repository")
                _note(journal, "drsync", way, number, usage, stored)
                shutil.rmtree(directory / way.replace(" ", "-"))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _note(journal: Journal, tool: str, step: str, number: int, usage: Usage, stored: int | None = None) -> None:
    journal.note(Figure(tool=tool, step=step, run=number, stored_bytes=stored, **asdict(usage)))


def main() -> None:
    """Measure, print, and keep the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gib", type=int, default=5, help="how much of real files (default: 5)")
    parser.add_argument("--runs", type=int, default=3, help="how often; the summary has the medians (default: 3)")
    parser.add_argument("--work", type=Path, default=Path(".lab/bench"), help="where the data is, and all else goes")
    parser.add_argument("--json", type=Path, default=None, help="write every figure to this file")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    data = real_files(work, options.size_gib)
    journal, latencies = Journal(), list[Latency]()
    for number in range(1, options.runs + 1):
        print(f"run {number} of {options.runs}")
        run(work, data, number, journal, latencies)
    print(f"\nmedians of {options.runs} runs, highest peak")
    for figure in journal.medians():
        print(figure)
    if options.json is not None:
        kept = {"figures": [asdict(f) for f in journal.figures], "latencies": [asdict(found) for found in latencies]}
        options.json.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
