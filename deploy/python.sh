#!/bin/sh
# Prints the Python that everything is made with: PYTHON when it is set, else the first of the tested names that is new enough.
for name in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
    if command -v "$name" >/dev/null 2>&1 && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        command -v "$name"
        exit 0
    fi
done
if [ -n "${PYTHON:-}" ]; then
    echo "PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13: name one that is, or unset PYTHON" >&2
else
    echo "no Python 3.11, 3.12 or 3.13 in PATH: install one, or name it with PYTHON=/path/to/python3.11" >&2
fi
exit 3
