"""SGD and AdamW on dicts of tensors, in place, with the arithmetic of torch.optim.

The rule to know: an optimizer's moments are ordinary tensors of the trial's state. Topology
updates clear them, checkpoints hold them and the engine stacks them, which the objects of
torch.optim (tested equal to these) would hide.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetune.settings import OptimizerSettings, ScheduleSettings


class Moments(NamedTuple):
    """By parameter name. `second` is empty for SGD."""

    first: dict[str, Tensor]
    second: dict[str, Tensor]


def begin(settings: OptimizerSettings, params: dict[str, Tensor]) -> Moments:
    """All moments zero."""
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    return Moments(first, second if settings.name == "adamw" else {})


def learning_rate(settings: ScheduleSettings, base: float, step: int, num_steps: int) -> float:
    """The learning rate of step 0 .. num_steps - 1; a cosine goes to zero over all steps."""
    if settings.name == "cosine":
        return base * (1 + math.cos(math.pi * step / num_steps)) / 2
    if settings.name == "step":
        passed = sum(step >= share * num_steps for share in settings.milestones)
        return base * settings.gamma**passed
    return base


def apply_step(
    settings: OptimizerSettings,
    params: dict[str, Tensor],
    grads: dict[str, Tensor],
    moments: Moments,
    decays: dict[str, bool],
    lr: float,
    step: int,
) -> None:
    """One optimizer step (`step` counts from 1), changing params and moments in place.

    `grads` are used up: their tensors hold something else afterwards.
    `decays` says which parameters weight decay applies to; SGD couples it, AdamW does not.
    """
    for name, p in params.items():
        decay = settings.weight_decay if decays[name] else 0.0
        if settings.name == "sgd":
            _sgd(settings, p, grads[name], moments.first[name], decay, lr)
        else:
            first, second = moments.first[name], moments.second[name]
            _adamw(settings, p, grads[name], first, second, decay, lr, step)


def _sgd(
    settings: OptimizerSettings, p: Tensor, grad: Tensor, buffer: Tensor, decay: float, lr: float
) -> None:
    if decay:
        grad.add_(p, alpha=decay)
    buffer.mul_(settings.momentum).add_(grad)
    if settings.nesterov:
        p.add_(grad, alpha=-lr).add_(buffer, alpha=-lr * settings.momentum)
    else:
        p.add_(buffer, alpha=-lr)


def _adamw(
    settings: OptimizerSettings,
    p: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    decay: float,
    lr: float,
    step: int,
) -> None:
    p.mul_(1 - lr * decay)
    first.lerp_(grad, 1 - settings.momentum)
    second.mul_(settings.beta2).addcmul_(grad, grad, value=1 - settings.beta2)
    correction_1 = 1 - settings.momentum**step
    correction_2 = math.sqrt(1 - settings.beta2**step)
    denominator = (second.sqrt() / correction_2).add_(settings.eps)
    p.addcdiv_(first, denominator, value=-lr / correction_1)


def momentum_of(settings: OptimizerSettings, moments: Moments) -> dict[str, Tensor]:
    """What methods call momentum: SGD's buffer, or m / (sqrt(v) + eps) under AdamW."""
    if settings.name == "sgd":
        return moments.first
    return {
        name: first / (moments.second[name].sqrt() + settings.eps)
        for name, first in moments.first.items()
    }


# The same step as a function of tensors, for engines that lift it over many trials ----------------


def step_numbers(
    settings: OptimizerSettings, schedule: ScheduleSettings, step: int, num_steps: int
) -> list[float]:
    """What `stepped` needs to know of optimizer step `step` (counted from 1)."""
    lr = learning_rate(schedule, settings.lr, step - 1, num_steps)
    if settings.name == "sgd":
        return [settings.weight_decay, settings.momentum, lr, lr * settings.momentum]
    correction_1 = 1 - settings.momentum**step
    correction_2 = math.sqrt(1 - settings.beta2**step)
    return [
        1 - lr * settings.weight_decay,
        1 - settings.momentum,
        settings.beta2,
        1 - settings.beta2,
        correction_2,
        settings.eps,
        lr / correction_1,
    ]


def stepped(
    settings: OptimizerSettings,
    p: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor | None,
    decays: bool,
    numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(parameter, moments) after one step; of `settings`, only what a pool shares is read.

    `numbers` holds one trial's `step_numbers` in the parameter's dtype.
    """
    if settings.name == "sgd":
        decay, momentum, lr, lr_momentum = numbers.unbind()
        grad = grad + decay * p if decays else grad
        first = momentum * first + grad
        if settings.nesterov:
            return p - lr * grad - lr_momentum * first, first, None
        return p - lr * first, first, None
    assert second is not None
    shrink, share_1, beta2, share_2, correction, eps, lr = numbers.unbind()
    p = p * shrink if decays else p
    first = first + share_1 * (grad - first)
    second = beta2 * second + share_2 * grad * grad
    return p - lr * first / (second.sqrt() / correction + eps), first, second
