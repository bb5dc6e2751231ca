"""MEST: Yuan et al. 2021, "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the
Edge", arXiv:2110.14032.

After every epoch but the last, each layer loses the weights with the smallest |w| + lambda |g|, a
fraction of it that falls to zero, and grows as many at random positions, with value zero. The
paper's soft memory bound is left out.

A method of one's own: this file and mest.yaml are all there is of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsetune.methods.contract import Growth, Method, hyperparameters, number
from sparsetune.methods.ops import annealed, count, lowest, snapped


@hyperparameters
class Hyperparameters:
    prune_fraction: float = number(0.3, 0.0, 1.0, "share of each layer dropped at the start")
    gradient_weight: float = number(0.01, 0.0, 100.0, "lambda, of the gradient in the score")


class State(NamedTuple):
    rate: Tensor  # share of each layer that the last update dropped


def init(values, shapes, targets, hp, noise, variant):
    return State(hp.prune_fraction.clone()), {}


def decide(active, shapes, state, hp, progress, variant):
    rate = annealed("linear", hp.prune_fraction, 0.0, progress)
    keep, grow = {}, {}
    for name, layer in active.items():
        score = layer.value.abs()
        score = score + hp.gradient_weight.to(score.dtype) * layer.gradient.abs()
        grow[name] = torch.floor(snapped(rate * count(layer.valid)))
        keep[name] = layer.valid & ~lowest(score, layer.valid, grow[name])
    return keep, grow, State(rate)


METHOD = Method(
    name="mest",
    paper="Yuan et al. 2021, arXiv:2110.14032",
    begins="sparse",
    Hyperparameters=Hyperparameters,
    needs=lambda variant: frozenset({"gradient"}),
    growth=lambda variant: Growth("random", regrow_dropped=True, new_value="zero"),
    init=init,
    decide=decide,
    metrics=lambda params, state, hp: {"rate": state.rate},
)
