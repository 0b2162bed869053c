#!/usr/bin/env bash
# Starts LocalStack, an S3 (and more of AWS) on this machine, without Docker; prints its endpoint.
# Does the set-up on its own: .venv-localstack from requirements.txt and plugin/, about a minute, once.
# Can be run any number of times: a LocalStack that runs on the port already is used as it is.
#
#   bash localstack/start.sh                          at http://127.0.0.1:4566
#   LOCALSTACK_PORT=4600 bash localstack/start.sh     at another port, beside the first one
#   bash localstack/start.sh --install-only           the set-up alone
#   PYTHON=/usr/bin/python3.12 bash localstack/start.sh     another Python than the system's (3.11 to 3.13)
#
# It listens on the loopback interface only, and writes below .lab/localstack/PORT only.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=examples/apt.sh
source examples/apt.sh
# shellcheck source=localstack/instance.sh
source localstack/instance.sh

venv=$root/.venv-localstack
requirements=(localstack/requirements-build.txt localstack/requirements.txt)

is_python_for_it() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-/usr/bin/python3 python3 python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null && is_python_for_it "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "LocalStack 4.12 runs on Python 3.11 to 3.13; ${PYTHON:-/usr/bin/python3} is" \
        "$("${PYTHON:-/usr/bin/python3}" --version 2>&1 || true). Install one of them, then: PYTHON=python3.13 bash $0"
}

# The system's Python comes without the means to make an environment on Debian and Ubuntu.
install_venv_package() {
    if ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        say "installing system package: python3-venv"
        logged apt_update
        logged apt_install python3-venv
    fi
}

# What was installed is remembered as the hash of the pinned requirements.
install() {
    local wanted python
    wanted=$(cat "${requirements[@]}" | sha256sum)
    if [ -f "$venv/.installed" ] && [ "$(cat "$venv/.installed")" = "$wanted" ]; then
        return
    fi
    python=$(find_python)
    install_venv_package "$python"
    say "installing LocalStack 4.12.0 into .venv-localstack with $("$python" --version); this takes a minute, once"
    logged "$python" -m venv --clear "$venv"
    logged "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r localstack/requirements-build.txt
    logged "$venv/bin/python" -m pip install --quiet --no-build-isolation -r localstack/requirements.txt
    echo "$wanted" >"$venv/.installed"
}

# The plug-in's code is used where it lies; its entry points are what an installation remembers. Built apart from the
# environment: plux, which LocalStack brings, stands in the way of setuptools there.
install_plugin() {
    local wanted
    wanted=$({ echo "$root" && cat localstack/requirements-build.txt localstack/plugin/pyproject.toml; } | sha256sum)
    if [ -f "$venv/.plugin" ] && [ "$(cat "$venv/.plugin")" = "$wanted" ]; then
        return
    fi
    say "installing the plug-in: EBS direct and VM Import"
    logged env PIP_CONSTRAINT=localstack/requirements-build.txt \
        "$venv/bin/python" -m pip install --quiet --no-deps --editable localstack/plugin
    echo "$wanted" >"$venv/.plugin"
}

# env -i: nothing of the user's AWS settings reaches it. The settings, all documented by LocalStack but the last:
# FILESYSTEM_ROOT + OVERRIDE_IN_DOCKER=0: its own directories are below there, also on a machine that is a container;
# DNS_ADDRESS=0: no name server on port 53; DISABLE_EVENTS: nothing is reported to its makers;
# SKIP_SSL_CERT_DOWNLOAD: it makes its certificate itself; HOME, TMPDIR: where Python and its libraries write;
# DRSYNC_LOCALSTACK_FAULTS: the plug-in's (plugin/README.md).
start() {
    mkdir -p "$state/root" "$state/home" "$state/tmp"
    setsid env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
        HOME="$state/home" TMPDIR="$state/tmp" FILESYSTEM_ROOT="$state/root" OVERRIDE_IN_DOCKER=0 \
        DRSYNC_LOCALSTACK_FAULTS="${DRSYNC_LOCALSTACK_FAULTS:-}" GATEWAY_LISTEN="127.0.0.1:$port" DNS_ADDRESS=0 DISABLE_EVENTS=1 SKIP_SSL_CERT_DOWNLOAD=1 \
        "$venv/bin/python" -P localstack/serve.py >"$state/log" 2>&1 </dev/null 9>&- &
    echo $! >"$state/pid"
}

wait_until_healthy() {
    local tries
    for tries in $(seq 240); do
        if is_healthy; then
            return
        fi
        if ! kill -0 "$(cat "$state/pid")" 2>/dev/null; then
            tail -n 20 "$state/log" >&2
            fail "it ended at once; its whole output: $state/log"
        fi
        sleep 0.25
    done
    tail -n 20 "$state/log" >&2
    fail "it is not healthy after $((tries / 4)) s; its whole output: $state/log"
}

main() {
    case "${1:-}" in
        --install-only | "") ;;
        *) fail "usage: bash localstack/start.sh [--install-only]" ;;
    esac
    mkdir -p "$root/.lab/localstack"
    exec 9>"$root/.lab/localstack/lock"
    flock 9 # two at once: the second one finds all done
    install
    install_plugin
    if [ "${1:-}" = "--install-only" ]; then
        say "installed"
        return
    fi
    if is_healthy; then
        say "runs already"
    elif is_taken; then
        fail "port $port is taken by something else; try: LOCALSTACK_PORT=$((port + 1)) bash localstack/start.sh"
    else
        start
        wait_until_healthy
    fi
    echo "http://127.0.0.1:$port"
}

main "$@"
