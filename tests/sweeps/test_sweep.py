"""Sweeps end to end at toy size, through the command line: what is written, and what survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import processes
from helpers.command import (
    TOY,
    check_complete,
    environment,
    reports,
    run,
    start,
    wait_for_reports,
)
from helpers.wandb_files import read_runs

from sparsetune.store import journal, layout
from sparsetune.training import checkpoint
from sparsetune.training.setup import setup_of

LONGER = ["epochs=12", *TOY[1:]]
KILLS = int(os.environ.get("SPARSETUNE_KILLS", "5"))  # each is a start of Ray, some 15 seconds


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of three members with three trials each."""
    folder = tmp_path_factory.mktemp("toy")
    run(folder, "sweep", "set", "sm", "dense", "density=0.2", "name=toy", "trials=3", *TOY)
    return folder


def test_a_sweep_writes_a_journal_per_member(toy: Path) -> None:
    for member in ("set@0.2", "sm@0.2", "dense"):
        record = check_complete(toy / "sweeps/toy" / member, trials=3, epochs=3)
        points = ["start:paper"] if member == "dense" else ["start:paper", "start:seed-text"]
        assert [t.origin for t in record.trials.values()][: len(points)] == points
    metrics = record.trials[0].reports[-1].metrics
    assert {"train/loss", "val/loss", "val/accuracy", "density/all", "device_seconds"} <= set(
        metrics
    )
    assert not any(key.startswith("test/") for key in metrics)


def test_seed_text_outside_the_space_counts_but_is_not_in_the_study(toy: Path) -> None:
    seed_text = journal.load(toy / "sweeps/toy/set@0.2").trials[1]
    assert seed_text.fixed["variant.prune"] == "threshold"
    assert not seed_text.in_study


def test_checkpoints_hold_the_trial_and_its_records(toy: Path) -> None:
    member = toy / "sweeps/toy/set@0.2"
    for one in journal.load(member).trials.values():
        folder = layout.trial_folder(member, one.number)
        assert checkpoint.saved_epochs(folder) == [3]
        saved = torch.load(folder / "e0003.pt", weights_only=True)
        assert [r["epoch"] for r in saved["records"]] == [1, 2, 3]
        assert saved["records"][-1]["val/accuracy"] == one.reports[-1].metrics["val/accuracy"]
        # Density 0.2 of 64*16 + 16*10 weights: 237 in all, stored as values with their index.
        assert sum(len(index) for index in saved["index"].values()) == 237
        assert set(saved["params"]["fc1.weight"]) == {"value"}


def test_a_restored_trial_gives_the_recorded_accuracy(toy: Path) -> None:
    record = journal.load(toy / "sweeps/toy/sm@0.2")
    from sparsetune.space.member import Member
    from sparsetune.training import trainer

    member = Member.from_header(record.header["member"])
    one = record.trials[2]
    settings = member.trial_settings(one.params, one.fixed)
    setup = setup_of(settings, "cpu")
    state, _ = checkpoint.restore(setup, layout.trial_folder(toy / "sweeps/toy/sm@0.2", 2))
    measured = trainer.measure(setup, state, state.masks)
    assert measured["val/accuracy"] == pytest.approx(one.reports[-1].metrics["val/accuracy"])


def test_wandb_has_one_run_per_trial_with_each_epoch_once(toy: Path) -> None:
    runs = read_runs(toy / "sweeps/toy")
    assert len(runs) == 9
    assert {r.group for r in runs} == {"toy"}
    for one in runs:
        assert one.steps == [1, 2, 3]
        assert one.job_type == one.config["method"]
        assert one.config["member"].startswith(f"toy/{one.job_type}")
        assert one.summary["status"] == "finished"
        assert one.summary["best/val/accuracy"] == max(row["val/accuracy"] for row in one.history)
        assert one.config["optimizer"]["lr"] > 0
        assert one.name.startswith(one.job_type)


def test_status_says_what_the_journals_say(toy: Path) -> None:
    status = json.loads(run(toy, "status", "toy", "--json").stdout)
    assert status["name"] == "toy"
    assert status["state"] == "finished"
    first = status["members"][0]
    assert first["name"] == "toy/set@0.2"
    assert first["trials"] == {
        "total": 3,
        "finished": 3,
        "running": 0,
        "stopped": 0,
        "diverged": 0,
        "failed": 0,
    }
    assert first["epochs_trained"] == 9
    record = journal.load(toy / "sweeps/toy/set@0.2")
    last = {n: t.reports[-1].metrics["val/accuracy"] for n, t in record.trials.items()}
    assert first["best"]["value"] == max(last.values()) == last[first["best"]["trial"]]
    one = json.loads(run(toy, "status", "toy/dense", "--json").stdout)
    assert one == status["members"][2]
    every = json.loads(run(toy, "status", "--json").stdout)
    assert [each["name"] for each in every["sweeps"]] == ["toy"]


def test_an_existing_name_is_refused_with_the_command_to_resume(toy: Path) -> None:
    before = sorted(toy.rglob("*"))
    done = run(toy, "sweep", "set", "name=toy", *TOY, check=2)
    assert "sparsetune resume toy" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(toy.rglob("*")) == before


def test_a_cluster_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    sweep = ["sweep", "set", "name=x", *TOY]
    for address in ("127.0.0.1:9", "nonsense"):  # port 9 is the discard service, which is not there
        done = run(tmp_path, *sweep, f"ray.address={address}", check=2)
        assert f"ray.address: no cluster answers at '{address}'" in done.stderr
    done = run(tmp_path, *sweep, "resources.engines=4096", check=2)
    assert "resources: 4096 engines of 1 threads, and this machine has" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_finished_sweep_is_extended(toy: Path) -> None:
    before = journal.load(toy / "sweeps/toy/dense")
    run(toy, "resume", "toy", "trials=4")
    record = check_complete(toy / "sweeps/toy/dense", trials=4, epochs=3)
    assert record.generation == before.generation + 1
    for number, old in before.trials.items():
        assert record.trials[number] == old
    assert len(read_runs(toy / "sweeps/toy")) == 12
    refused = run(toy, "resume", "toy", "trials=2", check=2)
    assert "trials=4 or more" in refused.stderr


def test_interrupted_sweeps_are_resumed(tmp_path: Path) -> None:
    """Ctrl-C, SIGTERM, kill -9 of one member, then all: the asked number, none twice, no gap."""
    words = ["sweep", "set", "static", "density=0.2", "name=cut", "trials=4", *LONGER]
    words.append("scheduler.name=none")
    process = start(tmp_path, *words)
    wait_for_reports(tmp_path, process, 5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path / "out").read_text()
    assert "sparsetune resume cut" in (tmp_path / "out").read_text()
    process = start(tmp_path, "resume", "cut")
    wait_for_reports(tmp_path, process, reports(tmp_path) + 15)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130, (tmp_path / "out").read_text()
    assert json.loads(run(tmp_path, "status", "cut", "--json").stdout)["state"] == "interrupted"
    before = {name: reports(tmp_path / "sweeps/cut" / name) for name in ("set@0.2", "static@0.2")}
    process = start(tmp_path, "resume", "cut/set@0.2", "concurrency=1")
    wait_for_reports(tmp_path, process, sum(before.values()) + 5)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert reports(tmp_path / "sweeps/cut/set@0.2") >= before["set@0.2"] + 5
    assert reports(tmp_path / "sweeps/cut/static@0.2") == before["static@0.2"]
    run(tmp_path, "resume", "cut")
    for member in ("set@0.2", "static@0.2"):
        check_complete(tmp_path / "sweeps/cut" / member, trials=4, epochs=12)
    runs = read_runs(tmp_path / "sweeps/cut")
    assert len(runs) == 8
    assert all(one.steps == list(range(1, 13)) for one in runs)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_engines_and_trials_that_are_killed_cost_no_trial(tmp_path: Path) -> None:
    words = ["sweep", "set", "dsr", "density=0.2", "name=hit", "trials=4", "epochs=40", *TOY[1:]]
    process = start(tmp_path, *words, "scheduler.name=none", "resources.slots=2")
    for number, title in enumerate(["ray::Engine", "ray::ImplicitFunc", "ray::Engine"]):
        wait_for_reports(tmp_path, process, reports(tmp_path) + 30 + number)
        pids = processes.below(process.pid, title)
        assert pids, title
        os.kill(pids[-1], signal.SIGKILL)
    assert process.wait(300) == 0, (tmp_path / "out").read_text()
    for member in ("set@0.2", "dsr@0.2"):
        check_complete(tmp_path / "sweeps/hit" / member, trials=4, epochs=40)


@pytest.mark.slow
def test_one_trial_at_a_time_killed_often_is_the_search_it_would_have_been(tmp_path: Path) -> None:
    words = ["sweep", "set", "density=0.2", "trials=16", "concurrency=1", *LONGER[:-1]]
    words.append("wandb.mode=disabled")
    run(tmp_path, *words, "name=whole")
    process = start(tmp_path, *words, "name=killed")
    for _ in range(KILLS):
        cut = tmp_path / "sweeps/killed"
        wait_for_reports(cut, process, reports(cut) + 100 // KILLS)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process = start(tmp_path, "resume", "killed")
    assert process.wait(300) == 0

    def essence(name: str) -> list[dict[str, Any]]:
        events = journal.read(tmp_path / f"sweeps/{name}/set@0.2")[1:]
        return [without_times(e) for e in events if e["type"] != "driver"]

    assert essence("killed") == essence("whole")


def without_times(event: dict[str, Any]) -> dict[str, Any]:
    event = {k: v for k, v in event.items() if k not in ("time", "seq", "attempt")}
    if "metrics" in event:
        event["metrics"] = {k: v for k, v in event["metrics"].items() if k != "device_seconds"}
    return event


SPACES = {
    # Trial 0 keeps nearly all weights (alpha 0), trial 1 begins with a tenth of them.
    "two": """
        method: dst
        fixed: {constraint: {density/all: 0.3}, threshold_init: constant}
        search: {alpha: {low: 0.0, high: 0.001}, threshold: {low: 0.0, high: 0.9}}
        start:
          dense: {alpha: 0.0, threshold: 0.0, lr: 0.1, weight_decay: 1e-5}
          sparse: {alpha: 0.001, threshold: 0.9, lr: 0.01, weight_decay: 1e-5}
    """,
    "none": "{method: dst, fixed: {constraint: {density/all: 0.001}}}",
    "nan": "{method: static, fixed: {optimizer.lr: 1e30}}",
    "bug": "{method: static, fixed: {model.name: 'mynet:Net'}}",
}
NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.fc = torch.nn.Linear(64, num_classes)
    def forward(self, x):
        if x.device.type != 'meta':
            raise RuntimeError('a bug of mine')
        return self.fc(x.flatten(1))
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep whose members end as one would rather not; its output is in `said`."""
    folder = tmp_path_factory.mktemp("odd")
    for name, text in SPACES.items():
        (folder / f"{name}.yaml").write_text(textwrap.dedent(text))
    (folder / "mynet.py").write_text(NET)
    spaces = [f"./{name}.yaml" for name in SPACES]
    done = run(
        folder,
        "sweep",
        *spaces,
        "name=odd",
        "trials=2",
        *TOY,
        "failures=2",
        "concurrency=4",
        check=1,
    )
    (folder / "said").write_text(done.stderr)
    return folder


def status_of(folder: Path, member: str) -> dict[str, Any]:
    return dict(json.loads(run(folder, "status", f"odd/{member}", "--json").stdout))


def test_dense_and_ahead_but_infeasible_is_not_best(odd: Path) -> None:
    dense, sparse = check_complete(odd / "sweeps/odd/two@0.3", trials=2, epochs=3).trials.values()
    assert dense.reports[1].metrics["val/accuracy"] > sparse.reports[1].metrics["val/accuracy"]
    assert dense.reports[-1].metrics["density/all"] > 0.3
    assert sparse.reports[-1].metrics["density/all"] <= 0.3
    assert {dense.status, sparse.status} == {"finished"}
    assert status_of(odd, "two@0.3")["best"]["trial"] == 1


def test_nothing_feasible_says_the_lowest_density(odd: Path) -> None:
    status = status_of(odd, "none@0.001")
    assert status["best"] is None
    assert 0.001 < status["lowest_density"] <= 1


def test_a_diverged_trial_is_a_result(odd: Path) -> None:
    assert status_of(odd, "nan@0.1")["trials"]["diverged"] == 2
    runs = [one for one in read_runs(odd / "sweeps/odd") if one.config["optimizer"]["lr"] == 1e30]
    assert [one.summary["status"] for one in runs] == ["diverged"] * 2


def test_a_bug_in_a_users_network_fails_the_trial(odd: Path) -> None:
    assert "a bug of mine" in (odd / "said").read_text()
    assert status_of(odd, "bug@0.1")["trials"]["failed"] == 2
    errors = list(odd.rglob("error.txt"))
    assert len(errors) == 2
    assert all("Traceback" in error.read_text() for error in errors)


def test_several_objectives_give_a_front(tmp_path: Path) -> None:
    run(
        tmp_path,
        "sweep",
        "dst",
        "name=front",
        "trials=4",
        "objective=[val/accuracy,density/all]",
        *TOY,
    )
    status = json.loads(run(tmp_path, "status", "front", "--json").stdout)
    values = [entry["value"] for entry in status["best"]]
    assert values
    for a in values:
        assert not any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in values)


def test_train_needs_no_ray_and_writes_what_a_sweep_writes(tmp_path: Path) -> None:
    done = run(tmp_path, "train", "sm", "start=seed-text", "density=0.2", *TOY)
    assert done.stderr.count("epoch ") == 3
    status = json.loads(run(tmp_path, "status", "train-sm-1", "--json").stdout)
    assert status["trials"]["finished"] == 1
    record = journal.load(tmp_path / "sweeps/train-sm-1/sm@0.2")
    assert record.trials[0].origin == "start:seed-text"
    [saved] = tmp_path.rglob("e0003.pt")
    assert saved.parent.name == "00000"
    [one] = read_runs(tmp_path / "sweeps/train-sm-1")
    assert one.steps == [1, 2, 3]
    run(tmp_path, "train", "sm", "density=0.2", *TOY)
    assert (tmp_path / "sweeps/train-sm-2").is_dir()


def test_a_killed_train_is_resumed_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    longer = ["epochs=60", *TOY[1:]]
    run(tmp_path, "train", "dsr", "density=0.2", "name=whole", *longer)
    process = start(tmp_path, "train", "dsr", "density=0.2", "name=cut", *longer)
    wait_for_reports(tmp_path / "sweeps/cut", process, 5)
    process.kill()
    process.wait()
    assert reports(tmp_path / "sweeps/cut") < 60
    run(tmp_path, "resume", "cut")

    def last(name: str) -> dict[str, float]:
        record = journal.load(tmp_path / f"sweeps/{name}/dsr@0.2")
        return {
            k: v for k, v in record.trials[0].reports[-1].metrics.items() if k != "device_seconds"
        }

    assert last("cut") == last("whole")


def test_trainable_in_anybodys_tuner(tmp_path: Path) -> None:
    script = tmp_path / "tuner.py"
    script.write_text(
        "import ray\n"
        "from ray import tune\n"
        "import sparsetune\n"
        "ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
        "space = {'method': 'set', 'density': 0.1, 'epochs': 3,\n"
        "         'hp': {'zeta': tune.uniform(0.1, 0.5)}, 'optimizer': {'lr': 0.1},\n"
        "         'data': {'limit': 200}, 'model': {'widths': [16]}, 'train': {'batch_size': 32}}\n"
        "tuner = tune.Tuner(sparsetune.trainable, param_space=space,\n"
        "    tune_config=tune.TuneConfig(metric='val/accuracy', mode='max', num_samples=2),\n"
        f"    run_config=tune.RunConfig(storage_path={str(tmp_path)!r}, name='x', verbose=0))\n"
        "results = tuner.fit()\n"
        "assert not results.errors, results.errors\n"
        "best = results.get_best_result()\n"
        "assert best.metrics['epoch'] == 3 and best.checkpoint is not None\n"
        "print('accuracy', best.metrics['val/accuracy'])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accuracy" in done.stdout
