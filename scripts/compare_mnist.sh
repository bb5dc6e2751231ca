#!/usr/bin/env bash
# Six methods and three controls on MNIST, LeNet-300-100, at three densities: search, confirm, compare.
#
#     bash scripts/compare_mnist.sh FOLDER [key=value ...]
#
# FOLDER has MNIST (parquet, IDX or images). Run again it goes on where it was. The page, its main
# picture and the table of all runs come to docs/compare-mnist.html, .svg and .csv. Three hours on 2
# cores.
set -euo pipefail
data=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
. .venv/bin/activate
name=compare-mnist
if [ -d "${SPARSETUNE_STORAGE:-sweeps}/$name" ]; then
    sparsetune resume $name "$@"
else
    sparsetune sweep set dsr sm dst rigl gmp static small_dense dense density=0.02,0.05,0.1 \
        name=$name trials=24 epochs=20 data.name=mnist data.path="$data" model.name=lenet300100 "$@"
fi
sparsetune confirm $name
sparsetune compare $name --csv docs/$name.csv
sparsetune report $name --html docs/$name.html
python scripts/picture.py $name docs/$name.svg
