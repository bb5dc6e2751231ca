"""A trial in a process of its own: for `sparsetune train`, and for anybody's Tuner.

The rule to know: `epochs` yields the records that the newest checkpoint has before it trains on, so
whoever lost some of them is told again, and it saves before it yields, so what was reported can be
resumed. The trials of our own sweeps do the same in an engine (`engine/actor.py`).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsetune.cluster.trial import write_error
from sparsetune.cluster.watch import Watch
from sparsetune.search.study import MemberStudy
from sparsetune.settings import TrialSettings
from sparsetune.space.config import trial_settings
from sparsetune.store.journal import Trial
from sparsetune.store.layout import trial_folder
from sparsetune.store.paths import StorageAway, Trouble, insist
from sparsetune.sweeps.create import Writable
from sparsetune.sweeps.progress import Progress
from sparsetune.sweeps.status import is_done
from sparsetune.training import checkpoint, trainer
from sparsetune.training.setup import setup_of
from sparsetune.training.trainer import Metrics


def epochs(
    settings: TrialSettings, device: str, folder: Path, save_every: int, trouble: Trouble
) -> Iterator[Metrics]:
    """Records of all epochs of a trial that checkpoints in `folder`; ends early if it diverges.

    `trouble` is told of each OSError of the folder (`paths.insist`)."""
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
    saved = tune.get_checkpoint()
    records: list[Metrics] = []
    if saved is None:
        state = trainer.begin(setup)
    else:
        with saved.as_directory() as folder:
            state, records = checkpoint.restore(setup, Path(folder))
    while state.epoch < settings.epochs and not state.diverged:
        state, metrics = trainer.train_epoch(setup, state)
        records.append(metrics)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), checkpoint.encode(state), records)
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def train_alone(writable: Writable, watch: Watch, progress: Progress) -> None:
    """The open and new trials of a member one after another in this process, without Ray."""
    member, record = writable.member, writable.record
    study = MemberStudy(member, writable.journal, member.settings.seed)
    with watch.signals():
        while not is_done(record) and watch.leaving_since is None:
            running = [trial for trial in record.trials.values() if trial.status == "running"]
            _train(writable, study, running[0] if running else study.suggest(), watch, progress)


def _train(
    writable: Writable, study: MemberStudy, trial: Trial, watch: Watch, progress: Progress
) -> None:
    """Trains one trial on, to its end or until somebody wants to leave."""
    sweep = writable.member.settings
    settings = writable.member.trial_settings(trial.params, trial.fixed)
    folder = trial_folder(writable.folder, trial.number)
    metrics: Metrics = {}
    records = epochs(settings, sweep.device, folder, sweep.checkpoint.every, watch.trouble)
    while watch.leaving_since is None:
        try:
            metrics = next(records)
        except StopIteration:
            break
        except StorageAway:
            raise
        except Exception as error:  # noqa: BLE001 - recorded as in a sweep, not as a result
            study.end(trial.number, "failed", error=write_error(folder, error))
            return
        if metrics["epoch"] > len(trial.reports):
            study.report(trial.number, int(metrics["epoch"]), metrics, "CONTINUE")
        progress.epoch(writable.name, metrics, settings.epochs)
        watch.send()
    if metrics.get("diverged"):
        study.end(trial.number, "diverged")
    elif len(trial.reports) == settings.epochs:
        study.end(trial.number, "finished")
