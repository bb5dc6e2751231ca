"""Truly sparse trials together: linear layers of which only the active weights exist.

The rule to know: nothing of a sparse layer's size is ever made, not at the beginning, in steps,
updates, snapshots or metrics. A trial is a `Slot`, all of them make up a `Pack`, and this module
takes them through their epochs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsetune.engine.csr.index import num_missing
from sparsetune.engine.csr.pack import Pack, nll
from sparsetune.engine.csr.slot import Slot, begin, restore, snapshot, update_topology
from sparsetune.training import models, trainer
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.setup import Batches, Setup, batches, inputs, is_due
from sparsetune.training.trainer import Metrics

Batch = tuple[Tensor, Tensor]  # images [b, features] float32, labels [b]


class Csr:
    """See `pool.Backend`."""

    @staticmethod
    def unfit(setup: Setup) -> str:
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

    def __init__(self, slots: int) -> None:
        self._slots: dict[int, Slot] = {}
        self._pack: Pack | None = None  # None: to be made

    def attach(self, slot: int, setup: Setup, start: Snapshot | None) -> None:
        self._slots[slot] = begin(setup) if start is None else restore(setup, start)
        self._pack = None

    def snapshot(self, slot: int) -> Snapshot:
        return snapshot(self._slots[slot])

    def detach(self, slot: int) -> None:
        del self._slots[slot]
        self._pack = None

    @torch.no_grad()
    def advance(self) -> dict[int, Metrics]:
        began = time.perf_counter()
        if not self._slots:
            return {}
        slots = list(self._slots.values())
        if self._pack is None:
            self._pack = Pack(slots)
        earlier = [(slot.index(), slot.updates) for slot in slots]
        losses = self._train(self._pack)
        validation = _validate(self._pack)
        sizes = [slot.num_values for slot in slots]
        epochs = zip(slots, earlier, losses, validation, strict=True)
        results = dict(zip(self._slots, (_ended(*epoch) for epoch in epochs), strict=True))
        seconds = time.perf_counter() - began
        for metrics, size in zip(results.values(), sizes, strict=True):
            metrics["device_seconds"] = seconds * size / sum(sizes)
        return results

    def _train(self, pack: Pack) -> list[float]:
        """One epoch of steps and updates of all trials, and the mean loss of each."""
        slots, counted = pack.slots, [0] * len(pack.slots)
        for slot in slots:
            slot.active_steps = dict.fromkeys(slot.setup.sparse, 0)
        total = torch.zeros(len(slots), pack.width, dtype=torch.float64, device=pack.device)
        leaders = ((slot.setup, batches(slot.setup, slot.epoch)) for slot in pack.leaders)
        shared = zip(*(_flat_batches(*leader) for leader in leaders), strict=True)
        for number, batch in enumerate(shared, start=1):
            total += pack.gradients(*zip(*batch, strict=True))
            for slot in slots:
                slot.step += 1
            due = [k for k, slot in enumerate(slots) if is_due(slot.setup, slot.step)]
            # An update reads the gradients, which the optimizer's step uses up.
            grads = {k: pack.gradients_of(k) for k in due}
            pack.optimize()
            for k in due:
                slots[k].count_active(number - counted[k])
                counted[k] = number
                update_topology(slots[k], grads[k], pack.gradient_scores(k))
            if due:
                self._pack = pack = Pack(slots)
        steps = slots[0].setup.steps_per_epoch
        for slot, done in zip(slots, counted, strict=True):
            slot.count_active(steps - done)
        return [float(row.sum()) / (steps * pack.width) for row in total]


def _flat_batches(setup: Setup, epoch: Batches) -> Iterator[Batch]:
    """What is at the epoch's places; the last batch may be a smaller one."""
    for places in epoch.places.flatten().split(setup.batch_size):
        images, labels = inputs(setup, epoch, places)
        yield images.flatten(1), labels


def _validate(pack: Pack) -> list[Metrics]:
    """`val/loss` and `val/accuracy` of each trial, where images are held out."""
    num = len(pack.slots[0].setup.validation_index)
    if not num:
        return [{} for _ in pack.slots]
    size = (len(pack.slots), pack.width)
    loss = torch.zeros(size, dtype=torch.float64, device=pack.device)
    right = torch.zeros(size, dtype=torch.int64, device=pack.device)
    # Groups in other epochs or orders may hold out the same images.
    splits = {leader.group[0]: leader.setup for leader in pack.leaders}
    held_out = ((setup, Batches(setup.validation_index, None)) for setup in splits.values())
    for batch in zip(*(_flat_batches(*split) for split in held_out), strict=True):
        by_split = dict(zip(splits, batch, strict=True))
        images, labels = zip(*(by_split[leader.group[0]] for leader in pack.leaders), strict=True)
        logits, target = pack.forward(images), pack.labels(labels)
        loss[:, : target.shape[1]] += nll(logits.log_softmax(1), target)
        right[:, : target.shape[1]] += logits.argmax(1) == target
    return [
        {"val/loss": float(losses.sum()) / num, "val/accuracy": float(rights.sum()) / num}
        for losses, rights in zip(loss, right, strict=True)
    ]


def _ended(
    slot: Slot, earlier: tuple[dict[str, Tensor], int], loss: float, validation: Metrics
) -> Metrics:
    """`trainer.end_epoch` of a slot, whose positions and updates at its beginning are `earlier`."""
    setup, index, (index_before, updates_before) = slot.setup, slot.index(), earlier
    weights = trainer.weight_metrics(
        setup,
        slot,
        active={name: len(positions) for name, positions in index.items()},
        seen=sum(map(len, slot.ever.values())),
        new=sum(num_missing(positions, index_before[k]) for k, positions in index.items()),
    )
    sums = torch.tensor(list(slot.active_steps.values()), dtype=torch.float64)
    metrics = trainer.epoch_metrics(
        setup,
        slot,
        slot.updates - updates_before,
        loss,
        sums / setup.steps_per_epoch,
        validation | weights,
    )
    slot.epoch += 1
    slot.flops, slot.diverged = metrics["flops/total"], bool(metrics["diverged"])
    return metrics
