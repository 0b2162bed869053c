"""Measures what a guest's writes wait for while its disks are read, with and without `[limits] read`.

    .venv/bin/python tests/bench/read_limit.py [--size-mib 1024] [--disk 100MiB] [--read 30MiB/s] [--runs 3]

QEMU runs without a guest, on a disk that gives so many bytes a second and no more (QEMU's own throttle, below the
image), as a shared array does. Every 50 ms 4 KiB are written to a random place that holds data, past
any cache, and timed: while nothing else happens, while a full goes through the spool, and while the VM is seeded.
"""

import argparse
import json
import secrets
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples" / "guest")]

from bench.measuring import settle  # noqa: E402 - found through the path above
from bench.seed import DRSYNC, Latency, Writer  # noqa: E402
from storage_daemon import DaemonDisk, StorageDaemon  # noqa: E402

from drsync.units import MiB, parse_size  # noqa: E402

WAYS = {"full": "1TiB", "seed": "16MiB"}
"""What is measured, and the `stream_above` that makes it so."""


def configure(directory: Path, daemon: StorageDaemon, way: str, read: str) -> list[str]:
    """A new repository and spool; the command."""
    for name in (way, "repository"):
        shutil.rmtree(directory / name, ignore_errors=True)
    (directory / "key").unlink(missing_ok=True)
    (directory / "repository").mkdir()
    text = f'[repository]\nurl = "file://{directory}/repository"\nkey_file = "{directory}/key"\n'
    text += f'[spool]\npath = "{directory}/{way}"\nreserve = "1MiB"\nstream_above = "{WAYS[way]}"\n'
    text += f'[limits]\nread = "{read}"\n'
    text += f'[[vm]]\nname = "files"\nsocket = "{daemon.qmp_socket}"\ndisks = {{ d = "d-d" }}\n'
    (directory / "drsync.toml").write_text(text)
    command = [*DRSYNC, "--config", str(directory / "drsync.toml")]
    subprocess.run([*command, "init"], check=True, stdout=subprocess.DEVNULL)
    return command


def slow_disk(daemon: StorageDaemon, bytes_per_s: int) -> None:
    """Let the disk give no more than so much, reads and writes together."""
    limits = {"bps-total": bytes_per_s}
    daemon.execute("object-add", **{"qom-type": "throttle-group"}, id="disk", limits=limits)
    between = {"driver": "throttle", "throttle-group": "disk", "file": "f-d", "node-name": "between"}
    daemon.execute("blockdev-add", **between)
    options = {"driver": "qcow2", "node-name": "d-d", "file": "between", "discard": "unmap"}
    daemon.execute("blockdev-reopen", options=[options])


def run(directory: Path, options: argparse.Namespace, found: list[Latency]) -> None:
    """One run, in a directory that is removed afterwards."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        data = directory / "data"
        with data.open("wb") as file:
            for _ in range(options.size_mib):
                file.write(secrets.token_bytes(MiB))
        daemon = StorageDaemon(directory, [DaemonDisk(name="d", size_bytes=options.size_mib * MiB)], free_nbd=True)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", data, daemon.path("d")], check=True)
        data.unlink()
        with daemon:
            slow_disk(daemon, parse_size(options.disk))
            writer = Writer(daemon, directory / "seed" / "files" / ".live" / "nbd", options.size_mib * MiB)
            with writer.during("nothing", found):
                time.sleep(5)
            for way in WAYS:
                for read in ("unlimited", options.read):
                    command = configure(directory, daemon, way, read)
                    settle(daemon.path("d"))
                    began_s = time.monotonic()
                    with writer.during(f"{way}, read = {read}", found):
                        subprocess.run([*command, "capture", "files"], check=True, stdout=subprocess.DEVNULL)
                    print(f"    {way} took {time.monotonic() - began_s:.1f} s", flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    """Measure, print, and keep the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--disk", default="100MiB", help="what the disk gives in a second")
    parser.add_argument("--read", default="30MiB/s", help="the limit to measure with")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(".lab/read"), help="a short path: a socket goes there")
    parser.add_argument("--json", type=Path, default=None, help="write every figure to this file")
    options = parser.parse_args()
    found: list[Latency] = []
    for number in range(1, options.runs + 1):
        print(f"run {number} of {options.runs}", flush=True)
        run(options.work.absolute(), options, found)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(latency) for latency in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
