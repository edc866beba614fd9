#!/usr/bin/env bash
# The checks: ./test.sh [pytest arguments]. What is missing is installed into .venv first, once.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
. tools/setup.sh

setup . tools dev
"$python" -m ruff check .
# Two workers, so one thread each: more would wait for each other's cores, and many times as long.
export OMP_NUM_THREADS=1
exec "$python" -m pytest -q -n 2 "$@"
