# shellcheck shell=bash
# One LocalStack: its port, its files, whether it runs. Sourced by start.sh and stop.sh, which set `root`; needs bash.

port=${LOCALSTACK_PORT:-4566}
# shellcheck disable=SC2154 # the scripts that source this set it
state=$root/.lab/localstack/$port

say() { echo "localstack: $*" >&2; }

fail() {
    say "$*"
    exit 1
}

# logged COMMAND...: run it with its output in a file, which is shown when it fails.
logged() {
    local log=$root/.lab/localstack/setup.log
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        fail "failed: $* (the whole output: $log)"
    fi
}

# is_taken: somebody listens on the port.
is_taken() {
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null
}

# is_healthy: it is LocalStack that answers there. (Plain bash: not every machine has curl.)
is_healthy() {
    # shellcheck disable=SC2016 # the inner bash expands it
    timeout 5 bash -c '
        exec 3<>"/dev/tcp/127.0.0.1/$1"
        printf "GET /_localstack/health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n" >&3
        grep -q "\"services\":" <&3
    ' health "$port" 2>/dev/null
}

# runs: the process that start.sh started here lives. Its command line is looked at, since a pid can be reused.
runs() {
    local pid
    pid=$(cat "$state/pid" 2>/dev/null) || return 1
    [ -n "$pid" ] && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q 'localstack/serve\.py'
}
