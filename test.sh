#!/usr/bin/env bash
# The checks: ./test.sh [pytest arguments]. What is missing is installed into .venv first, once.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
. tools/setup.sh

setup . tools dev
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest -q -n 2 "$@"
