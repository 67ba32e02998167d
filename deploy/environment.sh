#!/bin/sh
# Makes .venv from deploy/requirements.lock, every package by hash. Idempotent; takes uv from PATH or installs the pinned one for itself.
set -eu
cd "$(dirname "$0")/.."
export UV_NO_CONFIG=1 UV_PYTHON_DOWNLOADS="${UV_PYTHON_DOWNLOADS:-never}"

python=$(sh deploy/python.sh)
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
stamp=.venv/.lock
wanted="$minor $(cat deploy/requirements.lock pyproject.toml | cksum)"
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

say() { echo "environment: $*" >&2; }
fail() {
    say "$*"
    exit 3
}

uv=$(command -v uv || true)
if [ -z "$uv" ]; then
    tools="${XDG_CACHE_HOME:-$HOME/.cache}/repro-assets/uv-$(cksum <deploy/uv.txt | cut -d' ' -f1)"
    uv="$tools/bin/uv"
    if [ ! -x "$uv" ]; then
        say "installing uv into $tools"
        new="$tools.$$"
        "$python" -m venv "$new" || fail "$python has no working venv module: on Debian install python3-venv, or put uv in PATH"
        "$new/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r deploy/uv.txt ||
            fail "pip could not fetch uv: check the network or the package index (PIP_INDEX_URL), or put uv in PATH"
        rm -rf "$tools" && mv "$new" "$tools"
    fi
fi

total=$(grep -c '==' deploy/requirements.lock)
say ".venv with Python $minor and up to $total locked packages (about 7 GB with PyTorch; a minute when they come from a cache)"
rm -f "$stamp"
kept=--allow-existing
[ "$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$minor" ] || kept=--clear
"$uv" venv --quiet $kept --python "$python" .venv || fail "uv could not make .venv with $python"
touch .venv/.started

# uv shows bars to terminals only, and lists every package afterwards: one line now and then tells more
fetched="$("$uv" cache dir)/archive-v0"
begun=$(date +%s)
(while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
    say "$(find "$fetched" -mindepth 1 -maxdepth 1 -newer .venv/.started 2>/dev/null | wc -l | tr -d ' ') packages fetched, $(($(date +%s) - begun)) s"
done) &
ticker=$!
child=
trap 'kill $ticker 2>/dev/null || true' EXIT
trap 'kill $child 2>/dev/null || true; exit 143' TERM HUP
trap 'kill $child 2>/dev/null || true; exit 130' INT
run() {
    "$@" &
    child=$!
    wait "$child"
}

run "$uv" pip sync --quiet --python .venv/bin/python --require-hashes deploy/requirements.lock ||
    fail "the locked packages could not be installed: check the network or the package index (UV_INDEX_URL), then repeat; what was fetched is kept"
"$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable . 2>/dev/null ||
    "$uv" pip install --quiet --python .venv/bin/python --no-deps --editable . || fail "the project itself could not be installed"
echo "$wanted" >"$stamp"
say "ready after $(($(date +%s) - begun)) s"
