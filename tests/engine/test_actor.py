"""The engine behind its Ray actor: trials come, go, die and take engines with them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Hashable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from sparsetune.cluster.trial import EngineActor, Moved, _records
from sparsetune.engine.actor import Engine
from sparsetune.engine.places import Place, wait_for_company
from sparsetune.engine.pool import Pool
from sparsetune.settings import ModelSettings, TrainSettings, TrialSettings, to_dict
from sparsetune.training import checkpoint

EPOCHS = 3
# A network that ends its process, or raises, in the first epoch of trials with a learning rate
# above 1. (The rate reaches the weights, so it is told by what the weights have become.)
POISON = """
import asyncio
import os
import torch
from torch import nn

class Poison(nn.Module):
    def __init__(self, input_shape, num_classes, kind):
        super().__init__()
        self.kind = kind
        self.fc = nn.Linear(64, num_classes)
    def forward(self, x):
        weight = self.fc.weight
        if weight.device.type != "meta" and float(weight.detach().abs().max()) > 5:
            if self.kind == "kill":
                os._exit(9)
            raise RuntimeError("a bad network")
        return self.fc(x.flatten(1))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "poison.py").write_text(POISON)
    env = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{folder}"}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": env},
    )  # fmt: skip
    yield folder
    ray.shutdown()


def engine(folder: Path, slots: int = 4) -> Any:
    options = {"num_cpus": 0, "max_restarts": -1}
    return (
        ray.remote(EngineActor).options(**options).remote("cpu", "solo", slots, 1, 0.5, str(folder))
    )


def config(epochs: int = EPOCHS, lr: float = 0.1, model: ModelSettings | None = None) -> Any:
    settings = TrialSettings(
        method="set", density=0.5, epochs=epochs, train=TrainSettings(batch_size=32),
        model=model or ModelSettings(name="mlp", widths=[16]),
    )  # fmt: skip
    settings.data.limit, settings.optimizer.lr = 200, lr
    return to_dict(settings)


class Trial:
    """What `trial.sweep_trial` is to an engine, by hand."""

    def __init__(self, engine: Any, folder: Path, key: str, given: Any, suspect: bool = False):
        self.engine, self.key, self.folder, self.records = engine, key, folder / key, []
        self.given = key, given, str(self.folder), 1, [1, 2], suspect
        self.attach()

    def attach(self) -> None:
        self.token = ray.get(self.engine.attach.remote(*self.given))

    def next(self) -> list[dict[str, float]]:
        found: list[dict[str, float]] = []
        while not found:
            found = ray.get(self.engine.after.remote(self.key, self.token, len(self.records)))
        self.records += found
        return found

    def run(self, epochs: int = EPOCHS) -> list[dict[str, float]]:
        while len(self.records) < epochs:
            self.next()
        ray.get(self.engine.detach.remote(self.key, self.token))
        return self.records


def losses(records: list[dict[str, float]]) -> list[float]:
    return [record["train/loss"] for record in records]


def test_a_trial_has_no_torch(cluster: Path, tmp_path: Path) -> None:
    options = {"name": "named", "num_cpus": 0}
    one = ray.remote(EngineActor).options(**options).remote("cpu", "solo", 1, 1, 0.5, str(cluster))

    @ray.remote(num_cpus=0)
    def trial() -> list[str]:
        import sys

        from sparsetune.cluster.trial import sweep_trial

        assert callable(sweep_trial)
        ray.get(ray.get_actor("named").detach.remote("x"))
        return [name for name in ("torch", "optuna", "wandb") if name in sys.modules]

    assert ray.get(trial.remote()) == []
    del one


def test_trials_train_side_by_side_and_checkpoint(cluster: Path, tmp_path: Path) -> None:
    one = engine(cluster)
    first, second = (Trial(one, tmp_path, key, config()) for key in "ab")
    assert losses(first.run()) == losses(second.run())
    assert [record["epoch"] for record in first.records] == [1, 2, 3]
    assert checkpoint.saved_epochs(first.folder) == [3]
    # Whoever attaches later with the same folder is told what the checkpoint has.
    assert losses(Trial(one, tmp_path, "a", config()).run()) == losses(first.records)


def test_a_stopped_trial_trains_no_further_epoch(cluster: Path, tmp_path: Path) -> None:
    one = engine(cluster)
    goes, stops = Trial(one, tmp_path, "goes", config(6)), Trial(one, tmp_path, "stops", config(6))
    goes.next(), stops.next()
    time.sleep(0.3)  # of the PATIENCE_SECONDS that the engine waits for a decision
    ray.get(one.detach.remote("stops", stops.token))
    goes.run(6)
    assert checkpoint.saved_epochs(stops.folder) == [1]


def test_the_last_one_to_leave_gives_the_slot_back(cluster: Path, tmp_path: Path) -> None:
    one = engine(cluster)
    stops = Trial(one, tmp_path, "stops", config(6))
    stops.next()
    assert ray.get(one.held.remote()) == 1
    ray.get(one.detach.remote("stops", stops.token))
    deadline = time.monotonic() + 5
    while ray.get(one.held.remote()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_more_trials_than_slots_wait_for_their_turn(cluster: Path, tmp_path: Path) -> None:
    one = engine(cluster, slots=1)
    trials = [Trial(one, tmp_path, str(number), config(2)) for number in range(3)]
    for trial in trials:
        trial.run(2)


def test_a_newer_attachment_takes_the_place_of_an_older(cluster: Path, tmp_path: Path) -> None:
    one = engine(cluster)
    old = Trial(one, tmp_path, "x", config())
    new = Trial(one, tmp_path, "x", config())
    with pytest.raises(KeyError):
        old.next()
    ray.get(one.detach.remote("x", old.token))  # says nothing about the newer one
    assert len(new.run()) == EPOCHS


def test_a_trial_that_cannot_be_trained_is_told_why(cluster: Path, tmp_path: Path) -> None:
    one = engine(cluster)
    good, bad = Trial(one, tmp_path, "good", config()), None
    broken = config()
    broken["model"]["name"] = "nowhere:Net"
    bad = Trial(one, tmp_path, "bad", broken)
    with pytest.raises(RuntimeError, match="module 'nowhere' cannot be imported"):
        bad.next()
    assert len(good.run()) == EPOCHS


def test_an_engine_that_is_killed_comes_back_and_trials_go_on(
    cluster: Path, tmp_path: Path
) -> None:
    one = engine(cluster)
    whole = losses(Trial(one, tmp_path, "whole", config(6)).run(6))
    trial = Trial(one, tmp_path, "cut", config(6))
    trial.next(), trial.next()
    os.kill(ray.get(one.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)
    with pytest.raises((ray.exceptions.RayActorError, KeyError)):
        while True:
            trial.next()
    deadline = time.monotonic() + 60
    while True:
        try:
            trial.attach()
            break
        except ray.exceptions.RayActorError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert losses(trial.run(6)) == whole


@pytest.mark.parametrize("broken", ["save", "snapshot"])
def test_a_checkpoint_that_cannot_be_made_fails_its_trial_alone(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an exception that is no OSError, which would be the storage's."""
    save, snapshot = checkpoint.save, Pool.snapshot

    def break_for_bad(key: str) -> None:
        if key == "bad":
            raise RuntimeError("a bug")

    def breaking_save(folder: Path, *rest: Any) -> Path:
        break_for_bad(folder.name)
        return save(folder, *rest)

    def breaking_snapshot(self: Pool, key: Hashable) -> Any:
        break_for_bad(str(key))
        return snapshot(self, key)

    if broken == "save":
        monkeypatch.setattr(checkpoint, "save", breaking_save)
    else:
        monkeypatch.setattr(Pool, "snapshot", breaking_snapshot)
    engine = Engine("cpu", "solo", 4, 1, 0.5, str(tmp_path))

    async def trial(key: str) -> int:
        token = await engine.attach(key, config(), str(tmp_path / key), 2, [], False)
        num = 0
        while num < EPOCHS:
            num += len(await asyncio.wait_for(engine.after(key, token, num), 60))
        await engine.detach(key, token)
        return num

    async def both() -> list[Any]:
        return await asyncio.gather(trial("good"), trial("bad"), return_exceptions=True)

    good, bad = asyncio.run(both())
    assert good == EPOCHS and checkpoint.saved_epochs(tmp_path / "good") == [EPOCHS]
    assert isinstance(bad, RuntimeError) and "RuntimeError: a bug" in str(bad)
    assert engine._inside.keys() <= {"good"}


def test_an_exception_of_the_engine_is_told_and_ends_its_process(
    cluster: Path, tmp_path: Path
) -> None:
    one = engine(cluster)
    trials = [Trial(one, tmp_path, key, config(6)) for key in "ab"]
    for trial in trials:
        trial.next()

    def damage(actor: Any) -> int:
        def gather() -> None:
            raise SystemExit("a bug")

        actor._engine._gather = gather
        return os.getpid()

    process = ray.get(one.__ray_call__.remote(damage))
    for trial in trials:
        with pytest.raises(RuntimeError, match="SystemExit: a bug"):
            while True:
                trial.next()
    deadline = time.monotonic() + 60
    while True:
        try:
            assert ray.get(one.__ray_call__.remote(lambda self: os.getpid())) != process
            break
        except (ray.exceptions.RayActorError, AssertionError):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    for trial in trials:
        trial.attach()
        trial.run(6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raise", "kill"])
def test_a_poison_trial_fails_and_the_others_do_not(
    kind: str, cluster: Path, tmp_path: Path
) -> None:
    one = engine(cluster)
    network = ModelSettings(name="poison:Poison", args={"kind": kind})
    rates = {"a": 0.1, "poison": 1000.0, "b": 0.1}
    trials = {
        key: Trial(one, tmp_path, key, config(lr=lr, model=network)) for key, lr in rates.items()
    }
    failed: dict[str, str] = {}
    deaths = dict.fromkeys(trials, 0)
    deadline = time.monotonic() + 120
    while any(len(t.records) < EPOCHS for k, t in trials.items() if k not in failed):
        assert time.monotonic() < deadline
        for key, trial in trials.items():
            if key in failed or len(trial.records) == EPOCHS:
                continue
            try:
                if not trial.token:
                    trial.given = *trial.given[:5], deaths[key] > 1
                    trial.attach()
                found = ray.get(one.after.remote(key, trial.token, len(trial.records)), timeout=30)
                trial.records += found
                if found:
                    deaths[key] = 0
            except RuntimeError as error:
                failed[key] = str(error)
            except (ray.exceptions.RayActorError, KeyError):
                deaths[key] += trial.token > 0
                trial.token = 0
                time.sleep(0.2)
    assert failed.keys() == {"poison"}
    expected = "a bad network" if kind == "raise" else "killed its engine"
    assert expected in failed["poison"]
    assert losses(trials["a"].records) == losses(trials["b"].records)


def test_trials_wait_for_company_where_many_epochs_are_under_way() -> None:
    """16 slots: four trials are company. A trial of 8 epochs waits for two at most."""

    def place(epochs_done: int, waited: int = 0) -> Place:
        records = [{"epoch": float(n)} for n in range(epochs_done)]
        settings = TrialSettings(epochs=8)
        given = ("x", 1, settings, Path(), 1, frozenset[int](), False, asyncio.Event())
        return Place(*given, records=records, waited=waited)

    one, four = [place(0)], [place(0) for _ in range(4)]
    two_epochs = [place(n % 2) for n in range(12)]
    three_epochs = [place(n % 3) for n in range(12)]
    assert not wait_for_company(one, two_epochs, 16)
    assert wait_for_company(one, three_epochs, 16)
    assert wait_for_company(one, three_epochs + three_epochs[:3], 16)
    assert not wait_for_company(four, three_epochs, 16)
    # Four wait, but one slot is free.
    assert wait_for_company(four, three_epochs + three_epochs[:3], 16)
    assert wait_for_company([place(0, waited=1)], three_epochs, 16)
    assert not wait_for_company([place(0, waited=2)], three_epochs, 16)


def test_an_engine_that_does_not_answer_is_no_failure_of_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As while its process is suspended, or the network is away; a sweep's engines were once."""

    def away(*_: Any) -> None:
        raise ray.exceptions.ActorUnavailableError("no answer", None)

    engine = SimpleNamespace(attach=SimpleNamespace(remote=lambda *_: None))
    monkeypatch.setattr("sparsetune.cluster.trial.ENGINE_SECONDS", 0.0)
    monkeypatch.setattr(ray, "get_actor", lambda name: engine)
    monkeypatch.setattr(ray, "get", away)
    about = {"member": "m", "number": 0, "engine": "engine-0", "folder": "", "save_every": 1}
    with pytest.raises(Moved):
        list(_records({"epochs": 1}, about | {"decisions": []}, suspect=False))
