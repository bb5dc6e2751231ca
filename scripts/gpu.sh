#!/usr/bin/env bash
# Everything that wants a GPU, in one command: `bash scripts/gpu.sh [FOLDER of MNIST's parquet files]`.
# The engines' tests, a step's time, and trials trained together against eager solo, solo with CUDA
# graphs (a pool of one slot) and ten processes side by side. Needs torch, pyarrow, PIL (and pytest for
# the tests); PYTHON=... says which.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD
if "$python" -c 'import pytest' 2>/dev/null; then
  "$python" -m pytest tests/engine/test_stacked.py tests/engine/test_pool.py -k gpu
fi
"$python" scripts/bench_step.py --device cuda
for model in lenet300100 lenet5; do
  for method in set dst; do
    "$python" scripts/bench_engine.py --data "${1:-}" --device cuda --processes 1 --beside 10 \
      --backends stacked --slots 1 8 64 256 512 --density 0.1 --repeats 3 --limit 25600 \
      --model "$model" --method "$method"
  done
done
