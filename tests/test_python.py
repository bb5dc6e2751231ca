"""What `sparsetune` offers to Python: the commands as functions, wherever they are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from helpers.command import environment, run
from helpers.told_sweep import confirmed, told

import sparsetune
from sparsetune.cluster import tuner
from sparsetune.comparison.compare import compare
from sparsetune.settings import OptimizerSettings, TrainSettings
from sparsetune.space.config import parse_words
from sparsetune.space.words import as_words, storage_folder
from sparsetune.store import journal
from sparsetune.store.layout import sweeps
from sparsetune.store.lines import FILE
from sparsetune.sweeps import run as sweeping
from sparsetune.sweeps.launch import Refused

TOY: dict[str, Any] = {
    "epochs": 2,
    "data": {"limit": 200},
    "model.widths": [16],
    "train": {"batch_size": 32},
    "wandb": {"mode": "disabled"},
}
SETTLED = ["density=0.2", "trials=4"]


def python(folder: Path, code: str) -> str:
    """What a script prints."""
    (folder / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_name_is_imported_when_it_is_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys, sparsetune; print([m for m in ('torch', 'ray', 'optuna') if m in sys.modules])"
    )
    assert python(tmp_path, code).strip() == "[]"
    for name in sparsetune.__all__:
        assert name in dir(sparsetune)
        assert getattr(sparsetune, name) is not None
    assert set(sparsetune.PLACES) == {*sparsetune.__all__} - {"__version__"}
    assert Path(sparsetune.__file__).with_name("py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'sweeep'"):
        sparsetune.sweeep  # noqa: B018 - asked for


def test_arguments_are_the_words_of_a_command_line(tmp_path: Path) -> None:
    words = as_words(
        "set", tmp_path / "mine.yaml", name="2024", density=[0.02, 1e-05], storage=tmp_path / "a b",
        optimizer={"lr": 0.1, "nesterov": True}, order_seed=None, objective="val/accuracy",
        search={"zeta": {"low": 0.1}, "optimizer.lr": {"choices": [0.1, 0.2]}},
        constraint={"density/all": 0.5}, **{"model.args": {"depth": "1e3", "wide": "yes"}},
    )  # fmt: skip
    assert words[:2] == ["set", f"{tmp_path}/mine.yaml"]
    assert words[2:5] == ["name=2024", "density=0.02,1e-05", f"storage={tmp_path}/a b"]
    assert parse_words(words[2:]) == {
        "name": "2024", "density": [0.02, 1e-05], "storage": f"{tmp_path}/a b",
        "optimizer.lr": 0.1, "optimizer.nesterov": True, "order_seed": None,
        "objective": "val/accuracy", "search.zeta.low": 0.1,
        "search.optimizer.lr.choices": [0.1, 0.2], "constraint.density/all": 0.5,
        "model.args.depth": "1e3", "model.args.wide": "yes",
    }  # fmt: skip


def test_what_is_wrong_is_a_value_error_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.lrr: no such key; did you mean optimizer.lr"):
        sparsetune.sweep("set", name="a", storage=tmp_path, **{"optimizer.lrr": 0.1})
    with pytest.raises(ValueError, match="epochs: 0 is out of range"):
        sparsetune.sweep(["set"], name="a", storage=tmp_path, epochs=0)
    with pytest.raises(Refused, match="'sets' is no search space; did you mean 'set'"):
        sparsetune.sweep("sets", name="a", storage=tmp_path)
    with pytest.raises(Refused, match="there is no sweep 'a'"):
        sparsetune.resume("a", storage=tmp_path)
    with pytest.raises(Refused, match="there is no sweep 'a'"):
        sparsetune.confirm("a", seeds=3, storage=tmp_path, device="cpu")
    with pytest.raises(ValueError, match="there is no sweep 'a'"):
        sparsetune.report("a", storage=tmp_path)
    assert not list(tmp_path.iterdir())
    told(tmp_path, ["static"], *SETTLED, "name=a")
    with pytest.raises(Refused, match="epochs: 2 -> 3"):
        sparsetune.resume("a", storage=tmp_path, epochs=3)
    with pytest.raises(Refused, match="name: 'a' exists already"):
        sparsetune.sweep("set", name="a", storage=tmp_path)


def test_a_ray_that_is_there_already_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    with pytest.raises(Refused, match=r"this process uses a Ray already; call ray\.shutdown\(\)"):
        sparsetune.sweep("static", name="a", storage=tmp_path, **TOY)
    assert not list(tmp_path.iterdir())


def test_a_finished_sweep_is_resumed_compared_and_reported(tmp_path: Path) -> None:
    path = told(tmp_path, ["set", "static"], *SETTLED, "name=a")
    status = json.loads(run(tmp_path, "status", "a", f"storage={tmp_path}", "--json").stdout)
    assert sparsetune.resume("a", storage=str(tmp_path)) == status
    confirmed(path, "seeds=3")
    comparison = sparsetune.compare("a", storage=tmp_path)
    assert comparison.ranking == compare("a", storage=str(tmp_path)).ranking is not None
    words = ["static", "density=0.2", "name=a", f"storage={tmp_path}"]
    assert all(word in comparison.about["commands"][0].split() for word in ["sweep", *words])
    page = sparsetune.report("a", storage=tmp_path, html=tmp_path / "page.html")
    assert page == tmp_path / "page.html" and "<svg" in page.read_text()
    with pytest.raises(ValueError, match="give one or more sweeps"):
        sparsetune.compare(storage=tmp_path)


LOOP = f"""
import asyncio, json
import sparsetune

async def main():
    # As in a notebook, whose cells run within a loop; then in a thread, where no signal arrives.
    first = sparsetune.sweep("static", name="a", density=0.2, trials=1, **{TOY})
    again = await asyncio.to_thread(sparsetune.resume, "a", trials=2)
    sure = await asyncio.to_thread(sparsetune.confirm, "a", seeds=2, top=1)
    print("RESULT", json.dumps([first, again, sure]))

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_sweep_within_a_running_loop_and_in_a_thread(tmp_path: Path) -> None:
    printed = python(tmp_path, LOOP)
    first, again, sure = json.loads(printed.partition("RESULT ")[2].splitlines()[0])
    assert (first["state"], first["trials"]["finished"]) == ("finished", 1)
    assert (again["state"], again["trials"]["finished"]) == ("finished", 2)
    assert again["best"]["value"] > 0.1
    (member,) = sure["members"]
    assert (sure["state"], member["name"]) == ("finished", "a/static@0.2")
    assert [len(tests) for tests in member["test/accuracy"].values()] == [2]
    assert sweeps(tmp_path / "sweeps") == ["a"]
    header = journal.header(tmp_path / "sweeps/a/static@0.2")
    assert header["argv"][:4] == ["sweep", "static", "name=a", "density=0.2"]
    header = journal.header(tmp_path / "sweeps/a/static@0.2/confirm")
    assert header["argv"] == ["confirm", "a", "seeds=2", "top=1"]


def test_what_science_gives_for_numbers_is_taken(tmp_path: Path) -> None:
    words = as_words(
        "set",
        density=np.array([0.1, 0.25]),
        trials=np.int64(4),
        device=torch.device("cpu"),
        warm_start=None,  # says nothing
        wandb={"entity": None, "tags": ["\N{ROCKET}"]},
        search={"zeta.high": 0.7, "optimizer": {"lr": {"low": 0.1}}},
        model={"args": {"folder": tmp_path}},
    )
    assert parse_words(words[1:]) == {
        "density": [0.1, 0.25],
        "trials": 4,
        "device": "cpu",
        "wandb.tags": ["\N{ROCKET}"],
        "search.zeta.high": 0.7,
        "search.optimizer.lr.low": 0.1,
        "model.args.folder": str(tmp_path),
    }
    # pathlib makes one slash of two; a folder called "s3:" is nobody's wish.
    assert str(storage_folder(Path("s3://bucket/sweeps"))) == "s3://bucket/sweeps"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": {"args": {"x": float("nan")}}}, "model.args.x: nan is no setting"),
        ({"model": {"args": {"x": object()}}}, "model.args.x: <object .* is no setting"),
        ({"search": 3}, "search"),
    ],
)
def test_what_no_words_can_say_is_a_value_error(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sparsetune.sweep("set", name="odd", **settings)
    with pytest.raises(ValueError, match="reads as a setting"):
        sparsetune.sweep("runs/lr=1/mine.yaml", name="odd")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train": TrainSettings(precision="bf16")}, "train.precision"),
        ({"optimizer": OptimizerSettings(name="adam")}, "optimizer.name"),
        ({"optimizer": OptimizerSettings(lr=-1.0)}, "optimizer.lr"),
        ({"distribution": "erdos"}, "distribution"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_train_refuses_what_a_sweep_would(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: "):
        sparsetune.train([sparsetune.TrialSettings(**changes)])


def test_a_member_alone_is_stopped_as_the_whole_sweep_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = told(
        tmp_path, ["set", "gmp"], "name=whole", *SETTLED
    )  # gmp begins dense: no early stopping
    seen: list[str] = []
    monkeypatch.setattr(
        sweeping, "tune", lambda members, stopping, watch: seen.append(stopping.name)
    )
    name = f"{folder.name}/set@0.2"
    assert sparsetune.resume(name, trials=5, storage=tmp_path)["state"] == "interrupted"
    assert seen == ["none"]


def test_a_cluster_that_does_not_answer_leaves_the_journals_alone(tmp_path: Path) -> None:
    folder = told(tmp_path, ["static"], "name=alone", *SETTLED)
    before = {path: path.read_bytes() for path in folder.rglob(FILE)}
    nowhere: dict[str, Any] = {"storage": tmp_path, "ray": {"address": "127.0.0.1:9"}}
    with pytest.raises(Refused, match="no cluster answers"):
        sparsetune.resume(folder.name, trials=9, **nowhere)
    with pytest.raises(Refused, match="no cluster answers"):
        sparsetune.confirm(folder.name, seeds=2, **nowhere)
    assert {path: path.read_bytes() for path in folder.rglob(FILE)} == before


def test_a_ray_of_our_own_that_missed_its_time_limit_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = [RuntimeError("Timed out waiting for file gcs_server_port"), None, RuntimeError("no")]
    monkeypatch.setattr(ray, "shutdown", lambda: None)

    def init(**_: Any) -> None:
        if error := errors.pop(0):
            raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("TUNE_PRINT_ALL_TRIAL_ERRORS", "theirs")
    monkeypatch.delenv("TUNE_GLOBAL_CHECKPOINT_S", raising=False)
    with tuner._ray("", {}):
        assert os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] == "0"
        assert "TUNE_GLOBAL_CHECKPOINT_S" in os.environ
    assert os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] == "theirs"
    assert "TUNE_GLOBAL_CHECKPOINT_S" not in os.environ
    with pytest.raises(RuntimeError, match="no"), tuner._ray("", {}):
        pass
    assert errors == []
