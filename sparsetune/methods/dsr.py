"""DSR, Dynamic Sparse Reparameterization: Mostafa & Wang 2019, arXiv:1902.05967.

At each update, weights of all layers below ONE threshold H are dropped and as many grow, spread
over layers in proportion to their survivors (algorithm 1), at random positions other than those
just dropped, with value zero. H then doubles or halves where the number dropped missed its target
by more than the tolerance, so the next update comes nearer.

Deviations: shares become whole numbers by largest remainder within each layer's room, in closed
form (the published loop can overshoot, and never ends when the rest belongs to a full layer); when
no other room is left anywhere, positions dropped in this update are used; a layer that would empty
keeps its largest weight (the published code keeps its first). `growth: gradient` is the rule of the
founding description, `growth: momentum` its sibling; neither is in the paper.
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
    UpdateSchedule,
    choice,
    hyperparameters,
    number,
)
from sparsetune.methods.ops import (
    ROUNDING,
    apportion,
    below,
    count,
    keep_one,
    mean_magnitude,
    stack,
    total,
)


@dataclass(frozen=True)
class Variant:
    growth: str = choice("nonzero", "gradient", "momentum")
    threshold_mode: str = choice("adaptive", "fixed")


@hyperparameters
class Hyperparameters:
    threshold: float = number(1e-3, 0.0, 100.0, "H at the start (H always, where fixed)")
    target: float = number(0.1, 0.0, 1.0, "share of active weights to drop per update, Np / n")
    tolerance: float = number(0.1, 0.0, 1.0, "miss of the target that leaves H as it is, delta")
    gain: float = number(2.0, 1.0, 100.0, "factor by which H moves")


class State(NamedTuple):
    """`threshold` is H for the next update; the others say what the last one did. Float64 0-d."""

    threshold: Tensor
    dropped: Tensor  # share of the active weights of all layers


def init(
    values: dict[str, Active], shapes: Shapes, targets: Layers, hp: Any, noise: Noise, variant: Any
) -> tuple[State, Layers]:
    return State(hp.threshold.clone(), torch.zeros_like(hp.threshold)), {}


def _steered(state: State, dropped: Tensor, num: Tensor, hp: Any) -> Tensor:
    target = hp.target * num
    slack = ROUNDING * target
    too_many = dropped > (1 + hp.tolerance) * target + slack
    too_few = dropped < (1 - hp.tolerance) * target - slack
    factor = torch.where(too_many, 1 / hp.gain, torch.where(too_few, hp.gain, 1.0))
    return state.threshold * factor


def decide(
    active: dict[str, Active], shapes: Shapes, state: State, hp: Any, progress: Tensor, variant: Any
) -> tuple[Layers, Layers, State]:
    keep = {
        name: keep_one(layer.valid & ~below(layer.value, state.threshold), layer.value, layer.valid)
        for name, layer in active.items()
    }
    before = stack({name: count(layer.valid) for name, layer in active.items()})
    survivors = stack({name: count(kept) for name, kept in keep.items()})
    sizes = torch.tensor(
        [shape.numel() for shape in shapes.values()], dtype=before.dtype, device=before.device
    )
    dropped = before - survivors
    num_dropped = total(dropped)

    shares = survivors
    if variant.growth != "nonzero":
        field = "gradient" if variant.growth == "gradient" else "momentum"
        means = stack(
            {n: mean_magnitude(getattr(layer, field), keep[n]) for n, layer in active.items()}
        )
        shares = torch.where(total(means) > 0, means, survivors)

    grow = apportion(shares, num_dropped, sizes - before)
    grow = grow + apportion(shares, num_dropped - total(grow), dropped)

    num = total(before)
    moved = _steered(state, num_dropped, num, hp)
    threshold = moved if variant.threshold_mode == "adaptive" else state.threshold
    return (
        keep,
        dict(zip(active, grow, strict=True)),
        State(threshold, num_dropped / num.clamp(min=1)),
    )


METHOD = Method(
    name="dsr",
    paper="Mostafa & Wang 2019, arXiv:1902.05967",
    begins="sparse",
    Variant=Variant,
    Hyperparameters=Hyperparameters,
    needs=lambda variant: frozenset({variant.growth} - {"nonzero"}),
    growth=lambda variant: Growth("random", regrow_dropped=False, new_value="zero"),
    init=init,
    decide=decide,
    metrics=lambda params, state, hp: {
        "threshold": state.threshold,
        "dropped_share": state.dropped,
    },
    # WRN-28-2 in the authors' code: every 100 steps, doubled at epochs 25, 80 and 140 of 200,
    # stopped at 190.
    schedule=UpdateSchedule(every=100, stop=0.95, doublings=(0.125, 0.4, 0.7)),
)
