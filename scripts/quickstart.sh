#!/usr/bin/env bash
# From a clone to a first search: installs into .venv, then one sweep over SET, DSR, SM, DST, static
# and dense on the handwritten digits that scikit-learn ships. No account, no download, no compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup_venv ""
name=${1:-quickstart}
# So little data needs small batches, and a larger alpha for DST to become sparse in time.
exec .venv/bin/sparsetune sweep set dsr sm dst static dense density=0.1 name="$name" \
  trials=8 epochs=15 train.batch_size=32 search.alpha.low=1e-3
