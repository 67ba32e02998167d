#!/bin/sh
# Locks every package with hashes for Python 3.11 to 3.13 on Linux and macOS. The file names no registry, so any mirror serves it.
set -eu
cd "$(dirname "$0")/.."
uv=$(command -v uv || ls -d "${XDG_CACHE_HOME:-$HOME/.cache}"/repro-assets/uv-*/bin/uv | head -n 1)
compile() {
    "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --no-emit-index-url \
        --no-emit-find-links "$@"
}
compile --group dev --all-extras pyproject.toml --output-file deploy/requirements.lock --upgrade
printf 'uv==%s\n' "$("$uv" --version | cut -d' ' -f2)" | compile - --output-file deploy/uv.txt
