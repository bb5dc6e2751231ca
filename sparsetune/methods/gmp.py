"""GMP, gradual magnitude pruning: Zhu & Gupta 2017, "To prune, or not to prune", arXiv:1710.01878.

Begins dense; at each update every layer keeps its largest weights, as many as the cubic schedule
(equation 1) says, from all of them at `begin` to the target at the schedule's stop. What is pruned
stays pruned. The targets are the exact counts of the trial's layer-wise distribution, so that GMP
ends with the same layers as the methods that begin sparse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetune.methods.contract import (
    Active,
    Layers,
    Method,
    Noise,
    Shapes,
    UpdateSchedule,
    hyperparameters,
    number,
)
from sparsetune.methods.ops import count, lowest, snapped


@hyperparameters
class Hyperparameters:
    begin: float = number(0.0, 0.0, 0.99, "progress at which pruning begins")


class State(NamedTuple):
    """Counts of weights per layer, float64 [L]: `start` before pruning, `target` at the stop."""

    start: Tensor
    target: Tensor
    density: Tensor  # of the sparse layers after the last update, 0-d


def init(
    values: dict[str, Active], shapes: Shapes, targets: Layers, hp: Any, noise: Noise, variant: Any
) -> tuple[State, Layers]:
    start = torch.stack([count(layer.valid) for layer in values.values()])
    return State(start, torch.stack(list(targets.values())), torch.ones_like(hp.begin)), {}


def decide(
    active: dict[str, Active], shapes: Shapes, state: State, hp: Any, progress: Tensor, variant: Any
) -> tuple[Layers, Layers, State]:
    done = ((progress - hp.begin) / (1 - hp.begin)).clamp(0, 1)
    left = (1 - done) ** 3
    wanted = torch.round(snapped(state.target + (state.start - state.target) * left))
    keep, grow = {}, {}
    for (name, layer), num in zip(active.items(), wanted, strict=True):
        keep[name] = lowest(-layer.value.abs(), layer.valid, num.clamp(min=1))
        grow[name] = torch.zeros_like(num)
    size = sum(shape.numel() for shape in shapes.values())
    density = torch.stack([count(kept) for kept in keep.values()]).sum() / size
    return keep, grow, State(state.start, state.target, density)


METHOD = Method(
    name="gmp",
    paper="Zhu & Gupta 2017, arXiv:1710.01878",
    begins="dense",
    Hyperparameters=Hyperparameters,
    init=init,
    decide=decide,
    metrics=lambda params, state, hp: {"density": state.density},
    schedule=UpdateSchedule(every=100, stop=0.75),
)
