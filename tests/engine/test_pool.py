"""Every backend of the engine against the solo trainer, slot by slot."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sparsetune.engine.pool import Pool, choose, train
from sparsetune.engine.stacked.step import has_compiler
from sparsetune.methods import METHODS
from sparsetune.settings import ModelSettings, OptimizerSettings, TrialSettings
from sparsetune.training import trainer
from sparsetune.training.setup import choose_device, prepare


def settings(method: str, number: int = 0, epochs: int = 3) -> TrialSettings:
    """Trial `number` of a pool: other numbers, same structure."""
    return TrialSettings(
        method=method,
        density=0.2 + 0.1 * (number % 3),
        epochs=epochs,
        seed=number // 2,
        order_seed=7,
        model=ModelSettings(name="mlp", widths=[32, 16]),
        optimizer=OptimizerSettings(lr=0.05 * (1 + number), weight_decay=1e-4 * number),
    )


def alone(trial: TrialSettings) -> list[trainer.Metrics]:
    setup = prepare(trial, choose_device("cpu"))
    state, records = trainer.begin(setup), []
    while state.epoch < trial.epochs:
        state, metrics = trainer.train_epoch(setup, state)
        records.append(metrics)
    return records


def without_time(records: list[trainer.Metrics]) -> list[trainer.Metrics]:
    return [{k: v for k, v in each.items() if k != "device_seconds"} for each in records]


@pytest.mark.parametrize("method", METHODS)
def test_solo_pool_is_the_trainer(method: str) -> None:
    trials = [settings(method, number, epochs=2 + number % 2) for number in range(3)]
    packed = train(trials, slots=2, device="cpu", engine="solo")
    assert [without_time(each) for each in packed] == [without_time(alone(t)) for t in trials]


def test_auto_takes_what_fits() -> None:
    def chosen(method: str, density: float, device: str = "cpu", **changes: Any) -> str:
        trial = dataclasses.replace(settings(method), density=density, **changes)
        return choose("auto", prepare(trial, torch.device(device))).name

    assert [chosen("set", density) for density in (0.05, 0.25, 0.3, 0.9)] == ["csr"] * 2 + [
        "solo"
    ] * 2
    assert chosen("sm", 0.05) == "solo"  # dense gradients at every step
    assert chosen("sm", 0.05, variant={"growth": "random"}) == "csr"
    assert chosen("dst", 0.05) == chosen("gmp", 0.05) == chosen("dense", 1.0) == "solo"
    # 3 * 5,440 FLOPs, 128 images, 10 steps, 100,000 epochs: worth a compiler, where there is one.
    assert chosen("dst", 0.05, epochs=100_000) == ("stacked" if has_compiler() else "solo")


def test_a_pool_takes_no_more_memory_than_its_share() -> None:
    pool = Pool(10_000, "cpu", "stacked", share=1e-4)
    pool.attach("a", settings("set"))
    assert 1 <= pool.slots < 10_000


def test_a_pool_refuses_what_does_not_fit() -> None:
    pool = Pool(1, "cpu")
    pool.attach("a", settings("set"))
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        pool.attach("b", settings("set"))
    pool.attach("a", settings("set", 1))  # the same trial again takes its own slot
    pool.detach("a")
    with pytest.raises(ValueError, match="use another pool"):
        pool.attach("c", dataclasses.replace(settings("set"), model=ModelSettings(widths=[5])))
    with pytest.raises(ValueError, match="csr cannot train this: method: dst begins dense"):
        pool.attach("c", settings("dst"))
    assert len(pool) == 0 and pool.advance() == {}


def test_a_csr_pool_holds_all_methods_that_it_can_train() -> None:
    """Beside others, each trial is what it is alone in a pool, to the last bit."""
    trials = [
        settings("set"),
        dataclasses.replace(settings("set", 1), variant={"prune": "magnitude"}),
        dataclasses.replace(settings("static"), dense_layers=["last"]),
        settings("dsr"),
        settings("rigl"),
    ]
    trials = [dataclasses.replace(each, density=0.2) for each in trials]
    pool = Pool(8, "cpu")
    for number, each in enumerate(trials):
        pool.attach(number, each)
    assert pool.choice is not None and pool.choice.name == "csr"
    together = [pool.advance() for _ in range(3)]
    for number, each in enumerate(trials):
        (by_itself,) = train([each], slots=1, device="cpu")
        assert without_time([epoch[number] for epoch in together]) == without_time(by_itself)


def test_a_trial_moves_between_pools() -> None:
    trial = settings("set")
    first, second = Pool(2, "cpu", "solo"), Pool(1, "cpu", "solo")
    first.attach("a", trial)
    first.advance()
    second.attach("other name", trial, first.snapshot("a"))
    third = Pool(1, "cpu", "solo")
    third.attach("a", trial, first.state("a"))
    moved = second.advance()["other name"]
    assert without_time([moved]) == without_time([third.advance()["a"]])
    assert without_time([moved]) == without_time([alone(trial)[1]])
