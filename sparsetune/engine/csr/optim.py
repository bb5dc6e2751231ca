"""The optimizers of `optim.py` over flat values of many trials, each with its own numbers.

The rule to know: a number of a trial becomes a vector with one entry for each of its values, made
again only when one of the numbers has changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetune.settings import OptimizerSettings


class Vectors:
    """Turns one number per segment into one per value: float32 [n]."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._owner = torch.arange(len(lengths), device=device).repeat_interleave(
            torch.tensor(lengths, device=device)
        )
        self._made: dict[str, tuple[list[float], Tensor]] = {}

    def __call__(self, name: str, numbers: list[float]) -> Tensor:
        """`name` says which vector of the same numbers may be used again."""
        made = self._made.get(name)
        if made is None or made[0] != numbers:
            few = torch.tensor(numbers, dtype=torch.float32, device=self._owner.device)
            made = self._made[name] = numbers, few.index_select(0, self._owner)
        return made[1]


class Numbers(NamedTuple):
    """One entry for each segment; the optimizer's name and nesterov are the same for all."""

    settings: list[OptimizerSettings]
    decays: list[bool]  # does weight decay apply
    lrs: list[float]
    steps: list[int]  # counted from 1

    def decay(self) -> list[float]:
        pairs = zip(self.settings, self.decays, strict=True)
        return [s.weight_decay if decays else 0.0 for s, decays in pairs]


def apply_step(
    numbers: Numbers,
    vectors: Vectors,
    params: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
) -> None:
    """One step of all values, changing params and moments in place; `grad` is used up. `second` is
    empty for SGD."""
    if numbers.settings[0].name == "sgd":
        _sgd(numbers, vectors, params, grad, first)
    else:
        _adamw(numbers, vectors, params, grad, first, second)


def _sgd(numbers: Numbers, vectors: Vectors, params: Tensor, grad: Tensor, buffer: Tensor) -> None:
    momentum = [s.momentum for s in numbers.settings]
    down = vectors("down", [-lr for lr in numbers.lrs])
    grad.addcmul_(params, vectors("decay", numbers.decay()))
    buffer.mul_(vectors("momentum", momentum)).add_(grad)
    if numbers.settings[0].nesterov:
        params.addcmul_(grad, down)
        down = vectors(
            "further down", [-lr * m for lr, m in zip(numbers.lrs, momentum, strict=True)]
        )
    params.addcmul_(buffer, down)


def _adamw(
    numbers: Numbers,
    vectors: Vectors,
    params: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
) -> None:
    settings = numbers.settings
    shrink = [1 - lr * d for lr, d in zip(numbers.lrs, numbers.decay(), strict=True)]
    params.mul_(vectors("shrink", shrink))
    first.lerp_(grad, vectors("1 - beta1", [1 - s.momentum for s in settings]))
    second.mul_(vectors("beta2", [s.beta2 for s in settings]))
    second.addcmul_(grad.square_(), vectors("1 - beta2", [1 - s.beta2 for s in settings]))
    each = list(zip(settings, numbers.lrs, numbers.steps, strict=True))
    down = [-lr / (1 - s.momentum**step) for s, lr, step in each]
    correction = [math.sqrt(1 - s.beta2**step) for s, _, step in each]
    denominator = second.sqrt().div_(vectors("correction", correction))
    denominator.add_(vectors("eps", [s.eps for s in settings]))
    params.addcmul_(first / denominator, vectors("down", down))
