"""Truly sparse trials together: linear layers of which only the active weights exist.

The rule to know: nothing of a sparse layer's size is ever made, not at the beginning, in steps,
updates, snapshots or metrics. A trial is a `csr_trial.Trial`, those of all slots make up a
`csr_pack.Pack`, and this module takes them through their epochs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsetune.engine.csr import index as csr_index
from sparsetune.engine.csr import slot as csr_trial
from sparsetune.engine.csr.pack import Pack, nll
from sparsetune.engine.csr.slot import Trial
from sparsetune.training import models, trainer
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.setup import Batches, Setup, batches, inputs, is_due
from sparsetune.training.trainer import Metrics

Batch = tuple[Tensor, Tensor]  # images [b, features] float32, labels [b]


def unfit(setup: Setup) -> str:
    """Why trials like this one cannot be trained here, in one sentence; "" where they can."""
    settings = setup.settings
    if type(setup.model) is not models.MLP:
        return f"model.name: csr trains mlp and lenet300100, not {settings.model.name}"
    if setup.method.begins != "sparse":
        return f"method: {settings.method} begins dense"
    if setup.method.dense_gradient(setup.variant) == "always":
        return f"method: {settings.method}, as set, needs dense gradients at every step"
    if settings.train.precision != "float32":
        return f"train.precision: csr computes in float32, not {settings.train.precision}"
    return ""


class Csr:
    """See `pool.Backend`."""

    def __init__(self, slots: int) -> None:
        self._trials: dict[int, Trial] = {}
        self._pack: Pack | None = None  # None: to be made

    def attach(self, slot: int, setup: Setup, start: Snapshot | None) -> None:
        trial = csr_trial.begin(setup) if start is None else csr_trial.restore(setup, start)
        self._trials[slot], self._pack = trial, None

    def snapshot(self, slot: int) -> Snapshot:
        return csr_trial.snapshot(self._trials[slot])

    def detach(self, slot: int) -> None:
        del self._trials[slot]
        self._pack = None

    @torch.no_grad()
    def advance(self) -> dict[int, Metrics]:
        began = time.perf_counter()
        trials = list(self._trials.values())
        if not trials:
            return {}
        if self._pack is None:
            self._pack = Pack(trials)
        earlier = [(trial.index(), trial.updates) for trial in trials]
        losses = self._train(self._pack)
        validation = _validate(self._pack)
        results = {}
        sizes = [trial.num_values for trial in trials]
        for k, (slot, trial) in enumerate(self._trials.items()):
            metrics = {"epoch": trial.epoch + 1, "train/loss": losses[k]} | validation[k]
            results[slot] = _ended(trial, metrics, *earlier[k])
        seconds = time.perf_counter() - began
        for metrics, size in zip(results.values(), sizes, strict=True):
            metrics["device_seconds"] = seconds * size / sum(sizes)
        return results

    def _train(self, pack: Pack) -> list[float]:
        """One epoch of steps and updates of all trials, and the mean loss of each."""
        trials, counted = pack.trials, [0] * len(pack.trials)
        for trial in trials:
            trial.active_steps = dict.fromkeys(trial.setup.sparse, 0)
        total = torch.zeros(len(trials), pack.width, dtype=torch.float64, device=pack.device)
        batches = zip(*(_training_batches(trial) for trial in pack.leaders), strict=True)
        for number, batch in enumerate(batches, start=1):
            total += pack.gradients(*zip(*batch, strict=True))
            lrs = [trial.learning_rate() for trial in trials]
            for trial in trials:
                trial.step += 1
            due = [k for k, trial in enumerate(trials) if is_due(trial.setup, trial.step)]
            # An update reads the gradients, which the optimizer's step uses up.
            grads = {k: pack.gradients_of(k) for k in due}
            pack.optimize(lrs)
            for k in due:
                trials[k].count_active(number - counted[k])
                counted[k] = number
                csr_trial.update_topology(trials[k], grads[k], pack.gradient_scores(k))
            if due:
                self._pack = pack = Pack(trials)
        steps = trials[0].setup.steps_per_epoch
        for trial, done in zip(trials, counted, strict=True):
            trial.count_active(steps - done)
        return [float(row.sum()) / (steps * pack.width) for row in total]


def _training_batches(trial: Trial) -> Iterator[Batch]:
    """The batches of the trial's next epoch."""
    epoch = batches(trial.setup, trial.epoch)
    for places in epoch.places:
        images, labels = inputs(trial.setup, epoch, places)
        yield images.flatten(1), labels


def _validation_batches(setup: Setup, size: int) -> Iterator[Batch]:
    held_out = Batches(setup.validation_index, None)
    for places in held_out.places.split(size):
        images, labels = inputs(setup, held_out, places)
        yield images.flatten(1), labels


def _validate(pack: Pack) -> list[Metrics]:
    """`val/loss` and `val/accuracy` of each trial, where images are held out."""
    num = len(pack.trials[0].setup.validation_index)
    if not num:
        return [{} for _ in pack.trials]
    size = (len(pack.trials), pack.width)
    loss = torch.zeros(size, dtype=torch.float64, device=pack.device)
    right = torch.zeros(size, dtype=torch.int64, device=pack.device)
    # Groups in other epochs or orders may hold out the same images.
    splits = {leader.group[0]: leader.setup for leader in pack.leaders}
    batches = (_validation_batches(setup, pack.width) for setup in splits.values())
    for batch in zip(*batches, strict=True):
        of = dict(zip(splits, batch, strict=True))
        images, labels = zip(*(of[leader.group[0]] for leader in pack.leaders), strict=True)
        logits, target = pack.forward(images), pack.labels(labels)
        loss[:, : target.shape[1]] += nll(logits.log_softmax(1), target)
        right[:, : target.shape[1]] += logits.argmax(1) == target
    return [
        {"val/loss": float(losses.sum()) / num, "val/accuracy": float(rights.sum()) / num}
        for losses, rights in zip(loss, right, strict=True)
    ]


def _ended(
    trial: Trial, metrics: Metrics, earlier: dict[str, Tensor], updates_before: int
) -> Metrics:
    """Ends the trial's epoch: all metrics that `trainer.train_epoch` gives but the seconds.

    `earlier` and `updates_before` are its positions and updates at the epoch's beginning.
    """
    setup = trial.setup
    num, batch_size = setup.steps_per_epoch, setup.settings.train.batch_size
    index = trial.index()
    metrics |= trainer.density_metrics(
        setup,
        active={name: len(at) for name, at in index.items()},
        seen=sum(map(len, trial.ever.values())),
        new=sum(csr_index.num_missing(at, earlier[name]) for name, at in index.items()),
    )
    own = setup.method.metrics(trial.params, trial.method, setup.hp)
    metrics |= {f"method/{name}": float(value) for name, value in own.items()}
    active = torch.tensor(list(trial.active_steps.values()), dtype=torch.float64) / num
    flops = trainer.epoch_flops(setup, active, trial.updates - updates_before)
    trial.epoch += 1
    trial.flops += flops * num * min(batch_size, len(setup.train_index))
    metrics |= {"flops/train": flops, "flops/total": trial.flops}
    trial.diverged = trainer.has_diverged(trial.params, metrics)
    metrics["diverged"] = float(trial.diverged)
    return metrics
