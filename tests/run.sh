#!/usr/bin/env bash
# All tests, each once: every notebook (nbdev_test), then this folder (pytest). Needs `pip install -e '.[dev]'`.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # two processes of one thread each finish three times sooner than two of two on two cores
nbdev_test --n_workers 2 --do_print --timing
python -m pytest tests -n 2 --dist loadfile # the tests of a file share what its first one made
