"""Published figures beside ours: `python scripts/reproduce.py mnist-5ep --data FOLDER`.

mnist-5ep: MNIST, LeNet-300-100, 60,000 training images, 5 epochs, batch 128, lr 0.1 cosine,
momentum 0.9, weight decay 5e-4, uniform density, nn.Linear's initialisation; test accuracy after
the last epoch, mean of 3 seeds. Needs torch and the parquet files alone: no Ray, no Optuna, no W&B.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import platform
import statistics
import time
from typing import Any

import torch

from sparsetune.settings import DataSettings, ModelSettings, TrialSettings, UpdateSettings
from sparsetune.training import data, trainer
from sparsetune.training.setup import prepare

EPOCHS = 5
SET = {"variant": {"prune": "magnitude", "new_value": "zero", "decay": "cosine"}}
DSR = {"update": UpdateSettings(every=100, stop=0.9, doublings=[])}
# (label, published %, settings). Published: accuracy of public code at these settings.
ROWS: list[tuple[str, float | None, dict[str, Any]]] = [
    ("dense", 98.4, {"method": "dense"}),
    ("SM 0.1", 97.9, {"method": "sm", "density": 0.1}),
    ("SET 0.1", 97.1, {"method": "set", "density": 0.1, **SET}),
    ("static 0.1", 96.9, {"method": "static", "density": 0.1}),
    ("DSR 0.1", None, {"method": "dsr", "density": 0.1, **DSR}),
    ("SM 0.05", 97.2, {"method": "sm", "density": 0.05}),
    ("SET 0.05", 95.1, {"method": "set", "density": 0.05, **SET}),
    ("static 0.05", 94.3, {"method": "static", "density": 0.05}),
    ("DSR 0.05", None, {"method": "dsr", "density": 0.05, **DSR}),
    ("DST", 98.0, {"method": "dst", "hp": {"alpha": 5e-4}}),
]


def run(settings: TrialSettings) -> tuple[float, float]:
    """(test accuracy in %, density over all weights) after the last epoch."""
    torch.set_num_threads(1)
    setup = prepare(settings, torch.device("cpu"))
    state = trainer.begin(setup)
    for _ in range(settings.epochs):
        state, metrics = trainer.train_epoch(setup, state)
    _, accuracy = trainer.evaluate(setup, state, data.load_test(settings.data))
    return 100 * accuracy, metrics["density/all"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=["mnist-5ep"])
    parser.add_argument("--data", required=True, help="folder with the MNIST parquet files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="", help="only rows whose label holds this text")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    source = DataSettings(name="mnist", path=options.data, validation=0.0)
    data.load(source), data.load_test(source)  # decoded once, not by every process
    rows = [row for row in ROWS if options.rows in row[0]]
    began = time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor(options.processes) as pool:
        jobs = {
            label: [
                pool.submit(
                    run,
                    TrialSettings(
                        epochs=EPOCHS,
                        seed=seed,
                        data=source,
                        model=ModelSettings(name="lenet300100"),
                        **changes,
                    ),
                )
                for seed in range(options.seeds)
            ]
            for label, _, changes in rows
        }
        print(f"{'':12} published  measured  difference  density  seeds")
        for label, published, _ in rows:
            accuracies, densities = zip(*(job.result() for job in jobs[label]), strict=True)
            mean = statistics.mean(accuracies)
            beside = (
                f"{published:9.1f}  {mean:8.2f}  {mean - published:+10.2f}"
                if published
                else (f"{'-':>9}  {mean:8.2f}  {'-':>10}")
            )
            seeds = " ".join(f"{a:.2f}" for a in accuracies)
            print(f"{label:12} {beside}  {statistics.mean(densities):7.4f}  {seeds}", flush=True)
    print(
        f"{time.perf_counter() - began:.0f} s; torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, {options.processes} processes"
    )


if __name__ == "__main__":
    main()
