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


def above_(x: Tensor) -> Tensor:
    """1.0 where x > 0, else 0.0, in place. Float arithmetic: comparisons, and `where` with a mask
    that follows no pattern, take six to thirty times as long on a CPU."""
    return x.sign_().clamp_(min=0)


def step_derivative(x: Tensor) -> Tensor:
    """H(x), equation 6; H(1) = 0.4."""
    size = x.abs()
    slope = torch.rsub(size, 2, alpha=4).clamp_(min=0.4)
    return slope.addcmul_(slope, above_(size.sub_(1)), value=-1)


class MaskedWeight(torch.autograd.Function):
    """w where |w| > t, else 0, with H for the derivative of the step.

    Written out because autograd, over the same value plus a term that is zero and has this
    gradient, takes twice as long on a CPU.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, t: Tensor) -> Tensor:
        return above_(weight.abs().sub_(aligned(t, weight))).mul_(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """G the gradient at the masked weight: dw = G M + G w H sign(w), dt = -sum G w H."""
        weight, t = ctx.saved_tensors
        size = weight.abs()
        x = size - aligned(t, weight)
        pulled = step_derivative(x).mul_(grad)
        weight_grad = above_(x).mul_(grad).addcmul_(pulled, size)
        t_grad = pulled.mul_(weight)
        if t.dim() == 0:
            t_grad = t_grad.sum()
        elif t.dim() < weight.dim():
            t_grad = t_grad.flatten(1).sum(1)
        return weight_grad, -t_grad


def _size(layer: Active, hp: Any, variant: Any) -> Tensor:
    """The absolute threshold that stands for `hp.threshold`, float64 0-d."""
    if variant.threshold_unit == "absolute" or variant.threshold_init == "zero":
        return hp.threshold
    magnitude = layer.value.abs().to(torch.float64)
    masked = lowest(
        magnitude,
        layer.valid,
        torch.round(snapped(hp.threshold.clamp(max=0.9) * count(layer.valid))),
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
        extra[name + SUFFIX] = t.masked_fill(_collapsed(_left(weight, t), weight, variant), 0)
    return (), extra


def _left(weight: Tensor, t: Tensor) -> Tensor:
    """How many weights of a layer are not masked, 0-d."""
    return above_(weight.abs().sub_(aligned(t, weight))).sum()


def _collapsed(left: Tensor, weight: Tensor, variant: Any) -> Tensor:
    """Is the guard to open the layer? 0-d bool."""
    return (left <= GUARD_DENSITY * weight.numel()) & (variant.guard == "on")


def sparsify(params: Layers, masks: Layers, state: Any, hp: Any, variant: Any) -> Layers:
    masked = {name: MaskedWeight.apply(params[name], t) for name, t in thresholds(params).items()}
    return {**params, **masked}


def penalty(params: Layers, state: Any, hp: Any, variant: Any) -> Tensor:
    every = torch.cat([t.flatten() for t in thresholds(params).values()])
    return hp.alpha * torch.exp(-every).sum()


def after_step(
    params: Layers, masks: Layers, state: Any, hp: Any, variant: Any
) -> tuple[Layers, Layers, Layers]:
    changed, reset, active = {}, {}, {}
    for name, t in thresholds(params).items():
        left = _left(params[name], t)
        collapsed = _collapsed(left, params[name], variant)
        changed[name + SUFFIX] = t.masked_fill(collapsed, 0)
        reset[name + SUFFIX] = collapsed.expand_as(t)
        active[name] = torch.where(collapsed, params[name].numel(), left)
    return changed, reset, active


METHOD = Method(
    name="dst",
    paper="Liu et al. 2020, arXiv:2005.06870",
    begins="dense",
    Variant=Variant,
    Hyperparameters=Hyperparameters,
    dense_gradient=lambda variant: "always",
    init=init,
    sparsify=sparsify,
    penalty=penalty,
    after_step=after_step,
    masks_of=masks_of,
    metrics=lambda params, state, hp: {
        f"threshold/{name}": t.mean() for name, t in thresholds(params).items()
    },
    decays=lambda name, variant: variant.threshold_decay == "shared" or not name.endswith(SUFFIX),
    emergent=True,
)
