#!/usr/bin/env bash
# Sets everything up and runs every check and test of drsync; nothing that is missing is skipped.
#
#   bash tests/run.sh                          all
#   bash tests/run.sh tests/unit -k segment    pytest with these arguments, after the same set-up and checks
#   bash tests/run.sh --soak 60                all, ten times as much of what is random, and an hour of stress
#   COVERAGE=1 bash tests/run.sh               all, and which lines of drsync they ran
#
# Can be run any number of times; the set-up is done once. Ends with the time that each stage took.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bin=.venv/bin
timings=()

if [ "${1:-}" = --soak ]; then
    [[ "${2:-}" =~ ^[0-9]+$ ]] || {
        echo "tests: --soak wants a number of minutes" >&2
        exit 2
    }
    export DRSYNC_SOAK=1 DRSYNC_SOAK_MINUTES=$2
    shift 2
    set -- --timeout 3600 "$@"
fi

# stage TITLE COMMAND...: run it and remember how long it took; the first that fails ends it all.
stage() {
    local title=$1 started=$SECONDS
    shift
    echo "── $title"
    if ! "$@" </dev/null; then
        echo "tests: $title failed: $*" >&2
        exit 1
    fi
    timings+=("$(printf '%5d s  %s' $((SECONDS - started)) "$title")")
}

lint_shell() {
    find examples localstack tests .ci \( -name '*.sh' -o -path .ci/run \) -print0 | xargs -0 shellcheck --external-sources
}

run_tests() {
    if [ -n "${COVERAGE:-}" ]; then
        $bin/coverage run --branch --source drsync -m pytest "$@" && $bin/coverage report --skip-covered
    else
        $bin/python -m pytest "$@"
    fi
}

stage "set-up" bash examples/setup.sh --dev
stage "guest" bash examples/guest/build.sh
stage "LocalStack" bash localstack/start.sh --install-only
stage "format" $bin/ruff format --check .
stage "lint" $bin/ruff check .
stage "shell lint" lint_shell
stage "types" $bin/mypy
stage "layers" $bin/lint-imports
stage "tests" run_tests "$@"

echo "── all passed"
printf '%s\n' "${timings[@]}"
