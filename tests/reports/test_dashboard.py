"""optuna-dashboard on a sweep that is being written: what its own interface answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from click.testing import CliRunner
from helpers.command import command, environment
from helpers.told_sweep import accuracy, told
from optuna.trial import TrialState

from sparsetune.cli import main
from sparsetune.reports import dashboard
from sparsetune.reports.dashboard import Copy
from sparsetune.search.study import MemberStudy
from sparsetune.sweeps.create import Extension, opened

WORDS = ["density=0.2", "name=a", "trials=4"]


def ended(one: Any, trial: Any, role: str) -> Any:
    return {1: "stopped", 2: "diverged", 3: "failed"}.get(trial.number) or accuracy(
        one, trial, role
    )


@contextmanager
def driven(path: Path, trials: int, **wanted: Any) -> Iterator[MemberStudy]:
    """The search of a sweep's one member as its driver holds it."""
    extension = Extension(trials=trials, **wanted)
    with opened(path.parent, path.name, extension) as [one]:
        yield MemberStudy(one.member, one.journal, 0)


def test_a_copy_follows_its_journal(tmp_path: Path) -> None:
    path = told(tmp_path, ["static"], *WORDS, tell=ended)
    memory = optuna.storages.InMemoryStorage()
    copy = Copy(path / "static@0.2", memory)
    copy.update()
    study = optuna.load_study(study_name="a/static@0.2", storage=memory)
    states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL]
    assert [trial.state for trial in study.trials] == states
    assert study.trials[1].intermediate_values == {1: 0.1}
    assert study.trials[0].user_attrs["origin"] == "start:paper"
    with driven(path, 6) as search:
        trial = search.suggest()
        search.report(4, 1, {"val/accuracy": 0.5}, "CONTINUE")
        copy.update()
        [running] = study.get_trials(states=[TrialState.RUNNING])
        assert (running.number, running.intermediate_values) == (4, {1: 0.5})
        assert running.params == trial.params
        search.report(4, 2, {"val/accuracy": 0.6}, "CONTINUE")
        search.end(4, "finished")
        search.suggest()
        search.end(5, "failed", error="no memory")
        copy.update()
        copy.update()
        [*_, finished, failed] = search.study.trials
    for one, other in zip(study.trials[-2:], (finished, failed), strict=True):
        assert (one.state, one.values, one.params) == (other.state, other.values, other.params)
    assert study.trials[4].intermediate_values == {1: 0.5, 2: 0.6}
    # A failed trial that is tried again is one more, under its own number.
    with driven(path, 6, retry_failed=True) as search:
        copy.update()
        again = study.get_trials(states=[TrialState.RUNNING])
        assert [t.user_attrs["trial"] for t in again] == [3, 5]
        search.end(5, "diverged")
        copy.update()
        assert [t.user_attrs["trial"] for t in study.get_trials(states=[TrialState.RUNNING])] == [3]
    assert len(study.trials) == 8


@pytest.mark.slow
def test_the_dashboard_shows_a_sweep_that_runs(tmp_path: Path) -> None:
    pytest.importorskip("optuna_dashboard")
    path = told(tmp_path, ["static", "dense"], *WORDS, tell=ended)
    files = sorted(path.rglob("*"))
    words = command("dashboard", "a", "--port", "0", f"storage={tmp_path}")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.partition("/dashboard")[0]
        assert address.startswith("http://127.0.0.1:"), line

        def asked(place: str) -> Any:
            with urllib.request.urlopen(address + place, timeout=10) as answer:
                return json.loads(answer.read())

        studies = {s["study_name"]: s["study_id"] for s in asked("/api/studies")["study_summaries"]}
        assert list(studies) == ["a/static@0.2", "a/dense"]
        place = f"/api/studies/{studies['a/dense']}?after=0"
        found = asked(place)["trials"]
        assert [t["state"] for t in found] == ["Complete", "Pruned", "Fail", "Fail"]
        with urllib.request.urlopen(address + "/dashboard", timeout=10) as page:
            assert b"<html" in page.read()
        with opened(tmp_path, "a/dense", Extension(trials=5)) as [one]:
            search = MemberStudy(one.member, one.journal, 0)
            search.suggest()
            search.report(4, 1, {"val/accuracy": 0.75}, "CONTINUE")
            one.journal.sync()
            deadline = time.monotonic() + 30
            while len(found := asked(place)["trials"]) < 5:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert found[4]["state"] == "Running"
        assert found[4]["intermediate_values"] == [{"step": 1, "value": 0.75}]
        refused = urllib.request.Request(f"{address}/api/studies/0", method="DELETE")
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(refused, timeout=10)
        with pytest.raises(ValueError, match=r"cannot be used .* give another by --port"):
            dashboard.serve(tmp_path, "a", int(address.rpartition(":")[2]))
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()
    assert sorted(path.rglob("*")) == files


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(tmp_path, ["dense"], "name=a", "trials=1")
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    done = CliRunner().invoke(main, ["dashboard", "a", f"storage={tmp_path}"])
    assert done.exit_code == 2
    assert "pip install 'sparsetune[dashboard]'" in done.stderr


def test_no_such_sweep(tmp_path: Path) -> None:
    pytest.importorskip("optuna_dashboard")
    done = CliRunner().invoke(main, ["dashboard", "b", f"storage={tmp_path}"])
    assert done.exit_code == 2
    assert "there is no sweep 'b'" in done.stderr
