"""Journals that version 0.1.0 wrote (commit 1613ba7) say today what they said then.

`tests/data/journals-1613ba7` holds a finished sweep with two confirmations, and what that commit
printed of it: `status --json`, `compare --json` and the csv of all runs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import sparsetune
from sparsetune.cli import main

THEN = Path(__file__).parents[1] / "data/journals-1613ba7"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(THEN / "old", tmp_path / "sweeps/old")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSETUNE_STORAGE", raising=False)


def output(*words: str) -> str:
    done = CliRunner().invoke(main, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_status() -> None:
    now = json.loads(output("status", "old", "--json"))
    assert now == json.loads((THEN / "status.json").read_text())


def test_compare() -> None:
    table = Path("runs.csv")
    now = json.loads(output("compare", "old", "--json", "--csv", str(table)))
    assert now == json.loads((THEN / "compare.json").read_text())
    assert table.read_text() == (THEN / "runs.csv").read_text()


def test_load() -> None:
    frame = sparsetune.load("old")
    assert len(frame[frame["kind"] == "search"]) == 3 * 4 * 4  # members, trials, epochs
    assert set(frame[frame["kind"] == "confirm"]["role"]) == {"rank", "final", "paper"}


def test_report() -> None:
    page = Path("old.html")
    output("report", "old", "--html", str(page))
    assert "old/set@0.2" in page.read_text()
