"""A trial in a slot of the csr backend: a trainer's state as values at sorted flat positions.

The rule to know: `begin`, `restore`, `snapshot` and `update_topology` equal `trainer.begin`,
`checkpoint.decode`, `checkpoint.encode` and `update.update_layers`, without anything of a sparse
layer's size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsetune.engine.csr.index import (
    Pattern,
    Scores,
    find,
    lowest_positions,
    merge,
    pattern,
    random_positions,
    union,
)
from sparsetune.methods import noise
from sparsetune.methods.contract import Growth, Layers, Shapes
from sparsetune.methods.update import NEW_WEIGHT_DEVIATION, activate
from sparsetune.training import checkpoint, models, optim, trainer
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.setup import Setup, batches_key


@dataclass
class Slot:
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


def begin(setup: Setup) -> Slot:
    seed, device = setup.settings.seed, setup.device
    shapes = models.weights(setup.model)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    index = {
        name: random_positions(
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
    return _slot(setup, index, index, params, *moments)


def _slot(
    setup: Setup, index: Layers, ever: Layers, params: Layers, first: Layers, second: Layers
) -> Slot:
    """With the method's state as it is at the beginning."""
    shapes = models.weights(setup.model)
    patterns = {}
    for number, (name, shape) in enumerate(shapes.items()):
        at = index[name] if name in index else torch.arange(shape.numel(), device=setup.device)
        patterns[name] = pattern(at, shape, with_columns=number > 0)
    method, _ = trainer.begin_method(setup, params, _all_valid(index))
    return Slot(setup, shapes, patterns, dict(ever), params, first, second, method)


def _all_valid(index: Layers) -> Layers:
    """What is a mask elsewhere: a decision sees values alone, all of them active."""
    return {name: torch.ones_like(at, dtype=torch.bool) for name, at in index.items()}


def restore(setup: Setup, start: Snapshot) -> Slot:
    checkpoint.check_format(start)
    index = {name: at.to(setup.device) for name, at in start["index"].items()}

    def values(packed: dict[str, Any]) -> Layers:
        flat = {}
        for name, entry in packed.items():
            value = entry["value"] if "value" in entry else entry["whole"].flatten()
            if "whole" in entry and name in index:
                value = value[start["index"][name]]
            flat[name] = value.to(setup.device)
        return flat

    ever = {name: at.to(setup.device) for name, at in start["ever"].items()}
    slot = _slot(setup, index, ever, *(values(start[k]) for k in ("params", "first", "second")))
    slot.method = checkpoint.method_state(slot.method, start, setup.device)
    for name, value in start["counts"].items():
        setattr(slot, name, value)
    return slot


def snapshot(slot: Slot) -> Snapshot:
    shapes = {name: parameter.shape for name, parameter in slot.setup.model.named_parameters()}

    def pack(values: Layers) -> dict[str, Any]:
        copies = {name: value.cpu().clone() for name, value in values.items()}
        return {
            name: {"value": value}
            if name in slot.setup.sparse
            else {"whole": value.view(shapes[name])}
            for name, value in copies.items()
        }

    return checkpoint.snapshot(
        index={name: at.cpu() for name, at in slot.index().items()},
        ever={name: at.cpu() for name, at in slot.ever.items()},
        params=pack(slot.params),
        first=pack(slot.first),
        second=pack(slot.second),
        buffers={},
        state=slot,
    )


# Topology updates ---------------------------------------------------------------------------------


def update_topology(slot: Slot, grads: Layers, gradient_scores: Callable[[str], Scores]) -> None:
    """One prune-and-grow event. `grads` are the values' gradients in the last batch, by sparse
    layer; `gradient_scores` gives -|gradient| at any positions of a layer."""
    setup, index = slot.setup, slot.index()
    assert setup.method.decide is not None
    moments = optim.Moments(slot.first, slot.second)
    momenta = optim.momentum_of(setup.settings.optimizer, moments)
    keep, grow, slot.method = setup.method.decide(
        activate(slot.params, _all_valid(index), momenta, grads),
        setup.sparse,
        slot.method,
        setup.hp,
        setup.progress(slot.step),
        setup.variant,
    )
    growth = setup.method.growth(setup.variant)
    new_index = {}
    for name, at in index.items():
        grown = at[:0]
        if growth is not None:
            num = int(grow[name])
            grown = _grown(slot, growth, name, at, keep[name], num, gradient_scores)
        new_index[name] = _regrow(slot, growth, name, at, keep[name], grown)
        slot.ever[name] = union(slot.ever[name], grown)
    slot.patterns = slot.patterns | {
        name: pattern(at, setup.sparse[name], len(slot.patterns[name].column_ends) > 0)
        for name, at in new_index.items()
    }
    slot.updates += 1


def _grown(
    slot: Slot,
    growth: Growth,
    name: str,
    index: Tensor,
    keep: Tensor,
    num: int,
    gradient_scores: Callable[[str], Scores],
) -> Tensor:
    """Sorted positions of the `num` weights that grow."""
    setup = slot.setup
    size = setup.sparse[name].numel()

    def lowest(excluded: Tensor, num: int) -> Tensor:
        if growth.score == "random":
            stream = noise.key(setup.settings.seed, "choose", slot.updates, name)
            return random_positions(stream, size, excluded, num, setup.device)
        assert growth.score == "gradient", growth.score
        return lowest_positions(gradient_scores(name), size, excluded, num)

    if growth.regrow_dropped:
        return lowest(index[keep], num)
    first = lowest(index, num)
    more = num - len(first)
    if more <= 0:
        return first
    # `first` is all that was absent, so what is left are the weights dropped in this update.
    return union(first, lowest(union(index[keep], first), more))


def _regrow(
    slot: Slot, growth: Growth | None, name: str, index: Tensor, keep: Tensor, grown: Tensor
) -> Tensor:
    """The new positions; the trial's values and moments move to them. Moments of grown weights
    are zero."""
    kept = keep.nonzero().squeeze(1)
    positions, order = merge(index[kept], grown)
    zeros = torch.zeros_like(grown, dtype=slot.params[name].dtype)
    new = zeros
    if growth is not None and growth.new_value == "normal":
        stream = noise.key(slot.setup.settings.seed, "value", slot.updates, name)
        new = noise.normal(stream, grown).mul_(NEW_WEIGHT_DEVIATION).to(zeros.dtype)
    elif growth is not None and growth.new_value == "keep":
        places, was_active = find(grown, index)
        new = torch.where(was_active, slot.params[name][places], zeros)
    for values, added in ((slot.params, new), (slot.first, zeros), (slot.second, zeros)):
        if name in values:
            values[name] = torch.cat([values[name][kept], added])[order]
    return positions
