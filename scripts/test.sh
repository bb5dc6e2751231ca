#!/usr/bin/env bash
# The tests, in .venv: `bash scripts/test.sh`; with arguments they go to pytest
# (`bash scripts/test.sh -m slow`, `bash scripts/test.sh tests/methods/test_ops.py`).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup_venv "[dev]"
exec .venv/bin/python -m pytest -n 2 "$@"
