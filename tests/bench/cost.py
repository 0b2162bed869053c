"""Counts drsync's requests around real captures, and writes the tables of docs/cost.md.

    PYTHONPATH=tests:examples/guest .venv/bin/python tests/bench/cost.py [--write]

Without --write it prints the page's tables. Needs QEMU; takes ten seconds.
"""

import argparse
import tempfile
from pathlib import Path

from cost_page import count_table, counts_of, month_table, page_with, storage_table
from request_counts import measure

PAGE = Path(__file__).parents[2] / "docs" / "cost.md"


def main() -> None:
    """Measure, then print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/cost.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        counts = measure(Path(name))
    if options.write:
        page = page_with(PAGE.read_text(), counts)
        PAGE.write_text(page_with(page, counts_of(page)))  # reckoned from the counts as the page has them
    else:
        print(count_table(counts), month_table(counts), storage_table(), sep="\n")


if __name__ == "__main__":
    main()
