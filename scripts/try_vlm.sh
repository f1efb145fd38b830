#!/usr/bin/env bash
# Models of mlx-vlm on compressed caches, in an environment of their own, which is removed again.
#
#     bash scripts/try_vlm.sh             # the version that is known to work
#     bash scripts/try_vlm.sh 0.7.9       # another
#
# The rest of the tests does without mlx-vlm: it needs a newer MLX and brings a lot.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
known=$(sed -n 's/^VLM_KNOWN_TO_WORK = ("\([^"]*\)".*/\1/p' backends/mlx_metal/model/borrowed.py)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet . "mlx-vlm==${1:-$known}" pytest
# the wheel alone, with tests that need neither PyTorch nor the fixtures of all the others
cp -r tests docs "$work"
cd "$work"
OMP_NUM_THREADS=1 venv/bin/python -m pytest -q --noconftest -p no:cacheprovider \
    tests/mlx_metal/test_vlm.py tests/mlx_metal/test_borrowed.py
