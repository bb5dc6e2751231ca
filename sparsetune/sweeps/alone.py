"""A trial in a process of its own: for `sparsetune train`, and for anybody's Tuner.

The rule to know: `epochs` yields the records that the newest checkpoint has before it trains on, so
whoever lost some of them is told again, and it saves before it yields, so what was reported can be
resumed. The trials of our own sweeps do the same in an engine (`engine/actor.py`).
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsetune.settings import DataSettings, TrialSettings, from_dict
from sparsetune.space.config import trial_settings
from sparsetune.store.paths import Trouble, insist
from sparsetune.training import checkpoint, data, trainer
from sparsetune.training.memory import keep_freed_memory
from sparsetune.training.trainer import Metrics


@functools.lru_cache(maxsize=2)
def _dataset(key: str) -> data.Dataset:
    """Data sets stay with a process, which trains many trials one after another."""
    return data.load(from_dict(DataSettings, json.loads(key)))


def setup_of(settings: TrialSettings, device: str) -> trainer.Setup:
    keep_freed_memory()
    key = json.dumps(vars(settings.data), sort_keys=True)
    return trainer.prepare(settings, trainer.choose_device(device), _dataset(key))


def epochs(
    settings: TrialSettings,
    device: str,
    folder: Path,
    save_every: int,
    trouble: Trouble,
) -> Iterator[Metrics]:
    """Records of all epochs of a trial that checkpoints in `folder`; ends early if it diverges.

    `trouble` is told of each OSError of the folder (`files.insist`)."""
    setup = setup_of(settings, device)
    state, records = insist(lambda: checkpoint.restore(setup, folder), trouble)
    yield from records
    while state.epoch < settings.epochs and not state.diverged:
        state, metrics = trainer.train_epoch(setup, state)
        records = [*records, metrics]
        if state.epoch % save_every == 0 or state.epoch == settings.epochs or state.diverged:
            snapshot = checkpoint.encode(state)
            insist(functools.partial(checkpoint.save, folder, snapshot, records), trouble)
        yield metrics


def trainable(config: dict[str, Any]) -> None:
    """A sparse training trial for anybody's `ray.tune.Tuner`; it checkpoints through Tune.

    `config` holds what `TrialSettings` has, nested: {"method": "set", "density": 0.1, "epochs": 3,
    "hp": {"zeta": 0.3}, "optimizer": {"lr": 0.1}, "data": {...}, "model": {...}}; what is left out
    has the defaults. Reports one result per epoch, with the metrics of `trainer.measure`.
    """
    from ray import tune

    settings = trial_settings(config)
    threads = tune.get_context().get_trial_resources().required_resources.get("CPU", 1)
    torch.set_num_threads(max(1, int(threads)))
    setup = setup_of(settings, "auto")
    given = tune.get_checkpoint()
    records: list[Metrics] = []
    if given is None:
        state = trainer.begin(setup)
    else:
        with given.as_directory() as folder:
            state, records = checkpoint.restore(setup, Path(folder))
    while state.epoch < settings.epochs and not state.diverged:
        state, metrics = trainer.train_epoch(setup, state)
        records.append(metrics)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), checkpoint.encode(state), records)
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
