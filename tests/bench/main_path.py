"""Measures the main path beside its peers: whole commands, same data, same run. Not a test: nothing fails on a figure.

    .venv/bin/python tests/bench/main_path.py [--size-gib 5] [--runs 3] [--work DIRECTORY] [--json FILE]

tests/bench/README.md says what is measured and how, and which packages the peers come from.
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples" / "guest")]

from bench.rounds import measure_all  # noqa: E402 - found through the path above


def main() -> None:
    """Measure, print, and keep the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gib", type=int, default=5, help="how much of real files (default: 5)")
    parser.add_argument("--runs", type=int, default=3, help="how often; the summary has the medians (default: 3)")
    parser.add_argument(
        "--work", type=Path, default=Path(".lab/bench"), help="where the data is kept, and all else goes"
    )
    parser.add_argument("--json", type=Path, default=None, help="write every figure to this file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs beside us is ended
    measure_all(options.work.absolute(), size_gib=options.size_gib, runs=options.runs, output=options.json)


if __name__ == "__main__":
    main()
