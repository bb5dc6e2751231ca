"""A trial under Ray Tune: train one setting, report each epoch, go on where it was left.

The rule to know: `epochs` is the one loop of a trial, with Ray or without. It yields the records
that the newest checkpoint has before it trains on, so whoever lost some of them is told again, and
it saves before it yields, so what was reported can be resumed.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsetune import checkpoint, data, trainer
from sparsetune.memory import keep_freed_memory
from sparsetune.settings import DataSettings, TrialSettings, from_dict
from sparsetune.trainer import Metrics

ATTEMPTS = 3  # of one trial under one driver; then it has failed


@functools.lru_cache(maxsize=2)
def _dataset(key: str) -> data.Dataset:
    """Data sets stay with a process, which trains many trials one after another."""
    return data.load(from_dict(DataSettings, json.loads(key)))


def setup_of(settings: TrialSettings, device: str) -> trainer.Setup:
    keep_freed_memory()
    key = json.dumps(vars(settings.data), sort_keys=True)
    return trainer.prepare(settings, trainer.choose_device(device), _dataset(key))


def epochs(
    settings: TrialSettings, device: str, folder: Path, save_every: int
) -> Iterator[Metrics]:
    """Records of all epochs of a trial that checkpoints in `folder`; ends early if it diverges."""
    setup = setup_of(settings, device)
    state, records = checkpoint.restore(setup, folder)
    yield from records
    while state.epoch < settings.epochs and not state.diverged:
        state, metrics = trainer.train_epoch(setup, state)
        records = [*records, metrics]
        if state.epoch % save_every == 0 or state.epoch == settings.epochs or state.diverged:
            checkpoint.save(folder, checkpoint.encode(state), records)
        yield metrics


def _attempt(folder: Path, generation: int) -> int:
    """Counts this attempt at the trial, among those under the present driver, from 1.

    Attempts that ended with an earlier driver say nothing about the trial.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "attempts.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    count = 1 + (known.get("count", 0) if known.get("generation") == generation else 0)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"generation": generation, "count": count}))
    scratch.replace(path)
    return count


def sweep_trial(config: dict[str, Any]) -> None:
    """The trainable of our own sweeps.

    `config` is a trial's settings plus `trial`: member, number, folder, device, threads,
    save_every, generation of the driver and the folders where its modules are found. A trial that
    failed ATTEMPTS times under one driver says so and returns; before that Ray tries it again.
    """
    from ray import tune

    about = config["trial"]
    settings = from_dict(TrialSettings, {k: v for k, v in config.items() if k != "trial"})
    sys.path.extend(entry for entry in about["path"] if entry not in sys.path)
    torch.set_num_threads(about["threads"])
    folder = Path(about["folder"])
    attempt = _attempt(folder, about["generation"])
    try:
        if attempt > ATTEMPTS:
            raise RuntimeError(f"its process died {ATTEMPTS} times")
        for record in epochs(settings, about["device"], folder, about["save_every"]):
            tune.report({**record, "attempt": attempt})
    except Exception as error:
        (folder / "error.txt").write_text(traceback.format_exc())
        if attempt < ATTEMPTS:
            raise
        tune.report({"failed": f"{type(error).__name__}: {error}", "attempt": attempt})


def trainable(config: dict[str, Any]) -> None:
    """A sparse training trial for anybody's `ray.tune.Tuner`; it checkpoints through Tune.

    `config` holds what `TrialSettings` has, nested: {"method": "set", "density": 0.1, "epochs": 3,
    "hp": {"zeta": 0.3}, "optimizer": {"lr": 0.1}, "data": {...}, "model": {...}}; what is left out
    has the defaults. Reports one result per epoch, with the metrics of `trainer.measure`.
    """
    from ray import tune

    from sparsetune.config import trial_settings

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


def trial_folder(member_folder: Path, number: int) -> Path:
    return member_folder.resolve() / "trials" / f"{number:05d}"
