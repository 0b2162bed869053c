#!/usr/bin/env bash
# Ends the LocalStack that start.sh started (LOCALSTACK_PORT as there), and removes what it stored and its log. No other process.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=localstack/instance.sh
source "$root/localstack/instance.sh"

# has_ended PID: it is gone, or waits only for its parent to notice. Not `runs`: a process that ends loses its
# command line first, and its files and sockets later.
has_ended() {
    local state_letter
    state_letter=$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null) || true
    [[ $state_letter == [ZX] || -z $state_letter ]]
}

# end SIGNAL SECONDS: send it, and wait for so long; true when the process has ended.
end() {
    local pid
    pid=$(cat "$state/pid")
    kill "-$1" "$pid" 2>/dev/null || true
    for _ in $(seq $(($2 * 10))); do
        if has_ended "$pid"; then
            return 0
        fi
        sleep 0.1
    done
    return 1
}

if ! runs; then
    say "none runs that was started for port $port"
elif end TERM 20 || end KILL 5; then
    say "stopped"
else
    fail "process $(cat "$state/pid") does not end"
fi
rm -rf "${state:?}"
