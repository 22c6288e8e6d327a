#!/usr/bin/env bash
# Sets everything up in .venv and does one thing:
#   ./run.sh demo    annotate two small corpora of different domains with the bundled bank
#   ./run.sh test    lint, types and tests
#   ./run.sh setup   only set up
set -euo pipefail
cd "$(dirname "$0")"
venv="${VENV:-.venv}"
python="$venv/bin/python"

setup() {
    if [ ! -x "$python" ]; then
        "${PYTHON:-python3}" -m venv "$venv"
    fi
    "$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
    "$python" -m pip install --quiet --disable-pip-version-check -e ".[offline,$1]"
}

case "${1:-}" in
demo)
    setup offline
    "$python" -m spacy sam demo
    ;;
test)
    setup dev
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
    "$python" -m pytest
    ;;
setup)
    setup dev
    ;;
*)
    sed -n '2,5p' "$0"
    exit 2
    ;;
esac
