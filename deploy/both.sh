#!/bin/sh
# Environment and server binaries side by side: on a bare machine the servers are built from source, which takes minutes of its own.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -m resources.servers.binaries &
servers=$!
sh deploy/environment.sh || { kill "$servers" 2>/dev/null || true; exit 3; }
wait "$servers"
