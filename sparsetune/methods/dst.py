"""DST, Dynamic Sparse Training with trainable thresholds: Liu et al. 2020, arXiv:2005.06870.

Every masked layer has thresholds t (one per output neuron or filter), trained by the same optimizer
as the weights. A weight takes part in the forward pass where |w| - t > 0; the step's derivative is
replaced by H(x) = 2 - 4|x| up to 0.4, 0.4 up to 1, 0 beyond (equation 6), so that masked weights
keep training and come back. alpha * sum exp(-t) in the loss pushes thresholds up (equation 7): the
density is a result, not a setting.

Deviation: the collapse guard of the authors' code (a layer of which 1 % or less is left gets t = 0)
runs after the step, resets the moments of t as well, and runs once at the start; there it rewrites
parameters inside the forward pass. Scalar thresholds drawn at random are the rule of the founding
description.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetune.methods.contract import (
    Active,
    Layers,
    Method,
    Noise,
    Shapes,
    choice,
    hyperparameters,
    number,
)
from sparsetune.methods.ops import count, lowest, snapped

GUARD_DENSITY = 0.01  # a layer this dense or less has collapsed; authors' code
SUFFIX = ".threshold"


@dataclass(frozen=True)
class Variant:
    granularity: str = choice("neuron", "scalar", "weight")
    threshold_init: str = choice("zero", "constant", "uniform")
    threshold_unit: str = choice("share", "absolute")
    threshold_decay: str = choice("shared", "none")
    guard: str = choice("on", "off")


@hyperparameters
class Hyperparameters:
    alpha: float = number(5e-4, 0.0, 10.0, "weight of sum exp(-t) in the loss")
    threshold: float = number(
        0.0, 0.0, 100.0, "size of t at the start: share of a layer masked (0-0.9), or absolute"
    )


def thresholds(params: Layers) -> Layers:
    """{weight name: its thresholds}, from params["<weight>.threshold"]."""
    return {k.removesuffix(SUFFIX): t for k, t in params.items() if k.endswith(SUFFIX)}


def aligned(t: Tensor, weight: Tensor) -> Tensor:
    """t of shape [], [out] or the weight's, ready to broadcast against the weight."""
    return t.view(-1, *[1] * (weight.dim() - 1)) if t.dim() == 1 else t


def masks_of(params: Layers) -> Layers:
    """|w| - t > 0 for each layer with thresholds; equality is masked."""
    return {k: params[k].abs() > aligned(t, params[k]) for k, t in thresholds(params).items()}


def gate(weight: Tensor, t: Tensor) -> Tensor:
    """1.0 where |w| - t > 0, else 0.0. Float arithmetic in place: comparisons, and `where` with a
    mask that follows no pattern, take six to thirty times as long on a CPU."""
    return weight.abs().sub_(aligned(t, weight)).sign_().relu_()


def step_derivative(x: Tensor) -> Tensor:
    """H(x), equation 6; H(1) = 0.4."""
    return _derivative_at(x.abs())


def _derivative_at(size: Tensor) -> Tensor:
    slope = torch.rsub(size, 2, alpha=4).clamp_min_(0.4)
    # Beyond 1 the shrunk size is the size itself, which brings any slope below zero.
    return slope.sub_(torch.nn.functional.hardshrink(size, 1.0)).relu_()


def _size(layer: Active, hp: Any, variant: Any) -> Tensor:
    """The absolute threshold that stands for `hp.threshold`, float64 0-d."""
    if variant.threshold_unit == "absolute" or variant.threshold_init == "zero":
        return hp.threshold
    magnitude = layer.value.abs().to(torch.float64)
    masked = lowest(
        magnitude,
        layer.valid,
        torch.round(snapped(hp.threshold * count(layer.valid))),
    )
    return magnitude.masked_fill(~masked, 0).amax()


def init(
    values: dict[str, Active], shapes: Shapes, targets: Layers, hp: Any, noise: Noise, variant: Any
) -> tuple[tuple[()], Layers]:
    extra = {}
    for name, layer in values.items():
        shape = {"scalar": (), "neuron": shapes[name][:1], "weight": shapes[name]}[
            variant.granularity
        ]
        unit = torch.ones(shape, dtype=torch.float64, device=layer.value.device)
        if variant.threshold_init == "zero":
            unit = torch.zeros_like(unit)
        elif variant.threshold_init == "uniform":
            unit = noise(name, unit.numel()).view(shape)
        extra[name + SUFFIX] = (unit * _size(layer, hp, variant)).to(layer.value.dtype)
        weight, t = layer.value.view(shapes[name]), extra[name + SUFFIX]
        extra[name + SUFFIX] = t.masked_fill(_collapsed(gate(weight, t), variant), 0)
    return (), extra


def _collapsed(gate: Tensor, variant: Any) -> Tensor:
    """Is the guard to open the layer? 0-d bool."""
    active = gate.sum(dtype=torch.promote_types(gate.dtype, torch.float32))  # bfloat16 has no 1001
    return (active <= GUARD_DENSITY * gate.numel()) & (variant.guard == "on")


def sparsify(params: Layers, gates: Layers, state: Any, hp: Any, variant: Any) -> Layers:
    return {**params, **{name: params[name] * gates[name] for name in thresholds(params)}}


def pull_back(grads: Layers, params: Layers, gates: Layers, hp: Any, variant: Any) -> Layers:
    """With G the gradient at the masked weight (section 3.3, and equation 7 for the last term):

    dw = G M + G w H sign(w),  dt = -sum of G w H over the weights of t  - alpha exp(-t)
    """
    pulled = dict(grads)
    for name, t in thresholds(params).items():
        weight, grad = params[name], grads[name]
        size = weight.abs()
        through_step = _derivative_at((size - aligned(t, weight)).abs_()).mul_(grad)
        if t.dim() == weight.dim():
            t_grad = through_step * weight
        elif t.dim() == 1:
            t_grad = torch.linalg.vecdot(through_step.flatten(1), weight.flatten(1))
        else:
            t_grad = torch.linalg.vecdot(through_step.flatten(), weight.flatten())
        pulled[name] = grad.mul_(gates[name]).addcmul_(through_step, size)
        pulled[name + SUFFIX] = -t_grad - hp.alpha.to(t.dtype) * torch.exp(-t)
    return pulled


def after_step(params: Layers, state: Any, hp: Any, variant: Any) -> tuple[Layers, Layers, Layers]:
    changed, gates, reset = {}, {}, {}
    for name, t in thresholds(params).items():
        gates[name] = gate(params[name], t)
        collapsed = _collapsed(gates[name], variant)
        changed[name + SUFFIX] = t.masked_fill(collapsed, 0)
        reset[name + SUFFIX] = collapsed.expand_as(t)
        # With t = 0 every weight takes part; one of exactly 0 adds nothing where it does.
        gates[name].clamp_min_(collapsed.to(t.dtype))
    return changed, gates, reset


METHOD = Method(
    name="dst",
    paper="Liu et al. 2020, arXiv:2005.06870",
    begins="dense",
    Variant=Variant,
    Hyperparameters=Hyperparameters,
    at_most=lambda variant: (
        {"threshold": 0.9}
        if variant.threshold_unit == "share" and variant.threshold_init != "zero"
        else {}
    ),
    dense_gradient=lambda variant: "always",
    init=init,
    sparsify=sparsify,
    pull_back=pull_back,
    after_step=after_step,
    masks_of=masks_of,
    metrics=lambda params, state, hp: {
        f"threshold/{name}": t.mean() for name, t in thresholds(params).items()
    },
    decays=lambda name, variant: variant.threshold_decay == "shared" or not name.endswith(SUFFIX),
    emergent=True,
)
