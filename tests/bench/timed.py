"""Runs a command to its end and writes what it took to a file, as JSON. A process of its own, and a small one.

python -I -S tests/bench/timed.py RESULT COMMAND...

Linux counts into a command's peak memory what the process that started it had:
started by a large one, every small command would look as large.
"""

import json
import os
import subprocess
import sys
import time


def main() -> None:
    """Run, and end as the command did."""
    started = time.monotonic()
    process = subprocess.Popen(sys.argv[2:])
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    took = {"wall_s": wall_s, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}
    with open(sys.argv[1], "w", encoding="utf-8") as result:  # noqa: PTH123 - pathlib is more to load
        json.dump(took, result)
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
