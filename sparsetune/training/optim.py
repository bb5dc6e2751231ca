"""SGD and AdamW on dicts of tensors, in place, with the arithmetic of torch.optim.

The rule to know: an optimizer's moments are ordinary tensors of the trial's state. Topology
updates clear them, checkpoints hold them and the engine stacks them, which the objects of
torch.optim (tested equal to these) would hide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def step_numbers(
    settings: OptimizerSettings, schedule: ScheduleSettings, step: int, num_steps: int
) -> list[float]:
    """All that a trial's optimizer step `step` (counted from 1) needs to know but what a pool
    shares (the optimizer's name, nesterov); the first number is about weight decay."""
    lr = learning_rate(schedule, settings.lr, step - 1, num_steps)
    if settings.name == "sgd":
        numbers = [settings.weight_decay, settings.momentum, lr]
        return [*numbers, lr * settings.momentum] if settings.nesterov else numbers
    return [
        1 - lr * settings.weight_decay,
        1 - settings.momentum,
        settings.beta2,
        1 - settings.beta2,
        math.sqrt(1 - settings.beta2**step),
        settings.eps,
        lr / (1 - settings.momentum**step),
    ]


def no_decay(settings: OptimizerSettings) -> float:
    """What the first number is for a parameter that weight decay does not apply to."""
    return 0.0 if settings.name == "sgd" else 1.0


def apply_step(
    settings: OptimizerSettings,
    params: dict[str, Tensor],
    grads: dict[str, Tensor],
    moments: Moments,
    decays: dict[str, bool],
    numbers: list[float],
) -> None:
    """One step with these `step_numbers`, changing params and moments in place.

    `grads` are used up: their tensors hold something else afterwards.
    `decays` says which parameters weight decay applies to; SGD couples it, AdamW does not.
    """
    for name, p in params.items():
        own = numbers if decays[name] else [no_decay(settings), *numbers[1:]]
        step_in_place(settings, p, grads[name], moments.first[name], moments.second.get(name), own)


def step_in_place(
    settings: OptimizerSettings,
    p: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor | None,
    numbers: Sequence[float] | Sequence[Tensor],
) -> None:
    """One step; `numbers` are a trial's `step_numbers`, or tensors of the parameter's shape."""
    if settings.name == "sgd":
        decay, momentum, lr, *nesterovs = numbers
        if isinstance(decay, Tensor) or decay:
            _add(grad, p, decay)
        first.mul_(momentum).add_(grad)
        if settings.nesterov:
            _add(p, grad, lr, -1)
            _add(p, first, nesterovs[0], -1)
        else:
            _add(p, first, lr, -1)
        return
    assert second is not None
    shrink, share_1, beta2, share_2, correction, eps, lr = numbers
    p.mul_(shrink)
    first.lerp_(grad, share_1)
    second.mul_(beta2)
    if isinstance(share_2, Tensor):
        second.addcmul_(grad.square_(), share_2)
    else:
        second.addcmul_(grad, grad, value=share_2)
    denominator = second.sqrt().div_(correction).add_(eps)
    if isinstance(lr, Tensor):
        p.addcmul_(first / denominator, lr, value=-1)
    else:
        p.addcdiv_(first, denominator, value=-lr)


def _add(to: Tensor, value: Tensor, factor: float | Tensor, sign: int = 1) -> None:
    """Adds sign * factor * value in place."""
    if isinstance(factor, Tensor):
        to.addcmul_(value, factor, value=sign)
    else:
        to.add_(value, alpha=sign * factor)


def momentum_of(
    settings: OptimizerSettings, moments: Moments, eps: Tensor | None = None
) -> dict[str, Tensor]:
    """What methods call momentum: SGD's buffer, or m / (sqrt(v) + eps) under AdamW; `eps` where
    it is not the settings'."""
    if settings.name == "sgd":
        return moments.first
    return {
        name: first / (moments.second[name].sqrt() + (settings.eps if eps is None else eps))
        for name, first in moments.first.items()
    }


# The same step as a function of tensors, for engines that lift it over many trials ----------------


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
        decay, momentum, lr, *nesterovs = numbers.unbind()
        grad = grad + decay * p if decays else grad
        first = momentum * first + grad
        if settings.nesterov:
            return p - lr * grad - nesterovs[0] * first, first, None
        return p - lr * first, first, None
    assert second is not None
    shrink, share_1, beta2, share_2, correction, eps, lr = numbers.unbind()
    p = p * shrink if decays else p
    first = first + share_1 * (grad - first)
    second = beta2 * second + share_2 * grad * grad
    return p - lr * first / (second.sqrt() / correction + eps), first, second
