#!/usr/bin/env bash
# Sets everything up and runs every check and test of drsync; nothing that is missing is skipped.
#
#   bash tests/run.sh                          all
#   bash tests/run.sh tests/unit -k segment    pytest with these arguments, after the same set-up and checks
#   bash tests/run.sh --soak 60                all, ten times as much of what is random, and an hour of stress
#   COVERAGE=1 bash tests/run.sh               all in one process, and which lines of drsync they ran
#   DRSYNC_LANES=0 bash tests/run.sh           all in one process; else in as many as suit this machine
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

# run_tests ARGUMENT...: pytest, and which lines it ran if that is wanted. An end in which it found nothing to run (5, of
# one of the two stages) is counted; it's an error only if neither has found anything.
run_tests() {
    local rc=0
    if [ -n "${COVERAGE:-}" ]; then
        $bin/coverage run --append --branch --source drsync -m pytest --seed "$seed" "$@" || rc=$?
    else
        $bin/python -m pytest --seed "$seed" "$@" || rc=$?
    fi
    [ "$rc" -eq 5 ] || return "$rc"
    empty=$((empty + 1))
    [ "$empty" -lt 2 ]
}

# run_together ARGUMENT...: what may run side by side. On a busy machine even a patient test can miss its time limit
# there: up to three that failed (pytest's status 1) run once more with nothing beside them, and are named; what fails
# then has failed.
run_together() {
    local rc=0 failed
    rm -f "$last_failed"
    run_tests "${lanes[@]}" --lanes together "$@" || rc=$?
    [ "$rc" -eq 1 ] && [ "${#lanes[@]}" -gt 0 ] || return "$rc"
    failed=$($bin/python -c 'import json, sys; print(*json.load(open(sys.argv[1])), sep="\n")' "$last_failed")
    [ "$(wc -l <<<"$failed")" -le 3 ] || return "$rc"
    echo "tests: failed beside others, tried once more alone, with the same seed: ${failed//$'\n'/, }" >&2
    $bin/python -m pytest --last-failed --last-failed-no-failures none --seed "$seed" "$@"
}

# lanes_here: two for each processor, if there are 3 GiB of memory for each: a lane may have a LocalStack and guests.
lanes_here() {
    local by_processor by_memory
    by_processor=$(($(nproc) * 2))
    by_memory=$(awk '/^MemAvailable:/ { print int($2 / 3145728) }' /proc/meminfo)
    echo $((by_memory < 1 ? 1 : by_memory < by_processor ? by_memory : by_processor))
}

# What waits and what works run side by side, a file's tests in one lane (tests/lanes.py); what runs is measured line by
# line only in a process of its own.
empty=0
seed=$((RANDOM << 15 | RANDOM)) # of all that is random, unless the arguments name one
last_failed=.pytest_cache/v/cache/lastfailed
lanes=(-n "${DRSYNC_LANES:-$(lanes_here)}" --dist loadfile --no-loadscope-reorder)
if [ -n "${COVERAGE:-}" ]; then
    lanes=()
    rm -f .coverage
fi

stage "set-up" bash examples/setup.sh --dev
stage "guest" bash examples/guest/build.sh
stage "LocalStack" bash localstack/start.sh --install-only
stage "format" $bin/ruff format --check .
stage "lint" $bin/ruff check .
stage "shell lint" lint_shell
stage "types" $bin/mypy
stage "layers" $bin/lint-imports
stage "tests" run_together "$@"
stage "tests, alone" run_tests --lanes alone "$@"
[ -z "${COVERAGE:-}" ] || $bin/coverage report --skip-covered

echo "── all passed"
printf '%s\n' "${timings[@]}"
