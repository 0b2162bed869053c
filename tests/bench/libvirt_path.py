"""Measures the protection of a running libvirt VM beside virtnbdbackup: same data, same run, a guest that writes.

    .venv/bin/python tests/bench/libvirt_path.py [--size-gib 5] [--runs 3] [--work DIRECTORY] [--json FILE]
    .venv/bin/python tests/bench/libvirt_path.py --rpo-minutes 10 --plot lag.png

The second form holds an RPO of 10 s on a guest that keeps writing 10 MB/s, and plots the lag.
tests/bench/README.md says what is measured and how. As root.
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples" / "guest")]

from bench.libvirt_rounds import measure_libvirt  # noqa: E402 - found through the path above
from bench.rpo import hold_rpo  # noqa: E402 - as above


def main() -> None:
    """Measure, print, and keep the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gib", type=int, default=5, help="how much of real files (default: 5)")
    parser.add_argument("--runs", type=int, default=3, help="how often; the summary has the medians (default: 3)")
    parser.add_argument("--work", type=Path, default=Path(".lab/bench"), help="where the data is kept")
    parser.add_argument("--json", type=Path, default=None, help="write every figure to this file")
    parser.add_argument("--rpo-minutes", type=float, default=0, help="hold an RPO for so long, and nothing else")
    parser.add_argument("--plot", type=Path, default=Path(".lab/bench/lag.png"), help="where the lag is drawn")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs beside us is ended
    work = options.work.absolute()
    if options.rpo_minutes:
        hold_rpo(work, minutes=options.rpo_minutes, plot=options.plot)
    else:
        measure_libvirt(work, size_gib=options.size_gib, runs=options.runs, output=options.json)


if __name__ == "__main__":
    main()
