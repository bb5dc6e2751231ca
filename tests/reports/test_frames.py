"""`sparsetune.load`: a row per epoch that says what the journals say, with types to compute on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.check_frame import check_equal
from helpers.told_sweep import EPOCHS, accuracy, confirmed, told

import sparsetune
from sparsetune.store import journal
from sparsetune.store.journal import Journal


def test_a_row_per_epoch_with_types(tmp_path: Path) -> None:
    path = told(tmp_path, ["set", "dense"], "density=0.1,0.2", "trials=4", "name=a")
    frame = sparsetune.load("a", tmp_path)
    for member in ("set@0.1", "set@0.2", "dense"):
        check_equal(frame, path / member)
    assert len(frame) == 3 * 4 * EPOCHS
    types = {name: str(kind) for name, kind in frame.dtypes.items()}
    assert types["member"] == types["role"] == types["status"] == "string"
    assert types["trial"] == types["seed"] == types["epoch"] == types["config.epochs"] == "Int64"
    assert types["density"] == types["val/accuracy"] == types["config.optimizer.lr"] == "float64"
    assert types["config.variant.prune"] == types["config.model.widths"] == "string"
    assert list(frame.columns[:4]) == ["sweep", "member", "space", "method"]
    last = frame[frame["epoch"] == EPOCHS].groupby(["method", "density"])["val/accuracy"].max()
    assert list(last.index) == [("dense", 1.0), ("set", 0.1), ("set", 0.2)]
    # 0.8 + 0.1 density + 0.02 for SET (seed 0), 0.0001 for each trial before the last.
    assert last["set", 0.2] == pytest.approx(0.8 + 0.02 + 0.02 + 0.0003)
    # A key that one member searches and another has fixed is there for both.
    assert frame["config.optimizer.lr"].notna().all()
    assert frame.loc[frame["method"] == "dense", "config.hp.zeta"].isna().all()
    one = sparsetune.load("a/set@0.2", str(tmp_path))
    assert set(one["member"]) == {"a/set@0.2"} and len(one) == 4 * EPOCHS


def test_runs_of_the_confirmation(tmp_path: Path) -> None:
    path = told(tmp_path, ["static"], "density=0.2", "trials=5", "name=a")
    confirmed(path, "seeds=2", "top=2")
    confirmed(path, "seeds=2", "top=1", "multiplier=2")
    frame = sparsetune.load("a", tmp_path)
    for kind in ("search", "confirm", "confirm-2x"):
        check_equal(frame, path / "static@0.2", kind)
    runs = frame[frame["kind"] == "confirm"]
    assert set(runs["role"]) == {"rank", "final", "paper"} and set(runs["seed"]) == {1001, 1002}
    assert set(frame.loc[frame["kind"] == "search", "role"]) == {"sampler", "start:paper"}
    assert set(frame.loc[frame["kind"] == "search", "seed"]) == {0}
    tested = runs[runs["test/accuracy"].notna()]
    assert list(tested["role"]) == ["final", "paper"] * 2 and set(tested["epoch"]) == {EPOCHS}
    test = [t.test for t in journal.load(path / "static@0.2/confirm").trials.values() if t.test]
    assert list(tested["test/accuracy"]) == [each["test/accuracy"] for each in test]
    longer = frame[frame["kind"] == "confirm-2x"]
    assert set(longer["config.epochs"]) == {2 * EPOCHS} == {longer["epoch"].max()}


def test_a_sweep_that_is_being_written(tmp_path: Path) -> None:
    def tell(one: Any, trial: Any, role: str) -> Any:
        return {1: "stopped", 2: "diverged", 3: "failed"}.get(trial.number) or accuracy(
            one, trial, role
        )

    path = told(tmp_path, ["set"], "density=0.2", "trials=4", "name=a", tell=tell)
    with_more = Journal.open(path / "set@0.2")
    with_more.append({"type": "extend", "trials": 5})
    begun = {"params": {"hp.zeta": 0.3}, "distributions": {}, "origin": "sampler", "fixed": {}}
    with_more.append({"type": "suggest", "number": 4, "in_study": False, **begun})
    frame = sparsetune.load("a", tmp_path)
    with_more.close()
    assert list(frame.groupby("trial")["status"].first()) == [
        "finished", "stopped", "diverged", "failed", "running",
    ]  # fmt: skip
    [row] = [row for _, row in frame[frame["trial"] == 4].iterrows()]
    assert row["epoch"] is pd.NA and math.isnan(row["val/accuracy"])
    assert row["config.hp.zeta"] == 0.3
    assert len(frame[frame["trial"] == 1]) == 1


def test_what_there_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(tmp_path, ["static"], "density=0.2", "trials=1", "name=a")
    with pytest.raises(ValueError, match=r"there is no sweep 'b' in .*; there are: a"):
        sparsetune.load("b", tmp_path)
    with pytest.raises(ValueError, match="storage: 'ftp://x' is no place for sweeps"):
        sparsetune.load("a", "ftp://x")
    monkeypatch.setenv("SPARSETUNE_STORAGE", str(tmp_path))
    assert len(sparsetune.load("a")) == EPOCHS
