#!/bin/sh
# Makes .venv from deploy/requirements.lock, every package by hash. Idempotent; takes uv from PATH or installs the pinned one for itself.
set -eu
cd "$(dirname "$0")/.."
export UV_NO_CONFIG=1 UV_PYTHON_DOWNLOADS="${UV_PYTHON_DOWNLOADS:-never}"

stamp=.venv/.lock
wanted=$(cat deploy/requirements.lock pyproject.toml | cksum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

python=
for name in ${PYTHON:-} python3 python3.11 python3.12 python3.13; do
    if command -v "$name" >/dev/null 2>&1 && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python=$name
        break
    fi
done
[ -n "$python" ] || { echo "no Python 3.11, 3.12 or 3.13 in PATH: install one, or name it with PYTHON=/path/to/python3.11 make ..." >&2; exit 3; }

uv=$(command -v uv || true)
if [ -z "$uv" ]; then
    tools="${XDG_CACHE_HOME:-$HOME/.cache}/repro-assets/uv-$(cksum <deploy/uv.txt | cut -d' ' -f1)"
    uv="$tools/bin/uv"
    if [ ! -x "$uv" ]; then
        echo "environment: installing uv into $tools"
        "$python" -m venv "$tools.new" || { echo "python's venv module does not work: on Debian install python3-venv" >&2; exit 3; }
        "$tools.new/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r deploy/uv.txt
        rm -rf "$tools" && mv "$tools.new" "$tools"
    fi
fi

echo "environment: .venv with $(grep -c '==' deploy/requirements.lock) locked packages (about 7 GB with PyTorch; a minute when they come from a cache)"
rm -f "$stamp"
"$uv" venv --quiet --allow-existing --python "$(command -v "$python")" .venv
"$uv" pip sync --quiet --python .venv/bin/python --require-hashes deploy/requirements.lock
"$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable . ||
    "$uv" pip install --quiet --python .venv/bin/python --no-deps --editable .
echo "$wanted" >"$stamp"
