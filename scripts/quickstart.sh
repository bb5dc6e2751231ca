#!/usr/bin/env bash
# From a clone to a first search: installs into .venv, then one sweep over SET, DSR, SM, DST, static
# and dense on the handwritten digits that scikit-learn ships. No account, no download, no compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup_venv ""
name=${1:-quickstart}
# So little data needs small batches, and a larger alpha for DST to become sparse in time.
.venv/bin/sparsetune sweep set dsr sm dst static dense density=0.1 name="$name" \
  trials=8 epochs=15 train.batch_size=32 search.alpha.low=1e-3
cat <<EOF

What to type next:
  export PATH=$PWD/.venv/bin:\$PATH      # so that the shell finds sparsetune
  sparsetune status $name              # what there is, also while a sweep runs
  sparsetune resume $name trials=16    # eight more trials of each member
  sparsetune confirm $name             # the best of each again, on fresh seeds
  sparsetune report $name              # $name.html: ranking, curves, searches, settings
EOF
