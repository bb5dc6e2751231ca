"""What a frame of `load` must hold: the journal, row by row."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from sparsetune.comparison import winners
from sparsetune.store import journal


def check_equal(frame: pd.DataFrame, folder: Path, kind: str = "search") -> None:
    """The frame's rows of one member are the reports of its journal, in number order."""
    record = journal.load(folder if kind == "search" else folder / kind)
    sweep = f"{folder.parent.name}/{folder.name}"
    rows = frame[(frame["member"] == sweep) & (frame["kind"] == kind)]
    expected = [(t, r) for t in record.trials.values() for r in t.reports]
    assert len(rows) == len(expected) > 0
    for (_, row), (trial, report) in zip(rows.iterrows(), expected, strict=True):
        number = trial.number if kind == "search" else winners.role(trial)[1]
        assert (row["trial"], row["status"], row["epoch"]) == (number, trial.status, report.epoch)
        for name, value in report.metrics.items():
            assert row[name] == value or (math.isnan(row[name]) and math.isnan(value)), name
        for key, value in (trial.params | trial.fixed).items():
            assert row[f"config.{key}"] == value, key
