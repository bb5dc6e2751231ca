"""One trial of the csr backend: a trainer's state as values at sorted flat positions.

The rule to know: `begin`, `restore`, `snapshot` and `update_topology` equal `trainer.begin`,
`checkpoint.decode`, `checkpoint.encode` and `update.update_alone`, without anything of a sparse
layer's size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsetune.engine.csr import index as csr_index
from sparsetune.engine.csr.index import Pattern, Scores
from sparsetune.methods import noise
from sparsetune.methods.contract import Active, Growth, Layers, Shapes
from sparsetune.methods.update import NEW_WEIGHT_DEVIATION
from sparsetune.training import checkpoint, models, optim, trainer
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.setup import Setup, batches_key


@dataclass
class Trial:
    """`params` and moments by name, flat: a weight's values at its pattern's positions, biases
    whole. A layer left dense is one with all positions active that no update touches."""

    setup: Setup
    shapes: Shapes  # of all weights
    patterns: dict[str, Pattern]  # of all weights
    ever: Layers  # of the sparse layers, sorted positions
    params: Layers
    first: Layers
    second: Layers
    method: Any
    epoch: int = 0
    step: int = 0
    updates: int = 0
    flops: float = 0.0
    diverged: bool = False
    active_steps: dict[str, int] = field(default_factory=dict)  # see count_active

    @property
    def group(self) -> tuple[int | None, int, int]:
        """Equal for trials that see the same batches in their next epoch."""
        return batches_key(self.setup, self.epoch)

    @property
    def num_values(self) -> int:
        return sum(value.numel() for value in self.params.values())

    def index(self) -> Layers:
        """Active positions of the sparse layers."""
        return {name: self.patterns[name].positions for name in self.setup.sparse}

    def count_active(self, steps: int) -> None:
        """Adds that many steps x the weights active now to this epoch's sum of each layer."""
        for name, at in self.index().items():
            self.active_steps[name] += steps * len(at)

    def learning_rate(self) -> float:
        """Of the next step."""
        settings = self.setup.settings
        return optim.learning_rate(
            settings.schedule, settings.optimizer.lr, self.step, self._num_steps
        )

    @functools.cached_property
    def _num_steps(self) -> int:
        return self.setup.num_steps


def begin(setup: Setup) -> Trial:
    seed, device = setup.settings.seed, setup.device
    shapes = models.weights(setup.model)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    index = {
        name: csr_index.random_positions(
            noise.key(seed, "mask", 0, name), shape.numel(), nothing, setup.targets[name], device
        )
        for name, shape in setup.sparse.items()
    }
    params = {}
    for name, parameter in setup.model.named_parameters():
        at = index[name] if name in index else torch.arange(parameter.numel(), device=device)
        drawn = noise.uniform(noise.key(seed, "init", 0, name), at)
        weight_shape = shapes[name.rpartition(".")[0] + ".weight"]
        params[name] = models.initial_values(drawn, models.init_bound(weight_shape))
    moments = optim.begin(setup.settings.optimizer, params)
    return _trial(setup, index, index, params, *moments)


def _trial(
    setup: Setup, index: Layers, ever: Layers, params: Layers, first: Layers, second: Layers
) -> Trial:
    """With the method's state as it is at the beginning."""
    shapes = models.weights(setup.model)
    patterns = {}
    for number, (name, shape) in enumerate(shapes.items()):
        at = index[name] if name in index else torch.arange(shape.numel(), device=setup.device)
        patterns[name] = csr_index.pattern(at, shape, with_columns=number > 0)
    zeros = {name: torch.zeros_like(params[name]) for name in index}
    method, _ = trainer.begin_method(setup, _active(params, zeros, zeros, index))
    return Trial(setup, shapes, patterns, dict(ever), params, first, second, method)


def _active(params: Layers, momenta: Layers, grads: Layers, index: Layers) -> dict[str, Active]:
    """What a decision sees: values alone, all of them valid."""
    valid = {name: torch.ones_like(at, dtype=torch.bool) for name, at in index.items()}
    return {name: Active(params[name], momenta[name], grads[name], valid[name]) for name in index}


def restore(setup: Setup, start: Snapshot) -> Trial:
    checkpoint.check_format(start)
    index = {name: at.to(setup.device) for name, at in start["index"].items()}

    def values(packed: dict[str, Any]) -> Layers:
        found = {}
        for name, entry in packed.items():
            value = entry["value"] if "value" in entry else entry["whole"].flatten()
            if "whole" in entry and name in index:
                value = value[start["index"][name]]
            found[name] = value.to(setup.device)
        return found

    ever = {name: at.to(setup.device) for name, at in start["ever"].items()}
    trial = _trial(setup, index, ever, *(values(start[k]) for k in ("params", "first", "second")))
    trial.method = checkpoint.method_state(trial.method, start, setup.device)
    for name, value in start["counts"].items():
        setattr(trial, name, value)
    return trial


def snapshot(trial: Trial) -> Snapshot:
    shapes = {name: parameter.shape for name, parameter in trial.setup.model.named_parameters()}

    def pack(values: Layers) -> dict[str, Any]:
        copies = {name: value.cpu().clone() for name, value in values.items()}
        return {
            name: {"value": value}
            if name in trial.setup.sparse
            else {"whole": value.view(shapes[name])}
            for name, value in copies.items()
        }

    return checkpoint.snapshot(
        index={name: at.cpu() for name, at in trial.index().items()},
        ever={name: at.cpu() for name, at in trial.ever.items()},
        params=pack(trial.params),
        first=pack(trial.first),
        second=pack(trial.second),
        buffers={},
        state=trial,
    )


# Topology updates ---------------------------------------------------------------------------------


def update_topology(trial: Trial, grads: Layers, gradient_scores: Callable[[str], Scores]) -> None:
    """One prune-and-grow event. `grads` are the values' gradients in the last batch, by sparse
    layer; `gradient_scores` gives -|gradient| at any positions of a layer."""
    setup, index = trial.setup, trial.index()
    assert setup.method.decide is not None
    moments = optim.Moments(trial.first, trial.second)
    momenta = optim.momentum_of(setup.settings.optimizer, moments)
    progress = setup.schedule.progress(trial.step, setup.num_steps)
    keep, grow, trial.method = setup.method.decide(
        _active(trial.params, momenta, grads, index),
        setup.sparse,
        trial.method,
        setup.hp,
        torch.tensor(progress, dtype=torch.float64, device=setup.device),
        setup.variant,
    )
    growth = setup.method.growth(setup.variant)
    new_index = {}
    for name, at in index.items():
        grown = at[:0]
        if growth is not None:
            num = int(grow[name])
            grown = _grown(trial, growth, name, at, keep[name], num, gradient_scores)
        new_index[name] = _regrow(trial, growth, name, at, keep[name], grown)
        trial.ever[name] = csr_index.union(trial.ever[name], grown)
    trial.patterns = trial.patterns | {
        name: csr_index.pattern(at, setup.sparse[name], trial.patterns[name].has_columns)
        for name, at in new_index.items()
    }
    trial.updates += 1


def _grown(
    trial: Trial,
    growth: Growth,
    name: str,
    index: Tensor,
    keep: Tensor,
    num: int,
    gradient_scores: Callable[[str], Scores],
) -> Tensor:
    """Sorted positions of the `num` weights that grow."""
    setup = trial.setup
    size = setup.sparse[name].numel()

    def lowest(excluded: Tensor, num: int) -> Tensor:
        if growth.score == "random":
            stream = noise.key(setup.settings.seed, "choose", trial.updates, name)
            return csr_index.random_positions(stream, size, excluded, num, setup.device)
        assert growth.score == "gradient", growth.score
        return csr_index.lowest_positions(gradient_scores(name), size, excluded, num)

    if growth.regrow_dropped:
        return lowest(index[keep], num)
    first = lowest(index, num)
    more = num - len(first)
    if more <= 0:
        return first
    # `first` is all that was absent, so what is left are the weights dropped in this update.
    return csr_index.union(first, lowest(csr_index.union(index[keep], first), more))


def _regrow(
    trial: Trial, growth: Growth | None, name: str, index: Tensor, keep: Tensor, grown: Tensor
) -> Tensor:
    """The new positions; the trial's values and moments move to them. Moments of grown weights
    are zero."""
    kept = keep.nonzero().squeeze(1)
    positions, order = csr_index.merge(index[kept], grown)
    zeros = torch.zeros_like(grown, dtype=trial.params[name].dtype)
    new = zeros
    if growth is not None and growth.new_value == "normal":
        stream = noise.key(trial.setup.settings.seed, "value", trial.updates, name)
        new = noise.normal(stream, grown).mul_(NEW_WEIGHT_DEVIATION).to(zeros.dtype)
    elif growth is not None and growth.new_value == "keep":
        places, was_active = csr_index.find(grown, index)
        new = torch.where(was_active, trial.params[name][places], zeros)
    for values, added in ((trial.params, new), (trial.first, zeros), (trial.second, zeros)):
        if name in values:
            values[name] = torch.cat([values[name][kept], added])[order]
    return positions
