"""SET, Sparse Evolutionary Training: Mocanu et al. 2018, Nature Communications 9:2383.

After every epoch but the last, each layer loses its `zeta` smallest positive and largest negative
weights and grows as many at random positions, those just dropped included, with new values from
N(0, 0.1^2) (the authors' truly sparse code; their Keras code grows zeros).

Deviations, all in the open: the paper's rule counts round(zeta * n) of each sign, half to even,
where the authors' code drops one or two more; weights of exactly zero are dropped first and count
for neither sign, or with `new_value: zero` they would never leave. `prune: threshold` is the rule
of the founding description, not the paper's: it drops what lies below t, at most `max_prune`.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    choice,
    hyperparameters,
    number,
)
from sparsetune.methods.ops import annealed, below, count, lowest, snapped, stack, total


@dataclass(frozen=True)
class Variant:
    prune: str = choice("signwise", "magnitude", "threshold")
    new_value: str = choice("normal", "zero")
    decay: str = choice("none", "cosine")
    threshold_unit: str = choice("std", "absolute")


@hyperparameters
class Hyperparameters:
    zeta: float = number(0.3, 0.0, 1.0, "share of each sign dropped, section Methods")
    threshold: float = number(0.3, 0.0, 100.0, "drop |w| below it, in threshold_unit")
    max_prune: float = number(0.9, 0.0, 1.0, "most of a layer that a threshold may drop")


class State(NamedTuple):
    """What the last update did, for the log; the rule itself remembers nothing."""

    dropped: Tensor  # share of the active weights of all layers, float64 0-d


def init(
    values: dict[str, Active], shapes: Shapes, targets: Layers, hp: Any, noise: Noise, variant: Any
) -> tuple[State, Layers]:
    return State(torch.zeros_like(hp.zeta)), {}


def _signwise(layer: Active, zeta: Tensor) -> Tensor:
    positive = layer.valid & (layer.value > 0)
    negative = layer.valid & (layer.value < 0)
    zero = layer.valid & (layer.value == 0)
    smallest = lowest(layer.value, positive, torch.round(snapped(zeta * count(positive))))
    largest = lowest(-layer.value, negative, torch.round(snapped(zeta * count(negative))))
    return smallest | largest | zero


def _below(layer: Active, threshold: Tensor, hp: Any, variant: Any) -> Tensor:
    """|w| < t, but no more than `max_prune` of the layer: then its smallest."""
    num = count(layer.valid)
    if variant.threshold_unit == "std":
        value = layer.value.to(torch.float64).masked_fill(~layer.valid, 0)
        mean = value.sum() / num.clamp(min=1)
        spread = (value - mean).square().masked_fill(~layer.valid, 0).sum() / num.clamp(min=1)
        threshold = threshold * spread.sqrt()
    wanted = count(layer.valid & below(layer.value, threshold))
    most = torch.minimum(torch.floor(snapped(hp.max_prune * num)), num - 1)
    return lowest(layer.value.abs(), layer.valid, torch.minimum(wanted, most))


def decide(
    active: dict[str, Active], shapes: Shapes, state: State, hp: Any, progress: Tensor, variant: Any
) -> tuple[Layers, Layers, State]:
    keep, grow = {}, {}
    zeta = annealed(variant.decay, hp.zeta, 0.0, progress)
    threshold = annealed(variant.decay, hp.threshold, 0.0, progress)
    for name, layer in active.items():
        if variant.prune == "signwise":
            drop = _signwise(layer, zeta)
        elif variant.prune == "magnitude":
            wanted = torch.round(snapped(zeta * count(layer.valid)))
            drop = lowest(layer.value.abs(), layer.valid, wanted)
        else:
            drop = _below(layer, threshold, hp, variant)
        keep[name], grow[name] = layer.valid & ~drop, count(drop)
    num = stack({name: count(layer.valid) for name, layer in active.items()})
    dropped = total(stack(grow)) / total(num).clamp(min=1)
    return keep, grow, State(dropped)


METHOD = Method(
    name="set",
    paper="Mocanu et al. 2018, Nature Communications 9:2383",
    begins="sparse",
    Variant=Variant,
    Hyperparameters=Hyperparameters,
    growth=lambda variant: Growth("random", regrow_dropped=True, new_value=variant.new_value),
    init=init,
    decide=decide,
    metrics=lambda params, state, hp: {"dropped_share": state.dropped},
)
