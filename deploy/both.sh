#!/bin/sh
# Environment and server binaries side by side: on a bare machine the servers are built from source, which takes minutes of its own.
set -eu
cd "$(dirname "$0")/.."
PYTHON=$(sh deploy/python.sh)
export PYTHON

# A group of its own, so that ending it also ends the compilers; the terminal's Ctrl-C does not reach it, hence the traps.
REPRO_OWN_GROUP=1 "$PYTHON" -m resources.servers.binaries &
servers=$!
# in the background too: a shell looks at its signals only when what runs in the foreground ends, which takes minutes
sh deploy/environment.sh &
environment=$!
stop() {
    trap '' INT TERM HUP
    kill "$servers" "$environment" 2>/dev/null || true
    wait
}
trap 'stop; exit 130' INT
trap 'stop; exit 143' TERM HUP

wait "$environment" || { code=$?; stop; exit "$code"; }
wait "$servers" || { echo "the servers could not be made; the lines that begin with \`servers:\` say why" >&2; exit 3; }
