"""RigL: Evci et al. 2020, "Rigging the Lottery", arXiv:1911.11134.

Every 100 steps until 75 % of training each layer loses its smallest weights, a fraction that
falls to zero by a cosine (appendix G), and grows as many where the gradient of absent weights is
largest, those just dropped included. New weights are zero and their momentum too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetune.methods.contract import (
    Active,
    Growth,
    Layers,
    Method,
    Noise,
    Shapes,
    UpdateSchedule,
    hyperparameters,
    number,
)
from sparsetune.methods.ops import annealed, count, lowest, snapped


@hyperparameters
class Hyperparameters:
    prune_fraction: float = number(0.3, 0.0, 1.0, "share of each layer dropped at the start")


class State(NamedTuple):
    """`rate` is the share of each layer that the last update dropped, float64 0-d."""

    rate: Tensor


def init(
    values: dict[str, Active], shapes: Shapes, targets: Layers, hp: Any, noise: Noise, variant: Any
) -> tuple[State, Layers]:
    return State(hp.prune_fraction.clone()), {}


def decide(
    active: dict[str, Active], shapes: Shapes, state: State, hp: Any, progress: Tensor, variant: Any
) -> tuple[Layers, Layers, State]:
    rate = annealed("cosine", hp.prune_fraction, 0.0, progress)
    keep, grow = {}, {}
    for name, layer in active.items():
        grow[name] = torch.floor(snapped(rate * count(layer.valid)))
        keep[name] = layer.valid & ~lowest(layer.value.abs(), layer.valid, grow[name])
    return keep, grow, State(rate)


METHOD = Method(
    name="rigl",
    paper="Evci et al. 2020, arXiv:1911.11134",
    begins="sparse",
    Hyperparameters=Hyperparameters,
    dense_gradient=lambda variant: "at_update",
    needs=lambda variant: frozenset({"gradient"}),
    growth=lambda variant: Growth("gradient", regrow_dropped=True, new_value="zero"),
    init=init,
    decide=decide,
    metrics=lambda params, state, hp: {"rate": state.rate},
    schedule=UpdateSchedule(every=100, stop=0.75),
)
