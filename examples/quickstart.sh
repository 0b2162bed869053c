#!/usr/bin/env bash
# drsync's main job, for you to watch: a real VM is protected, lost, and comes back from its repository.
#
#   bash examples/quickstart.sh         the repository is a directory
#   bash examples/quickstart.sh --s3    the repository is a bucket of LocalStack, an S3 on this machine
#
# Does all the set-up that it needs. Everything that it makes is in .lab/ and .venv*/; it can be run any number of times.
# A LocalStack that runs already is used and left running; LOCALSTACK_URL=http://127.0.0.1:PORT names one at another port.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

case "${1:-}" in
    --s3 | "") ;;
    *)
        echo "usage: bash examples/quickstart.sh [--s3]" >&2
        exit 2
        ;;
esac

bash examples/setup.sh
bash examples/guest/build.sh
PYTHONPATH=examples/guest exec .venv/bin/python examples/quickstart.py "$@"
