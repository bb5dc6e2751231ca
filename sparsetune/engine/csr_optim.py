"""The optimizers of `optim.py` over flat values of many trials, each with its own numbers.

The rule to know: a number of a trial becomes a vector with one entry for each of its values, made
again only when one of the numbers has changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def apply_step(
    settings: list[OptimizerSettings],
    vectors: Vectors,
    params: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    decays: list[bool],
    lrs: list[float],
    steps: list[int],
) -> None:
    """One step of all values, changing params and moments in place; `grad` is used up.

    Lists have an entry for each segment; the optimizer's name and nesterov are the same for all.
    """
    decay = [s.weight_decay if d else 0.0 for s, d in zip(settings, decays, strict=True)]
    apply = _sgd if settings[0].name == "sgd" else _adamw
    apply(settings, vectors, params, grad, moments, decay, lrs, steps)


def _sgd(
    settings: list[OptimizerSettings],
    vectors: Vectors,
    params: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    decay: list[float],
    lrs: list[float],
    steps: list[int],
) -> None:
    buffer, _ = moments
    momentum = vectors("momentum", [s.momentum for s in settings])
    down = vectors("down", [-lr for lr in lrs])
    grad.addcmul_(params, vectors("decay", decay))
    buffer.mul_(momentum).add_(grad)
    if settings[0].nesterov:
        params.addcmul_(grad, down)
        down = vectors(
            "down further", [-lr * s.momentum for lr, s in zip(lrs, settings, strict=True)]
        )
    params.addcmul_(buffer, down)


def _adamw(
    settings: list[OptimizerSettings],
    vectors: Vectors,
    params: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    decay: list[float],
    lrs: list[float],
    steps: list[int],
) -> None:
    first, second = moments
    every = list(zip(settings, lrs, steps, strict=True))
    params.mul_(vectors("decay", [1 - lr * d for lr, d in zip(lrs, decay, strict=True)]))
    first.lerp_(grad, vectors("one less momentum", [1 - s.momentum for s in settings]))
    second.mul_(vectors("beta2", [s.beta2 for s in settings]))
    second.addcmul_(grad.square_(), vectors("one less beta2", [1 - s.beta2 for s in settings]))
    correction = [math.sqrt(1 - s.beta2**step) for s, _, step in every]
    down = [-lr / (1 - s.momentum**step) for s, lr, step in every]
    denominator = (second.sqrt() / vectors("correction", correction)).add_(
        vectors("eps", [s.eps for s in settings])
    )
    params.addcmul_(first / denominator, vectors("down", down))
