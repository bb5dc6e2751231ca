"""SM, Sparse Momentum (SNFS): Dettmers & Zettlemoyer 2019, arXiv:1907.04840.

After every epoch but the last, each layer drops a decaying fraction of its smallest weights. The
freed ones are handed out over layers in proportion to the mean |momentum| of their active weights,
and grow inside a layer where the |momentum| of absent weights is largest. SGD's buffer therefore
holds dense gradients, and nothing resets it.

Written from the authors' code (`sparselearning/core.py`), with its nearly-dense guard, its cap of
0.99 and its carried correction of the total; the loop that spreads what layers cannot take is
water filling here (`ops.water_fill`). Variants off the paper: growth, redistribution, regrown,
decay (the founding description's 50 % in every layer is `decay: none`; the guard stays);
`redistribution: none` means that each layer regrows what it lost (in that code it grows in
proportion to layer size). A layer keeps at least one weight.
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
from sparsetune.methods.ops import (
    ROUNDING,
    annealed,
    count,
    lowest,
    mean_magnitude,
    snapped,
    stack,
    total,
    water_fill,
)

LOWEST_RATE = 0.005  # where the cosine ends: eta_min of CosineDecay in the authors' code
NEARLY_DENSE = 0.2  # a layer sparser than this is pruned by the full rate, authors' code
FILL = 0.99  # share of a layer's absent weights that may grow at once, authors' code


@dataclass(frozen=True)
class Variant:
    growth: str = choice("momentum", "gradient", "random")
    redistribution: str = choice("momentum", "magnitude", "nonzero", "none")
    regrown: str = choice("keep", "zero")
    decay: str = choice("cosine", "linear", "none")


@hyperparameters
class Hyperparameters:
    prune_fraction: float = number(0.5, 0.0, 1.0, "share of each layer dropped at the start")


class State(NamedTuple):
    """Float64 0-d each. `baseline` weights are meant to be active; `correction` of the total is
    carried to the next update, from the sum of all misses and the number of updates so far. `rate`
    is the share that the last update dropped of each layer that is not nearly dense."""

    baseline: Tensor
    correction: Tensor
    miss_sum: Tensor
    updates: Tensor
    rate: Tensor
    dropped: Tensor  # share of the active weights at the last update


def init(
    values: dict[str, Active], shapes: Shapes, targets: Layers, hp: Any, noise: Noise, variant: Any
) -> tuple[State, Layers]:
    baseline = total(stack({name: count(layer.valid) for name, layer in values.items()}))
    zero = torch.zeros_like(baseline)
    return State(baseline, zero, zero, zero, hp.prune_fraction.clone(), zero), {}


def _shares(active: dict[str, Active], num: Tensor, variant: Any) -> Tensor:
    """[L], sum 1: how the freed weights are handed out."""
    if variant.redistribution in ("nonzero", "none"):
        return num / total(num).clamp(min=1)
    field = "momentum" if variant.redistribution == "momentum" else "value"
    means = stack(
        {name: mean_magnitude(getattr(layer, field), layer.valid) for name, layer in active.items()}
    )
    weight = torch.where(total(means) > 0, means, num)
    return weight / total(weight).clamp(min=1e-300)


def decide(
    active: dict[str, Active], shapes: Shapes, state: State, hp: Any, progress: Tensor, variant: Any
) -> tuple[Layers, Layers, State]:
    num = stack({name: count(layer.valid) for name, layer in active.items()})
    sizes = torch.tensor(
        [shape.numel() for shape in shapes.values()], dtype=num.dtype, device=num.device
    )
    shares = _shares(active, num, variant)

    end = LOWEST_RATE if variant.decay == "cosine" else 0.0
    rate = annealed(variant.decay, hp.prune_fraction, end, progress)
    sparsity = 1 - num / sizes
    guarded = (sparsity < NEARLY_DENSE - ROUNDING) & (shares > 1 / len(active) + ROUNDING)
    rates = torch.where(guarded, torch.minimum(sparsity, rate), rate)
    drop = torch.minimum(torch.ceil(snapped(rates * num)), num - 1).clamp(min=0)

    if variant.redistribution == "none":
        grow = drop
    else:
        wanted = torch.ceil(snapped(shares * (total(drop) + state.correction))).clamp(min=0)
        grow = torch.floor(snapped(water_fill(wanted, FILL * (sizes - num + drop))))

    keep = {
        name: layer.valid & ~lowest(layer.value.abs(), layer.valid, k)
        for (name, layer), k in zip(active.items(), drop, strict=True)
    }
    miss = state.baseline - total(num - drop + grow)
    miss_sum, updates = state.miss_sum + miss, state.updates + 1
    correction = 0.25 * state.correction + 0.75 * miss + miss_sum / updates
    after = State(
        state.baseline, correction, miss_sum, updates, rate, total(drop) / total(num).clamp(min=1)
    )
    return keep, dict(zip(active, grow, strict=True)), after


def _needs(variant: Any) -> frozenset[str]:
    read = {variant.growth, variant.redistribution}
    return frozenset(read & {"momentum", "gradient"})


METHOD = Method(
    name="sm",
    paper="Dettmers & Zettlemoyer 2019, arXiv:1907.04840",
    begins="sparse",
    Variant=Variant,
    Hyperparameters=Hyperparameters,
    dense_gradient=lambda variant: {"momentum": "always", "gradient": "at_update"}.get(
        variant.growth, "never"
    ),
    needs=_needs,
    growth=lambda variant: Growth(variant.growth, regrow_dropped=True, new_value=variant.regrown),
    keeps_count=lambda variant: variant.redistribution == "none",
    init=init,
    decide=decide,
    metrics=lambda params, state, hp: {
        "rate": state.rate,
        "dropped_share": state.dropped,
        "correction": state.correction,
    },
)
