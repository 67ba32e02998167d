#!/bin/sh
# Environment and server binaries side by side: on a bare machine the servers are built from source, which takes minutes of its own.
set -eu
cd "$(dirname "$0")/.."
PYTHON=$(sh deploy/python.sh)
export PYTHON

# A group of its own, so that ending it also ends the compilers; the terminal's Ctrl-C does not reach it, hence the traps.
REPRO_OWN_GROUP=1 "$PYTHON" -m resources.servers.binaries &
servers=$!
stop() { kill "$servers" 2>/dev/null && wait "$servers" || true; }
trap 'stop; exit 130' INT
trap 'stop; exit 143' TERM HUP

sh deploy/environment.sh || { code=$?; stop; exit "$code"; }
wait "$servers" || { echo "the servers could not be made; the lines that begin with \`servers:\` say why" >&2; exit 3; }
