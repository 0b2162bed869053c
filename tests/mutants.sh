#!/usr/bin/env bash
# Breaks drsync on purpose, line by line (tests/mutants.py), and runs the tests that ought to notice each.
#
#   bash tests/mutants.sh              all, about 15 minutes; writes the result into docs/reliability.md
#   bash tests/mutants.sh ship: log:   those of some modules
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec .venv/bin/python tests/mutants.py "$@"
