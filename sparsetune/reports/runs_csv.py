"""All runs of a comparison as a csv file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import IO, Any

from sparsetune.comparison.values import Comparison

COLUMNS = (
    "cell", "sweep", "space", "method", "density asked", "state", "setting", "trial", "seed",
    "status", "test accuracy", "density", "density sparse", "parameters", "flops train",
    "flops inference", "dense gradient", "tuning trials", "tuning finished",
    "tuning stopped", "tuning diverged", "tuning failed", "tuning epochs", "tuning device-seconds",
)  # fmt: skip


def save_csv(comparison: Comparison, file: Path) -> None:
    """ValueError for a file that is there and is no such table."""
    try:
        if file.exists() and not file.read_bytes().startswith(",".join(COLUMNS).encode()):
            raise ValueError(f"csv: '{file}' is no table of sparsetune; give another --csv FILE")
        with file.open("w", newline="", encoding="utf-8") as opened:
            write_csv(comparison, opened)
    except OSError as error:
        raise ValueError(f"csv: '{file}' cannot be written ({error.strerror})") from error


def write_csv(comparison: Comparison, file: IO[str]) -> None:
    """One row per cell, setting (chosen or paper) and seed; a cell without runs has one row."""
    rows = csv.writer(file)
    rows.writerow(COLUMNS)
    for cell in comparison.cells:
        tuning = cell.tuning
        head: list[Any] = [cell.name, cell.sweep, cell.space, cell.method, cell.density, cell.state]
        tail: list[Any] = [cell.dense_gradient, tuning.asked]
        tail += [tuning.trials[s] for s in ("finished", "stopped", "diverged", "failed")]
        tail += [tuning.epochs, round(tuning.device_seconds, 3)]
        if not cell.chosen and not cell.paper:
            rows.writerow([*head, *[None] * 10, *tail])
        for setting, line in (("chosen", cell.chosen), ("paper", cell.paper)):
            if line is None:
                continue
            whole: list[Any] = [line.density, line.density_sparse, line.parameters]
            whole += [line.flops_train, line.flops_inference]
            for seed, status, test in zip(line.seeds, line.statuses, line.test, strict=True):
                rows.writerow([*head, setting, line.trial, seed, status, test, *whole, *tail])
